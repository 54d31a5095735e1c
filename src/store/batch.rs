//! Defines batches of changes that are committed together, their outcome, and the tickets that
//! callers wait on.

use super::Inner;
use super::reserve::{PROBE_FREE_BYTES, RESERVE_BYTES};
use super::tx::Step;
use crate::error::{Error, Kind, Result};
use crate::locks::{Condvar, Mutex, Rank, durable_wait};
use crate::sched::Instant;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A change that is not yet on disk.
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

/// The reason why a write failed. All callers that waited for the write get a copy.
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
            let hint = "see dmesg and fcctl doctor; fcd recovers automatically once it can write"
                .to_owned();
            return Self {
                kind: Kind::StoreReadOnly,
                text: format!("write the store in {shown}: {e}"),
                hint,
            };
        }
        let needed = (RESERVE_BYTES + PROBE_FREE_BYTES) >> 20;
        let hint = format!(
            "free at least {needed} MiB (df -h {shown}); fcd then recovers automatically; deletes work even now"
        );
        Self {
            kind: Kind::DiskFull,
            text: format!("write the store in {shown}: {e}"),
            hint,
        }
    }

    pub(super) fn closed() -> Self {
        Self {
            kind: Kind::ShuttingDown,
            text: "the store is closed".into(),
            hint: "try again once fcd runs".into(),
        }
    }

    pub(super) fn to_error(&self) -> Error {
        Error::new(self.kind, self.text.clone()).hint(self.hint.clone())
    }
}

/// The result of a batch. Only the first result that is set counts.
pub(super) struct Outcome {
    // This lock has the same rank as the store's other lock, so the two are never held together.
    settled: Mutex<Option<std::result::Result<(), Failure>>>,
    changed: Condvar,
}

impl Default for Outcome {
    fn default() -> Self {
        Self {
            settled: Mutex::new(Rank::Store, None),
            changed: Condvar::new(),
        }
    }
}

impl Outcome {
    pub(super) fn settle(&self, how: std::result::Result<(), Failure>) {
        self.settled.lock().get_or_insert(how);
        self.changed.notify_all();
    }
}

/// A change that was made in memory and still has to be written. The change is written when a
/// caller waits for it or for another change, or when the ticket is dropped.
#[must_use = "a change is not durable before its ticket was waited for"]
pub struct Ticket {
    seq: u64,
    /// `None` if there was nothing to write.
    pending: Option<Pending>,
}

struct Pending {
    inner: Arc<Inner>,
    outcome: Arc<Outcome>,
    /// True once a caller writes the change or has asked the store's thread to do so.
    is_asked_for: AtomicBool,
}

/// The thread that writes a change when a caller waits for the change.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Writes {
    /// The caller, if no other thread is writing and the caller's deadline is not near.
    Own,
    ByThread,
}

impl Ticket {
    pub(super) fn new(seq: u64, inner: &Arc<Inner>, outcome: Option<Arc<Outcome>>) -> Self {
        let pending = |outcome| Pending {
            inner: inner.clone(),
            outcome,
            is_asked_for: AtomicBool::new(false),
        };
        Self {
            seq,
            pending: outcome.map(pending),
        }
    }

    /// Returns the change's position in the order of all changes, which continues across restarts
    /// of the daemon.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Waits until the change and all changes before it are durable, and returns its number. Writes
    /// the change on this thread if no other thread writes and the deadline is not near
    /// (`OWN_WRITE_TIME_MIN`). If the disk hangs during that write, this call may take longer than
    /// its deadline. Opens `Rank::DurableWait`.
    ///
    /// # Errors
    /// `disk_full` or `store_read_only` if the change was not written; the store has then also
    /// undone it in memory. `shutting_down` if the store was closed first. `timeout` if the outcome
    /// is unknown at the deadline.
    pub fn wait(&self, deadline: Instant) -> Result<u64> {
        self.wait_as(Writes::Own, deadline)
    }

    /// Waits as [`Ticket::wait`] does, but leaves the write to the store's thread, so that the
    /// deadline holds even if the disk hangs.
    pub fn wait_for_thread(&self, deadline: Instant) -> Result<u64> {
        self.wait_as(Writes::ByThread, deadline)
    }

    fn wait_as(&self, writes: Writes, deadline: Instant) -> Result<u64> {
        let _waiting = durable_wait();
        let Some(pending) = &self.pending else {
            return Ok(self.seq);
        };
        let outcome = &pending.outcome;
        pending.is_asked_for.store(true, Ordering::Relaxed);
        pending.inner.write_or_ask(outcome, writes, deadline);
        let mut settled = outcome.settled.lock();
        outcome
            .changed
            .wait_while(&mut settled, deadline, |s| s.is_none());
        match &*settled {
            Some(Ok(())) => Ok(self.seq),
            Some(Err(failure)) => Err(failure.to_error()),
            None => Err(Error::new(
                Kind::Timeout,
                format!(
                    "wait for change {} to be on disk: not finished in time",
                    self.seq
                ),
            )
            .hint("run fcctl doctor")),
        }
    }

    /// Asks the store's thread to write the change, without waiting.
    #[cfg(any(test, feature = "fakes"))]
    pub fn write_soon(&self) {
        if let Some(pending) = &self.pending {
            pending.write_soon();
        }
    }

    /// Drops the ticket without waiting. This is for a change that may be lost in a crash, such as
    /// the removal of a ledger row.
    pub fn detach(self) {}
}

impl Pending {
    fn write_soon(&self) {
        if !self.is_asked_for.swap(true, Ordering::Relaxed) {
            self.inner
                .write_or_ask(&self.outcome, Writes::ByThread, Instant::now());
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.write_soon();
    }
}
