//! Checks the FIFOs that callers pass and reopens them for fcd's own use.

use crate::error::{Error, Kind, Result};
use crate::host::wait::is_hung_up;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// We read; the caller passed the read end.
    Read,
    /// We write; the caller passed the write end.
    Write,
}

impl Direction {
    fn access(self) -> OFlags {
        match self {
            Direction::Read => OFlags::RDONLY,
            Direction::Write => OFlags::WRONLY,
        }
    }
    fn end(self) -> &'static str {
        match self {
            Direction::Read => "read end",
            Direction::Write => "write end",
        }
    }
}

/// Accepts the end of a FIFO from the caller and reopens it non-blocking, so that neither side's
/// flags affect the other's.
///
/// Returns `invalid_argument` if the descriptor is not a FIFO or is the wrong end, and `cancelled`
/// if nobody reads the FIFO any more. The access mode must match exactly. The kernel checks a
/// reopen through `/proc/self/fd` against the daemon's rights, so without this check the daemon
/// could gain access that the caller's descriptor did not give (an `O_PATH` descriptor gives none).
pub fn accept(fd: OwnedFd, direction: Direction) -> Result<OwnedFd> {
    crate::locks::may_block("file access");
    let wanted = direction.end();
    let refused = |what: &str| {
        Error::invalid(format!(
            "expected the {wanted} of a fifo, but the passed descriptor is {what}"
        ))
        .hint("pass one end of pipe(2); fcctl does")
    };
    let stat = rustix::fs::fstat(&fd).map_err(|e| Error::io("inspect the passed descriptor", e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo {
        return Err(refused("not a fifo"));
    }
    let flags =
        rustix::fs::fcntl_getfl(&fd).map_err(|e| Error::io("inspect the passed descriptor", e))?;
    if flags.contains(OFlags::PATH) || flags & OFlags::ACCMODE != direction.access() {
        return Err(refused("not open in that direction"));
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let own = rustix::fs::open(
        path.as_str(),
        direction.access() | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY,
        Mode::empty(),
    );
    let unread = || {
        Error::new(
            Kind::Cancelled,
            "cancelled: nobody reads the passed fifo any more",
        )
    };
    let own = own.map_err(|e| match e {
        // fifo(7): without a reader, a write end cannot be opened without blocking.
        Errno::NXIO => unread(),
        e => Error::io("open the passed fifo", e),
    })?;
    // A pipe from pipe(2) can be reopened without a reader, but poll(2) reports that the reader is
    // gone.
    if direction == Direction::Write && is_hung_up(&own) {
        return Err(unread());
    }
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC).unwrap()
    }

    fn kind(fd: OwnedFd, direction: Direction) -> Kind {
        accept(fd, direction).unwrap_err().kind()
    }

    #[test]
    fn fifo_ends_are_accepted_and_only_own_end_is_non_blocking() {
        let (r, w) = pipe();
        let r_kept = r.try_clone().unwrap();
        let ours = accept(r, Direction::Read).unwrap();
        assert_eq!(rustix::io::read(&ours, &mut [0; 8]), Err(Errno::AGAIN));
        assert!(
            !rustix::fs::fcntl_getfl(&r_kept)
                .unwrap()
                .contains(OFlags::NONBLOCK)
        );
        let w = accept(w, Direction::Write).unwrap();
        assert_eq!(rustix::io::write(&w, b"hello"), Ok(5));
        let mut buffer = [0; 8];
        assert_eq!(rustix::io::read(&ours, &mut buffer), Ok(5));
        drop(w);
        assert_eq!(
            rustix::io::read(&ours, &mut buffer),
            Ok(0),
            "the last writer's end is seen"
        );
    }

    #[test]
    fn other_descriptor_than_fifo_is_refused() {
        let (r, w) = pipe();
        assert_eq!(kind(r, Direction::Write), Kind::InvalidArgument);
        assert_eq!(kind(w, Direction::Read), Kind::InvalidArgument);
        let file = tempfile::tempfile().unwrap();
        assert_eq!(kind(file.into(), Direction::Read), Kind::InvalidArgument);
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(kind(socket.into(), Direction::Read), Kind::InvalidArgument);
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(kind(null.into(), Direction::Read), Kind::InvalidArgument);
    }

    #[test]
    fn fifo_descriptor_without_access_gains_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        let fd = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        assert_eq!(kind(fd, Direction::Read), Kind::InvalidArgument);
    }

    #[test]
    fn fifo_without_a_reader_is_cancelled() {
        let (r, w) = pipe();
        drop(r);
        assert_eq!(kind(w, Direction::Write), Kind::Cancelled);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        let r = rustix::fs::open(
            &path,
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap();
        let w = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        drop(r);
        assert_eq!(kind(w, Direction::Write), Kind::Cancelled);
    }
}
