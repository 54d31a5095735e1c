//! Defines the protocol between the daemon and a helper. A message consists of a tag and the fields
//! that belong to the tag; no field is optional.
//!
//! The daemon first sends a [`Job`] and then [`Order`]s; the helper answers with [`Reply`]s. Both
//! sides reject a message that is unknown, truncated, too long or followed by extra bytes. The
//! daemon's checks matter most, because a guest may control what the helper sends.

use crate::api::exec::{Exit, Pty, PtySize};
use crate::host::confine::{Reader, Writer};
use crate::host::text::printable;
use std::os::fd::BorrowedFd;

/// Maximum size of a message to a helper: a command of `COMMAND_BYTES_MAX`, two keys and some room.
pub const TO_HELPER_BYTES_MAX: usize = 64 * 1024;
/// Maximum size of a message from a helper.
pub const FROM_HELPER_BYTES_MAX: usize = 1024;
/// Maximum length of a text in a message from a helper.
const TEXT_BYTES_MAX: usize = 512;
/// Maximum length of a signal's name.
const SIGNAL_BYTES_MAX: usize = 16;

/// One session: log in and run a command, or only log in.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    pub user: String,
    /// The VM's private key in OpenSSH format.
    pub private_key: String,
    pub host_key: Vec<u8>,
    /// The command to run. With `None`, the helper only logs in.
    pub command: Option<Command>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    /// A command line for the guest's shell.
    pub line: Vec<u8>,
    pub pty: Option<Pty>,
    pub stdin: Input,
    pub has_stdout: bool,
    pub has_stderr: bool,
    /// If true, the session ends with the command, even if other processes still hold its output
    /// open.
    pub no_wait_children: bool,
}

/// The source of a command's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    Empty,
    /// The caller's own descriptor. EOF on it ends the input.
    Direct,
    /// A pipe from the daemon. EOF counts only after [`Order::InputEnded`]. EOF without that order
    /// means that the daemon died or failed to read the rest, and the guest must not treat the
    /// input as complete.
    Pumped,
}

/// The descriptors that are passed with a job, in this order.
pub struct Passed<'a> {
    pub socket: BorrowedFd<'a>,
    pub stdin: Option<BorrowedFd<'a>>,
    pub stdout: Option<BorrowedFd<'a>>,
    pub stderr: Option<BorrowedFd<'a>>,
}

impl<'a> Passed<'a> {
    pub fn list(&self) -> Vec<BorrowedFd<'a>> {
        [Some(self.socket), self.stdin, self.stdout, self.stderr]
            .into_iter()
            .flatten()
            .collect()
    }
}

/// An order from the daemon to a helper that has already received its job.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    Resize(PtySize),
    /// The name of a signal, without `SIG`.
    Signal(String),
    InputEnded,
    /// End the command with SIGHUP, then exit.
    HangUp,
}

/// A message from a helper to the daemon.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The command has started or, in a job without a command, the server accepted the key.
    Started,
    /// The command has ended and its output has been delivered.
    Exited(Exit),
    Failed(Failure, String),
}

/// The reason why a session failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The helper cannot confine itself.
    Confinement,
    /// The session could not be established.
    Unavailable,
    /// The guest's SSH server refuses our key.
    KeyRefused,
    HostKeyMismatch,
    /// The connection broke.
    Lost,
    /// One of the caller's descriptors could not be read or written.
    Stream,
}

impl Failure {
    const ALL: [Failure; 6] = [
        Failure::Confinement,
        Failure::Unavailable,
        Failure::KeyRefused,
        Failure::HostKeyMismatch,
        Failure::Lost,
        Failure::Stream,
    ];
}

const JOB: u8 = 1;
const RESIZE: u8 = 2;
const SIGNAL: u8 = 3;
const INPUT_ENDED: u8 = 4;
const HANG_UP: u8 = 5;
const STARTED: u8 = 1;
const STATUS: u8 = 2;
const BY_SIGNAL: u8 = 3;
const FAILED: u8 = 4;

