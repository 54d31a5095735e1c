//! Changes that are committed together, and what became of them.

use super::reserve::{PROBE_FREE_BYTES, RESERVE_BYTES};
use super::tx::Step;
use crate::error::{Error, Kind, Result};
use crate::locks::{Condvar, Mutex, Rank, region};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// One change as it waits for the disk.
pub(super) struct Change {
    pub(super) seq: u64,
    pub(super) essential: bool,
    pub(super) steps: Vec<Step>,
}

#[derive(Default)]
pub(super) struct Batch {
    pub(super) changes: Vec<Change>,
    pub(super) outcome: Arc<Outcome>,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
    pub(super) fn last_seq(&self) -> u64 {
        self.changes.last().map_or(0, |c| c.seq)
    }
}

/// Why a write failed, for everyone who waited for it.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    pub(super) text: String,
    pub(super) hint: String,
}

impl Failure {
    pub(super) fn from_error(e: &Error, dir: &Path) -> Self {
        let shown = dir.display();
        if e.kind() != Kind::DiskFull {
            let hint = "see dmesg and fcctl doctor; fcd takes changes again by itself once it can write".to_owned();
            return Self { kind: Kind::StoreReadOnly, text: format!("write the store in {shown}: {e}"), hint };
        }
        let needed = (RESERVE_BYTES + PROBE_FREE_BYTES) >> 20;
        let hint = format!("free at least {needed} MiB (df -h {shown}); fcd takes changes again by itself, deletes work now");
        Self { kind: Kind::DiskFull, text: format!("write the store in {shown}: {e}"), hint }
    }

    pub(super) fn closed() -> Self {
        Self { kind: Kind::ShuttingDown, text: "the store is closed".into(), hint: "try again when fcd runs".into() }
    }

    pub(super) fn to_error(&self) -> Error {
        Error::new(self.kind, self.text.clone()).hint(self.hint.clone())
    }
}

/// The answer to a batch: set once.
pub(super) struct Outcome {
    // The rank of the store, whose other lock is never held with it.
    settled: Mutex<Option<std::result::Result<(), Failure>>>,
    changed: Condvar,
}

impl Default for Outcome {
    fn default() -> Self {
        Self { settled: Mutex::new(Rank::Store, None), changed: Condvar::new() }
    }
}

impl Outcome {
    pub(super) fn settle(&self, how: std::result::Result<(), Failure>) {
        self.settled.lock().get_or_insert(how);
        self.changed.notify_all();
    }
}

/// A change that was made in memory and is on its way to the disk.
#[must_use = "a change is not durable before its ticket was waited for"]
pub struct Ticket {
    pub(super) seq: u64,
    /// None: nothing was under way.
    pub(super) outcome: Option<Arc<Outcome>>,
}

impl Ticket {
    /// The change's place in the order of all changes, also over restarts of the daemon.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Waits until the change and all before it are durable, and gives its number. Opens `Rank::DurableWait`.
    ///
    /// # Errors
    /// `disk_full` or `store_read_only`: it was not written and is undone in memory, too. `timeout`: it may still
    /// become either.
    pub fn wait(&self, deadline: Instant) -> Result<u64> {
        let _waiting = region(Rank::DurableWait);
        let Some(outcome) = &self.outcome else { return Ok(self.seq) };
        let mut settled = outcome.settled.lock();
        outcome.changed.wait_while(&mut settled, deadline, |s| s.is_none());
        match &*settled {
            Some(Ok(())) => Ok(self.seq),
            Some(Err(failure)) => Err(failure.to_error()),
            None => {
                Err(Error::new(Kind::Timeout, format!("wait for change {} to be on disk", self.seq)).hint("run fcctl doctor"))
            }
        }
    }

    /// Goes on without waiting: for what may be lost with a crash, such as a strike-off.
    pub fn detach(self) {}
}
