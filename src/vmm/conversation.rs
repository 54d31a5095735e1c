//! A conversation with a VMM over a stream: every wait has a deadline and can be cancelled. A guest
//! may control the VMM, so each client also limits the data that it keeps.

use super::dial::Deadline;
use crate::error::{Error, Kind, Result};
use crate::host::wait::{WaitResult, cancelled, wait_any};
use nix::poll::PollFlags;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// A non-blocking stream, and the deadline for sending and reading. The errors of the methods begin
/// with `doing`. Their kinds include `timeout`, `cancelled`, and `vmm_failed` if the VMM hangs up.
pub(super) struct Conversation<'a> {
    stream: UnixStream,
    pub deadline: Deadline<'a>,
}

impl<'a> Conversation<'a> {
    /// Begins a conversation over `stream`, which must be non-blocking.
    pub(super) fn new(stream: UnixStream, deadline: Deadline<'a>) -> Self {
        Self { stream, deadline }
    }

    pub(super) fn send(&mut self, mut bytes: &[u8], doing: &str) -> Result<()> {
        while !bytes.is_empty() {
            self.wait(PollFlags::POLLOUT, doing)?;
            match self.stream.write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) => pass_over(e, doing)?,
            }
        }
        Ok(())
    }

    /// Sends a message together with a descriptor. Fails if the socket does not accept the whole
    /// message at once.
    pub(super) fn send_with(
        &mut self,
        bytes: &[u8],
        fd: BorrowedFd<'_>,
        doing: &str,
    ) -> Result<()> {
        self.wait(PollFlags::POLLOUT, doing)?;
        let fds = [fd.as_raw_fd()];
        let (data, rights) = ([IoSlice::new(bytes)], [ControlMessage::ScmRights(&fds)]);
        let socket = self.stream.as_raw_fd();
        let sent = sendmsg::<()>(socket, &data, &rights, MsgFlags::MSG_NOSIGNAL, None);
        match sent.map_err(|e| Error::io(doing, std::io::Error::from(e)))? {
            n if n == bytes.len() => Ok(()),
            _ => Err(Error::new(
                Kind::VmmFailed,
                format!("{doing}: its socket is full"),
            )),
        }
    }

    /// Reads at least one byte, and returns the number of bytes.
    pub(super) fn read(&mut self, buffer: &mut [u8], doing: &str) -> Result<usize> {
        loop {
            self.wait(PollFlags::POLLIN, doing)?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(hung_up(doing)),
                Ok(n) => return Ok(n),
                Err(e) => pass_over(e, doing)?,
            }
        }
    }

    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }

    fn wait(&self, flags: PollFlags, doing: &str) -> Result<()> {
        let Deadline { at, cancel } = self.deadline;
        match wait_any(&[(self.stream.as_fd(), flags)], at, cancel)
            .map_err(|e| Error::io(doing, e))?
        {
            WaitResult::Ready => Ok(()),
            WaitResult::Deadline => Err(Error::new(
                Kind::Timeout,
                format!("{doing}: no answer within the deadline"),
            )),
            WaitResult::Cancelled => Err(cancelled(doing, cancel)),
        }
    }
}

/// Returns Ok if the call can be repeated, and otherwise the error.
fn pass_over(e: std::io::Error, doing: &str) -> Result<()> {
    match e.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(()),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Err(hung_up(doing)),
        _ => Err(Error::io(doing, e)),
    }
}

fn hung_up(doing: &str) -> Error {
    Error::new(Kind::VmmFailed, format!("{doing}: the VMM hung up"))
}
