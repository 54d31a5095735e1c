//! The bounded worker pool for guest I/O ([`Pool`]), and the admission of boots and builds
//! ([`Admission`]).
//!
//! Submitting a job never blocks: if the queue is full, the caller gets `pool_full`.
//! [`Pool::reserve`] takes a slot early, so that a call can be refused before it changes anything.
//!
//! Workers are shared fairly between uids. The next job comes from the uid with the fewest running
//! jobs, and no uid has more than [`Bounds::running_per_uid_max`] running, so one user's slow
//! transfers never hold up those of others.

mod admission;
mod job;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

pub use admission::Admission;
pub use job::JobHandle;

use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, Condvar, Mutex, Rank, region};
use crate::sched::Instant;
use crate::uids::UidCounts;
use job::{QueuedJob, Start};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// How long an idle worker waits at a time. New work wakes it at once.
const IDLE_WAIT: Duration = Duration::from_secs(60);

/// A fixed number of workers and a bounded queue.
pub struct Pool {
    shared: Arc<Shared>,
}

/// The limits of a pool.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub workers: usize,
    /// How many jobs of one uid may run at the same time.
    pub running_per_uid_max: usize,
    /// The number of slots in the queue. Running jobs do not occupy one.
    pub queue_max: usize,
    /// The number of slots that one uid may occupy.
    pub queue_per_uid_max: usize,
}

/// The pool's current load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg(any(test, feature = "fakes"))]
pub struct Counts {
    pub running: usize,
    /// The number of jobs that wait for a worker.
    pub queued: usize,
    /// The number of occupied slots: queued jobs, and slots reserved for later jobs.
    pub places: usize,
}

struct Shared {
    state: Mutex<State>,
    /// Notified when a job can run or the pool closes.
    work: Condvar,
    /// Notified when the pool becomes idle.
    idle: Condvar,
    bounds: Bounds,
}

#[derive(Default)]
struct State {
    queue: VecDeque<QueuedJob>,
    running: UidCounts,
    /// Slots that are reserved or hold a queued job.
    places: UidCounts,
    is_closing: bool,
}

impl State {
    /// Returns the queue index of the next job that may run: the oldest job of the uid with the
    /// fewest running jobs. A cancelled job may always leave the queue.
    fn next(&self, running_per_uid_max: usize) -> Option<usize> {
        let weight = |queued: &QueuedJob| {
            if queued.cancel.is_cancelled() {
                0
            } else {
                self.running.of(queued.uid)
            }
        };
        let may_run = |(_, weight): &(usize, usize)| *weight < running_per_uid_max;
        let weights = self.queue.iter().map(weight).enumerate();
        weights
            .filter(may_run)
            .min_by_key(|(at, weight)| (*weight, *at))
            .map(|(at, _)| at)
    }

    fn take_next(&mut self, running_per_uid_max: usize) -> Option<QueuedJob> {
        let at = self.next(running_per_uid_max)?;
        self.queue.remove(at)
    }

    /// True if no queued job may run now and the worker must not end, because the pool is open or
    /// jobs are still queued.
    fn must_wait(&self, running_per_uid_max: usize) -> bool {
        self.next(running_per_uid_max).is_none() && !(self.is_closing && self.queue.is_empty())
    }
}

impl Pool {
    /// Creates a pool and starts its workers.
    ///
    /// # Errors
    /// `exhausted` if a thread cannot be started.
    pub fn new(bounds: Bounds) -> Result<Self> {
        let (state, work, idle) = (
            Mutex::new(Rank::Pool, State::default()),
            Condvar::new(),
            Condvar::new(),
        );
        let pool = Self {
            shared: Arc::new(Shared {
                state,
                work,
                idle,
                bounds,
            }),
        };
        for i in 0..bounds.workers {
            let shared = pool.shared.clone();
            // On failure, dropping the pool ends the workers that have started.
            crate::host::thread::spawn(&format!("pool-{i}"), move || shared.work())?;
        }
        Ok(pool)
    }

    /// Reserves a slot in the queue for a later job. Never blocks.
    ///
    /// # Errors
    /// `pool_full` or `shutting_down`.
    pub fn reserve(&self, uid: u32) -> Result<QueueSlot> {
        self.shared.purge();
        let mut state = self.shared.state.lock();
        if state.is_closing {
            return Err(shutting_down());
        }
        let (mine, all) = (state.places.of(uid), state.places.total());
        let full = |whose: &str, n: usize| {
            Error::new(
                Kind::PoolFull,
                format!("{whose} queue for guest transfers is full ({n} waiting)"),
            )
            .hint("wait for one to finish (fcctl op list), then try again")
        };
        if all >= self.shared.bounds.queue_max {
            return Err(full("the", all));
        }
        if mine >= self.shared.bounds.queue_per_uid_max {
            return Err(full("your share of the", mine));
        }
        state.places.add(uid);
        drop(state);
        Ok(QueueSlot {
            shared: Some(self.shared.clone()),
            uid,
        })
    }

