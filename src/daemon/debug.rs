//! Lists which threads hold or await each lock, and for how long, with statistics. Release builds
//! include this module.

use super::core::Core;
use crate::api::daemon::{
    DebugLocksReply, LockClass, LockContention, LockEdge, LockParty, LockRecord,
};
use crate::host::log;
use crate::locks::{ClassStats, KeyRecord, Party, check, durable_waits, stats};

impl Core {
    /// Lists the locks with their holders and waiters.
    pub fn debug_locks(&self) -> DebugLocksReply {
        let locks = self.locks.records().into_iter();
        DebugLocksReply {
            locks: locks.map(|(set, held)| record(set, held)).collect(),
            violations: check::violations(),
            checked: check::IS_ON,
            durable_waits: durable_waits().into_iter().map(party).collect(),
            classes: stats().into_iter().map(class).collect(),
            edges: edges(),
            contention: contention(),
            log_lines_dropped: log::lines_dropped(),
        }
    }
}

fn record(set: &str, held: KeyRecord) -> LockRecord {
    LockRecord {
        set: set.to_owned(),
        key: held.key,
        holder: held.holder.map(party),
        waiters: held.waiters.into_iter().map(party).collect(),
    }
}

fn party(p: Party) -> LockParty {
    LockParty {
        for_us: u64::try_from(p.since.elapsed().as_micros()).unwrap_or(u64::MAX),
        thread: p.thread,
        operation: p.operation.as_deref().unwrap_or_default().to_owned(),
    }
}

fn class(counted: ClassStats) -> LockClass {
    LockClass {
        class: counted.class.to_owned(),
        waits: counted.waits,
        holds: counted.holds,
    }
}

#[cfg(any(debug_assertions, feature = "lock-check"))]
fn edges() -> Vec<LockEdge> {
    let edges = check::observed().into_iter();
    edges
        .map(|edge| LockEdge {
            from: edge.from.name().to_owned(),
            to: edge.to.name().to_owned(),
            from_site: edge.first.0,
            to_site: edge.first.1,
        })
        .collect()
}

#[cfg(any(debug_assertions, feature = "lock-check"))]
fn contention() -> Vec<LockContention> {
    let places = check::contention().into_iter();
    places
        .map(|place| LockContention {
            class: place.rank.name().to_owned(),
            site: place.at.to_string(),
            count: place.count,
        })
        .collect()
}

/// Returns nothing: a build without the checker records neither nestings nor contention, and does
/// not contain the names of ranks.
#[cfg(not(any(debug_assertions, feature = "lock-check")))]
fn edges() -> Vec<LockEdge> {
    Vec::new()
}

#[cfg(not(any(debug_assertions, feature = "lock-check")))]
fn contention() -> Vec<LockContention> {
    Vec::new()
}

/// Counts of what is in progress. In an idle daemon all are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg(any(test, feature = "fakes"))]
pub struct Leftovers {
    /// Keys that are held or waited for.
    pub locks: usize,
    /// VMs with a boot, a stop, a successor, a transfer or a session.
    pub runtimes: usize,
    /// Threads of operations.
    pub threads: usize,
    pub sessions: usize,
    /// Running jobs, and slots taken in the pool's queue.
    pub jobs: usize,
    pub operations: usize,
    pub images_being_built: usize,
    /// Idempotency keys of calls that are just beginning.
    pub keys_beginning: usize,
}
