//! Waits in `poll` for descriptors, a cancel token and a deadline at once.

use crate::error::{Error, Kind};
use crate::locks::Cancel;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitResult {
    /// A descriptor is ready, or has an error or a hang-up.
    Ready,
    Deadline,
    Cancelled,
}

/// The time left in `poll`'s milliseconds, rounded up so that the last one is not spent spinning.
pub fn timeout_until(deadline: Instant) -> PollTimeout {
    let left = deadline.saturating_duration_since(Instant::now());
    let ms = left.as_nanos().div_ceil(1_000_000);
    PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
}

/// Waits until one of the descriptors is ready. A fired token takes precedence over a ready
/// descriptor.
pub fn wait_any(
    fds: &[(BorrowedFd<'_>, PollFlags)],
    deadline: Instant,
    cancel: &Cancel,
) -> io::Result<WaitResult> {
    wait(fds, deadline, Some(cancel))
}

/// Like [`wait_any`], but ignores cancellation. For cleaning up.
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
    loop {
        let mut polled: Vec<_> = cancel
            .map(|c| PollFd::new(c.fd(), PollFlags::POLLIN))
            .into_iter()
            .collect();
        polled.extend(fds.iter().map(|(fd, flags)| PollFd::new(*fd, *flags)));
        let ready = match poll(&mut polled, timeout_until(deadline)) {
            Ok(n) => n,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        };
        if cancel.is_some_and(Cancel::is_cancelled) {
            return Ok(WaitResult::Cancelled);
        }
        if ready > 0 {
            return Ok(WaitResult::Ready);
        }
        if Instant::now() >= deadline {
            return Ok(WaitResult::Deadline);
        }
    }
}

/// True if a read would not block because there are bytes, the end of the stream or an error.
pub fn is_readable(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
}

/// Sleeps for `duration`. Returns false if the token fired first.
pub fn sleep(duration: Duration, cancel: &Cancel) -> io::Result<bool> {
    Ok(wait_any(&[], Instant::now() + duration, cancel)? == WaitResult::Deadline)
}

/// The error for work that was cancelled while `doing`.
pub fn cancelled(doing: &str, cancel: &Cancel) -> Error {
    cancelled_by(cancel).context(doing)
}

/// The error for work that a token has cancelled. Its source is the cause.
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
            "wait for x: cancelled: op cancel was asked for"
        );
    }
}
