//! Decides which thread writes.
//!
//! There is one [`Writer`], and the thread that has taken it out of the store's core writes. A
//! caller that waits for its change takes the writer if it is free, and commits all waiting changes
//! on its own thread. Waking another thread and being woken by it would take half as long as the
//! fdatasync(2) itself. The store's own thread writes changes that nobody waits for, and those that
//! arrive while another thread writes. This thread also folds the log and probes a read-only store.

use super::batch::{Batch, Failure, Outcome, Writes};
use super::writer::Writer;
use super::{Core, Inner};
use crate::sched::Instant;
use std::sync::Arc;
use std::time::Duration;

/// How often the store's thread wakes up if nothing else wakes it.
const IDLE: Duration = Duration::from_secs(600);
/// The time that a caller must have until its deadline to write on its own thread. A caller with
/// less time leaves the write to the store's thread, because a system call that waits for the disk
/// does not end at a deadline.
pub(super) const OWN_WRITE_TIME_MIN: Duration = Duration::from_secs(5);

enum Work {
    Batch(Batch),
    Chores,
    Probe,
    Close,
}

/// Holds the writer and returns it to the core when dropped. If the writer has panicked, the drop
/// also closes the store.
struct Turn<'a> {
    inner: &'a Inner,
    writer: Option<Box<Writer>>,
    /// True if the thread was already unwinding when it took the writer. This happens if a
    /// destructor waits for a change during a panic.
    was_panicking: bool,
}

impl<'a> Turn<'a> {
    fn new(inner: &'a Inner, writer: Option<Box<Writer>>) -> Self {
        let was_panicking = std::thread::panicking();
        Self {
            inner,
            writer,
            was_panicking,
        }
    }

    fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().expect("only `close` takes it")
    }

    fn close(mut self) {
        if let Some(writer) = self.writer.take() {
            writer.finish(self.inner);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let Some(writer) = self.writer.take() else {
            return;
        };
        let mut core = self.inner.core.lock();
        core.writer = Some(writer);
        // The state after a panic in the writer is unknown, so the store closes.
        core.closing |= std::thread::panicking() && !self.was_panicking;
        let is_thread_due = core.has_work() || core.mode.is_read_only();
        drop(core);
        if is_thread_due {
            self.inner.wake.notify_all();
        }
    }
}

impl Core {
    /// True if the store's thread has something to do now.
    fn has_work(&self) -> bool {
        let is_asked =
            self.closing || self.probe_now || (self.is_thread_wanted && !self.queue.is_empty());
        self.writer
            .as_ref()
            .is_some_and(|writer| is_asked || writer.has_chores())
    }

    fn waits_to_probe(&self) -> bool {
        self.mode.is_read_only() && self.writer.is_some()
    }

    /// Takes all waiting changes and marks them as in flight.
    fn begin_batch(&mut self) -> Batch {
        let batch = std::mem::take(&mut self.queue);
        self.in_flight = Some(batch.outcome.clone());
        self.is_thread_wanted = false;
        batch
    }

    /// Takes the writer for a caller. Returns `None` if another thread uses the writer, if the
    /// store is closing or read-only, or if the writer has work that only the store's thread does.
    fn take_writer(&mut self) -> Option<Box<Writer>> {
        let is_free = !self.closing && !self.mode.is_read_only();
        self.writer
            .take_if(|writer| is_free && !writer.has_chores())
    }
}

impl Inner {
    /// Makes sure that the batch of `outcome` is written, unless its write has begun. This thread
    /// writes the batch if it has enough time until `deadline` and no other thread writes;
    /// otherwise the store's thread does.
    pub(super) fn write_or_ask(&self, outcome: &Arc<Outcome>, writes: Writes, deadline: Instant) {
        let time_left = deadline.saturating_duration_since(Instant::now());
        let may_write = writes == Writes::Own && time_left >= OWN_WRITE_TIME_MIN;
        let mut core = self.core.lock();
        if !Arc::ptr_eq(&core.queue.outcome, outcome) {
            return;
        }
        let writer = if may_write { core.take_writer() } else { None };
        if writer.is_none() {
            core.is_thread_wanted = true;
            drop(core);
            self.wake.notify_all();
            return;
        }
        let batch = core.begin_batch();
        drop(core);
        Turn::new(self, writer).writer().commit(self, batch);
    }

    /// Runs the store's thread until the store is closed.
    pub(super) fn write_until_closed(&self) {
        let _end = End(self);
        loop {
            let (mut turn, work) = self.next_work();
            match work {
                Work::Batch(batch) => turn.writer().commit(self, batch),
                Work::Chores => turn.writer().do_chores(self),
                Work::Probe => turn.writer().probe_and_report(self),
                Work::Close => return turn.close(),
            }
        }
    }

    fn next_work(&self) -> (Turn<'_>, Work) {
        let mut core = self.core.lock();
        loop {
            let waits_to_probe = core.waits_to_probe();
            let probe_at = core
                .writer
                .as_ref()
                .filter(|_| waits_to_probe)
                .map(|writer| writer.probe_at());
            let until = probe_at.unwrap_or_else(|| Instant::now() + IDLE);
            self.wake.wait_while(&mut core, until, |c| {
                !c.has_work() && c.waits_to_probe() == waits_to_probe
            });
            let Some(writer) = core.writer.take() else {
                continue;
            };
            let work = if writer.has_chores() {
                Work::Chores
            } else if !core.queue.is_empty() {
                Work::Batch(core.begin_batch())
            } else if core.closing {
                Work::Close
            } else if (std::mem::take(&mut core.probe_now) || Instant::now() >= writer.probe_at())
                && core.mode.is_read_only()
            {
                Work::Probe
            } else {
                core.writer = Some(writer);
                continue;
            };
            drop(core);
            return (Turn::new(self, Some(writer)), work);
        }
    }
}

/// Ends the store when its thread ends for any reason, so that nobody waits for it forever.
struct End<'a>(&'a Inner);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut core = self.0.core.lock();
        core.closing = true;
        let left = std::mem::take(&mut core.queue);
        if left.is_empty() {
            return;
        }
        core.revert(left.changes);
        drop(core);
        left.outcome.settle(Err(Failure::closed()));
    }
}
