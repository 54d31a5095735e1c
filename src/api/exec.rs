//! Commands in a guest. The bytes go through FIFOs that the caller passes, never through frames.

use super::calls;
use crate::ids::SessionId;
use serde::{Deserialize, Serialize};

/// Longest command line in the guest, with environment and directory, quoted, that goes in one packet: libssh2 sends none
/// over 34,744 bytes. A longer one is brought into the guest first.
pub const COMMAND_BYTES_MAX: usize = 32 * 1024;
/// Longest command, with environment and directory: what Linux takes in all (execve(2)). It takes at most 128 KiB for one
/// string; the guest's shell refuses a longer one with status 126.
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
    /// The read end of a FIFO with the command in place of `argv`, `env` and `workdir`, which are empty then: for a command
    /// that is not UTF-8 or does not fit the request. See [`CommandWords`].
    Command,
}

/// A command as bytes, for [`Stream::Command`]: the directory (empty when there is none), the number of words in decimal,
/// the words, then the variables as `NAME=VALUE`. A NUL ends each of them.
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
        let variables = self.env.iter().map(|(name, value)| [name.as_bytes(), b"=", value].concat());
        for word in self.argv.iter().cloned().chain(variables) {
            bytes.extend(word);
            bytes.push(0);
        }
        bytes
    }

    /// None where `bytes` are not what [`CommandWords::encode`] gives.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = bytes.strip_suffix(b"\0")?.split(|b| *b == 0).map(<[u8]>::to_vec);
        let workdir = fields.next().filter(|dir| !dir.is_empty());
        let count: usize = std::str::from_utf8(&fields.next()?).ok()?.parse().ok()?;
        let argv: Vec<Vec<u8>> = fields.by_ref().take(count).collect();
        let variable = |field: Vec<u8>| {
            let at = field.iter().position(|b| *b == b'=')?;
            Some((String::from_utf8(field[..at].to_vec()).ok()?, field[at + 1..].to_vec()))
        };
        let env = fields.map(variable).collect::<Option<_>>()?;
        (argv.len() == count).then_some(Self { argv, env, workdir })
    }
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
    /// End when the command does, though programs that it left in the background still hold its output.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_wait_children: bool,
}

/// How a command in the guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// As a shell gives it: 128+n where a signal ended the command.
    Status(u8),
    /// Without `SIG`: `KILL`. Only where a signal has ended the shell that waits for the command, too, and for a login shell.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_words_come_back_as_they_were() {
        let words = |argv: &[&[u8]], env: &[(&str, &[u8])], workdir: Option<&[u8]>| CommandWords {
            argv: argv.iter().map(|w| w.to_vec()).collect(),
            env: env.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec())).collect(),
            workdir: workdir.map(<[u8]>::to_vec),
        };
        for one in [
            words(&[], &[], None),
            words(&[b""], &[("A", b"")], Some(b"/x\xff")),
            words(&[b"", b"\xff\n", b"A=b"], &[("A", b"b=\xfe"), ("B", b"")], None),
        ] {
            assert_eq!(CommandWords::decode(&one.encode()), Some(one));
        }
        for bad in [b"".as_slice(), b"x", b"\0", b"\0x\0", b"\x001\0", b"\0-1\0", b"\x000\0A\0", b"\x002\0a\0"] {
            assert_eq!(CommandWords::decode(bad), None, "{bad:?}");
        }
    }
}
