//! Virtual time, timers and random bytes.

use super::state::{Sim, TimerEntry, with_me};
use crate::sched::real;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// The time of day when a simulation begins: 2026-01-01.
const BEGIN_S: u64 = 1_767_225_600;

/// A moment of virtual time in a simulation, and of real time outside. It has the methods of
/// [`std::time::Instant`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Instant(std::time::Instant);

impl Instant {
    pub fn now() -> Self {
        let simulated = with_me(|me| me.sim.begin + me.sim.core().now);
        Self(simulated.unwrap_or_else(std::time::Instant::now))
    }
    pub(super) fn real(self) -> std::time::Instant {
        self.0
    }
    /// Returns the time since the simulation began.
    pub(super) fn offset(self, sim: &Sim) -> Duration {
        self.0.saturating_duration_since(sim.begin)
    }
    pub fn elapsed(&self) -> Duration {
        Self::now().saturating_duration_since(*self)
    }
    pub fn duration_since(&self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }
    pub fn saturating_duration_since(&self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }
    pub fn checked_duration_since(&self, earlier: Self) -> Option<Duration> {
        self.0.checked_duration_since(earlier.0)
    }
    pub fn checked_add(&self, duration: Duration) -> Option<Self> {
        self.0.checked_add(duration).map(Self)
    }
    pub fn checked_sub(&self, duration: Duration) -> Option<Self> {
        self.0.checked_sub(duration).map(Self)
    }
}

impl Add<Duration> for Instant {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0 + duration)
    }
}
impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, duration: Duration) {
        self.0 += duration;
    }
}
impl Sub<Duration> for Instant {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        Self(self.0 - duration)
    }
}
impl SubAssign<Duration> for Instant {
    fn sub_assign(&mut self, duration: Duration) {
        self.0 -= duration;
    }
}
impl Sub for Instant {
    type Output = Duration;
    fn sub(self, earlier: Self) -> Duration {
        self.duration_since(earlier)
    }
}

pub fn since_epoch() -> Duration {
    with_me(|me| Duration::from_secs(BEGIN_S) + me.sim.core().now).unwrap_or_else(real::since_epoch)
}

/// Fills the buffer with random bytes that the seed determines. Returns false outside of
/// simulations.
pub fn fill_random(bytes: &mut [u8]) -> bool {
    with_me(|me| {
        let random = &mut me.sim.core().bytes;
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
        }
    })
    .is_some()
}

/// A timer whose descriptor is readable after it has fired.
pub struct Timer(Kind);

enum Kind {
    Real(real::Timer),
    Simulated(Arc<EventFd>),
}

impl Timer {
    pub fn try_new() -> io::Result<Self> {
        let make = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self(match with_me(|_| ()) {
            None => Kind::Real(real::Timer::try_new()?),
            Some(()) => Kind::Simulated(Arc::new(make()?)),
        }))
    }

    pub fn set(&self, after: Duration) -> io::Result<()> {
        let event = match &self.0 {
            Kind::Real(timer) => return timer.set(after),
            Kind::Simulated(event) => event,
        };
        self.unset();
        with_me(|me| {
            let mut core = me.sim.core();
            let due = core.now + after;
            let event = Arc::downgrade(event);
            core.timers.push(TimerEntry { due, event });
        });
        Ok(())
    }

    pub fn unset(&self) {
        match &self.0 {
            Kind::Real(timer) => timer.unset(),
            Kind::Simulated(event) => {
                // EAGAIN means that it has not fired.
                let _ = event.read();
                let is_it = |t: &TimerEntry| std::ptr::eq(t.event.as_ptr(), Arc::as_ptr(event));
                with_me(|me| me.sim.core().timers.retain(|t| !is_it(t)));
            }
        }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Real(timer) => timer.fd(),
            Kind::Simulated(event) => event.as_fd(),
        }
    }
}
