//! Defines a job's entry in the queue, and the handle for waiting for the job's result.

use super::Shared;
use crate::error::{Error, Kind, Result};
use crate::locks::{
    Cancel, Condvar, Mutex, Rank, Waited, assert_none_held, operation_scope, region,
};
use crate::sched::Instant;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A job in the queue.
pub(super) struct QueuedJob {
    pub(super) uid: u32,
    pub(super) label: Arc<str>,
    pub(super) cancel: Cancel,
    pub(super) run: Box<dyn FnOnce(Start<'_>) + Send>,
}

pub(super) enum Start<'a> {
    Run(&'a Shared),
    /// The job will never run, because of this error.
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

/// A handle for waiting for a job. Dropping it does not stop the job.
#[must_use = "dropping it discards the job's result"]
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
) -> (JobHandle<T>, QueuedJob) {
    let label: Arc<str> = label.into();
    let slot = Arc::new(Slot {
        outcome: Mutex::new(Rank::Pool, Outcome::Pending),
        done: Condvar::new(),
    });
    let run = {
        let (slot, label, cancel) = (slot.clone(), label.clone(), cancel.clone());
        Box::new(move |start: Start<'_>| match start {
            Start::Run(shared) => {
                let result = run(&label, &cancel, job);
                // Count the worker as free before the result is visible, so that a caller that has
                // seen the result can submit the next job.
                shared.ended(uid);
                slot.set(result);
            }
            Start::Refuse(error) => {
                drop(job);
                slot.set(Err(error));
            }
        })
    };
    let queued = QueuedJob {
        uid,
        label: label.clone(),
        cancel: cancel.clone(),
        run,
    };
    (
        JobHandle {
            shared,
            slot,
            label,
            cancel: cancel.clone(),
        },
        queued,
    )
}

/// Runs a job on a worker thread. If the job panics, returns `internal`, and the thread survives.
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
        let said = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        log::error!("job {label} panicked: {}", said.unwrap_or("no message"));
        Err(Error::internal(format!("{label}: the job panicked")).hint("see the daemon's log"))
    })
}

impl<T> JobHandle<T> {
    /// Waits for the job and returns its result, which can be taken once. If the token fires before
    /// the job runs, returns `cancelled` immediately. If it fires later, the job sees it too, and
    /// this call still waits for the job, because the caller may hold a lock that must not be
    /// released before the job has ended.
    ///
    /// # Errors
    /// The job's error, `cancelled`, or `timeout` at the deadline, after which the job continues.
    pub fn wait(&self, deadline: Instant) -> Result<T> {
        let _waiting = region(Rank::JobWait);
        let pending = |o: &mut Outcome<T>| matches!(o, Outcome::Pending);
        let mut outcome = self.slot.outcome.lock();
        let mut ended =
            self.slot
                .done
                .wait_while_cancellable(&mut outcome, deadline, &self.cancel, pending);
        if ended == Waited::Cancelled {
            drop(outcome);
            self.shared.purge();
            outcome = self.slot.outcome.lock();
            let done = self.slot.done.wait_while(&mut outcome, deadline, pending);
            ended = if done { Waited::Done } else { Waited::TimedOut };
        }
        if ended == Waited::TimedOut {
            return Err(Error::new(
                Kind::Timeout,
                format!("{}: the job did not finish in time", self.label),
            ));
        }
        match std::mem::replace(&mut *outcome, Outcome::Taken) {
            Outcome::Ready(result) => result,
            _ => Err(Error::internal(format!(
                "{}: the result has already been taken",
                self.label
            ))),
        }
    }

    pub fn is_done(&self) -> bool {
        !matches!(*self.slot.outcome.lock(), Outcome::Pending)
    }
}
