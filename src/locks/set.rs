//! One lock per key, granted in the order of arrival.

use super::record::{Party, PartyRecord};
use super::{Cancel, check, rank::Rank, raw};
use std::collections::{HashMap, VecDeque, hash_map::Entry};
use std::fmt::Debug;
use std::hash::Hash;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// An empty set frees a map that has room for more than this many entries.
const IDLE_CAPACITY_MAX: usize = 1024;

/// One lock per key. An entry exists only while a thread holds or awaits the key's lock.
pub struct LockSet<K: Eq + Hash> {
    tag: check::Tag,
    slots: raw::Mutex<HashMap<K, Slot>>,
}

/// The lock of one key. A slot always has a holder: a release either hands it to the first waiter
/// or removes it, without unlocking the map in between.
struct Slot {
    holder: PartyRecord,
    waiters: VecDeque<Arc<Waiter>>,
}

struct Waiter {
    granted: raw::AtomicBool,
    here: PartyRecord,
}

/// The token fired before the lock was granted.
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

impl<K: Clone + Ord + Hash + Debug> LockSet<K> {
    pub fn new(rank: Rank) -> Self {
        Self { tag: check::Tag::new(rank), slots: raw::Mutex::new(HashMap::new()) }
    }

    /// Waits for the lock, without a deadline. Use [`LockSet::lock_cancellable`] for locks that may
    /// be held for longer than microseconds.
    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    pub fn lock(&self, key: &K) -> KeyGuard<'_, K> {
        let token = self.check(key, false, true);
        if let Some(waiter) = self.enter(key) {
            while !waiter.granted.load(Ordering::Acquire) {
                raw::park();
            }
        }
        self.guard(key.clone(), token)
    }

    /// Waits for the lock until `cancel` fires, and then returns within 100 ms.
    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    pub fn lock_cancellable(&self, key: &K, cancel: &Cancel) -> Result<KeyGuard<'_, K>, WaitCancelled> {
        let token = self.check(key, false, true);
        if cancel.is_cancelled() {
            return Err(WaitCancelled);
        }
        if let Some(waiter) = self.enter(key) {
            let thread = waiter.here.thread.clone();
            // An unpark before the park makes the park return at once, so a grant or a cancel
            // between the check and the park is not missed.
            let _subscription = cancel.on_cancel(move || thread.unpark());
            while !waiter.granted.load(Ordering::Acquire) {
                if cancel.is_cancelled() && self.leave_queue(key, &waiter) {
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
        let token = self.check(key, false, false);
        match self.slots().entry(key.clone()) {
            Entry::Occupied(_) => return None,
            Entry::Vacant(entry) => entry.insert(Slot { holder: PartyRecord::now(), waiters: VecDeque::new() }),
        };
        Some(self.guard(key.clone(), token))
    }

    /// Locks several keys, in sorted order and each once. Returns the guards in that order.
    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    pub fn lock_many(&self, keys: &[K]) -> Vec<KeyGuard<'_, K>> {
        let mut keys = keys.to_vec();
        keys.sort();
        keys.dedup();
        let mut guards = Vec::with_capacity(keys.len());
        for key in keys {
            let token = self.check(&key, !guards.is_empty(), true);
            if let Some(waiter) = self.enter(&key) {
                while !waiter.granted.load(Ordering::Acquire) {
                    raw::park();
                }
            }
            guards.push(self.guard(key, token));
        }
        guards
    }

    /// The current holder and the waiters, in order, of every key that is held. Keys are formatted
    /// with `Debug`.
    pub fn records(&self) -> Vec<(String, Option<Party>, Vec<Party>)> {
        let slots = self.slots();
        let mut all: Vec<_> = slots
            .iter()
            .map(|(key, slot)| {
                let waiters = slot.waiters.iter().map(|w| Party::from(&w.here)).collect();
                (format!("{key:?}"), Some(Party::from(&slot.holder)), waiters)
            })
            .collect();
        drop(slots);
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    #[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
    #[inline]
    fn check(&self, key: &K, sorted: bool, blocks: bool) -> check::Token {
        let instance = std::ptr::from_ref(self).cast();
        check::acquire(&self.tag, check::Request { key: Some(key), instance, sorted, blocks })
    }

    fn guard(&self, key: K, token: check::Token) -> KeyGuard<'_, K> {
        token.taken();
        KeyGuard { set: self, key, _token: token, _not_send: PhantomData }
    }

    /// Takes the lock (None) or joins its queue.
    fn enter(&self, key: &K) -> Option<Arc<Waiter>> {
        let here = PartyRecord::now();
        match self.slots().entry(key.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(Slot { holder: here, waiters: VecDeque::new() });
                None
            }
            Entry::Occupied(mut entry) => {
                let waiter = Arc::new(Waiter { granted: raw::AtomicBool::new(false), here });
                entry.get_mut().waiters.push_back(waiter.clone());
                Some(waiter)
            }
        }
    }

    /// False if the lock was granted in the meantime; the caller then holds it, cancelled or not.
    fn leave_queue(&self, key: &K, waiter: &Arc<Waiter>) -> bool {
        let mut slots = self.slots();
        let Some(slot) = slots.get_mut(key) else { return false };
        let before = slot.waiters.len();
        slot.waiters.retain(|w| !Arc::ptr_eq(w, waiter));
        slot.waiters.len() < before
    }
}

impl<K: Eq + Hash> LockSet<K> {
    #[cfg(not(feature = "shuttle"))]
    #[inline]
    fn slots(&self) -> parking_lot::MutexGuard<'_, HashMap<K, Slot>> {
        check::lock_beneath(&self.slots)
    }
    #[cfg(feature = "shuttle")]
    fn slots(&self) -> raw::MutexGuard<'_, HashMap<K, Slot>> {
        self.slots.lock()
    }

    /// The number of keys that are held.
    pub fn len(&self) -> usize {
        self.slots().len()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[cfg(all(test, not(feature = "shuttle")))]
    pub(super) fn capacity(&self) -> usize {
        self.slots().capacity()
    }

    fn release(&self, key: &K) {
        let mut slots = self.slots();
        let Some(slot) = slots.get_mut(key) else { return };
        if let Some(next) = slot.waiters.pop_front() {
            slot.holder = next.here.renewed();
            next.granted.store(true, Ordering::Release);
            drop(slots);
            next.here.thread.unpark();
            return;
        }
        slots.remove(key);
        if slots.is_empty() && slots.capacity() > IDLE_CAPACITY_MAX {
            slots.shrink_to_fit();
        }
    }
}

impl<K: Eq + Hash> KeyGuard<'_, K> {
    pub fn key(&self) -> &K {
        &self.key
    }
}

impl<K: Eq + Hash> Drop for KeyGuard<'_, K> {
    fn drop(&mut self) {
        self.set.release(&self.key);
    }
}
