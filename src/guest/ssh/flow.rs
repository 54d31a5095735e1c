//! Moves the streams of a command between the caller and the channel. Each stream has one buffer.

use super::channel::{Channel, READ_BYTES, Step, WRITE_BYTES_MAX};
use super::wire::Shared;
use crate::api::stream;
use crate::error::Result;
use crate::guest::{Sink, Source};
use nix::poll::{PollFd, PollFlags};
use std::io::ErrorKind;
use std::os::raw::c_int;

const IN_BYTES: usize = 4 * WRITE_BYTES_MAX;
/// Maximum number of pieces of one stream to move before the session turns to something else.
const PIECES_PER_ROUND: usize = 8;

/// The state of a stream after its turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// The stream waits for the peer or the caller, or has ended.
    Waits,
    /// The stream can continue at once.
    More,
}

/// An error that ended a stream's turn early, from libssh2 or from the caller's stream.
pub(super) enum TurnError {
    Ssh(ssh2::Error),
    Caller(crate::error::Error),
}

impl From<ssh2::Error> for TurnError {
    fn from(e: ssh2::Error) -> Self {
        TurnError::Ssh(e)
    }
}

pub(super) struct Inlet<'a> {
    source: Option<&'a mut dyn Source>,
    buffer: Vec<u8>,
    at: usize,
    /// True unless the source returned `WouldBlock` since the last poll that reported the source
    /// ready.
    pub is_ready: bool,
    eof_read: bool,
    eof_sent: bool,
}

impl<'a> Inlet<'a> {
    /// Creates the inlet of a command. With a pty and no source, it sends nothing, not even an EOF.
    /// On EOF, sshd would close its side of the terminal, and changes of the window size would no
    /// longer reach the command.
    pub(super) fn new(source: Option<&'a mut dyn Source>, has_pty: bool) -> Self {
        let eof_read = source.is_none();
        let eof_sent = eof_read && has_pty;
        Self {
            source,
            buffer: Vec::with_capacity(IN_BYTES),
            at: 0,
            is_ready: true,
            eof_read,
            eof_sent,
        }
    }

    fn has_room(&self) -> bool {
        self.buffer.len() - self.at < IN_BYTES
    }

    /// Returns the source's descriptor if this stream waits for the source.
    pub(super) fn poll_fd(&self) -> Option<PollFd<'_>> {
        let waits = !self.is_ready && !self.eof_read && self.has_room();
        let fd = self.source.as_ref().filter(|_| waits)?.fd()?;
        Some(PollFd::new(fd, PollFlags::POLLIN))
    }

    fn read_some(&mut self) -> Result<()> {
        let Some(source) = self
            .source
            .as_mut()
            .filter(|_| self.is_ready && !self.eof_read)
        else {
            return Ok(());
        };
        if self.at > 0 {
            self.buffer.drain(..self.at);
            self.at = 0;
        }
        let filled = self.buffer.len();
        if filled == IN_BYTES {
            return Ok(());
        }
        self.buffer.resize(IN_BYTES, 0);
        let result = source.read(&mut self.buffer[filled..]);
        self.buffer
            .truncate(filled + result.as_ref().map_or(0, |n| *n));
        match result {
            Ok(0) => self.eof_read = true,
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => self.is_ready = false,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(stream::error("read the command's input", e)),
        }
        Ok(())
    }

    /// Reads from the source and writes to the channel. Sets `progress` if the channel accepted
    /// bytes.
    pub(super) fn turn(
        &mut self,
        shared: &Shared,
        channel: &mut Channel,
        progress: &mut bool,
    ) -> Result<Turn, TurnError> {
        for _ in 0..PIECES_PER_ROUND {
            if self.eof_sent || shared.outbox_is_high() {
                return Ok(Turn::Waits);
            }
            // Gathers small pieces only while the source has more available.
            if self.buffer.len() - self.at < WRITE_BYTES_MAX {
                self.read_some().map_err(TurnError::Caller)?;
            }
            let waiting = self.buffer.len() - self.at;
            if waiting == 0 && self.eof_read {
                self.eof_sent = channel.send_eof()?.is_some();
                return Ok(Turn::Waits);
            }
            if waiting == 0 && !self.is_ready {
                return Ok(Turn::Waits);
            }
            if waiting >= WRITE_BYTES_MAX || !self.is_ready || self.eof_read {
                let Some(n) = channel.write(&self.buffer[self.at..])? else {
                    return Ok(Turn::Waits);
                };
                self.at += n;
                *progress |= n > 0;
            }
        }
        Ok(Turn::More)
    }
}

pub(super) struct Outlet<'a> {
    stream: c_int,
    /// `None` once the caller no longer reads. Further output is discarded.
    sink: Option<&'a mut dyn Sink>,
    buffer: Box<[u8; READ_BYTES]>,
    at: usize,
    len: usize,
    pub is_ready: bool,
}

impl<'a> Outlet<'a> {
    pub(super) fn new(stream: c_int, sink: Option<&'a mut dyn Sink>) -> Self {
        Self {
            stream,
            sink,
            buffer: Box::new([0; READ_BYTES]),
            at: 0,
            len: 0,
            is_ready: true,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.at == self.len
    }

    /// Returns the sink's descriptor if this stream waits for the sink.
    pub(super) fn poll_fd(&self) -> Option<PollFd<'_>> {
        let fd = self
            .sink
            .as_ref()
            .filter(|_| !self.is_empty() && !self.is_ready)?
            .fd()?;
        Some(PollFd::new(fd, PollFlags::POLLOUT))
    }

    fn write_some(&mut self, progress: &mut bool) -> Result<()> {
        while self.at < self.len {
            let Some(sink) = &mut self.sink else {
                self.at = self.len;
                *progress = true;
                break;
            };
            match sink.write(&self.buffer[self.at..self.len]) {
                Ok(n) => {
                    self.at += n;
                    *progress |= n > 0;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.is_ready = false;
                    break;
                }
                Err(e) if e.kind() == ErrorKind::BrokenPipe => self.sink = None,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(stream::error("write the command's output", e)),
            }
        }
        Ok(())
    }

    /// Forwards output that has arrived to the sink. Sets `progress` if the sink accepted bytes, or
    /// if output was discarded because the caller no longer reads.
    pub(super) fn turn(
        &mut self,
        channel: &mut Channel,
        progress: &mut bool,
    ) -> Result<Turn, TurnError> {
        for _ in 0..PIECES_PER_ROUND {
            if !self.is_empty() && self.is_ready {
                self.write_some(progress).map_err(TurnError::Caller)?;
            }
            if !self.is_empty() {
                return Ok(Turn::Waits);
            }
            let read: Step<usize> = channel.read(self.stream, &mut self.buffer);
            match read? {
                Some(n) if n > 0 => (self.at, self.len) = (0, n),
                _ => return Ok(Turn::Waits),
            }
        }
        Ok(Turn::More)
    }
}
