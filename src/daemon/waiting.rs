//! Waits on descriptors. Everything that may end the wait is among them.

use crate::error::{Error, Kind};
use crate::locks::CancelCause;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// The caller's connection, watched for a hang-up only. A half-close after a complete line is not a
/// hang-up.
#[derive(Clone, Copy)]
pub struct Hangup<'a>(pub BorrowedFd<'a>);

/// The caller hung up.
#[derive(Debug)]
pub struct Gone;

impl From<Gone> for Error {
    fn from(_: Gone) -> Self {
        Error::new(Kind::Cancelled, CancelCause::CallerHungUp.to_string())
    }
}

impl Hangup<'_> {
    /// True if the peer has closed both directions.
    pub fn is_up(&self) -> bool {
        let mut fds = [PollFd::new(self.0, PollFlags::empty())];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
    }

    /// Waits until one of `fds` is readable. Returns false at the deadline, and `Gone` if the peer
    /// hung up first.
    pub fn wait(&self, fds: &[BorrowedFd<'_>], deadline: Option<Instant>) -> Result<bool, Gone> {
        loop {
            let mut set = vec![PollFd::new(self.0, PollFlags::empty())];
            set.extend(fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
            match poll(&mut set, timeout_until(deadline)) {
                Ok(0) if deadline.is_some_and(|d| Instant::now() >= d) => return Ok(false),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) if set[0].revents().is_some_and(|r| !r.is_empty()) => return Err(Gone),
                Ok(_) => return Ok(true),
                // ENOMEM or EINVAL: the wait cannot continue, so it ends as after a hang-up.
                Err(_) => return Err(Gone),
            }
        }
    }
}

/// Waits until one of `fds` is readable, or until the deadline.
pub fn poll_until(fds: &[BorrowedFd<'_>], deadline: Instant) {
    let mut set: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    while matches!(
        poll(&mut set, timeout_until(Some(deadline))),
        Ok(0) | Err(Errno::EINTR)
    ) {
        if Instant::now() >= deadline {
            return;
        }
    }
}

/// Rounds up to a millisecond so that a wait never spins, and limits the timeout so that it fits.
fn timeout_until(deadline: Option<Instant>) -> PollTimeout {
    const CAP: Duration = Duration::from_secs(3600);
    match deadline {
        None => PollTimeout::NONE,
        Some(d) => {
            let left = d.saturating_duration_since(Instant::now()).min(CAP);
            PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
        }
    }
}
