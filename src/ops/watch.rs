//! Lets a thread watch one operation with `poll`.

use super::{Ops, Shared};
use crate::api::op::{Op, Progress};
use crate::error::{Error, Result};
use crate::ids::OpId;
use crate::sched::{Instant, Timer};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

/// The shortest time between two notifications of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// The shortest timeout. Setting a timer to zero would disarm it.
const IMMEDIATELY: Duration = Duration::from_nanos(1);

/// The registry's side of a watcher. Changes set a timer for when the next notification is due.
/// Unlike an eventfd, a timer reports the last change of a burst without an extra thread.
pub(super) struct Notifier {
    id: u64,
    timer: Arc<Timer>,
    is_set: bool,
    /// The earliest time of the next notification of progress.
    due: Instant,
}

impl Notifier {
    /// Sets the timer if it is not set. If `urgent`, the timer fires immediately in any case. Does
    /// not block.
    pub(super) fn notify(&mut self, urgent: bool) {
        if self.is_set && !urgent {
            return;
        }
        let after = if urgent {
            IMMEDIATELY
        } else {
            self.due
                .saturating_duration_since(Instant::now())
                .max(IMMEDIATELY)
        };
        let set = self.timer.set(after);
        debug_assert!(
            set.is_ok(),
            "a time in range and an open descriptor: {set:?}"
        );
        self.is_set = true;
    }
}

/// A change since the watcher last looked.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    Progress(Progress),
    Ended(Box<Op>),
}

/// Watches one operation. Poll [`Watcher::fd`] for reading, then call [`Watcher::next`].
pub struct Watcher {
    ops: Ops,
    op: OpId,
    id: u64,
    timer: Arc<Timer>,
    /// The number of the last change that was returned.
    seen: Option<u64>,
}

impl Watcher {
    pub(super) fn new(ops: Ops, op: &OpId) -> Result<Self> {
        let timer = Timer::try_new()
            .map_err(|e| Error::io(format!("watch operation {op}: create a timer"), e))?;
        let timer = Arc::new(timer);
        let mut state = ops.shared.state.lock();
        state.last_watcher += 1;
        let id = state.last_watcher;
        let mut notifier = Notifier {
            id,
            timer: timer.clone(),
            is_set: false,
            due: Instant::now(),
        };
        notifier.notify(true);
        state.entry(op)?.watchers.push(notifier);
        drop(state);
        Ok(Self {
            ops,
            op: op.clone(),
            id,
            timer,
            seen: None,
        })
    }

    /// Returns a descriptor that is readable when [`Watcher::next`] should be called. The caller
    /// must never read from the descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.timer.fd()
    }

    /// Returns the newest progress since the last call, or the end of the operation. The end is
    /// returned on every call. `None` means that nothing has changed. Does not block.
    #[allow(clippy::should_implement_trait)] // Unlike in an iterator, a Some may follow a None.
    pub fn next(&mut self) -> Option<Change> {
        let shared: &Shared = &self.ops.shared;
        let mut state = shared.state.lock();
        let entry = state.entry(&self.op).ok()?; // Cannot fail, because a watched entry is not pruned.
        if entry.op.state.has_ended() {
            return Some(Change::Ended(Box::new(entry.snapshot())));
        }
        let changes = entry.changes;
        let notifier = entry.watchers.iter_mut().find(|b| b.id == self.id)?;
        // Unset the timer under the lock. The next change then sets it again, so no notification is
        // lost.
        self.timer.unset();
        notifier.is_set = false;
        if self.seen == Some(changes) {
            return None;
        }
        notifier.due = Instant::now() + PROGRESS_INTERVAL;
        self.seen = Some(changes);
        Some(Change::Progress(entry.op.progress.clone()))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let mut state = self.ops.shared.state.lock();
        if let Ok(entry) = state.entry(&self.op) {
            entry.watchers.retain(|b| b.id != self.id);
        }
    }
}
