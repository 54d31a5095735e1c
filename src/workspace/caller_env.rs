//! The parts of the caller's environment that git depends on.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The environment variables that the caller's git depends on.
#[derive(Clone, Debug, Default)]
pub struct CallerEnv {
    pub path: Option<OsString>,
    pub home: Option<PathBuf>,
    pub config_home: Option<PathBuf>,
    /// Variables that decide which settings git reads, and settings given as variables.
    pub git: Vec<(OsString, OsString)>,
    /// The variables that name the author and the committer, such as `GIT_AUTHOR_NAME` and `EMAIL`,
    /// if they are set.
    pub identity: HashMap<OsString, OsString>,
    /// The value of `SUDO_UID`, if it is set. Because of this variable, git lets root use a
    /// repository of the user who ran sudo.
    pub sudo_uid: Option<OsString>,
}

impl CallerEnv {
    pub fn from_process() -> Self {
        Self::from_vars(std::env::vars_os())
    }

    pub(super) fn from_vars(vars: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let mut env = Self::default();
        for (key, value) in vars {
            match key.as_bytes() {
                b"PATH" => env.path = Some(value),
                b"HOME" => env.home = Some(value.into()),
                b"XDG_CONFIG_HOME" if !value.is_empty() => env.config_home = Some(value.into()),
                b"SUDO_UID" => env.sudo_uid = Some(value),
                b"GIT_CONFIG_GLOBAL" | b"GIT_CONFIG_SYSTEM" | b"GIT_CONFIG_NOSYSTEM" => {
                    env.git.push((key, value))
                }
                // CI systems set safe.directory with GIT_CONFIG_COUNT, GIT_CONFIG_KEY_0 and
                // GIT_CONFIG_VALUE_0.
                b"GIT_CONFIG_COUNT" => env.git.push((key, value)),
                name if name.starts_with(b"GIT_CONFIG_KEY_")
                    || name.starts_with(b"GIT_CONFIG_VALUE_") =>
                {
                    env.git.push((key, value));
                }
                b"EMAIL"
                | b"GIT_AUTHOR_NAME"
                | b"GIT_AUTHOR_EMAIL"
                | b"GIT_COMMITTER_NAME"
                | b"GIT_COMMITTER_EMAIL" => {
                    env.identity.insert(key, value);
                }
                _ => {}
            }
        }
        env
    }

    pub(super) fn for_config(&self) -> Vec<(OsString, OsString)> {
        let mut out = self.git.clone();
        let mut add = |key: &str, value: Option<OsString>| {
            out.extend(value.map(|v| (OsString::from(key), v)))
        };
        add("PATH", self.path.clone());
        add("HOME", self.home.clone().map(Into::into));
        add("XDG_CONFIG_HOME", self.config_home.clone().map(Into::into));
        add("SUDO_UID", self.sudo_uid.clone());
        out
    }

    /// Resolves a configured path: `~/x` is below the caller's home, anything else is relative to
    /// `base`.
    pub(super) fn expand(&self, base: &Path, path: &[u8]) -> PathBuf {
        match (path.strip_prefix(b"~/"), &self.home) {
            (Some(rest), Some(home)) => home.join(std::ffi::OsStr::from_bytes(rest)),
            _ => base.join(std::ffi::OsStr::from_bytes(path)),
        }
    }

    /// Returns the file in which git looks for ignore rules by default, if it exists.
    pub(super) fn default_excludes(&self) -> Option<PathBuf> {
        self.default_file("git/ignore")
    }

    /// Returns the file in which git looks for attributes by default, if it exists.
    pub(super) fn default_attributes(&self) -> Option<PathBuf> {
        self.default_file("git/attributes")
    }

    fn default_file(&self, name: &str) -> Option<PathBuf> {
        let base = self
            .config_home
            .clone()
            .or_else(|| Some(self.home.as_ref()?.join(".config")))?;
        Some(base.join(name)).filter(|p| p.is_file())
    }
}