fn size(r: &mut Reader<'_>) -> Option<PtySize> {
    Some(PtySize {
        rows: r.short()?,
        cols: r.short()?,
    })
}

impl Job {
    pub fn encode(&self) -> Vec<u8> {
        let w = Writer::new(JOB)
            .bytes(self.user.as_bytes())
            .bytes(self.private_key.as_bytes())
            .bytes(&self.host_key);
        let Some(command) = &self.command else {
            return w.byte(0).finish();
        };
        let input = match command.stdin {
            Input::Empty => 0,
            Input::Direct => 1,
            Input::Pumped => 2,
        };
        let w = w.byte(1).bytes(&command.line).byte(input);
        let w = w
            .byte(command.has_stdout.into())
            .byte(command.has_stderr.into())
            .byte(command.no_wait_children.into());
        match &command.pty {
            None => w.byte(0).finish(),
            Some(pty) => w
                .byte(1)
                .bytes(pty.term.as_bytes())
                .short(pty.size.rows)
                .short(pty.size.cols)
                .finish(),
        }
    }

    pub fn decode(message: &[u8]) -> Option<Self> {
        let mut r = Reader::new(message);
        if r.byte()? != JOB {
            return None;
        }
        let (user, private_key, host_key) = (r.text()?, r.text()?, r.bytes()?.to_vec());
        let command = if r.flag()? {
            Some(Command::decode(&mut r)?)
        } else {
            None
        };
        r.end()?;
        Some(Self {
            user,
            private_key,
            host_key,
            command,
        })
    }
}

impl Command {
    fn decode(r: &mut Reader<'_>) -> Option<Self> {
        let line = r.bytes()?.to_vec();
        let stdin = match r.byte()? {
            0 => Input::Empty,
            1 => Input::Direct,
            2 => Input::Pumped,
            _ => return None,
        };
        let (has_stdout, has_stderr) = (r.flag()?, r.flag()?);
        let no_wait_children = r.flag()?;
        let pty = if r.flag()? {
            Some(Pty {
                term: r.text()?,
                size: size(r)?,
            })
        } else {
            None
        };
        Some(Self {
            line,
            pty,
            stdin,
            has_stdout,
            has_stderr,
            no_wait_children,
        })
    }
}

impl Order {
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Order::Resize(size) => Writer::new(RESIZE)
                .short(size.rows)
                .short(size.cols)
                .finish(),
            Order::Signal(name) => Writer::new(SIGNAL).bytes(name.as_bytes()).finish(),
            Order::InputEnded => Writer::new(INPUT_ENDED).finish(),
            Order::HangUp => Writer::new(HANG_UP).finish(),
        }
    }

    pub fn decode(message: &[u8]) -> Option<Self> {
        let mut r = Reader::new(message);
        let order = match r.byte()? {
            RESIZE => Order::Resize(size(&mut r)?),
            SIGNAL => Order::Signal(signal_name(r.bytes()?)?),
            INPUT_ENDED => Order::InputEnded,
            HANG_UP => Order::HangUp,
            _ => return None,
        };
        r.end()?;
        Some(order)
    }
}

impl Reply {
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Reply::Started => Writer::new(STARTED).finish(),
            Reply::Exited(Exit::Status(status)) => Writer::new(STATUS).byte(*status).finish(),
            Reply::Exited(Exit::Signal(name)) => {
                Writer::new(BY_SIGNAL).bytes(name.as_bytes()).finish()
            }
            Reply::Failed(failure, text) => {
                let cut = text.floor_char_boundary(TEXT_BYTES_MAX);
                Writer::new(FAILED)
                    .byte(*failure as u8)
                    .bytes(&text.as_bytes()[..cut])
                    .finish()
            }
        }
    }

    /// Decodes a message and makes its text printable. Returns `None` for an invalid message.
    pub fn decode(message: &[u8]) -> Option<Self> {
        if message.len() > FROM_HELPER_BYTES_MAX {
            return None;
        }
        let mut r = Reader::new(message);
        let reply = match r.byte()? {
            STARTED => Reply::Started,
            STATUS => Reply::Exited(Exit::Status(r.byte()?)),
            BY_SIGNAL => Reply::Exited(Exit::Signal(signal_name(r.bytes()?)?)),
            FAILED => {
                let failure = *Failure::ALL.get(usize::from(r.byte()?))?;
                let text = r.bytes().filter(|text| text.len() <= TEXT_BYTES_MAX)?;
                Reply::Failed(failure, printable(&String::from_utf8_lossy(text)))
            }
            _ => return None,
        };
        r.end()?;
        Some(reply)
    }
}

