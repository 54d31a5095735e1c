//! One lock per key, granted in the order of arrival.

use super::record::KeyRecord;
use super::slots::Slots;
use super::{Cancel, check, rank::Rank, raw};
use std::fmt::Debug;
use std::hash::Hash;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;

/// A key whose type decides which set its lock belongs to. So the guards of two sets never have one
/// type, and a guard proves which of the locks is held.
pub trait LockKey: Clone + Ord + Hash + Debug {
    const RANK: Rank;
}

/// One lock per key. An entry exists only while a thread holds or awaits the key's lock.
pub struct LockSet<K: Eq + Hash> {
    tag: check::Tag,
    slots: Slots<K>,
}

/// The error if the token fired before the lock was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitCancelled;

/// Proof that the lock of its key is held.
#[must_use = "dropping it unlocks"]
pub struct KeyGuard<'a, K: Eq + Hash> {
    set: &'a LockSet<K>,
    key: K,
    _token: check::Token,
    _not_send: PhantomData<*const ()>,
}

impl<K: LockKey> Default for LockSet<K> {
    fn default() -> Self {
        Self::with_rank(K::RANK)
    }
}

impl<K: Clone + Ord + Hash + Debug> LockSet<K> {
    fn with_rank(rank: Rank) -> Self {
        Self {
            tag: check::Tag::new(rank),
            slots: Slots::new(rank),
        }
    }

    /// Creates a set whose keys do not decide its rank, for unit tests.
    #[cfg(test)]
    pub fn of_rank(rank: Rank) -> Self {
        Self::with_rank(rank)
    }

    /// Waits for the lock, without a deadline. Use [`LockSet::lock_cancellable`] for locks that may
    /// be held for longer than microseconds.
    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    pub fn lock(&self, key: &K) -> KeyGuard<'_, K> {
        let token = self.check(key, true);
        if let Some(waiter) = self.slots.enter(key) {
            token.contended();
            while !waiter.granted.load(Ordering::Acquire) {
                raw::park();
            }
        }
        self.guard(key.clone(), token)
    }

    /// Waits for the lock until `cancel` fires, and then returns within 100 ms.
    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    pub fn lock_cancellable(
        &self,
        key: &K,
        cancel: &Cancel,
    ) -> Result<KeyGuard<'_, K>, WaitCancelled> {
        let token = self.check(key, true);
        if cancel.is_cancelled() {
            return Err(WaitCancelled);
        }
        if let Some(waiter) = self.slots.enter(key) {
            token.contended();
            let thread = waiter.here.thread.clone();
            // An unpark before the park makes the park return at once, so a grant or a cancel
            // between the check and the park is not missed.
            let _subscription = cancel.on_cancel(move || thread.unpark());
            while !waiter.granted.load(Ordering::Acquire) {
                if cancel.is_cancelled() && self.slots.leave_queue(key, &waiter) {
                    return Err(WaitCancelled);
                }
                if !waiter.granted.load(Ordering::Acquire) {
                    raw::park();
                }
            }
        }
        Ok(self.guard(key.clone(), token))
    }

    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    pub fn try_lock(&self, key: &K) -> Option<KeyGuard<'_, K>> {
        let token = self.check(key, false);
        if !self.slots.enter_if_free(key) {
            return None;
        }
        Some(self.guard(key.clone(), token))
    }

    /// Returns every key that is held, with its current holder and its waiters.
    pub fn records(&self) -> Vec<KeyRecord> {
        self.slots.records()
    }

    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    #[inline]
    fn check(&self, key: &K, blocks: bool) -> check::Token {
        let instance = std::ptr::from_ref(self).cast();
        check::acquire(
            &self.tag,
            check::Request {
                key: Some(key),
                instance,
                blocks,
            },
        )
    }

    fn guard(&self, key: K, token: check::Token) -> KeyGuard<'_, K> {
        token.taken();
        KeyGuard {
            set: self,
            key,
            _token: token,
            _not_send: PhantomData,
        }
    }
}

impl<K: Eq + Hash> LockSet<K> {
    /// Returns the number of keys that are held.
    #[cfg(any(test, feature = "fakes"))]
    pub fn len(&self) -> usize {
        self.slots.len()
    }
    #[cfg(any(test, feature = "fakes"))]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[cfg(all(test, not(feature = "shuttle")))]
    pub(super) fn capacity(&self) -> usize {
        self.slots.capacity()
    }
}

impl<K: Eq + Hash> KeyGuard<'_, K> {
    pub fn key(&self) -> &K {
        &self.key
    }
}

impl<K: Eq + Hash> Drop for KeyGuard<'_, K> {
    fn drop(&mut self) {
        self.set.slots.release(&self.key);
    }
}
