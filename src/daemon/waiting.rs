//! Waits on descriptors. Everything that may end a wait has a descriptor.

use crate::error::{Error, Kind};
use crate::host::wait::poll_until;
use crate::locks::CancelCause;
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use std::os::fd::BorrowedFd;

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
    /// Waits until one of `fds` is readable. Returns false at the deadline, and `Gone` if the peer
    /// hung up first.
    pub fn wait(&self, fds: &[BorrowedFd<'_>], deadline: Option<Instant>) -> Result<bool, Gone> {
        let mut set = vec![PollFd::new(self.0, PollFlags::empty())];
        set.extend(fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
        match poll_until(&mut set, deadline) {
            Ok(0) => Ok(false),
            Ok(_) if set[0].revents().is_none_or(|r| r.is_empty()) => Ok(true),
            // The peer has hung up, or `poll` has failed (ENOMEM or EINVAL). After a failure the
            // wait cannot continue, so it ends as after a hang-up.
            Ok(_) | Err(_) => Err(Gone),
        }
    }
}
