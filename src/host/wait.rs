//! Waits in `poll` for descriptors, a cancel token and a deadline at once.

use crate::error::{Error, Kind};
use crate::locks::Cancel;
use crate::sched::Instant;
use crate::sched::is_ready;
use nix::poll::{PollFd, PollFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// The event that ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitResult {
    /// A descriptor is ready, or has an error or a hang-up.
    Ready,
    Deadline,
    Cancelled,
}

/// Polls until a descriptor is ready, or for ever without a deadline. Returns how many are ready,
/// which is 0 only after the deadline. A signal does not end the wait.
#[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
pub fn poll_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<usize> {
    crate::locks::may_block("poll");
    crate::sched::poll_until(fds, deadline)
}

/// Waits until one of the descriptors is ready, the deadline has passed, or the token fires. A
/// fired token takes precedence over a ready descriptor.
pub fn wait_any(
    fds: &[(BorrowedFd<'_>, PollFlags)],
    deadline: Instant,
    cancel: &Cancel,
) -> io::Result<WaitResult> {
    wait(fds, deadline, Some(cancel))
}

/// Waits like [`wait_any`], but ignores cancellation. Use it to clean up.
pub fn wait_uncancelled(
    fds: &[(BorrowedFd<'_>, PollFlags)],
    deadline: Instant,
) -> io::Result<WaitResult> {
    wait(fds, deadline, None)
}

fn wait(
    fds: &[(BorrowedFd<'_>, PollFlags)],
    deadline: Instant,
    cancel: Option<&Cancel>,
) -> io::Result<WaitResult> {
    let mut polled: Vec<_> = cancel
        .map(|c| PollFd::new(c.fd(), PollFlags::POLLIN))
        .into_iter()
        .collect();
    polled.extend(fds.iter().map(|(fd, flags)| PollFd::new(*fd, *flags)));
    let ready = poll_until(&mut polled, Some(deadline))?;
    Ok(match ready {
        _ if cancel.is_some_and(Cancel::is_cancelled) => WaitResult::Cancelled,
        0 => WaitResult::Deadline,
        _ => WaitResult::Ready,
    })
}

/// True if a read would not block because there are bytes, the end of the stream or an error.
pub fn is_readable(fd: impl AsFd) -> bool {
    is_ready(fd.as_fd(), PollFlags::POLLIN)
}

/// True if the peer has closed both directions, or the descriptor has an error. A half-close does
/// not count.
pub fn is_hung_up(fd: impl AsFd) -> bool {
    // Requesting no events still reports POLLHUP and POLLERR, but not POLLRDHUP.
    is_ready(fd.as_fd(), PollFlags::empty())
}

/// Makes reads and writes return `WouldBlock`, for every process that shares the open file
/// description.
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok(())
}

/// Sleeps for `duration`. Returns false if the token fired first.
pub fn sleep(duration: Duration, cancel: &Cancel) -> io::Result<bool> {
    Ok(wait_any(&[], Instant::now() + duration, cancel)? == WaitResult::Deadline)
}

/// Returns the error for work that was cancelled while `doing`.
pub fn cancelled(doing: &str, cancel: &Cancel) -> Error {
    cancelled_by(cancel).context(doing)
}

/// Returns the error for work that a token has cancelled. The error's source is the cause.
pub fn cancelled_by(cancel: &Cancel) -> Error {
    let error = Error::new(Kind::Cancelled, "cancelled");
    match cancel.cause() {
        Some(cause) => error.with_source(cause.clone()),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poll_waits_until_its_deadline() {
        let started = Instant::now();
        assert_eq!(
            poll_until(&mut [], Some(started + Duration::from_micros(1500))).unwrap(),
            0
        );
        assert!(started.elapsed() >= Duration::from_micros(1500));
    }

    #[test]
    fn half_close_is_not_a_hang_up() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(is_readable(&ours) && !is_hung_up(&ours));
        drop(theirs);
        assert!(is_hung_up(&ours));
    }

    #[test]
    fn nonblocking_read_of_empty_pipe_returns_at_once() {
        use std::io::Read;
        let (mut reader, _writer) = std::io::pipe().unwrap();
        set_nonblocking(&reader).unwrap();
        let e = reader.read(&mut [0]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn wait_reports_what_ended_it() {
        let cancel = Cancel::try_new().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let wait = |ms| {
            wait_any(
                &[(reader.as_fd(), PollFlags::POLLIN)],
                Instant::now() + Duration::from_millis(ms),
                &cancel,
            )
        };
        assert_eq!(wait(5).unwrap(), WaitResult::Deadline);
        assert!(!is_readable(&reader));
        drop(writer);
        assert_eq!(wait(10_000).unwrap(), WaitResult::Ready);
        assert!(is_readable(&reader));
        cancel.cancel(crate::locks::CancelCause::Requested);
        assert_eq!(wait(10_000).unwrap(), WaitResult::Cancelled);
        assert!(!sleep(Duration::from_secs(10), &cancel).unwrap());
        assert_eq!(
            cancelled("wait for x", &cancel).to_string(),
            "wait for x: cancelled: op cancel was requested"
        );
    }
}