    #[cfg(any(test, feature = "fakes"))]
    pub fn counts(&self) -> Counts {
        self.shared.purge();
        let state = self.shared.state.lock();
        Counts {
            running: state.running.total(),
            queued: state.queue.len(),
            places: state.places.total(),
        }
    }

    /// Accepts no more jobs and waits for the present ones. Jobs that are still queued at the
    /// deadline are refused with `shutting_down`. Running jobs are not interrupted; fire their
    /// tokens for that. Returns true if all jobs have ended.
    pub fn close(&self, deadline: Instant) -> bool {
        let _waiting = region(Rank::JobWait);
        let mut state = self.shared.state.lock();
        state.is_closing = true;
        self.shared.work.notify_all();
        let drained = self.shared.idle.wait_while(&mut state, deadline, |s| {
            s.running.total() > 0 || !s.queue.is_empty()
        });
        drop(state);
        if !drained {
            self.shared.refuse_all();
        }
        drained
    }
}

impl Drop for Pool {
    /// Refuses queued jobs. Each worker ends after its current job.
    fn drop(&mut self) {
        self.shared.state.lock().is_closing = true;
        self.shared.work.notify_all();
        self.shared.refuse_all();
    }
}

/// A reserved slot in the queue. Dropping it frees the slot.
#[must_use = "dropping it frees the slot"]
pub struct QueueSlot {
    shared: Option<Arc<Shared>>,
    uid: u32,
}

impl QueueSlot {
    /// Queues the job without blocking. A pool that is closing refuses the job with
    /// `shutting_down`. `label` names the job in lock records and messages, for example
    /// `workspace.prepare web`. If `cancel` fires before a worker takes the job, the job leaves the
    /// queue and never runs; a running job has to check the token itself.
    pub fn submit<T: Send + 'static>(
        mut self,
        label: &str,
        cancel: &Cancel,
        job: impl FnOnce(&Cancel) -> Result<T> + Send + 'static,
    ) -> JobHandle<T> {
        let shared = self.shared.take().expect("only submit takes it");
        let (handle, queued) = job::new(shared.clone(), self.uid, label, cancel, job);
        let mut state = shared.state.lock();
        state.queue.push_back(queued);
        let refused = state.is_closing.then(|| state.queue.pop_back()).flatten();
        drop(state);
        match refused {
            Some(queued) => shared.refuse(vec![queued], |_| shutting_down()),
            None => shared.work.notify_all(),
        }
        handle
    }
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            shared.state.lock().places.remove(self.uid);
        }
    }
}

impl Shared {
    /// Runs jobs on a worker thread until the pool is closing and the queue is empty.
    fn work(self: Arc<Self>) {
        let most = self.bounds.running_per_uid_max;
        loop {
            let mut state = self.state.lock();
            self.work
                .wait_while(&mut state, Instant::now() + IDLE_WAIT, |s| {
                    s.must_wait(most)
                });
            let Some(queued) = state.take_next(most) else {
                if state.is_closing && state.queue.is_empty() {
                    return;
                }
                continue;
            };
            if queued.cancel.is_cancelled() {
                drop(state);
                self.refuse(vec![queued], cancelled);
                continue;
            }
            state.places.remove(queued.uid);
            state.running.add(queued.uid);
            drop(state);
            (queued.run)(Start::Run(&self));
        }
    }

    /// Records that a worker's job has ended. The worker calls this before the job's result becomes
    /// visible.
    fn ended(&self, uid: u32) {
        let mut state = self.state.lock();
        state.running.remove(uid);
        self.notify_if_idle(&state);
        drop(state);
        // Another job of this uid may be able to run now.
        self.work.notify_all();
    }

    /// Removes cancelled jobs from the queue and wakes the threads that wait for them.
    fn purge(&self) {
        let mut gone = Vec::new();
        let mut state = self.state.lock();
        for i in (0..state.queue.len()).rev() {
            if state.queue[i].cancel.is_cancelled() {
                gone.extend(state.queue.remove(i));
            }
        }
        drop(state);
        self.refuse(gone, cancelled);
    }

    fn refuse_all(&self) {
        let gone = std::mem::take(&mut self.state.lock().queue);
        self.refuse(gone.into(), |_| shutting_down());
    }

    /// Ends jobs that have left the queue, with the error that `why` returns. No lock may be held,
    /// because the values that the jobs own are dropped here.
    fn refuse(&self, gone: Vec<QueuedJob>, why: fn(&QueuedJob) -> Error) {
        for queued in gone {
            let mut state = self.state.lock();
            state.places.remove(queued.uid);
            self.notify_if_idle(&state);
            drop(state);
            let why = why(&queued);
            (queued.run)(Start::Refuse(why));
        }
    }

    fn notify_if_idle(&self, state: &State) {
        if state.running.total() == 0 && state.queue.is_empty() {
            self.idle.notify_all();
        }
    }
}

fn cancelled(queued: &QueuedJob) -> Error {
    crate::host::wait::cancelled(&queued.label, &queued.cancel)
}

fn shutting_down() -> Error {
    Error::new(Kind::ShuttingDown, "the daemon is shutting down").hint("try again when it is back")
}
