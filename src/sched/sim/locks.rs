//! Mutexes, condition variables and cells that are filled once.

use super::state::{Me, On, with_me};
use super::time::Instant;
use super::turn::{begin_section, end_section};
use std::ops::{Deref, DerefMut};

/// A mutex with parking_lot's signatures.
#[derive(Default)]
pub struct Mutex<T>(parking_lot::Mutex<T>);

pub struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
    /// `None` while a condition wait has released the mutex.
    inner: Option<parking_lot::MutexGuard<'a, T>>,
}

fn address<T>(of: &T) -> usize {
    std::ptr::from_ref(of).cast::<()>() as usize
}

impl<T> Mutex<T> {
    pub const fn new(value: T) -> Self {
        Self(parking_lot::Mutex::new(value))
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        with_me(|me| me.sim.point(me.id));
        self.take()
    }

    fn take(&self) -> MutexGuard<'_, T> {
        let taken = with_me(|me| self.take_as(me));
        MutexGuard {
            mutex: self,
            inner: Some(taken.unwrap_or_else(|| self.0.lock())),
        }
    }

    fn take_as(&self, me: &Me) -> parking_lot::MutexGuard<'_, T> {
        loop {
            let core = me.sim.core();
            if let Some(guard) = self.0.try_lock() {
                drop(core);
                begin_section();
                return guard;
            }
            me.sim.wait(core, me.id, On::Lock(address(self)), None);
        }
    }
}

impl<T> MutexGuard<'_, T> {
    /// Releases the mutex while `body` runs.
    pub fn unlocked<R>(guard: &mut Self, body: impl FnOnce() -> R) -> R {
        guard.release();
        let result = body();
        guard.inner = guard.mutex.take().inner.take();
        result
    }

    /// Releases the mutex, and wakes the tasks that wait for it.
    fn release(&mut self) {
        if self.inner.take().is_some() {
            let at = address(self.mutex);
            with_me(|me| {
                me.sim
                    .core()
                    .wake_all(|on| matches!(on, On::Lock(lock) if *lock == at));
                end_section();
            });
        }
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        if self.inner.is_some() {
            self.release();
            with_me(|me| me.sim.point(me.id));
        }
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.inner
            .as_ref()
            .expect("only a wait takes the inner guard")
    }
}
impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner
            .as_mut()
            .expect("only a wait takes the inner guard")
    }
}

/// A condition variable with parking_lot's signatures.
#[derive(Default)]
pub struct Condvar(parking_lot::Condvar);

pub struct WaitResult(bool);

impl WaitResult {
    pub fn timed_out(&self) -> bool {
        self.0
    }
}

impl Condvar {
    pub const fn new() -> Self {
        Self(parking_lot::Condvar::new())
    }

    pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, deadline: Instant) -> WaitResult {
        let simulated = with_me(|me| !self.wait_as(me, guard, Some(deadline)));
        WaitResult(simulated.unwrap_or_else(|| {
            let inner = guard.inner.as_mut().expect("the mutex is locked");
            self.0.wait_until(inner, deadline.real()).timed_out()
        }))
    }

    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        if with_me(|me| self.wait_as(me, guard, None)).is_none() {
            self.0
                .wait(guard.inner.as_mut().expect("the mutex is locked"));
        }
    }

    /// Returns false at the deadline.
    fn wait_as<T>(&self, me: &Me, guard: &mut MutexGuard<'_, T>, until: Option<Instant>) -> bool {
        // No point lies between the release and the wait, so no notification is missed.
        guard.release();
        let (on, core) = (On::Signal(address(self)), me.sim.core());
        let is_woken = me
            .sim
            .wait(core, me.id, on, until.map(|d| d.offset(&me.sim)));
        guard.inner = guard.mutex.take().inner.take();
        is_woken
    }

    pub fn notify_all(&self) {
        let at = address(self);
        let simulated = with_me(|me| {
            let is_it = |on: &On| matches!(on, On::Signal(signal) if *signal == at);
            me.sim.core().wake_all(is_it);
            me.sim.point(me.id);
        });
        if simulated.is_none() {
            self.0.notify_all();
        }
    }
}

/// A cell like [`std::sync::OnceLock`].
pub struct OnceLock<T> {
    value: std::sync::OnceLock<T>,
    filling: Mutex<()>,
}

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> OnceLock<T> {
    pub const fn new() -> Self {
        Self {
            value: std::sync::OnceLock::new(),
            filling: Mutex::new(()),
        }
    }
    pub fn get(&self) -> Option<&T> {
        self.value.get()
    }
    pub fn set(&self, value: T) -> Result<(), T> {
        self.value.set(value)
    }
    pub fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        if let Some(value) = self.value.get() {
            return value;
        }
        // `make` may lose its turn, so it must not run in std's cell, which would block the others.
        let _filling = self.filling.lock();
        if self.value.get().is_none() {
            let _ = self.value.set(make());
        }
        self.value.get().expect("it was set")
    }
}
