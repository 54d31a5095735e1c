//! The caller's options for an import.

use super::caller_env::CallerEnv;
use crate::error::{Error, Kind, Result};
use std::path::PathBuf;
use std::str::FromStr;

/// Number of commits that are sent by default.
pub const HISTORY_DEFAULT: u32 = 50;
/// Maximum depth that a caller may request. `full` sends more.
pub const HISTORY_MAX: u32 = 1_000_000;

/// The amount of history to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum History {
    /// The history is cut at this depth, and the guest gets a shallow repository.
    Depth(u32),
    Full,
    /// Only the files are sent, and the guest has no repository.
    None,
}

impl Default for History {
    fn default() -> Self {
        History::Depth(HISTORY_DEFAULT)
    }
}

impl FromStr for History {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "full" => Ok(History::Full),
            "none" => Ok(History::None),
            _ => match text.parse() {
                Ok(depth @ 1..=HISTORY_MAX) => Ok(History::Depth(depth)),
                _ => Err(Error::invalid(format!(
                    "history {text:?} is not a number of commits, full or none"
                ))
                .hint("use --history 50, --history full or --history none")),
            },
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Options {
    pub history: History,
    pub env: CallerEnv,
    /// Directories outside the tree from which the repository may take objects.
    pub allow_alternates: Vec<PathBuf>,
}

impl Options {
    /// Returns `allow_alternates` with all links resolved, so that the paths can be compared.
    /// Returns `path_not_found` if one does not exist.
    pub(super) fn allowed_alternates(&self) -> Result<Vec<PathBuf>> {
        let real = |path: &PathBuf| {
            std::fs::canonicalize(path).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => Error::new(
                    Kind::PathNotFound,
                    format!("--allow-alternate {} does not exist", path.display()),
                )
                .hint("pass the directory of objects, or leave the option out"),
                _ => Error::io(format!("inspect {}", path.display()), e),
            })
        };
        self.allow_alternates.iter().map(real).collect()
    }
}
