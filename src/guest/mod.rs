//! The guest at arm's length: dial, wait until it answers, run a command with pumped streams.

mod connect;
mod controls;
#[cfg(feature = "fakes")]
pub mod fake;
pub mod helper;
pub mod io;
mod quote;
mod script;
pub mod ssh;
#[cfg(test)]
pub mod test_sshd;
mod wait;

pub use controls::{ControlReceiver, ControlSender, control_queue};
pub use helper::SshTransport;
#[cfg(test)]
pub use quote::command_line;
pub use quote::{CANNOT_ENTER, CANNOT_ENTER_STATUS, command_bytes, quote};
pub use script::{Script, run_script};

use crate::api::exec::{Exit, Pty, PtySize};
use crate::error::Result;
use crate::host::confine::Owner;
use crate::locks::Cancel;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// What a guest runs that is about to be saved.
pub const REJOIN: &str = include_str!("rejoin.sh");

/// Where a guest is and how it proves who it is.
#[derive(Clone)]
pub struct Target {
    pub addr: SocketAddr,
    pub user: String,
    /// Our private key, OpenSSH format.
    pub private_key: String,
    /// The only host key that is accepted: the raw public key blob (RFC 4253, 6.6; `ssh-ed25519`).
    pub host_key: Vec<u8>,
    /// Whom its helper process runs as. None: as the daemon, where that has no privilege.
    pub owner: Option<Owner>,
}

/// A non-blocking stream that can be polled. `None` for `fd` means always ready.
pub trait Source: Send {
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// A pipe whose bytes are exactly this stream's and that somebody else may read in our place.
    fn pipe(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// 0 is the end; `WouldBlock` when there is nothing yet. Any other error ends the command with that error.
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize>;
}

pub trait Sink: Send {
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// A pipe that takes exactly this stream's bytes and that somebody else may write in our place.
    fn pipe(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// `BrokenPipe`: nobody reads; what follows is dropped and the command goes on.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize>;
}

/// What a caller may do to a command that runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Control {
    Resize(PtySize),
    /// Without `SIG`.
    Signal(String),
    /// Nobody waits for the command any more: it gets a SIGHUP.
    HangUp,
}

/// Where controls come from: `fd` is readable when `next` has one.
pub trait Controls: Send {
    fn fd(&self) -> BorrowedFd<'_>;
    fn next(&mut self) -> Option<Control>;
}

/// The streams of one command. A missing source is empty, a missing sink drops.
#[derive(Default)]
pub struct Streams<'a> {
    pub stdin: Option<&'a mut dyn Source>,
    pub stdout: Option<&'a mut dyn Sink>,
    pub stderr: Option<&'a mut dyn Sink>,
    pub controls: Option<&'a mut dyn Controls>,
    /// When this one hangs up (POLLHUP or POLLERR), the command is ended as by a cancel: the caller's connection.
    pub hangup: Option<BorrowedFd<'a>>,
}

#[derive(Clone, Debug, Default)]
pub struct ExecSpec {
    /// A command line for the guest's shell. Build it with [`quote`].
    pub command: String,
    pub pty: Option<Pty>,
    /// No byte in either direction for so long ends it with `transfer_idle`. None: no such limit.
    pub idle: Option<Duration>,
    /// The whole of it, dialling included.
    pub deadline: Option<Instant>,
    /// End when the command does, though others still hold its output.
    pub no_wait_children: bool,
}

/// The seam: ssh in earnest, a fake in tests.
pub trait Transport: Send + Sync {
    /// Until the guest's SSH server has accepted our key, or the deadline, or cancel. Opens `Rank::GuestIo`.
    fn wait_ready(&self, target: &Target, deadline: Instant, cancel: &Cancel) -> Result<()>;

    /// Dials, runs one command to its end, hangs up. Errors: `guest_unavailable` (cannot dial),
    /// `host_key_mismatch`, `guest_lost` (the connection broke: never an exit status), `cancelled` with the
    /// token's cause, `transfer_idle`, `timeout`. Opens `Rank::GuestIo`.
    fn exec(&self, target: &Target, spec: &ExecSpec, streams: Streams<'_>, cancel: &Cancel) -> Result<Exit>;
}
