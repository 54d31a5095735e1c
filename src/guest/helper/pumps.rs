//! The daemon's side of a stream that is not a plain pipe. The stream's bytes go through a pipe to
//! or from the helper.

use super::protocol::Input;
use crate::api::stream;
use crate::error::{Error, Result};
use crate::guest::{Sink, Source};
use nix::poll::{PollFd, PollFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};

/// Maximum size of one read.
const PIECE_BYTES: usize = 128 * 1024;
/// Maximum number of pieces of one stream to move before the session turns to something else.
const PIECES_PER_TURN: usize = 8;
/// Size of a pipe for a bulk stream. The kernel limits the pipe buffers of one unprivileged user to
/// 64 MiB in all. Beyond that limit, a pipe keeps its default size.
const PIPE_BYTES: usize = 256 * 1024;

/// The result of one call of `turn`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Turn {
    /// True if bytes have moved.
    pub progress: bool,
    /// True if more bytes can move without waiting.
    pub has_more: bool,
}

impl Turn {
    pub(super) fn and(self, other: Turn) -> Turn {
        Turn {
            progress: self.progress || other.progress,
            has_more: self.has_more || other.has_more,
        }
    }
}

/// Creates a non-blocking pipe. Returns the read end and the write end.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let failed = |e: rustix::io::Errno| Error::io("make a pipe for a stream of the guest", e);
    let (r, w) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(failed)?;
    // The size only affects speed, so a failure is ignored.
    let _ = rustix::pipe::fcntl_setpipe_size(&w, PIPE_BYTES);
    Ok((r, w))
}

pub(super) struct Inward<'a> {
    source: &'a mut dyn Source,
    /// `None` once the helper no longer reads.
    pipe: Option<OwnedFd>,
    buffer: Vec<u8>,
    at: usize,
    has_ended: bool,
    /// The number of bytes in the pipe at the last call of `has_drained`.
    in_pipe: u64,
}

impl<'a> Inward<'a> {
    /// Creates the pump of `source` with its pipe. Also returns the end of the pipe that the helper
    /// reads.
    pub(super) fn new(source: &'a mut dyn Source) -> Result<(Self, OwnedFd)> {
        let (r, w) = pipe()?;
        Ok((
            Self {
                source,
                pipe: Some(w),
                buffer: Vec::new(),
                at: 0,
                has_ended: false,
                in_pipe: 0,
            },
            r,
        ))
    }

    /// True if the source has ended and all of its bytes are in the pipe. The pipe stays open,
    /// because EOF counts only after the helper has received `Order::InputEnded`.
    pub(super) fn is_finished(&self) -> bool {
        self.has_ended && self.at == self.buffer.len()
    }

    pub(super) fn poll_fd(&self) -> Option<PollFd<'_>> {
        let pipe = self.pipe.as_ref()?;
        if self.at < self.buffer.len() {
            return Some(PollFd::new(pipe.as_fd(), PollFlags::POLLOUT));
        }
        let source = self.source.fd().filter(|_| !self.has_ended)?;
        Some(PollFd::new(source, PollFlags::POLLIN))
    }

    /// True if the helper has read from the pipe since the last call.
    pub(super) fn has_drained(&mut self) -> bool {
        let Some(pipe) = &self.pipe else { return false };
        let now = rustix::io::ioctl_fionread(pipe).unwrap_or(0);
        std::mem::replace(&mut self.in_pipe, now) > now
    }

    pub(super) fn turn(&mut self) -> Result<Turn> {
        let mut turn = Turn::default();
        for _ in 0..PIECES_PER_TURN {
            if self.at == self.buffer.len() {
                if self.has_ended || self.pipe.is_none() || !self.read()? {
                    return Ok(turn);
                }
                continue;
            }
            let Some(pipe) = &self.pipe else {
                return Ok(turn);
            };
            match rustix::io::write(pipe, &self.buffer[self.at..]) {
                Ok(n) => {
                    self.at += n;
                    turn.progress = true;
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(turn),
                Err(rustix::io::Errno::INTR) => {}
                // A failed write means that the command accepts no more input.
                Err(_) => self.pipe = None,
            }
        }
        turn.has_more = true;
        Ok(turn)
    }

    /// Reads from the source. Returns false if the source is not ready or has ended.
    fn read(&mut self) -> Result<bool> {
        self.at = 0;
        self.buffer.resize(PIECE_BYTES, 0);
        let result = self.source.read(&mut self.buffer);
        self.buffer.truncate(*result.as_ref().unwrap_or(&0));
        match result {
            Ok(0) => {
                self.has_ended = true;
                Ok(false)
            }
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) if e.kind() == ErrorKind::Interrupted => Ok(true),
            Err(e) => Err(stream::error("read the command's input", e)),
        }
    }
}

