//! Reads one line at a time from a socket, with the descriptors that come with its first byte.

use super::{FDS_MAX, FRAME_BYTES_MAX, Limits};
use crate::sched::Instant;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const READ_BYTES: usize = 4096;
/// The capacity to which the buffer is reduced after a longer line.
const KEPT_BYTES: usize = 64 * 1024;
/// How much later than its deadline a read may end.
const SLACK: Duration = Duration::from_millis(1);

pub(super) struct LineReader<'a> {
    socket: &'a UnixStream,
    buffer: Vec<u8>,
    /// The current read timeout of the socket.
    timeout: Option<Duration>,
}

/// The descriptors that came with a line.
#[derive(Debug, Default)]
pub(super) struct Descriptors {
    pub(super) fds: Vec<OwnedFd>,
    /// True if there were more than [`FDS_MAX`] descriptors, or if some did not come with the first
    /// byte. All of them have then been closed.
    pub(super) wrong: bool,
}

#[derive(Debug)]
pub(super) enum Incoming {
    /// A complete line. It is in [`LineReader::line`], without its newline.
    Line(Descriptors),
    /// The connection ended between two lines.
    End,
    /// The connection ended within a line.
    CutOff,
    TooLong,
    /// A line did not end in time.
    Late,
    /// No line began in time.
    Idle,
    Broken(io::Error),
}

impl<'a> LineReader<'a> {
    pub(super) fn new(socket: &'a UnixStream) -> Self {
        Self {
            socket,
            buffer: Vec::new(),
            timeout: None,
        }
    }

    pub(super) fn line(&self) -> &[u8] {
        &self.buffer
    }

    pub(super) fn next(&mut self, limits: &Limits) -> Incoming {
        self.buffer.clear();
        self.buffer.shrink_to(KEPT_BYTES);
        let mut descriptors = Descriptors::default();
        let mut deadline = Instant::now() + limits.idle;
        loop {
            if self.buffer.len() == FRAME_BYTES_MAX {
                return Incoming::TooLong;
            }
            let begun = !self.buffer.is_empty();
            match self.read_some(deadline, &mut descriptors) {
                Ok(0) => {
                    return if begun {
                        Incoming::CutOff
                    } else {
                        Incoming::End
                    };
                }
                Ok(_) if self.buffer.last() == Some(&b'\n') => {
                    self.buffer.pop();
                    return Incoming::Line(descriptors);
                }
                Ok(_) if !begun => deadline = Instant::now() + limits.line,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return if begun {
                        Incoming::Late
                    } else {
                        Incoming::Idle
                    };
                }
                Err(e) => return Incoming::Broken(e),
            }
        }
    }

    /// Reads the available bytes, but never a byte of the next line, because the descriptors of
    /// that line come with its first byte.
    fn read_some(&mut self, deadline: Instant, descriptors: &mut Descriptors) -> io::Result<usize> {
        let old = self.buffer.len();
        let room = old.clamp(READ_BYTES, KEPT_BYTES).min(FRAME_BYTES_MAX - old);
        if self.buffer.capacity() < old + room {
            // Reserve exactly, so that the buffer never grows beyond the longest line.
            let capacity = (2 * old).clamp(old + room, FRAME_BYTES_MAX);
            self.buffer.reserve_exact(capacity - old);
        }
        self.buffer.resize(old + room, 0);
        let got = self.fill(old, deadline, descriptors);
        self.buffer.truncate(old + *got.as_ref().unwrap_or(&0));
        got
    }

    fn fill(
        &mut self,
        old: usize,
        deadline: Instant,
        descriptors: &mut Descriptors,
    ) -> io::Result<usize> {
        let space = &mut self.buffer[old..];
        let seen = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            // Set the timeout again only if it is too long or far too short, so that most calls
            // need no extra system call.
            if self
                .timeout
                .is_none_or(|set| set > left + SLACK || set < left / 2)
            {
                self.socket.set_read_timeout(Some(left))?;
                self.timeout = Some(left);
            }
            if !crate::sched::before_read(self.socket.as_fd(), deadline) {
                continue;
            }
            match rustix::net::recv(self.socket, &mut *space, RecvFlags::PEEK) {
                Ok((_, n)) => break n,
                Err(rustix::io::Errno::INTR) => {}
                // The timeout may have been set for a shorter wait.
                Err(rustix::io::Errno::AGAIN) => self.timeout = None,
                Err(e) => return Err(e.into()),
            }
        };
        let wanted = space[..seen]
            .iter()
            .position(|b| *b == b'\n')
            .map_or(seen, |at| at + 1);
        if wanted == 0 {
            return Ok(0);
        }
        take(self.socket, &mut space[..wanted], old == 0, descriptors)
    }
}

/// Reads up to `space.len()` bytes, which are known to be available, and the descriptors that come
/// with them.
fn take(
    socket: &UnixStream,
    space: &mut [u8],
    first: bool,
    descriptors: &mut Descriptors,
) -> io::Result<usize> {
    let mut control = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut control);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(space)], &mut control, flags)?;
    let mut fds = Vec::new();
    for ancillary in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = ancillary {
            fds.extend(passed);
        }
    }
    // The flag means that the descriptors were truncated: there were more than fit, or this process
    // has too many open. The kernel has then closed the rest.
    let cut = message.flags.contains(ReturnFlags::CTRUNC);
    if cut || fds.len() > FDS_MAX || (!first && !fds.is_empty()) {
        descriptors.wrong = true;
    }
    if first {
        descriptors.fds = fds;
    }
    if descriptors.wrong {
        descriptors.fds.clear();
    }
    Ok(message.bytes)
}
