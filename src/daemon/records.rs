//! The records of attempts to recover or adopt VMs, in the store's `meta` table.

use crate::ids::VmId;
use crate::locks::{Mutex, Rank};
use crate::sched::HashSet;
use crate::store::{State, Tx};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The record of attempts to recover a VM (`recovery.rs`) or to adopt it (`adoption.rs`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The number of daemons that died in an attempt.
    pub deaths: u32,
    pub is_under_way: bool,
    /// True if the daemon does nothing with the VM without a request of a user.
    pub is_left_alone: bool,
}

impl Record {
    /// Returns the number of deaths, for a starting daemon. An attempt that is still marked as
    /// under way has killed its daemon, so it counts.
    pub(super) fn deaths_at_start(self) -> u32 {
        self.deaths + u32::from(self.is_under_way)
    }
}

/// Reads a record. Returns an empty record if there is none or if it is unreadable.
pub(super) fn read(state: &State, name: &str) -> Record {
    // A record of another version may be unreadable. One attempt too many is better than none.
    state
        .meta(name)
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default()
}

/// Writes a record. An empty record is removed.
pub(super) fn write(tx: &mut Tx, name: &str, record: Record) {
    if record == Record::default() {
        tx.remove_meta(name);
    } else {
        let text = serde_json::to_string(&record).expect("a number and flags");
        tx.put_meta(name, &text);
    }
}

/// Records that the daemon survived the attempt.
pub(super) fn survive(tx: &mut Tx, name: &str) {
    let record = read(tx, name);
    write(
        tx,
        name,
        Record {
            is_under_way: false,
            ..record
        },
    );
}

/// The VMs whose recovery or adoption this daemon has attempted. Clones share one set.
#[derive(Clone)]
pub(super) struct Attempts(Arc<Mutex<HashSet<VmId>>>);

impl Attempts {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Rank::Runtimes, HashSet::default())))
    }

    pub(super) fn note(&self, vm: &VmId) {
        self.0.lock().insert(vm.clone());
    }

    pub(super) fn take(&self) -> HashSet<VmId> {
        std::mem::take(&mut *self.0.lock())
    }
}
