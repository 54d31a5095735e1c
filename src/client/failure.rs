//! Why a call failed: the daemon's fault as it came, or what went wrong on this side.

use crate::api::fault::Fault;
use crate::api::frame::{RpcError, rpc_code};
use crate::error::{Code, Error, Kind};

pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// A fault with its code, its kind (which may be newer than this side) and its hint.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub fault: Fault,
    /// No daemon, or none that can be talked to.
    pub unreachable: bool,
}

/// Exit status for a daemon that cannot be reached.
pub const UNREACHABLE_STATUS: u8 = 5;
/// Nobody listens at the socket.
pub const ABSENT: &str = "daemon_absent";
/// This user may not use the socket.
pub const DENIED: &str = "daemon_denied";
/// It does not take connections, or has closed ours without an answer.
pub const LOST: &str = "daemon_lost";

impl Failure {
    /// No daemon could be talked to. `kind` is one of this side's own: [`ABSENT`], [`DENIED`], [`LOST`].
    pub fn unreachable(kind: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        let fault = Fault {
            code: Code::Host,
            kind: kind.to_owned(),
            message: message.into(),
            hint: Some(hint.into()),
            retryable: true,
            op: None,
        };
        Self { fault, unreachable: true }
    }

    /// The error of a response. One of the protocol's own may come without data.
    pub fn from_rpc(error: RpcError) -> Self {
        if let Some(fault) = error.data {
            return Self { fault, unreachable: false };
        }
        let kind = match error.code {
            rpc_code::METHOD_NOT_FOUND => Kind::MethodNotFound,
            rpc_code::PARSE | rpc_code::INVALID_REQUEST | rpc_code::INVALID_PARAMS => Kind::InvalidRequest,
            _ => Kind::Internal,
        };
        Error::new(kind, error.message).into()
    }

    pub fn code(&self) -> Code {
        self.fault.code
    }
    /// The stable name of what went wrong.
    pub fn kind(&self) -> &str {
        &self.fault.kind
    }
    pub fn is(&self, kind: Kind) -> bool {
        self.fault.kind == kind.name()
    }
    /// Outside `exec` and `run`.
    pub fn exit_status(&self) -> u8 {
        if self.unreachable { UNREACHABLE_STATUS } else { self.fault.code.exit_status() }
    }

    /// Says what was being done: `doing: message`.
    #[must_use]
    pub fn context(mut self, doing: impl std::fmt::Display) -> Self {
        self.fault.message = format!("{doing}: {}", self.fault.message);
        self
    }
    /// Something to run that fits better than what came.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.fault.hint = Some(hint.into());
        self
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self { fault: e.into(), unreachable: false }
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self { fault, unreachable: false }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.fault.message)
    }
}
