//! The defaults of commands in a VM, which the options of a single command override.

use serde::{Deserialize, Serialize};

/// The user, the directory and the variables of commands, as chosen when the VM was created.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandDefaults {
    /// `USER[:GROUP]`, each a name or a number. If absent, commands run as the image's user.
    #[serde(default)]
    pub user: Option<String>,
    /// If absent, commands run in the workspace, or where the image says.
    #[serde(default)]
    pub workdir: Option<String>,
    /// The names of the variables. Their values may be secrets, so no reply has them.
    #[serde(default)]
    pub env: Vec<String>,
}

impl CommandDefaults {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
