//! The holders and waiters of a [`LockSet`](super::LockSet), by key.

use super::raw;
use super::record::{KeyRecord, Party, PartyRecord};
use super::{rank::Rank, stats};
use crate::sched::HashMap;
use std::collections::{VecDeque, hash_map::Entry};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The largest capacity that an empty set keeps. A larger map is freed when the set becomes empty.
const IDLE_CAPACITY_MAX: usize = 1024;

/// The lock of one key. A slot always has a holder: a release either hands it to the first waiter
/// or removes it, without unlocking the map in between.
struct Slot {
    holder: PartyRecord,
    waiters: VecDeque<Arc<Waiter>>,
}

/// A thread that waits for a lock.
pub(super) struct Waiter {
    pub granted: raw::AtomicBool,
    pub here: PartyRecord,
}

/// The slots of all keys that are held. The map has a lock of its own, beneath all ranks.
pub(super) struct Slots<K: Eq + Hash> {
    rank: Rank,
    map: raw::Mutex<HashMap<K, Slot>>,
}

impl<K: Clone + Ord + Hash + Debug> Slots<K> {
    pub(super) fn new(rank: Rank) -> Self {
        Self {
            rank,
            map: raw::Mutex::new(HashMap::default()),
        }
    }

    /// Takes the lock if it is free, and then returns None. Otherwise joins the lock's queue and
    /// returns the waiter.
    pub(super) fn enter(&self, key: &K) -> Option<Arc<Waiter>> {
        let here = PartyRecord::now();
        match self.lock().entry(key.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(Slot {
                    holder: here,
                    waiters: VecDeque::new(),
                });
                stats::waited(self.rank, Duration::ZERO);
                None
            }
            Entry::Occupied(mut entry) => {
                let waiter = Arc::new(Waiter {
                    granted: raw::AtomicBool::new(false),
                    here,
                });
                entry.get_mut().waiters.push_back(waiter.clone());
                Some(waiter)
            }
        }
    }

    /// Takes the lock if it is free. Returns false if it is held.
    pub(super) fn enter_if_free(&self, key: &K) -> bool {
        match self.lock().entry(key.clone()) {
            Entry::Occupied(_) => return false,
            Entry::Vacant(entry) => entry.insert(Slot {
                holder: PartyRecord::now(),
                waiters: VecDeque::new(),
            }),
        };
        stats::waited(self.rank, Duration::ZERO);
        true
    }

    /// Removes the waiter from the queue. Returns false if the waiter has already been granted the
    /// lock. The caller then holds the lock, even if the wait was cancelled.
    pub(super) fn leave_queue(&self, key: &K, waiter: &Arc<Waiter>) -> bool {
        let mut slots = self.lock();
        let Some(slot) = slots.get_mut(key) else {
            return false;
        };
        let before = slot.waiters.len();
        slot.waiters.retain(|w| !Arc::ptr_eq(w, waiter));
        slot.waiters.len() < before
    }

    /// Returns the result of [`LockSet::records`](super::LockSet::records).
    pub(super) fn records(&self) -> Vec<KeyRecord> {
        let slots = self.lock();
        let mut all: Vec<_> = slots
            .iter()
            .map(|(key, slot)| KeyRecord {
                key: format!("{key:?}"),
                holder: Some(Party::from(&slot.holder)),
                waiters: slot.waiters.iter().map(|w| Party::from(&w.here)).collect(),
            })
            .collect();
        drop(slots);
        all.sort_by(|a, b| a.key.cmp(&b.key));
        all
    }
}

impl<K: Eq + Hash> Slots<K> {
    #[cfg(not(feature = "shuttle"))]
    #[inline]
    fn lock(&self) -> crate::sched::MutexGuard<'_, HashMap<K, Slot>> {
        super::check::lock_beneath(&self.map)
    }
    #[cfg(feature = "shuttle")]
    fn lock(&self) -> raw::MutexGuard<'_, HashMap<K, Slot>> {
        self.map.lock()
    }

    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    #[cfg(all(test, not(feature = "shuttle")))]
    pub(super) fn capacity(&self) -> usize {
        self.lock().capacity()
    }

    /// Hands the lock to the first waiter, or frees it.
    pub(super) fn release(&self, key: &K) {
        let mut slots = self.lock();
        let Some(slot) = slots.get_mut(key) else {
            return;
        };
        stats::held(self.rank, slot.holder.age());
        if let Some(next) = slot.waiters.pop_front() {
            stats::waited(self.rank, next.here.age());
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
