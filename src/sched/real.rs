#![allow(clippy::disallowed_types)] // The items that the rest of fcd uses.
//! The operating system's scheduler and clocks.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

pub use parking_lot::{Condvar, Mutex, MutexGuard};
pub use std::collections::{HashMap, HashSet};
pub use std::sync::OnceLock;
pub use std::sync::atomic::AtomicBool;
pub use std::thread::{JoinHandle, Thread, ThreadId, current, park, park_timeout};
pub use std::time::Instant;

/// Starts a named thread.
#[allow(clippy::disallowed_methods)] // `host::thread`, which everybody calls, calls this.
pub fn spawn<T: Send + 'static>(
    name: &str,
    stack_bytes: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(stack_bytes)
        .spawn(body)
}

/// Returns the time since the epoch, or zero if the clock is set to before the epoch.
#[inline]
pub fn since_epoch() -> Duration {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
}

/// Fills the buffer with a simulation's random bytes. Returns false outside of simulations.
#[inline(always)]
pub fn fill_random(_bytes: &mut [u8]) -> bool {
    false
}

/// Waits until a read of this descriptor would not block. Returns false at the deadline. Does
/// nothing outside of simulations, where the read itself waits.
#[inline(always)]
pub fn before_read(_fd: BorrowedFd<'_>, _deadline: Instant) -> bool {
    true
}

/// A section of a fake that a simulated kill of the daemon does not cut in two.
#[cfg(any(test, feature = "fakes"))]
#[must_use = "dropping it ends the section"]
pub struct Whole;

#[cfg(any(test, feature = "fakes"))]
pub fn whole() -> Whole {
    Whole
}

/// Returns the time left in `poll`'s milliseconds, rounded up so that the last millisecond is not
/// spent spinning.
fn timeout_until(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else {
        return PollTimeout::NONE;
    };
    let left = deadline.saturating_duration_since(Instant::now());
    let ms = left.as_nanos().div_ceil(1_000_000);
    PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
}

/// Makes a callback that outlives its process run as a part of that process.
#[cfg(any(test, feature = "fakes"))]
pub fn bound<T>(callback: Box<dyn FnOnce(T) + Send>) -> Box<dyn FnOnce(T) + Send> {
    callback
}

/// Polls until a descriptor is ready, or for ever without a deadline. Returns how many are ready,
/// which is 0 only after the deadline. A signal does not end the wait.
pub fn poll_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<usize> {
    loop {
        match poll(fds, timeout_until(deadline)) {
            // One call of poll(2) waits for at most 24 days.
            Ok(0) if deadline.is_none_or(|d| Instant::now() < d) => {}
            Ok(ready) => return Ok(usize::try_from(ready).unwrap_or(0)),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// True if the descriptor is ready now.
pub fn is_ready(fd: BorrowedFd<'_>, events: PollFlags) -> bool {
    let mut fds = [PollFd::new(fd, events)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
}

/// A timer whose descriptor is readable after it has fired. Nothing reads from the descriptor.
pub struct Timer(TimerFd);

impl Timer {
    pub fn try_new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?))
    }

    /// Makes the timer fire after this time, which must not be zero.
    pub fn set(&self, after: Duration) -> io::Result<()> {
        let at = Expiration::OneShot(after.into());
        Ok(self.0.set(at, TimerSetTimeFlags::empty())?)
    }

    /// Stops the timer, and makes its descriptor unreadable.
    pub fn unset(&self) {
        // Fails only for a descriptor that is not a timer.
        let _ = self.0.unset();
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeout_is_rounded_up_and_bounded() {
        let now = Instant::now();
        assert_eq!(timeout_until(Some(now)), PollTimeout::ZERO);
        let far = now + Duration::from_secs(1 << 32);
        assert_eq!(timeout_until(Some(far)), PollTimeout::MAX);
        assert_eq!(timeout_until(None), PollTimeout::NONE);
        // Less than the second is left when the timeout is computed.
        let second = || timeout_until(Some(Instant::now() + Duration::from_secs(1)));
        assert!((0..1000).any(|_| second() == PollTimeout::from(1000u16)));
    }
}
