//! Prevents things in use from being deleted, and things being deleted from being used. Callers
//! hold a guard, not a lock, while they use or delete something.

use crate::locks::{Mutex, Rank};
use crate::sched::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

/// The uses and deletions of one kind of thing. Clones share their state.
pub(super) struct Uses<K: Eq + Hash + Clone> {
    known: Arc<Mutex<Known<K>>>,
}

struct Known<K> {
    /// The number of uses of each thing.
    used: HashMap<K, usize>,
    deleting: HashSet<K>,
}

/// Prevents the deletion of the thing while this guard lives.
pub(super) struct UseGuard<K: Eq + Hash + Clone> {
    uses: Uses<K>,
    key: K,
}

/// Prevents new uses of the thing while this guard lives.
pub(super) struct DeleteGuard<K: Eq + Hash + Clone> {
    uses: Uses<K>,
    key: K,
}

impl<K: Eq + Hash + Clone> Clone for Uses<K> {
    fn clone(&self) -> Self {
        Self {
            known: self.known.clone(),
        }
    }
}

impl<K: Eq + Hash + Clone> Uses<K> {
    pub(super) fn new() -> Self {
        let known = Known {
            used: HashMap::default(),
            deleting: HashSet::default(),
        };
        Self {
            known: Arc::new(Mutex::new(Rank::Runtimes, known)),
        }
    }

    /// Begins a use of the thing. Returns `None` while the thing is being deleted.
    pub(super) fn begin_use(&self, key: &K) -> Option<UseGuard<K>> {
        let mut known = self.known.lock();
        if known.deleting.contains(key) {
            return None;
        }
        *known.used.entry(key.clone()).or_default() += 1;
        Some(UseGuard {
            uses: self.clone(),
            key: key.clone(),
        })
    }

    pub(super) fn is_used(&self, key: &K) -> bool {
        self.known.lock().used.contains_key(key)
    }

    /// Begins to delete the thing. Returns `None` while the thing is in use or being deleted.
    pub(super) fn begin_delete(&self, key: &K) -> Option<DeleteGuard<K>> {
        let mut known = self.known.lock();
        if known.used.contains_key(key) || !known.deleting.insert(key.clone()) {
            return None;
        }
        Some(DeleteGuard {
            uses: self.clone(),
            key: key.clone(),
        })
    }
}

impl<K: Eq + Hash + Clone> Drop for UseGuard<K> {
    fn drop(&mut self) {
        let used = &mut self.uses.known.lock().used;
        match used.get_mut(&self.key) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(used.remove(&self.key)),
        }
    }
}

impl<K: Eq + Hash + Clone> Drop for DeleteGuard<K> {
    fn drop(&mut self) {
        self.uses.known.lock().deleting.remove(&self.key);
    }
}

impl<K: Eq + Hash + Clone> std::fmt::Debug for UseGuard<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UseGuard")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_and_delete_exclude_each_other_until_dropped() {
        let uses = Uses::new();
        let (first, second) = (uses.begin_use(&1), uses.begin_use(&1));
        assert!(first.is_some() && second.is_some() && uses.begin_delete(&1).is_none());
        drop(first);
        assert!(uses.begin_delete(&1).is_none());
        drop(second);
        let deleting = uses.begin_delete(&1);
        assert!(
            deleting.is_some() && uses.begin_delete(&1).is_none() && uses.begin_use(&1).is_none()
        );
        assert!(uses.begin_use(&2).is_some());
        drop(deleting);
        assert!(uses.begin_use(&1).is_some());
    }
}
