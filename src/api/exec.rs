//! Commands in a guest. The bytes go through FIFOs that the caller passes, never through frames.

use super::calls;
use crate::ids::SessionId;
use serde::{Deserialize, Serialize};

/// Longest command line in the guest, with environment and directory, quoted. It goes in one packet, and libssh2
/// sends none over 34,744 bytes.
pub const COMMAND_BYTES_MAX: usize = 32 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PtySize {
    pub rows: u16,
    pub cols: u16,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pty {
    pub size: PtySize,
    /// `TERM` in the guest.
    pub term: String,
}

/// What the caller passed descriptors for, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// The read end of a FIFO.
    Stdin,
    /// The write end of a FIFO.
    Stdout,
    /// The write end of a FIFO. With a pty there is none.
    Stderr,
}

/// Always on the line (`more`): a `session` note, then the answer when the command has ended. Hang-up ends it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecStartRequest {
    pub vm: String,
    /// Empty: the login shell.
    pub argv: Vec<String>,
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// The workspace's directory when not given and there is one, else the home directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pty: Option<Pty>,
    /// Which streams the passed descriptors are. One that is missing is empty (stdin) or dropped.
    #[serde(default)]
    pub streams: Vec<Stream>,
}

/// How a command in the guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    Status(u8),
    /// Without `SIG`: `TERM`.
    Signal(String),
}

impl Exit {
    /// As a shell gives it: 128+n for a signal.
    pub fn shell_status(&self) -> u8 {
        match self {
            Exit::Status(status) => *status,
            Exit::Signal(name) => 128u8.saturating_add(signal_number(name)),
        }
    }
}

/// Number of a signal's name on Linux, x86 and arm (signal(7)); 0 for one that is not known.
pub fn signal_number(name: &str) -> u8 {
    format!("SIG{name}").parse::<nix::sys::signal::Signal>().map_or(0, |s| s as i32 as u8)
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecReply {
    pub exit: Exit,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecResizeRequest {
    pub session: SessionId,
    pub size: PtySize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecSignalRequest {
    pub session: SessionId,
    /// Without `SIG`: `INT`.
    pub signal: String,
}

calls! {
    ExecStart = "exec.start" (ExecStartRequest) -> ExecReply;
    /// On a second connection.
    ExecResize = "exec.resize" (ExecResizeRequest) -> super::Empty;
    /// On a second connection.
    ExecSignal = "exec.signal" (ExecSignalRequest) -> super::Empty;
}