pub(super) struct Outward<'a> {
    /// `None` once the caller no longer reads. Further output is discarded.
    sink: Option<&'a mut dyn Sink>,
    /// `None` once the helper no longer writes.
    pipe: Option<OwnedFd>,
    buffer: Vec<u8>,
    at: usize,
}

impl<'a> Outward<'a> {
    /// Creates the pump of `sink` with its pipe. Also returns the end of the pipe that the helper
    /// writes.
    pub(super) fn new(sink: &'a mut dyn Sink) -> Result<(Self, OwnedFd)> {
        let (r, w) = pipe()?;
        Ok((
            Self {
                sink: Some(sink),
                pipe: Some(r),
                buffer: Vec::new(),
                at: 0,
            },
            w,
        ))
    }

    /// True if everything that the helper wrote has been delivered.
    pub(super) fn is_finished(&self) -> bool {
        self.pipe.is_none() && self.at == self.buffer.len()
    }

    pub(super) fn poll_fd(&self) -> Option<PollFd<'_>> {
        if self.at < self.buffer.len() {
            return Some(PollFd::new(self.sink.as_ref()?.fd()?, PollFlags::POLLOUT));
        }
        Some(PollFd::new(self.pipe.as_ref()?.as_fd(), PollFlags::POLLIN))
    }

    pub(super) fn turn(&mut self) -> Result<Turn> {
        let mut turn = Turn::default();
        for _ in 0..PIECES_PER_TURN {
            if self.at < self.buffer.len() {
                if !self.write(&mut turn)? {
                    return Ok(turn);
                }
                continue;
            }
            let Some(pipe) = &self.pipe else {
                return Ok(turn);
            };
            self.at = 0;
            self.buffer.resize(PIECE_BYTES, 0);
            let result = rustix::io::read(pipe, &mut self.buffer);
            self.buffer.truncate(result.unwrap_or(0));
            match result {
                Ok(0) => self.pipe = None,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(turn),
                Err(e) => return Err(Error::io("read the command's output from its helper", e)),
            }
        }
        turn.has_more = true;
        Ok(turn)
    }

    /// Writes to the sink, or discards the output if the caller no longer reads. Returns false if
    /// the sink accepts nothing now.
    fn write(&mut self, turn: &mut Turn) -> Result<bool> {
        let Some(sink) = &mut self.sink else {
            self.at = self.buffer.len();
            return Ok(true);
        };
        match sink.write(&self.buffer[self.at..]) {
            Ok(n) => {
                self.at += n;
                turn.progress |= n > 0;
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::BrokenPipe => self.sink = None,
            Err(e) => return Err(failed_sink(e)),
        }
        Ok(true)
    }
}

fn failed_sink(e: io::Error) -> Error {
    stream::error("write the command's output", e)
}

/// The helper's ends of the streams. The daemon closes its copies once it has passed them to the
/// helper.
#[derive(Default)]
pub(super) struct HelperEnds {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

/// The pumps of one session.
#[derive(Default)]
pub(super) struct Pumps<'a> {
    pub stdin: Option<Inward<'a>>,
    pub outputs: Vec<Outward<'a>>,
}

impl<'a> Pumps<'a> {
    pub(super) fn take_stdin(
        &mut self,
        source: Option<&'a mut dyn Source>,
        may_pass: bool,
        helper_ends: &mut HelperEnds,
    ) -> Result<Input> {
        let Some(source) = source else {
            return Ok(Input::Empty);
        };
        if let Some(pipe) = source.pipe().filter(|_| may_pass) {
            helper_ends.stdin = Some(clone(pipe)?);
            return Ok(Input::Direct);
        }
        let (inward, end) = Inward::new(source)?;
        self.stdin = Some(inward);
        helper_ends.stdin = Some(end);
        Ok(Input::Pumped)
    }

    pub(super) fn take_output(
        &mut self,
        sink: Option<&'a mut dyn Sink>,
        may_pass: bool,
    ) -> Result<Option<OwnedFd>> {
        let Some(sink) = sink else { return Ok(None) };
        if let Some(pipe) = sink.pipe().filter(|_| may_pass) {
            return Ok(Some(clone(pipe)?));
        }
        let (outward, end) = Outward::new(sink)?;
        self.outputs.push(outward);
        Ok(Some(end))
    }

    /// Delivers output from before the session broke, as far as the caller accepts it now.
    pub(super) fn deliver_rest(&mut self) {
        for output in &mut self.outputs {
            while output
                .turn()
                .is_ok_and(|turn| turn.progress || turn.has_more)
            {}
        }
    }
}

fn clone(fd: std::os::fd::BorrowedFd<'_>) -> Result<OwnedFd> {
    fd.try_clone_to_owned()
        .map_err(|e| Error::io("pass a stream to the helper process of a guest", e))
}
