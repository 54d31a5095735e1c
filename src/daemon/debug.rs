//! Lists which threads hold or await each lock, and for how long. Release builds include this
//! module.

use super::core::Core;
use crate::api::daemon::{DebugLocksReply, LockParty, LockRecord};
use crate::locks::{KeyRecord, Party, check};

impl Core {
    /// Lists the locks with their holders and waiters.
    pub fn debug_locks(&self) -> DebugLocksReply {
        let mut locks = Vec::new();
        let keyed = [
            ("vm_locks", self.locks.vm.records()),
            ("workspace_locks", self.locks.workspace.records()),
        ];
        for (name, records) in keyed {
            locks.extend(records.into_iter().map(|held| record(name, held)));
        }
        for (name, records) in [
            ("create_vm", self.locks.create_vm.records()),
            ("image_ops", self.locks.image_ops.records()),
        ] {
            locks.extend(records.into_iter().map(|held| LockRecord {
                key: String::new(),
                ..record(name, held)
            }));
        }
        DebugLocksReply {
            locks,
            violations: check::violations(),
            checked: cfg!(any(debug_assertions, feature = "lock-check")),
        }
    }
}

fn record(set: &str, held: KeyRecord) -> LockRecord {
    let party = |p: Party| LockParty {
        thread: p.thread,
        operation: p.operation.as_deref().unwrap_or_default().to_owned(),
        for_us: u64::try_from(p.since.elapsed().as_micros()).unwrap_or(u64::MAX),
    };
    LockRecord {
        set: set.to_owned(),
        key: held.key,
        holder: held.holder.map(party),
        waiters: held.waiters.into_iter().map(party).collect(),
    }
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
