//! Counts how long threads wait for locks and hold them, by class of lock. Release builds count
//! keyed locks and waits for the disk. Builds with the lock checker also count the leaves.

use super::rank::Rank;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The number of buckets. The last one counts everything of 2^30 microseconds or more, which is 18
/// minutes.
const BUCKETS: usize = 32;

/// Counts durations by their logarithm: bucket `i` counts those of less than 2^i microseconds that
/// no earlier bucket counts.
struct Histogram([AtomicU64; BUCKETS]);

impl Histogram {
    const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; BUCKETS])
    }

    fn add(&self, duration: Duration) {
        self.0[bucket(duration)].fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the counts without the empty buckets at the end.
    fn counts(&self) -> Vec<u64> {
        let mut counts: Vec<u64> = self.0.iter().map(|n| n.load(Ordering::Relaxed)).collect();
        let used = counts
            .iter()
            .rposition(|n| *n > 0)
            .map_or(0, |last| last + 1);
        counts.truncate(used);
        counts
    }
}

fn bucket(duration: Duration) -> usize {
    let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    ((u64::BITS - us.leading_zeros()) as usize).min(BUCKETS - 1)
}

struct Class {
    waits: Histogram,
    holds: Histogram,
}

static CLASSES: [Class; Rank::ALL.len()] = [const {
    Class {
        waits: Histogram::new(),
        holds: Histogram::new(),
    }
}; Rank::ALL.len()];

/// The classes that every build counts. Their names are written out here, so that a release build
/// does not contain those of the other ranks.
const ALWAYS: [(Rank, &str); 5] = [
    (Rank::Vm, "vm_locks"),
    (Rank::Workspace, "workspace_locks"),
    (Rank::CreateVm, "create_vm"),
    (Rank::ImageOps, "image_ops"),
    (Rank::DurableWait, "durable_wait"),
];

/// How often threads waited for a class of locks and held one, by duration: element `i` counts
/// durations of less than 2^i microseconds that no earlier element counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClassStats {
    pub class: &'static str,
    pub waits: Vec<u64>,
    pub holds: Vec<u64>,
}

pub(super) fn waited(rank: Rank, duration: Duration) {
    CLASSES[rank as usize].waits.add(duration);
}

pub(super) fn held(rank: Rank, duration: Duration) {
    CLASSES[rank as usize].holds.add(duration);
}

/// Returns the counts since the process started.
pub fn stats() -> Vec<ClassStats> {
    let of = |(rank, class): (Rank, &'static str)| ClassStats {
        class,
        waits: CLASSES[rank as usize].waits.counts(),
        holds: CLASSES[rank as usize].holds.counts(),
    };
    ALWAYS.into_iter().chain(leaves()).map(of).collect()
}

#[cfg(any(debug_assertions, feature = "lock-check"))]
fn leaves() -> impl Iterator<Item = (Rank, &'static str)> {
    let is_leaf = |rank: &Rank| !rank.is_virtual() && ALWAYS.iter().all(|(r, _)| r != rank);
    Rank::ALL
        .into_iter()
        .filter(is_leaf)
        .map(|rank| (rank, rank.name()))
}

#[cfg(not(any(debug_assertions, feature = "lock-check")))]
fn leaves() -> impl Iterator<Item = (Rank, &'static str)> {
    std::iter::empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_counted_by_their_logarithm() {
        let us = |n| bucket(Duration::from_micros(n));
        assert_eq!([us(0), us(1), us(2), us(3), us(4)], [0, 1, 2, 2, 3]);
        assert_eq!(bucket(Duration::from_nanos(999)), 0);
        assert_eq!(bucket(Duration::MAX), BUCKETS - 1);
        let histogram = Histogram::new();
        assert_eq!(histogram.counts(), [0; 0]);
        histogram.add(Duration::from_micros(3));
        histogram.add(Duration::from_micros(3));
        assert_eq!(histogram.counts(), [0, 0, 2]);
    }
}
