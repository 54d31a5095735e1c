//! Records what happened to each VM, in order, for tests. Every entry except that of a creation is
//! made while the VM's lock is held. Every entry carries the number of the store's change, so
//! that a test can replay the history through the transition table.

pub use super::transitions::Verb;
use crate::api::vm::VmState;
use crate::ids::{OpId, VmId, VmName};
use crate::locks::{Mutex, Rank};
use crate::sched::Instant;
use std::sync::atomic::{AtomicBool, Ordering};

/// How the daemon answered a verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Claimed,
    /// There was nothing to do.
    Nothing,
    Joined,
    Queued,
    Refused,
    /// The table allowed the verb, but it failed for another reason, such as a limit or the disk.
    Failed,
}

#[derive(Clone, Debug)]
pub enum What {
    Created,
    Asked {
        verb: Verb,
        /// The state in the row.
        state: VmState,
        restarting: bool,
        answer: Answer,
        op: Option<OpId>,
    },
    /// The claim of an operation was committed.
    Committed {
        op: OpId,
        ending: CommitKind,
        /// The row's state afterwards. `None` if the row is gone.
        state: Option<VmState>,
        next: Option<OpId>,
    },
    /// The VMM ended without a request.
    Died {
        state: VmState,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitKind {
    Booted,
    BootDied,
    BootCancelled,
    BootFailed,
    Ended,
    StillThere,
    Deleted,
}

#[derive(Clone, Debug)]
pub struct Event {
    pub vm: VmId,
    pub name: VmName,
    /// The store's last change that this event depends on.
    pub seq: u64,
    /// A time before and a time after the event became visible.
    pub between: (Instant, Instant),
    pub what: What,
}

/// The events of all VMs. Events are kept only if a test has called [`History::record`].
pub struct History {
    on: AtomicBool,
    events: Mutex<Vec<Event>>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            on: AtomicBool::new(false),
            events: Mutex::new(Rank::Runtimes, Vec::new()),
        }
    }
}

impl History {
    /// Appends an event, if a test records the history.
    #[inline]
    pub(super) fn note(&self, event: impl FnOnce() -> Event) {
        if !cfg!(any(test, feature = "fakes")) || !self.on.load(Ordering::Relaxed) {
            return;
        }
        let event = event();
        self.events.lock().push(event);
    }

    pub fn record(&self) {
        self.on.store(true, Ordering::Relaxed);
    }

    /// Takes all events so far.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events.lock())
    }
}
