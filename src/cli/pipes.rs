//! Pipes to the daemon. Our ends are non-blocking, so that a thread waiting on one can be
//! cancelled.

use crate::error::{Error, Result};
use crate::host::wait::{poll_until, set_nonblocking};
use crate::locks::{Cancel, CancelCause};
use nix::poll::{PollFd, PollFlags};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

/// Our end of a pipe. Reads and writes wait for the other end. Once `cancel` fires they fail with
/// `ErrorKind::ConnectionAborted`.
pub(super) struct End {
    fd: OwnedFd,
    cancel: Cancel,
    is_unread: bool,
}

/// Creates a pipe and returns our write end and the daemon's read end.
pub(super) fn to_daemon(cancel: &Cancel) -> Result<(End, OwnedFd)> {
    let (reader, writer) = io::pipe().map_err(|e| Error::io("create a pipe", e))?;
    Ok((End::new(writer.into(), cancel)?, reader.into()))
}

/// Creates a pipe and returns our read end and the daemon's write end.
pub(super) fn from_daemon(cancel: &Cancel) -> Result<(End, OwnedFd)> {
    let (reader, writer) = io::pipe().map_err(|e| Error::io("create a pipe", e))?;
    Ok((End::new(reader.into(), cancel)?, writer.into()))
}

impl End {
    // The two ends have separate file descriptions, so O_NONBLOCK affects only ours.
    fn new(fd: OwnedFd, cancel: &Cancel) -> Result<Self> {
        set_nonblocking(&fd).map_err(|e| Error::io("set up a pipe", e))?;
        Ok(Self {
            fd,
            cancel: cancel.clone(),
            is_unread: false,
        })
    }

    /// True once a write has found that the daemon closed its end.
    pub(super) fn is_unread(&self) -> bool {
        self.is_unread
    }
}

impl Read for End {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(&self.fd, &mut *buffer) {
                Err(rustix::io::Errno::AGAIN) => {
                    wait(self.fd.as_fd(), PollFlags::POLLIN, &self.cancel, None)?
                }
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }
}

impl Write for End {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(&self.fd, bytes) {
                Err(rustix::io::Errno::AGAIN) => {
                    wait(self.fd.as_fd(), PollFlags::POLLOUT, &self.cancel, None)?
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    self.is_unread |= e == rustix::io::Errno::PIPE;
                    return Err(e.into());
                }
                Ok(n) => return Ok(n),
            }
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opens a file of the caller. Opening a FIFO does not wait for its writer; [`Stoppable`] does.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// One of the caller's streams (a terminal, a pipe, a file) whose reads can be cancelled.
pub(super) struct Stoppable {
    file: File,
    cancel: Cancel,
}

impl Stoppable {
    pub(super) fn new(file: File, cancel: &Cancel) -> Self {
        Self {
            file,
            cancel: cancel.clone(),
        }
    }
}

impl Read for Stoppable {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            wait(self.file.as_fd(), PollFlags::POLLIN, &self.cancel, None)?;
            match self.file.read(buffer) {
                // Another process that shares the file description made it non-blocking, and read
                // first.
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                other => return other,
            }
        }
    }
}

fn stopped(cancel: &Cancel) -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        cancel.cause().cloned().unwrap_or(CancelCause::CommandEnded),
    )
}

/// Waits until `fd` is ready. Fails with `ConnectionAborted` when the token fires and with
/// `TimedOut` at the deadline.
pub(super) fn wait(
    fd: BorrowedFd<'_>,
    flags: PollFlags,
    cancel: &Cancel,
    deadline: Option<Instant>,
) -> io::Result<()> {
    let mut fds = [
        PollFd::new(fd, flags),
        PollFd::new(cancel.fd(), PollFlags::POLLIN),
    ];
    match poll_until(&mut fds, deadline)? {
        _ if cancel.is_cancelled() => Err(stopped(cancel)),
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipe_wait_ends_when_cancelled() {
        let cancel = Cancel::try_new().unwrap();
        let (mut ours, _theirs) = from_daemon(&cancel).unwrap();
        let (mut full, _unread) = to_daemon(&cancel).unwrap();
        let token = cancel.clone();
        let stopper =
            crate::host::thread::spawn("stopper", move || token.cancel(CancelCause::CommandEnded))
                .unwrap();
        let e = full.write_all(&vec![0; 1 << 20]).unwrap_err();
        assert_eq!(
            (e.kind(), e.to_string().as_str()),
            (io::ErrorKind::ConnectionAborted, "the command has ended")
        );
        assert_eq!(
            ours.read(&mut [0; 8]).unwrap_err().kind(),
            io::ErrorKind::ConnectionAborted
        );
        stopper.join().unwrap();
    }

    #[test]
    fn pipe_passes_bytes_and_end() {
        let cancel = Cancel::try_new().unwrap();
        let (mut ours, theirs) = from_daemon(&cancel).unwrap();
        File::from(theirs).write_all(b"a\0b").unwrap();
        let mut all = Vec::new();
        ours.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"a\0b");
    }
}
