//! A mutex and a condition variable whose uses are checked, and [`region`] for virtual ranks.

use super::{Cancel, check, rank::Rank};
use crate::sched::{self, Instant};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A mutex with a rank. It is never poisoned: a panic leaves the data as it was at that moment.
pub struct Mutex<T> {
    tag: check::Tag,
    inner: sched::Mutex<T>,
}

/// Gives access to the data of a locked [`Mutex`], and unlocks it on drop. The guard is not `Send`,
/// even if another crate enables parking_lot's `send_guard`.
#[must_use = "dropping it unlocks"]
pub struct MutexGuard<'a, T> {
    inner: sched::MutexGuard<'a, T>,
    token: check::Token,
    _not_send: PhantomData<*const ()>,
}

impl<T> Mutex<T> {
    pub const fn new(rank: Rank, value: T) -> Self {
        Self {
            tag: check::Tag::new(rank),
            inner: sched::Mutex::new(value),
        }
    }
    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let instance = std::ptr::from_ref(self).cast();
        let token = check::acquire(
            &self.tag,
            check::Request {
                key: None,
                instance,
                blocks: true,
            },
        );
        let inner = check::lock_beneath(&self.inner);
        token.taken();
        MutexGuard {
            inner,
            token,
            _not_send: PhantomData,
        }
    }
}
impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}
impl<T> DerefMut for MutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// How a wait ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Waited {
    /// The condition no longer holds. This takes precedence over a cancel and the deadline.
    Done,
    Cancelled,
    TimedOut,
}

/// A condition variable. Every wait has a deadline and checks its condition in a loop.
#[derive(Default)]
pub struct Condvar {
    inner: sched::Condvar,
    /// Threads in a cancellable wait. They park instead of waiting on `inner`, because a token's
    /// waker can then wake a thread without taking its mutex, and no wake-up is lost.
    parked: sched::Mutex<Vec<sched::Thread>>,
}

impl Condvar {
    pub const fn new() -> Self {
        Self {
            inner: sched::Condvar::new(),
            parked: sched::Mutex::new(Vec::new()),
        }
    }

    /// Waits while `condition` holds. Returns false if it still holds at the deadline.
    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    pub fn wait_while<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        deadline: Instant,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> bool {
        check::check_wait(Rank::CondWait, &guard.token);
        let mut is_done = !condition(guard);
        let mut timed_out = false;
        while !is_done && !timed_out {
            timed_out = self
                .inner
                .wait_until(&mut guard.inner, deadline)
                .timed_out();
            is_done = !condition(guard);
        }
        guard.token.resumed();
        is_done
    }

    /// Waits like [`Condvar::wait_while`], but also ends when `cancel` fires.
    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    pub fn wait_while_cancellable<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        deadline: Instant,
        cancel: &Cancel,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> Waited {
        check::check_wait(Rank::CondWait, &guard.token);
        let me = sched::current();
        let waker = me.clone();
        let subscription = cancel.on_cancel(move || waker.unpark());
        let waited = loop {
            if !condition(guard) {
                break Waited::Done;
            }
            if cancel.is_cancelled() {
                break Waited::Cancelled;
            }
            let now = Instant::now();
            if now >= deadline {
                break Waited::TimedOut;
            }
            check::lock_beneath(&self.parked).push(me.clone());
            sched::MutexGuard::unlocked(&mut guard.inner, || sched::park_timeout(deadline - now));
            check::lock_beneath(&self.parked).retain(|t| t.id() != me.id());
        };
        guard.token.resumed();
        // A drop would sleep under this lock until a call of the waker that is in progress returns.
        subscription.end_without_waiting();
        waited
    }

    pub fn notify_all(&self) {
        self.inner.notify_all();
        for thread in check::lock_beneath(&self.parked).drain(..) {
            thread.unpark();
        }
    }
}

/// Marks that this thread does what a virtual rank stands for, until the region is dropped.
#[must_use = "dropping it ends the region"]
pub struct Region {
    _token: check::Token,
    _not_send: PhantomData<*const ()>,
}

#[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
#[inline]
pub fn region(rank: Rank) -> Region {
    let want = check::Request {
        key: None,
        instance: std::ptr::null(),
        blocks: false,
    };
    Region {
        _token: check::acquire(&check::Tag::new(rank), want),
        _not_send: PhantomData,
    }
}

// The disabled checker costs nothing: the sizes are those of parking_lot, and `scripts/lock-code`
// compares the machine code.
#[cfg(not(any(debug_assertions, feature = "lock-check", feature = "sim")))]
const _: () = {
    assert!(size_of::<Mutex<u64>>() == size_of::<parking_lot::Mutex<u64>>());
    assert!(size_of::<Mutex<[u8; 3]>>() == size_of::<parking_lot::Mutex<[u8; 3]>>());
    assert!(
        size_of::<MutexGuard<'static, u64>>() == size_of::<parking_lot::MutexGuard<'static, u64>>()
    );
    assert!(size_of::<Region>() == 0 && !std::mem::needs_drop::<Region>());
};
