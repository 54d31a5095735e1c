//! The credential for a registry, which `fcctl` finds with the caller's rights and sends to the
//! daemon over a pipe, never as a parameter of a call.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Limit of a serialized [`Credential`]. Identity tokens of cloud registries have a few KiB.
pub const CREDENTIAL_BYTES_MAX: usize = 64 * 1024;

/// A text that no log and no error may show. `Debug` hides it, and `Display` does not exist.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the text itself, to be sent to where it belongs.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// How a caller identifies itself to one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Credential {
    #[default]
    Anonymous,
    Basic {
        user: String,
        password: Secret,
    },
    /// A token that the registry's authorization service exchanges for short-lived tokens.
    Identity {
        token: Secret,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_hides_secrets_that_the_serialized_form_has() {
        let basic = Credential::Basic {
            user: "ann".into(),
            password: Secret::new("canary"),
        };
        let identity = Credential::Identity {
            token: Secret::new("canary"),
        };
        for credential in [basic, identity] {
            assert!(!format!("{credential:?}").contains("canary"));
            let json = serde_json::to_string(&credential).unwrap();
            assert!(json.contains("canary"), "{json}");
            assert_eq!(
                serde_json::from_str::<Credential>(&json).unwrap(),
                credential
            );
        }
    }
}