fn signal_name(bytes: &[u8]) -> Option<String> {
    let is_name = !bytes.is_empty()
        && bytes.len() <= SIGNAL_BYTES_MAX
        && bytes.iter().all(u8::is_ascii_alphanumeric);
    is_name.then(|| String::from_utf8_lossy(bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(command: Option<Command>) -> Job {
        Job {
            user: "root".into(),
            private_key: "a key".into(),
            host_key: vec![0, 1, 255],
            command,
        }
    }

    fn command(pty: Option<Pty>) -> Command {
        Command {
            line: b"exec \xff".to_vec(),
            pty,
            stdin: Input::Pumped,
            has_stdout: true,
            has_stderr: false,
            no_wait_children: true,
        }
    }

    #[test]
    fn message_round_trips_and_wrong_lengths_are_rejected() {
        let size = PtySize {
            rows: 24,
            cols: 500,
        };
        let pty = Pty {
            size,
            term: "xterm".into(),
        };
        for job in [
            job(None),
            job(Some(command(None))),
            job(Some(command(Some(pty)))),
        ] {
            check(&job.encode(), Job::decode, &job);
        }
        for order in [
            Order::Resize(size),
            Order::Signal("USR1".into()),
            Order::InputEnded,
            Order::HangUp,
        ] {
            check(&order.encode(), Order::decode, &order);
        }
        let exits = [
            Exit::Status(0),
            Exit::Status(255),
            Exit::Signal("TERM".into()),
        ]
        .map(Reply::Exited);
        let failures = Failure::ALL.map(|f| Reply::Failed(f, "it's \"so\"".into()));
        for reply in exits.into_iter().chain(failures).chain([Reply::Started]) {
            check(&reply.encode(), Reply::decode, &reply);
        }
    }

    #[track_caller]
    fn check<T: PartialEq + std::fmt::Debug>(
        message: &[u8],
        decode: impl Fn(&[u8]) -> Option<T>,
        wanted: &T,
    ) {
        assert_eq!(decode(message).as_ref(), Some(wanted));
        for len in 0..message.len() {
            assert_eq!(decode(&message[..len]), None, "the first {len} bytes");
        }
        assert_eq!(decode(&[message, &[0]].concat()), None, "one byte more");
    }

    #[test]
    fn reply_text_is_bounded_and_printable() {
        let text = "a\x1b[2J\u{202e}b".to_owned() + &"é".repeat(1000);
        let Some(Reply::Failed(Failure::Lost, shown)) =
            Reply::decode(&Reply::Failed(Failure::Lost, text).encode())
        else {
            panic!("not read back");
        };
        assert!(
            shown.starts_with("a\\u{1b}[2J\\u{202e}bé") && shown.len() < 1024,
            "{shown}"
        );
        let long = [&[FAILED, 0][..], &600u32.to_le_bytes(), &[b'x'; 600]].concat();
        assert_eq!(Reply::decode(&long), None);
        for name in ["", "TERM\n", "A-NAME-OF-SEVENTEEN", "../x"] {
            assert_eq!(
                Reply::decode(&Reply::Exited(Exit::Signal(name.into())).encode()),
                None,
                "{name:?}"
            );
        }
    }
}
