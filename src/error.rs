//! Defines the crate's error type. An [`Error`] has a [`Kind`], a message, a hint for the user and
//! a source. Each kind belongs to one [`Code`], which decides the exit status of `fcctl`.

use serde::{Deserialize, Serialize};
use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The closed set of error codes, which decide the exit status of `fcctl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    NotFound,
    AlreadyExists,
    InvalidArgument,
    WrongState,
    Busy,
    Conflict,
    Exhausted,
    GuestUnavailable,
    Timeout,
    Cancelled,
    Host,
    Denied,
    Unsupported,
    Internal,
}

impl Code {
    /// Returns the exit status of `fcctl` for this code, except for `exec` and `run`.
    pub const fn exit_status(self) -> u8 {
        match self {
            Code::NotFound => 3,
            Code::AlreadyExists | Code::Busy | Code::Conflict => 4,
            Code::InvalidArgument => 2,
            Code::Timeout => 124,
            Code::Cancelled => 130,
            Code::WrongState
            | Code::Exhausted
            | Code::GuestUnavailable
            | Code::Host
            | Code::Denied
            | Code::Unsupported
            | Code::Internal => 1,
        }
    }
}

/// The chance that the same call succeeds later, if nobody fixes anything first.
enum Retry {
    /// The call fails again until somebody fixes the cause.
    Useless,
    /// The cause goes away by itself: a queue empties, a guest finishes its boot, a connection is
    /// restored.
    MayHelp,
}

/// Declares [`Kind`], which says in more detail than [`Code`] what went wrong. Every kind belongs
/// to exactly one code.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident => $code:ident, $retry:ident, $name:literal;)*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Kind { $($(#[$doc])* $kind,)* }
        impl Kind {
            pub const ALL: &'static [Kind] = &[$(Kind::$kind),*];
            pub const fn code(self) -> Code { match self { $(Kind::$kind => Code::$code,)* } }
            /// Returns the kind's stable name in the protocol.
            pub const fn name(self) -> &'static str { match self { $(Kind::$kind => $name,)* } }
            /// True if the same call may succeed later even if nobody fixes anything.
            pub const fn retryable(self) -> bool {
                match self { $(Kind::$kind => matches!(Retry::$retry, Retry::MayHelp),)* }
            }
        }
    };
}

kinds! {
    /// No VM matches, or the VM belongs to another user.
    VmNotFound => NotFound, Useless, "vm_not_found";
    ImageNotFound => NotFound, Useless, "image_not_found";
    KernelNotFound => NotFound, Useless, "kernel_not_found";
    SnapshotNotFound => NotFound, Useless, "snapshot_not_found";
    OperationNotFound => NotFound, Useless, "operation_not_found";
    SessionNotFound => NotFound, Useless, "session_not_found";
    /// The VM has no prepared workspace.
    WorkspaceNotFound => NotFound, Useless, "workspace_not_found";
    /// The registry has no such repository, tag or digest.
    ReferenceNotFound => NotFound, Useless, "reference_not_found";
    /// A path on the caller's side does not exist, or a path in a guest that `fcctl cp` names.
    PathNotFound => NotFound, Useless, "path_not_found";
    NameTaken => AlreadyExists, Useless, "name_taken";
    /// The target of an export already exists.
    TargetExists => AlreadyExists, Useless, "target_exists";
    /// Another VM or a program on the host uses the port.
    PortTaken => AlreadyExists, Useless, "port_taken";
    /// A parameter is out of range or malformed.
    InvalidArgument => InvalidArgument, Useless, "invalid_argument";
    /// More than one id begins with the given prefix.
    AmbiguousPrefix => InvalidArgument, Useless, "ambiguous_prefix";
    InvalidConfig => InvalidArgument, Useless, "invalid_config";
    InvalidRequest => InvalidArgument, Useless, "invalid_request";
    FrameTooLarge => InvalidArgument, Useless, "frame_too_large";
    MethodNotFound => InvalidArgument, Useless, "method_not_found";
    /// The guest path is outside of the directories that a workspace may use.
    InvalidGuestPath => InvalidArgument, Useless, "invalid_guest_path";
    /// The repository or tree cannot be sent as it is.
    InvalidTree => InvalidArgument, Useless, "invalid_tree";
    /// An image or a part of it is malformed, exceeds a limit, or does not match its digest.
    InvalidImage => InvalidArgument, Useless, "invalid_image";
    /// The VM's state does not allow the verb.
    WrongState => WrongState, Useless, "wrong_state";
    /// The workspace is incomplete because an import was interrupted.
    WorkspaceIncomplete => WrongState, Useless, "workspace_incomplete";
    Busy => Busy, MayHelp, "busy";
    PoolFull => Busy, MayHelp, "pool_full";
    ConnectionLimit => Busy, MayHelp, "connection_limit";
    OperationLimit => Busy, MayHelp, "operation_limit";
    /// The registry reports that it is overloaded or that the caller sends too many requests.
    RegistryBusy => Busy, MayHelp, "registry_busy";
    /// The daemon is shutting down.
    ShuttingDown => Busy, MayHelp, "shutting_down";
    Conflict => Conflict, Useless, "conflict";
    IdempotencyConflict => Conflict, Useless, "idempotency_conflict";
    /// A newer request has replaced this one.
    Superseded => Conflict, Useless, "superseded";
    /// The request exceeds a limit of the host or of the caller.
    Exhausted => Exhausted, Useless, "exhausted";
    VmLimit => Exhausted, Useless, "vm_limit";
    MemoryLimit => Exhausted, Useless, "memory_limit";
    GuestUnavailable => GuestUnavailable, MayHelp, "guest_unavailable";
    /// The connection to the guest was lost.
    GuestLost => GuestUnavailable, MayHelp, "guest_lost";
    HostKeyMismatch => GuestUnavailable, Useless, "host_key_mismatch";
    /// A command that fcd ran in the guest failed, for example because the guest's disk is full.
    GuestCommandFailed => GuestUnavailable, Useless, "guest_command_failed";
    Timeout => Timeout, MayHelp, "timeout";
    TransferIdle => Timeout, MayHelp, "transfer_idle";
    BootTimeout => Timeout, MayHelp, "boot_timeout";
    Cancelled => Cancelled, Useless, "cancelled";
    /// A system call or a host command failed.
    Host => Host, Useless, "host";
    DiskFull => Host, Useless, "disk_full";
    CommandMissing => Host, Useless, "command_missing";
    CommandFailed => Host, Useless, "command_failed";
    StoreReadOnly => Host, Useless, "store_read_only";
    StoreRefused => Host, Useless, "store_refused";
    VmmFailed => Host, Useless, "vmm_failed";
    /// A registry or a proxy cannot be reached, or the connection to it was lost.
    RegistryUnreachable => Host, MayHelp, "registry_unreachable";
    /// A registry's answer violates the protocol, a limit or a digest, or refers fcd to an address
    /// that it must not contact.
    RegistryInvalid => Host, Useless, "registry_invalid";
    Denied => Denied, Useless, "denied";
    /// The registry requires credentials, or refuses those that were sent.
    RegistryDenied => Denied, Useless, "registry_denied";
    /// The registry's certificate is not trusted.
    RegistryUntrusted => Denied, Useless, "registry_untrusted";
    Unsupported => Unsupported, Useless, "unsupported";
    /// `fcctl` and `fcd` speak incompatible versions of the protocol.
    VersionMismatch => Unsupported, Useless, "version_mismatch";
    /// A stream ended before it was complete.
    StreamIncomplete => Conflict, MayHelp, "stream_incomplete";
    Internal => Internal, Useless, "internal";
}

/// An error within a process. It is sent over the wire as an `api::Fault`.
#[derive(Clone)]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
    source: Option<std::sync::Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Creates an error without a hint or a source. The message must begin in lower case, have no
    /// full stop, and say what was being done and to what.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
            source: None,
        }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, message)
    }

    /// Builds the error for a failed system call. The kind is `disk_full` for a full disk or an
    /// exceeded quota, and `host` otherwise.
    pub fn io(doing: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        let source = source.into();
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Kind::DiskFull,
            _ => Kind::Host,
        };
        let error = Self::new(kind, doing).with_source(source);
        if kind == Kind::DiskFull {
            error.hint("free some space (df -h), then try again")
        } else {
            error
        }
    }

    /// Sets the hint: what the user can run or change. A caller that does not know the VM's name
    /// writes `{vm}`; see [`Error::of_vm`].
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into().into());
        self
    }

    /// Prefixes the message with what was being done: `doing: message`.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// Replaces `{vm}` in the hint with the VM's name.
    #[must_use]
    pub fn of_vm(mut self, name: impl fmt::Display) -> Self {
        self.hint = self
            .hint
            .map(|hint| hint.replace("{vm}", &name.to_string()));
        self
    }

    /// Changes the kind. Callers use this if they know more about what the error means.
    #[must_use]
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }
    pub fn code(&self) -> Code {
        self.kind.code()
    }
    /// Returns the message without the sources.
    pub fn message(&self) -> &str {
        &self.message
    }
    /// Returns the source if it is a `T`, so that callers can branch on it.
    pub fn source_as<T: std::error::Error + 'static>(&self) -> Option<&T> {
        self.source
            .as_deref()
            .and_then(|source| source.downcast_ref())
    }
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Error {
    /// Writes the message and all sources, joined with `: `.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let mut source = self.source.as_deref().map(|s| s as &dyn std::error::Error);
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {self}", self.kind.name())?;
        match &self.hint {
            Some(hint) => write!(f, " (hint: {hint})"),
            None => Ok(()),
        }
    }
}

// Display already prints the sources, so `source()` returns None to avoid printing them twice.
impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn kinds_have_distinct_snake_case_names() {
        let names: HashSet<_> = Kind::ALL.iter().map(|k| k.name()).collect();
        assert_eq!(names.len(), Kind::ALL.len());
        for name in names {
            assert!(
                name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{name}"
            );
        }
    }

    #[test]
    fn display_joins_the_chain_once() {
        let e =
            Error::io("create tap fc-tap3", std::io::Error::other("nope")).context("start VM web");
        assert_eq!(e.to_string(), "start VM web: create tap fc-tap3: nope");
    }

    #[test]
    fn hint_names_its_vm() {
        let e = Error::new(Kind::GuestLost, "it is gone")
            .hint("fcctl logs {vm}")
            .of_vm("web");
        assert_eq!(e.hint_text(), Some("fcctl logs web"));
    }

    #[test]
    fn full_disk_has_its_own_kind() {
        let e = Error::io("write x", std::io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(e.kind(), Kind::DiskFull);
        assert!(e.hint_text().is_some());
    }
}
