//! Sources and sinks that never block: over descriptors, memory and the framed workspace streams.

mod chunk;
pub mod fifo;

pub use chunk::{ChunkSink, ChunkSource};

use super::wait::Wait;
use super::{Sink, Source};
use crate::error::{Error, Result};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Reads a descriptor that is already non-blocking, such as one from [`fifo::accept`].
pub struct FdSource(OwnedFd);

impl FdSource {
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl Source for FdSource {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
    fn pipe(&self) -> Option<BorrowedFd<'_>> {
        self.fd()
    }
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        retry(|| rustix::io::read(&self.0, &mut *buffer))
    }
}

/// Writes to a descriptor that is already non-blocking.
pub struct FdSink(OwnedFd);

impl FdSink {
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl Sink for FdSink {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
    fn pipe(&self) -> Option<BorrowedFd<'_>> {
        self.fd()
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        retry(|| rustix::io::write(&self.0, bytes))
    }
}

/// Reads a source to its end. Fails with `invalid_argument` if the source has more than `bytes_max`
/// bytes. Also fails at a cancel, the caller's hang-up or the deadline.
pub fn read_to_end(
    source: &mut dyn Source,
    bytes_max: usize,
    deadline: Instant,
    hangup: BorrowedFd<'_>,
    cancel: &Cancel,
) -> Result<Vec<u8>> {
    const PIECE_BYTES: usize = 64 * 1024;
    let wait = Wait::new(cancel)
        .deadline(Some(deadline))
        .hangup(Some(hangup));
    let (mut all, mut piece) = (Vec::new(), vec![0; PIECE_BYTES]);
    loop {
        match source.read(&mut piece) {
            Ok(0) => return Ok(all),
            Ok(n) if all.len() + n > bytes_max => {
                return Err(Error::invalid(format!(
                    "it has more than {bytes_max} bytes"
                )));
            }
            Ok(n) => all.extend_from_slice(&piece[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let fd = source.fd().map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                wait.poll(fd.as_slice(), None)?;
            }
            Err(e) => return Err(Error::io("read a pipe", e)),
        }
    }
}

pub(super) fn retry(mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(Into::into),
        }
    }
}

/// A source of bytes in memory. It is always ready.
pub struct BytesSource {
    bytes: Vec<u8>,
    at: usize,
}

impl BytesSource {
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self {
            bytes: bytes.into(),
            at: 0,
        }
    }
}

impl Source for BytesSource {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = buffer.len().min(self.bytes.len() - self.at);
        buffer[..n].copy_from_slice(&self.bytes[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

/// A sink that keeps the first `bytes_max` bytes and drops the rest.
pub struct VecSink {
    pub bytes: Vec<u8>,
    pub truncated: bool,
    bytes_max: usize,
}

impl VecSink {
    pub fn new(bytes_max: usize) -> Self {
        Self {
            bytes: Vec::new(),
            truncated: false,
            bytes_max,
        }
    }
}

impl Sink for VecSink {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.bytes_max - self.bytes.len();
        self.bytes
            .extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.truncated |= bytes.len() > room;
        Ok(bytes.len())
    }
}
