use super::{check, rank::Rank};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::time::Instant;

pub struct Mutex<T> {
    rank: Rank,
    inner: parking_lot::Mutex<T>,
}

pub struct MutexGuard<'a, T> {
    inner: parking_lot::MutexGuard<'a, T>,
    token: check::Token,
    _not_send: PhantomData<*const ()>,
}

impl<T> Mutex<T> {
    pub const fn new(rank: Rank, value: T) -> Self {
        Self { rank, inner: parking_lot::Mutex::new(value) }
    }
    #[cfg_attr(debug_assertions, track_caller)]
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let token = check::acquire(self.rank, &(), false);
        MutexGuard { inner: self.inner.lock(), token, _not_send: PhantomData }
    }
}
impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}
impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// Always timed, always in a predicate loop.
#[derive(Default)]
pub struct Condvar(parking_lot::Condvar);

impl Condvar {
    pub const fn new() -> Self {
        Self(parking_lot::Condvar::new())
    }
    /// Waits while `condition` holds. False when the deadline came first.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn wait_while<T>(&self, guard: &mut MutexGuard<'_, T>, deadline: Instant, condition: impl FnMut(&mut T) -> bool) -> bool {
        check::check_wait(Rank::CondWait, &guard.token);
        !self.0.wait_while_until(&mut guard.inner, condition, deadline).timed_out()
    }
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// A virtual lock: this thread is about to block in the way that the rank names.
pub struct Region {
    _token: check::Token,
    _not_send: PhantomData<*const ()>,
}

#[cfg_attr(debug_assertions, track_caller)]
pub fn region(rank: Rank) -> Region {
    Region { _token: check::acquire(rank, &(), false), _not_send: PhantomData }
}
