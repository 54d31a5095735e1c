//! Waits on descriptors: whatever may end the wait is in the set.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// The caller's connection, looked at for a hang-up only: a half-close after a whole line is none.
#[derive(Clone, Copy)]
pub struct Hangup<'a>(pub BorrowedFd<'a>);

/// The caller went away.
#[derive(Debug)]
pub struct Gone;

impl Hangup<'_> {
    /// Whether the peer has closed both directions, now.
    pub fn is_up(&self) -> bool {
        let mut fds = [PollFd::new(self.0, PollFlags::empty())];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
    }

    /// Waits until one of `fds` is readable, or the deadline: then false. `Gone` when the peer hung
    /// up first.
    pub fn wait(&self, fds: &[BorrowedFd<'_>], deadline: Option<Instant>) -> Result<bool, Gone> {
        loop {
            let mut set = vec![PollFd::new(self.0, PollFlags::empty())];
            set.extend(fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
            match poll(&mut set, timeout_until(deadline)) {
                Ok(0) if deadline.is_some_and(|d| Instant::now() >= d) => return Ok(false),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) if set[0].revents().is_some_and(|r| !r.is_empty()) => return Err(Gone),
                Ok(_) => return Ok(true),
                // ENOMEM, EINVAL: as good as a hang-up, the wait cannot go on.
                Err(_) => return Err(Gone),
            }
        }
    }
}

/// Waits until one is readable or the deadline has come.
pub fn poll_until(fds: &[BorrowedFd<'_>], deadline: Instant) {
    let mut set: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    while matches!(poll(&mut set, timeout_until(Some(deadline))), Ok(0) | Err(Errno::EINTR)) {
        if Instant::now() >= deadline {
            return;
        }
    }
}

/// Rounded up to a millisecond, so that a wait never spins; capped, so that it fits.
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
