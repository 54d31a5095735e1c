//! Counts objects per uid, so that limits per local user can be enforced.

use crate::sched::HashMap;
use std::cmp::Reverse;

/// The number of objects of each uid. A uid without objects uses no memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UidCounts {
    counts: HashMap<u32, usize>,
    total: usize,
}

impl UidCounts {
    pub fn of(&self, uid: u32) -> usize {
        self.counts.get(&uid).copied().unwrap_or(0)
    }

    /// Returns the number of objects of all uids together.
    pub fn total(&self) -> usize {
        self.total
    }

    pub fn add(&mut self, uid: u32) {
        *self.counts.entry(uid).or_default() += 1;
        self.total += 1;
    }

    /// Subtracts one. Does nothing for a uid without objects.
    pub fn remove(&mut self, uid: u32) {
        let Some(count) = self.counts.get_mut(&uid) else {
            return;
        };
        *count -= 1;
        self.total -= 1;
        if *count == 0 {
            self.counts.remove(&uid);
        }
    }

    /// Returns the uid with the most objects, or `None` if there are no objects. Returns root only
    /// if no other uid has objects, so that other users cannot displace root's records.
    pub fn largest(&self) -> Option<u32> {
        let others = self.counts.iter().filter(|(uid, _)| **uid != 0);
        let largest = others
            .max_by_key(|(uid, count)| (**count, Reverse(**uid)))
            .map(|(uid, _)| *uid);
        largest.or_else(|| self.counts.contains_key(&0).then_some(0))
    }
}

/// How many ended operations and similar records are kept. If a uid exceeds its limit, its oldest
/// record is removed. If all uids together exceed the total limit, the oldest record of the uid
/// with the most records is removed; see [`UidCounts::largest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    pub per_uid_max: usize,
    pub total_max: usize,
}

/// The default limits on records that are kept.
pub const RETENTION: Retention = Retention {
    per_uid_max: 500,
    total_max: 10_000,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_per_uid_and_return_to_zero() {
        let mut counts = UidCounts::default();
        for uid in [7, 8, 7, 0] {
            counts.add(uid);
        }
        assert_eq!(
            (
                counts.of(7),
                counts.of(8),
                counts.of(0),
                counts.of(9),
                counts.total()
            ),
            (2, 1, 1, 0, 4)
        );
        for uid in [7, 8, 7, 0, 9, 7] {
            counts.remove(uid);
        }
        assert_eq!(counts, UidCounts::default());
    }

    #[test]
    fn largest_is_root_only_without_others() {
        let mut counts = UidCounts::default();
        assert_eq!(counts.largest(), None);
        (0..5).for_each(|_| counts.add(0));
        assert_eq!(counts.largest(), Some(0));
        counts.add(8);
        counts.add(7);
        assert_eq!(counts.largest(), Some(7), "the lower of two equals");
        counts.add(8);
        assert_eq!(counts.largest(), Some(8));
    }
}
