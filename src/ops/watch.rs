//! Watching one operation with `poll`.

use super::{Ops, Shared};
use crate::api::op::{Op, Progress};
use crate::error::{Error, Result};
use crate::ids::OpId;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two tellings of progress: ten a second.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// A timer set to zero would be switched off.
const AT_ONCE: Duration = Duration::from_nanos(1);

/// A watcher's side in the registry. A timer, not an eventfd, so that the last of a burst is told without a thread to
/// tell it: it is set for when the next telling is due.
pub(super) struct Bell {
    id: u64,
    timer: Arc<TimerFd>,
    is_set: bool,
    /// Earliest time of the next telling of progress.
    due: Instant,
}

impl Bell {
    /// Sets the timer, unless it is set; `urgent` at once in any case. Does not block.
    pub(super) fn ring(&mut self, urgent: bool) {
        if self.is_set && !urgent {
            return;
        }
        let after = if urgent { AT_ONCE } else { self.due.saturating_duration_since(Instant::now()).max(AT_ONCE) };
        let set = self.timer.set(Expiration::OneShot(after.into()), TimerSetTimeFlags::empty());
        debug_assert!(set.is_ok(), "a time in range and an open descriptor: {set:?}");
        self.is_set = true;
    }
}

/// What a watcher is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    Progress(Progress),
    Ended(Box<Op>),
}

/// Poll [`Watcher::fd`] for reading, then call [`Watcher::next`].
pub struct Watcher {
    ops: Ops,
    op: OpId,
    id: u64,
    timer: Arc<TimerFd>,
    /// The change that was told last.
    seen: Option<u64>,
}

impl Watcher {
    pub(super) fn new(ops: Ops, op: &OpId) -> Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)
            .map_err(|e| Error::io(format!("watch operation {op}: make a timer"), e))?;
        let timer = Arc::new(timer);
        let mut state = ops.shared.state.lock();
        state.last_watcher += 1;
        let id = state.last_watcher;
        let mut bell = Bell { id, timer: timer.clone(), is_set: false, due: Instant::now() };
        bell.ring(true);
        state.entry(op)?.watchers.push(bell);
        drop(state);
        Ok(Self { ops, op: op.clone(), id, timer, seen: None })
    }

    /// Readable when [`Watcher::next`] has something to say, or is due to be asked. Never read from it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// What changed since the last call: the newest progress, or the end, which stays. None: nothing has. Does not
    /// block.
    #[allow(clippy::should_implement_trait)] // Not an iterator: none now, more later.
    pub fn next(&mut self) -> Option<Change> {
        let shared: &Shared = &self.ops.shared;
        let mut state = shared.state.lock();
        let entry = state.entry(&self.op).ok()?; // Cannot fail: a watched entry is not pruned.
        if entry.op.state.has_ended() {
            return Some(Change::Ended(Box::new(entry.snapshot())));
        }
        let changes = entry.changes;
        let bell = entry.watchers.iter_mut().find(|b| b.id == self.id)?;
        // Under the lock, so that no ring falls between: with the timer off, the next change sets it.
        let _ = self.timer.unset();
        bell.is_set = false;
        if self.seen == Some(changes) {
            return None;
        }
        bell.due = Instant::now() + PROGRESS_INTERVAL;
        self.seen = Some(changes);
        Some(Change::Progress(entry.op.progress.clone()))
    }

    /// Waits in `poll` for something to say. For those who have nothing else to poll. None at the deadline.
    pub fn next_before(&mut self, deadline: Instant) -> Result<Option<Change>> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) if left.is_zero() => return Ok(None),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => match self.next() {
                    Some(change) => return Ok(Some(change)),
                    None => continue,
                },
                Err(e) => return Err(Error::io("poll an operation's watcher", e)),
            }
        }
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
