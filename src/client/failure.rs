//! Describes why a call failed: with the fault that the daemon sent, or with an error on the
//! client's side.

use crate::api::fault::Fault;
use crate::api::frame::{RpcError, rpc_code};
use crate::error::{Code, Error, Kind};

pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// A failed call, with its code, kind and hint. The kind may be one that this client does not know.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub fault: Fault,
    /// True if the daemon could not be reached or the connection to it was lost.
    pub unreachable: bool,
}

/// Exit status for a daemon that cannot be reached.
pub(super) const UNREACHABLE_STATUS: u8 = 5;
/// Kind of the failure if no daemon listens on the socket.
pub const ABSENT: &str = "daemon_absent";
/// Kind of the failure if this user may not use the socket.
pub(super) const DENIED: &str = "daemon_denied";
/// Kind of the failure if the daemon does not accept connections, or has closed this one without an
/// answer.
pub(super) const LOST: &str = "daemon_lost";

impl Failure {
    /// Builds the failure for a daemon that could not be reached. `kind` is one of the client's
    /// own: [`ABSENT`], [`DENIED`] or [`LOST`].
    pub fn unreachable(kind: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        let fault = Fault {
            code: Code::Host,
            kind: kind.to_owned(),
            message: message.into(),
            hint: Some(hint.into()),
            // A daemon may be restarting, but rights do not change by themselves.
            retryable: kind != DENIED,
            op: None,
        };
        Self {
            fault,
            unreachable: true,
        }
    }

    /// Converts the error of a response. Errors of the JSON-RPC layer may have no data; their kind
    /// then follows from the error code.
    pub fn from_rpc(error: RpcError) -> Self {
        if let Some(fault) = error.data {
            return Self {
                fault,
                unreachable: false,
            };
        }
        let kind = match error.code {
            rpc_code::METHOD_NOT_FOUND => Kind::MethodNotFound,
            rpc_code::PARSE | rpc_code::INVALID_REQUEST | rpc_code::INVALID_PARAMS => {
                Kind::InvalidRequest
            }
            _ => Kind::Internal,
        };
        Error::new(kind, error.message).into()
    }

    #[cfg(any(test, feature = "fakes"))]
    pub fn code(&self) -> Code {
        self.fault.code
    }
    /// Returns the stable name of the failure's kind.
    pub fn kind(&self) -> &str {
        &self.fault.kind
    }
    pub fn is(&self, kind: Kind) -> bool {
        self.fault.kind == kind.name()
    }
    /// Returns the exit status of `fcctl` for this failure, except for `exec` and `run`.
    pub fn exit_status(&self) -> u8 {
        if self.unreachable {
            UNREACHABLE_STATUS
        } else {
            self.fault.code.exit_status()
        }
    }

    /// Prefixes the message with what was being done: `doing: message`.
    #[must_use]
    pub fn context(mut self, doing: impl std::fmt::Display) -> Self {
        self.fault.message = format!("{doing}: {}", self.fault.message);
        self
    }
    /// Replaces the hint with a more specific one.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.fault.hint = Some(hint.into());
        self
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self {
            fault: e.into(),
            unreachable: false,
        }
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self {
            fault,
            unreachable: false,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.fault.message)
    }
}
