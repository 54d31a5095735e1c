//! The form in which errors are sent over the wire.

use crate::error::{Code, Error};
use serde::{Deserialize, Serialize};

/// The `error.data` of a response. `message` contains the error and its sources, joined with `: `.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    pub code: Code,
    /// The name of a [`crate::error::Kind`]. A newer daemon may send one that this client does not
    /// know.
    pub kind: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    pub retryable: bool,
    /// The operation that failed, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op: Option<crate::ids::OpId>,
}

impl From<&Error> for Fault {
    fn from(e: &Error) -> Self {
        Self {
            code: e.code(),
            kind: e.kind().name().to_owned(),
            message: e.to_string(),
            hint: e.hint_text().map(|hint| hint.replace("{vm}", "VM")),
            retryable: e.kind().retryable(),
            op: None,
        }
    }
}

impl From<Error> for Fault {
    fn from(e: Error) -> Self {
        Self::from(&e)
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    /// A changed host key persists until somebody acts, and a command that failed in the guest
    /// would fail again, so a retry cannot help.
    #[test]
    fn fault_kind_decides_whether_a_retry_can_help() {
        let retryable = |kind| Fault::from(Error::new(kind, "it failed")).retryable;
        let wrong: Vec<_> = [Kind::HostKeyMismatch, Kind::GuestCommandFailed]
            .into_iter()
            .filter(|kind| retryable(*kind))
            .collect();
        assert!(
            wrong.is_empty(),
            "retryable although nothing changes by itself: {wrong:?}"
        );
        assert!(
            retryable(Kind::GuestUnavailable)
                && retryable(Kind::PoolFull)
                && retryable(Kind::StreamIncomplete)
        );
    }
}
