//! Waits for a guest. Everything that can end a wait is part of the same `poll`.

use crate::error::{Error, Kind, Result};
use crate::host::wait::{cancelled_by, poll_until};
use crate::locks::{Cancel, CancelCause};
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// The events that can end a wait early. If several apply at once, the first of these is reported:
/// cancel, hang-up, deadline, idle limit.
#[derive(Clone)]
pub(super) struct Wait<'a> {
    cancel: &'a Cancel,
    hangup: Option<BorrowedFd<'a>>,
    deadline: Option<Instant>,
    idle: Option<Duration>,
    progressed: Instant,
    is_tightened: bool,
}

impl<'a> Wait<'a> {
    pub(super) fn new(cancel: &'a Cancel) -> Self {
        Self {
            cancel,
            hangup: None,
            deadline: None,
            idle: None,
            progressed: Instant::now(),
            is_tightened: false,
        }
    }
    #[must_use]
    pub(super) fn deadline(mut self, deadline: Option<Instant>) -> Self {
        self.deadline = deadline;
        self
    }
    #[must_use]
    pub(super) fn idle(mut self, idle: Option<Duration>) -> Self {
        self.idle = idle;
        self
    }
    #[must_use]
    pub(super) fn hangup(mut self, hangup: Option<BorrowedFd<'a>>) -> Self {
        self.hangup = hangup;
        self
    }

    /// Returns the same wait with an earlier deadline.
    #[must_use]
    pub(super) fn tighten(&self, deadline: Instant) -> Self {
        let is_nearer = self.deadline.is_none_or(|d| deadline < d);
        Self {
            deadline: Some(if is_nearer {
                deadline
            } else {
                self.deadline.unwrap_or(deadline)
            }),
            is_tightened: is_nearer,
            ..self.clone()
        }
    }

    /// Returns a wait with only the cancel token and this deadline.
    #[must_use]
    pub(super) fn without_ends(&self, deadline: Instant) -> Self {
        Wait::new(self.cancel).deadline(Some(deadline))
    }

    /// True if the deadline comes from [`Wait::tighten`].
    pub(super) fn is_tightened(&self) -> bool {
        self.is_tightened
    }

    /// Restarts the idle limit after a byte has moved.
    pub(super) fn progress(&mut self) {
        self.progressed = Instant::now();
    }

    /// Returns `cancelled`, `timeout` or `transfer_idle` if the wait must end.
    pub(super) fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(cancelled_by(self.cancel));
        }
        let now = Instant::now();
        if self.deadline.is_some_and(|d| d <= now) {
            return Err(Error::new(Kind::Timeout, "the deadline passed"));
        }
        if let Some(idle) = self
            .idle
            .filter(|i| now.duration_since(self.progressed) >= *i)
        {
            return Err(Error::new(
                Kind::TransferIdle,
                format!("not a byte moved for {} s", idle.as_secs_f32()),
            )
            .hint(
                "check that both the client and the guest still read and write, then try again",
            ));
        }
        Ok(())
    }

    /// Waits until one of `fds` is ready, `until` is reached, or something ends the wait. Returns
    /// which of `fds` are ready or have failed, or the error of whatever ended the wait.
    pub(super) fn poll(&self, fds: &[PollFd<'_>], until: Option<Instant>) -> Result<Vec<bool>> {
        let mut all: Vec<PollFd<'_>> = fds.to_vec();
        all.push(PollFd::new(self.cancel.fd(), PollFlags::POLLIN));
        // Requesting no events still reports POLLHUP and POLLERR, but not a half-close (POLLRDHUP).
        all.extend(self.hangup.map(|fd| PollFd::new(fd, PollFlags::empty())));
        let ends = [self.deadline, self.idle.map(|i| self.progressed + i), until];
        poll_until(&mut all, ends.into_iter().flatten().min())
            .map_err(|e| Error::io("wait for the guest", e))?;
        self.check()?;
        let has_hung_up = |fd: &PollFd<'_>| {
            fd.revents()
                .is_some_and(|r| r.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
        };
        if self.hangup.is_some() && all.last().is_some_and(has_hung_up) {
            return Err(hung_up());
        }
        Ok(all[..fds.len()]
            .iter()
            .map(|fd| fd.any().unwrap_or(true))
            .collect())
    }
}

/// Builds the error for a wait that ended because the caller hung up.
pub(super) fn hung_up() -> Error {
    Error::new(Kind::Cancelled, "cancelled").with_source(CancelCause::CallerHungUp)
}

/// True if [`Wait::poll`] failed because the caller hung up.
pub(super) fn is_hang_up(error: &Error) -> bool {
    error.source_as() == Some(&CancelCause::CallerHungUp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Shutdown;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn soon(ms: u64) -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(ms))
    }

    #[test]
    fn poll_half_close_is_not_a_hang_up_and_does_not_spin() {
        let cancel = Cancel::try_new().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let wait = Wait::new(&cancel).hangup(Some(ours.as_fd()));
        let (started, until) = (Instant::now(), soon(40));
        wait.poll(&[], until).unwrap();
        assert!(
            started.elapsed() >= Duration::from_millis(40),
            "it came back at once"
        );
        drop(theirs);
        let e = wait.poll(&[], soon(10_000)).unwrap_err();
        assert_eq!(
            (e.kind(), e.to_string().as_str()),
            (Kind::Cancelled, "cancelled: the caller hung up")
        );
        assert!(is_hang_up(&e) && is_hang_up(&e.context("run a command")));
    }

    #[test]
    fn poll_reports_a_distinct_kind_for_each_end() {
        let cancel = Cancel::try_new().unwrap();
        let wait = Wait::new(&cancel).idle(Some(Duration::from_millis(20)));
        assert_eq!(wait.poll(&[], None).unwrap_err().kind(), Kind::TransferIdle);
        let wait = Wait::new(&cancel).deadline(soon(20));
        assert_eq!(wait.poll(&[], None).unwrap_err().kind(), Kind::Timeout);
        cancel.cancel(crate::locks::CancelCause::VmDeleted);
        let e = wait.poll(&[], None).unwrap_err();
        assert_eq!(e.to_string(), "cancelled: the VM was deleted");
        // The error's source decides, not its text.
        assert!(
            !is_hang_up(&e)
                && !is_hang_up(&Error::new(
                    Kind::Cancelled,
                    "cancelled: the caller hung up"
                ))
        );
    }
}
