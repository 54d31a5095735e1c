//! For tests: what happened to each VM, in the order in which it happened. Every entry is made
//! while the VM's lock is held and carries the number of the store's change, so that the whole can
//! be played again through the transition table.

pub use super::transitions::Verb;
use crate::api::vm::VmState;
use crate::ids::{OpId, VmId, VmName};
use crate::locks::{Mutex, Rank};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What the daemon answered to a verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Claimed,
    /// Nothing to do.
    Nothing,
    Joined,
    Queued,
    Refused,
    /// The table allowed it, and something else did not: a limit, the disk.
    Failed,
}

#[derive(Clone, Debug)]
pub enum What {
    Created,
    Asked {
        verb: Verb,
        /// As the row said.
        state: VmState,
        restarting: bool,
        answer: Answer,
        op: Option<OpId>,
    },
    /// An operation let go of the VM.
    Committed {
        op: OpId,
        ending: CommitKind,
        /// The row's state afterwards; none: it is gone.
        state: Option<VmState>,
        next: Option<OpId>,
    },
    /// Its VMM ended by itself.
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
    /// The store's last change that it rests on.
    pub seq: u64,
    /// Before it became visible, and after.
    pub between: (Instant, Instant),
    pub what: What,
}

/// Kept only where tests ask for it.
pub struct History {
    on: AtomicBool,
    events: Mutex<Vec<Event>>,
}

impl Default for History {
    fn default() -> Self {
        Self { on: AtomicBool::new(false), events: Mutex::new(Rank::Runtimes, Vec::new()) }
    }
}

impl History {
    /// Appends an event, if a test has asked for the history.
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

    /// All so far.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events.lock())
    }
}
