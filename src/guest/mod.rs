//! Talks to guests: connects, waits until a guest answers, and runs a command while forwarding its
//! streams.
//!
//! [`Transport`] is the interface. The real one ([`helper`]) runs SSH in a helper process per
//! connection, so that the daemon never parses what a guest sends.

mod command_line;
mod connect;
mod controls;
#[cfg(feature = "fakes")]
pub mod fake;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod helper;
pub mod io;
pub mod listeners;
mod script;
pub mod ssh;
#[cfg(test)]
pub mod test_sshd;
mod user;
mod wait;

#[cfg(test)]
pub use command_line::command_line;
pub use command_line::{check_variable, command_bytes};
pub use controls::{ControlSender, control_queue};
pub use helper::SshTransport;
pub use script::{Script, run_script};
pub use user::GuestUser;

use crate::api::exec::{Exit, Pty, PtySize};
use crate::error::Result;
use crate::host::Credentials;
use crate::locks::Cancel;
use crate::sched::Instant;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// The script that a guest runs while it is saved in a snapshot.
pub const REJOIN: &str = include_str!("rejoin.sh");

/// The address of a guest, and the keys of both sides.
#[derive(Clone)]
pub struct Target {
    pub addr: SocketAddr,
    pub user: String,
    /// Our private key in OpenSSH format.
    pub private_key: String,
    /// The only accepted host key: the raw public key blob (RFC 4253, 6.6; `ssh-ed25519`).
    pub host_key: Vec<u8>,
    /// The user that the helper process runs as. `None` if the daemon has no privileges. The helper
    /// then runs as the daemon's user.
    pub owner: Option<Credentials>,
}

/// A non-blocking stream that can be polled. If `fd` is `None`, the stream is always ready.
pub trait Source: Send {
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// Returns a pipe that carries exactly this stream's bytes, if another process may read the
    /// pipe directly.
    fn pipe(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Reads some bytes. 0 is the end; `WouldBlock` means that nothing is available yet. Any other
    /// error ends the command with that error.
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize>;
}

pub trait Sink: Send {
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// Returns a pipe that takes exactly this stream's bytes, if another process may write to the
    /// pipe directly.
    fn pipe(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Writes some bytes. `BrokenPipe` means that nobody reads: later output is dropped, and the
    /// command continues.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize>;
}

/// A request of the caller that changes a running command.
#[derive(Clone, Debug, PartialEq)]
pub enum Control {
    Resize(PtySize),
    /// The name of a signal, without `SIG`.
    Signal(String),
    /// The caller is gone, so the command gets a SIGHUP.
    HangUp,
}

/// A source of controls. `fd` is readable when `next` has one.
pub trait Controls: Send {
    fn fd(&self) -> BorrowedFd<'_>;
    fn next(&mut self) -> Option<Control>;
}

/// The streams of one command. A missing source is empty; a missing sink discards the output.
#[derive(Default)]
pub struct Streams<'a> {
    pub stdin: Option<&'a mut dyn Source>,
    pub stdout: Option<&'a mut dyn Sink>,
    pub stderr: Option<&'a mut dyn Sink>,
    pub controls: Option<&'a mut dyn Controls>,
    /// The caller's connection. If the caller hangs up (POLLHUP or POLLERR), the command ends as it
    /// does after a cancel.
    pub hangup: Option<BorrowedFd<'a>>,
}

#[derive(Clone, Debug, Default)]
pub struct ExecSpec {
    /// A command line for the guest's shell. Build it with [`crate::host::shell::quote`].
    pub command: String,
    pub pty: Option<Pty>,
    /// If no byte moves in either direction for this long, the command ends with `transfer_idle`.
    /// `None` means no limit.
    pub idle: Option<Duration>,
    /// Deadline of the whole call, including dialing.
    pub deadline: Option<Instant>,
    /// If true, the session ends with the command, even if other processes still hold its output
    /// open.
    pub no_wait_children: bool,
}

/// The interface to guests: SSH in production, a fake in tests.
pub trait Transport: Send + Sync {
    /// Waits until the guest's SSH server accepts our key. Returns `boot_timeout` at the deadline
    /// and `cancelled` at a cancel. Opens `Rank::GuestIo`.
    fn wait_ready(&self, target: &Target, deadline: Instant, cancel: &Cancel) -> Result<()>;

    /// Dials, runs one command to its end and hangs up. Errors: `guest_unavailable` (cannot dial),
    /// `host_key_mismatch`, `guest_lost` (the connection broke; never reported as an exit status),
    /// `cancelled` with the token's cause, `transfer_idle`, `timeout`. Opens `Rank::GuestIo`.
    fn exec(
        &self,
        target: &Target,
        spec: &ExecSpec,
        streams: Streams<'_>,
        cancel: &Cancel,
    ) -> Result<Exit>;
}
