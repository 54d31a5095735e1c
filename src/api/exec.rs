//! Calls that run commands in a guest. The input and output of a command go through FIFOs that the
//! caller passes.

use super::call::calls;
use crate::ids::SessionId;
use serde::{Deserialize, Serialize};

/// The longest quoted command line, including environment and directory, that is sent in one SSH
/// packet: libssh2 cannot send more than 34,744 bytes. A longer command line is copied into the
/// guest first.
pub const COMMAND_BYTES_MAX: usize = 32 * 1024;
/// The longest command, including environment and directory, that Linux accepts (execve(2)). A
/// single string may have 128 KiB; the guest's shell refuses a longer one with status 126.
pub const COMMAND_STREAM_BYTES_MAX: usize = 2 * 1024 * 1024;

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
    /// The value of `TERM` in the guest.
    pub term: String,
}

/// The purpose of a passed descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// The read end of a FIFO.
    Stdin,
    /// The write end of a FIFO.
    Stdout,
    /// The write end of a FIFO. A command with a pty does not write to it.
    Stderr,
    /// The read end of a FIFO with the command, for commands that are not UTF-8 or do not fit into
    /// the request. `argv`, `env` and `workdir` are then empty. See [`CommandWords`].
    Command,
}

/// A command as bytes, for [`Stream::Command`]: the directory (may be empty), the number of words
/// in decimal, the words, and the variables as `NAME=VALUE`. Each field ends with NUL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandWords {
    pub argv: Vec<Vec<u8>>,
    pub env: Vec<(String, Vec<u8>)>,
    pub workdir: Option<Vec<u8>>,
}

impl CommandWords {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.workdir.clone().unwrap_or_default();
        bytes.extend(format!("\0{}\0", self.argv.len()).into_bytes());
        let variables = self
            .env
            .iter()
            .map(|(name, value)| [name.as_bytes(), b"=", value].concat());
        for word in self.argv.iter().cloned().chain(variables) {
            bytes.extend(word);
            bytes.push(0);
        }
        bytes
    }

    /// Decodes a command. Returns None if `bytes` are not in the form that [`CommandWords::encode`]
    /// produces.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = bytes
            .strip_suffix(b"\0")?
            .split(|b| *b == 0)
            .map(<[u8]>::to_vec);
        let workdir = fields.next().filter(|dir| !dir.is_empty());
        let count: usize = std::str::from_utf8(&fields.next()?).ok()?.parse().ok()?;
        let argv: Vec<Vec<u8>> = fields.by_ref().take(count).collect();
        let variable = |field: Vec<u8>| {
            let at = field.iter().position(|b| *b == b'=')?;
            Some((
                String::from_utf8(field[..at].to_vec()).ok()?,
                field[at + 1..].to_vec(),
            ))
        };
        let env = fields.map(variable).collect::<Option<_>>()?;
        (argv.len() == count).then_some(Self { argv, env, workdir })
    }
}

/// Requires `more`. The daemon sends a `session` note first. It replies when the command has ended
/// and, unless `no_wait_children` is set, its output is closed. If the caller disconnects, the
/// command ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecStartRequest {
    pub vm: String,
    /// The command and its arguments. If empty, and no [`Stream::Command`] is passed, the login
    /// shell runs.
    pub argv: Vec<String>,
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// If absent, the command runs in the VM's own directory for commands, else in the workspace,
    /// else in the home directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// The user of the guest who runs the command, as `USER[:GROUP]` with names or numbers. If
    /// absent, the command runs as the VM's user, else as the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pty: Option<Pty>,
    /// The purposes of the passed descriptors, in the same order. Without stdin, the command reads
    /// an empty input; output without a descriptor is discarded.
    #[serde(default)]
    pub streams: Vec<Stream>,
    /// Reply when the command exits, even if its background processes still hold its output open.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_wait_children: bool,
}

/// How a command in the guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// The status as a shell reports it: 128+n if signal n ended the command.
    Status(u8),
    /// The signal's name without `SIG`, such as `KILL`. This is reported if the signal ended a
    /// login shell, or if it also ended the shell that waits for the command.
    Signal(String),
}

impl Exit {
    /// Returns the status as a shell reports it: 128+n for signal n.
    pub fn shell_status(&self) -> u8 {
        match self {
            Exit::Status(status) => *status,
            Exit::Signal(name) => 128u8.saturating_add(signal_number(name)),
        }
    }
}

/// Returns the number of a signal on Linux for x86 and Arm (signal(7)), or 0 for an unknown name.
pub fn signal_number(name: &str) -> u8 {
    format!("SIG{name}")
        .parse::<nix::sys::signal::Signal>()
        .map_or(0, |s| s as i32 as u8)
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
    /// The signal's name without `SIG`, such as `INT`.
    pub signal: String,
}

calls! {
    ExecStart = "exec.start" (ExecStartRequest) -> ExecReply [Owner, Unkeyed, EndCall, TakesFds, feature "exec"];
    /// Changes the size of a session's terminal. The caller uses a second connection for this.
    ExecResize = "exec.resize" (ExecResizeRequest) -> super::Empty [Owner, Unkeyed, Nothing, NoFds];
    /// Sends a signal to a session's command. The caller uses a second connection for this.
    ExecSignal = "exec.signal" (ExecSignalRequest) -> super::Empty [Owner, Unkeyed, Nothing, NoFds];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_words_round_trip() {
        let words = |argv: &[&[u8]], env: &[(&str, &[u8])], workdir: Option<&[u8]>| CommandWords {
            argv: argv.iter().map(|w| w.to_vec()).collect(),
            env: env
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.to_vec()))
                .collect(),
            workdir: workdir.map(<[u8]>::to_vec),
        };
        for one in [
            words(&[], &[], None),
            words(&[b""], &[("A", b"")], Some(b"/x\xff")),
            words(
                &[b"", b"\xff\n", b"A=b"],
                &[("A", b"b=\xfe"), ("B", b"")],
                None,
            ),
        ] {
            assert_eq!(CommandWords::decode(&one.encode()), Some(one));
        }
        for bad in [
            b"".as_slice(),
            b"x",
            b"\0",
            b"\0x\0",
            b"\x001\0",
            b"\0-1\0",
            b"\x000\0A\0",
            b"\x002\0a\0",
        ] {
            assert_eq!(CommandWords::decode(bad), None, "{bad:?}");
        }
    }
}
