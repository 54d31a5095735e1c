use super::{Cancel, check, rank::Rank};
use parking_lot::{ArcMutexGuard, RawMutex};
use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

/// One lock per key; an entry exists only while somebody holds or waits for it.
pub struct LockSet<K: Eq + Hash> {
    rank: Rank,
    slots: parking_lot::Mutex<HashMap<K, Slot>>,
}
struct Slot {
    lock: Arc<parking_lot::Mutex<()>>,
    users: usize,
}

/// The token fired before the lock was had.
#[derive(Debug)]
pub struct WaitCancelled;

/// Evidence that the lock of its key is held.
pub struct KeyGuard<'a, K: Eq + Hash> {
    set: &'a LockSet<K>,
    key: K,
    lock: Option<ArcMutexGuard<RawMutex, ()>>,
    _token: check::Token,
    _not_send: PhantomData<*const ()>,
}

impl<K: Clone + Ord + Hash + Debug> LockSet<K> {
    pub fn new(rank: Rank) -> Self {
        Self { rank, slots: parking_lot::Mutex::new(HashMap::new()) }
    }
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn lock(&self, key: &K) -> KeyGuard<'_, K> {
        let token = check::acquire(self.rank, key, false);
        let lock = self.enter(key);
        self.guard(key, lock.lock_arc(), token)
    }
    /// First come, first served; leaves within 100 ms when `cancel` fires.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn lock_cancellable(&self, key: &K, cancel: &Cancel) -> Result<KeyGuard<'_, K>, WaitCancelled> {
        let token = check::acquire(self.rank, key, false);
        let lock = self.enter(key);
        while !cancel.is_cancelled() {
            if let Some(held) = lock.try_lock_arc_for(Duration::from_millis(20)) {
                return Ok(self.guard(key, held, token));
            }
        }
        drop(lock);
        self.leave(key);
        Err(WaitCancelled)
    }
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_lock(&self, key: &K) -> Option<KeyGuard<'_, K>> {
        let token = check::acquire(self.rank, key, false);
        let lock = self.enter(key);
        match lock.try_lock_arc() {
            Some(g) => Some(self.guard(key, g, token)),
            None => {
                drop(lock);
                self.leave(key);
                None
            }
        }
    }
    fn guard(&self, key: &K, lock: ArcMutexGuard<RawMutex, ()>, token: check::Token) -> KeyGuard<'_, K> {
        KeyGuard { set: self, key: key.clone(), lock: Some(lock), _token: token, _not_send: PhantomData }
    }
    fn enter(&self, key: &K) -> Arc<parking_lot::Mutex<()>> {
        let mut slots = self.slots.lock();
        let slot = slots.entry(key.clone()).or_insert_with(|| Slot { lock: Arc::default(), users: 0 });
        slot.users += 1;
        slot.lock.clone()
    }
}
impl<K: Eq + Hash> LockSet<K> {
    fn leave(&self, key: &K) {
        let mut slots = self.slots.lock();
        let slot = slots.get_mut(key).expect("a guard keeps its slot");
        slot.users -= 1;
        if slot.users == 0 {
            slots.remove(key);
        }
    }
    /// Keys now held or waited for.
    pub fn len(&self) -> usize {
        self.slots.lock().len()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
impl<K: Eq + Hash> KeyGuard<'_, K> {
    pub fn key(&self) -> &K {
        &self.key
    }
}
impl<K: Eq + Hash> Drop for KeyGuard<'_, K> {
    fn drop(&mut self) {
        self.lock = None; // Unlock before leaving, so that a waiter is never blocked on the map.
        self.set.leave(&self.key);
    }
}
