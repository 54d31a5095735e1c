//! One job: what lies in the queue, and the handle of whoever waits for it.

use super::Shared;
use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, Condvar, Mutex, Rank, Waited, assert_none_held, operation_scope, region};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

/// A job in the queue.
pub(super) struct Queued {
    pub(super) uid: u32,
    pub(super) label: Arc<str>,
    pub(super) cancel: Cancel,
    pub(super) run: Box<dyn FnOnce(Start<'_>) + Send>,
}

pub(super) enum Start<'a> {
    Run(&'a Shared),
    /// It will never run, for this reason.
    Refuse(Error),
}

enum Outcome<T> {
    Pending,
    Ready(Result<T>),
    Taken,
}

struct Slot<T> {
    outcome: Mutex<Outcome<T>>,
    done: Condvar,
}

impl<T> Slot<T> {
    fn set(&self, result: Result<T>) {
        *self.outcome.lock() = Outcome::Ready(result);
        self.done.notify_all();
    }
}

/// A job somebody may wait for. Dropping it leaves the job to run unobserved.
#[must_use = "nobody learns how the job ended"]
pub struct JobHandle<T> {
    shared: Arc<Shared>,
    slot: Arc<Slot<T>>,
    label: Arc<str>,
    cancel: Cancel,
}

pub(super) fn new<T: Send + 'static>(
    shared: Arc<Shared>,
    uid: u32,
    label: &str,
    cancel: &Cancel,
    job: impl FnOnce(&Cancel) -> Result<T> + Send + 'static,
) -> (JobHandle<T>, Queued) {
    let label: Arc<str> = label.into();
    let slot = Arc::new(Slot { outcome: Mutex::new(Rank::Pool, Outcome::Pending), done: Condvar::new() });
    let run = {
        let (slot, label, cancel) = (slot.clone(), label.clone(), cancel.clone());
        Box::new(move |start: Start<'_>| match start {
            Start::Run(shared) => {
                let result = run(&label, &cancel, job);
                // First free, then seen: who has the outcome finds the worker free.
                shared.ended(uid);
                slot.set(result);
            }
            Start::Refuse(error) => {
                drop(job);
                slot.set(Err(error));
            }
        })
    };
    let queued = Queued { uid, label: label.clone(), cancel: cancel.clone(), run };
    (JobHandle { shared, slot, label, cancel: cancel.clone() }, queued)
}

/// Runs a job on a worker, which outlives whatever the job does.
fn run<T>(label: &Arc<str>, cancel: &Cancel, job: impl FnOnce(&Cancel) -> Result<T>) -> Result<T> {
    let guarded = AssertUnwindSafe(|| {
        let scope = operation_scope(label.clone());
        let running = region(Rank::Job);
        let result = job(cancel);
        drop((running, scope));
        assert_none_held("the end of a pool job");
        result
    });
    catch_unwind(guarded).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        log::error!("job {label} panicked: {}", said.unwrap_or("no message"));
        Err(Error::internal(format!("{label}: the job panicked")).hint("see the daemon's log"))
    })
}

impl<T> JobHandle<T> {
    /// Waits for the job's end, which is had once. A job whose token fires before it runs ends at once with
    /// `cancelled`; a running one is waited for also then, for it ends by the same token and what it does must be
    /// over before a lock held meanwhile is let go. Fails with `timeout` at the deadline: the job goes on.
    pub fn wait(&self, deadline: Instant) -> Result<T> {
        let _waiting = region(Rank::JobWait);
        let pending = |o: &mut Outcome<T>| matches!(o, Outcome::Pending);
        let mut outcome = self.slot.outcome.lock();
        let mut ended = self.slot.done.wait_while_cancellable(&mut outcome, deadline, &self.cancel, pending);
        if ended == Waited::Cancelled {
            drop(outcome);
            self.shared.purge();
            outcome = self.slot.outcome.lock();
            let done = self.slot.done.wait_while(&mut outcome, deadline, pending);
            ended = if done { Waited::Done } else { Waited::TimedOut };
        }
        if ended == Waited::TimedOut {
            return Err(Error::new(Kind::Timeout, format!("{}: the job has not ended in time", self.label)));
        }
        match std::mem::replace(&mut *outcome, Outcome::Taken) {
            Outcome::Ready(result) => result,
            _ => Err(Error::internal(format!("{}: the outcome was taken before", self.label))),
        }
    }

    pub fn label(&self) -> &str {
        &self.label
    }
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }
    pub fn is_done(&self) -> bool {
        !matches!(*self.slot.outcome.lock(), Outcome::Pending)
    }
}
