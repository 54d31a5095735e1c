//! The bounded worker pool for guest I/O, and boot admission. Submitting never blocks: there is a place in the queue
//! or the answer is busy.
//!
//! Workers are shared fairly between uids: the next job is one of the uid with the fewest running, and no uid ever has
//! more than [`Bounds::running_per_uid_max`] running. So slow transfers of one user never hold up those of the others.

mod admission;
mod job;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

pub use admission::{Admission, Permit};
pub use job::JobHandle;

use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, Condvar, Mutex, Rank, region};
use crate::uids::UidCounts;
use job::{Queued, Start};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An idle worker looks up this often; it is woken for work.
const WORKER_LOOK: Duration = Duration::from_secs(60);

/// A fixed number of workers and a bounded queue.
pub struct Pool {
    shared: Arc<Shared>,
}

/// How much the pool takes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub workers: usize,
    /// Jobs of one uid that run at once.
    pub running_per_uid_max: usize,
    /// Places in the queue, running jobs not counted.
    pub queue_max: usize,
    /// Most queued jobs of one uid.
    pub queue_per_uid_max: usize,
}

/// What the pool does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub running: usize,
    /// Jobs that wait for a worker.
    pub queued: usize,
    /// Places taken in the queue: queued jobs, and places reserved for jobs to come.
    pub places: usize,
}

struct Shared {
    state: Mutex<State>,
    /// There is work, or the pool closes.
    work: Condvar,
    /// The pool has become idle.
    idle: Condvar,
    bounds: Bounds,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Queued>,
    running: UidCounts,
    /// Reserved or queued.
    places: UidCounts,
    is_closing: bool,
}

impl State {
    /// Where the next job lies that may run: of the uid with the fewest running, the one that has waited longest. A cancelled
    /// one may always leave the queue.
    fn next(&self, running_per_uid_max: usize) -> Option<usize> {
        let weight = |queued: &Queued| if queued.cancel.is_cancelled() { 0 } else { self.running.of(queued.uid) };
        let may_run = |(_, weight): &(usize, usize)| *weight < running_per_uid_max;
        let weights = self.queue.iter().map(weight).enumerate();
        weights.filter(may_run).min_by_key(|(at, weight)| (*weight, *at)).map(|(at, _)| at)
    }

    fn take_next(&mut self, running_per_uid_max: usize) -> Option<Queued> {
        let at = self.next(running_per_uid_max)?;
        self.queue.remove(at)
    }

    /// A worker has nothing to do and is not to end.
    fn must_wait(&self, running_per_uid_max: usize) -> bool {
        self.next(running_per_uid_max).is_none() && !(self.is_closing && self.queue.is_empty())
    }
}

impl Pool {
    /// Starts the workers. Fails with `exhausted` when no thread can be started.
    pub fn new(bounds: Bounds) -> Result<Self> {
        let (state, work, idle) = (Mutex::new(Rank::Pool, State::default()), Condvar::new(), Condvar::new());
        let pool = Self { shared: Arc::new(Shared { state, work, idle, bounds }) };
        for i in 0..bounds.workers {
            let shared = pool.shared.clone();
            // Dropping the pool on failure ends those that have started.
            crate::host::thread::spawn(&format!("pool-{i}"), move || shared.work())?;
        }
        Ok(pool)
    }

    /// Takes a place in the queue for a job to come. Never blocks: `pool_full`, or `shutting_down`.
    pub fn reserve(&self, uid: u32) -> Result<Place> {
        self.shared.purge();
        let mut state = self.shared.state.lock();
        if state.is_closing {
            return Err(shutting_down());
        }
        let (mine, all) = (state.places.of(uid), state.places.total());
        let full = |whose: &str, n: usize| {
            Error::new(Kind::PoolFull, format!("{whose} queue for guest transfers is full ({n} waiting)"))
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
        Ok(Place { shared: Some(self.shared.clone()), uid })
    }

    /// [`Pool::reserve`] and [`Place::submit`] in one.
    pub fn try_submit<T: Send + 'static>(
        &self,
        uid: u32,
        label: &str,
        cancel: &Cancel,
        job: impl FnOnce(&Cancel) -> Result<T> + Send + 'static,
    ) -> Result<JobHandle<T>> {
        Ok(self.reserve(uid)?.submit(label, cancel, job))
    }

    pub fn counts(&self) -> Counts {
        self.shared.purge();
        let state = self.shared.state.lock();
        Counts { running: state.running.total(), queued: state.queue.len(), places: state.places.total() }
    }

    /// Takes no more jobs and waits for those it has; those still queued at the deadline are refused with
    /// `shutting_down`. True when all have ended. A running job is not touched: fire its token.
    pub fn close(&self, deadline: Instant) -> bool {
        let _waiting = region(Rank::JobWait);
        let mut state = self.shared.state.lock();
        state.is_closing = true;
        self.shared.work.notify_all();
        let drained = self.shared.idle.wait_while(&mut state, deadline, |s| s.running.total() > 0 || !s.queue.is_empty());
        drop(state);
        if !drained {
            self.shared.refuse_all();
        }
        drained
    }
}

impl Drop for Pool {
    /// Workers end when their job does; queued jobs are refused.
    fn drop(&mut self) {
        self.shared.state.lock().is_closing = true;
        self.shared.work.notify_all();
        self.shared.refuse_all();
    }
}

/// A place in the queue. Dropping it gives the place back.
#[must_use = "dropping it gives the place back"]
pub struct Place {
    shared: Option<Arc<Shared>>,
    uid: u32,
}

impl Place {
    /// Queues the job; never blocks. `label` names it in lock records and messages: `workspace.prepare web`. When
    /// `cancel` fires before a worker took the job, it leaves the queue and never runs; a running job is to look at
    /// the token itself.
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

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            shared.state.lock().places.remove(self.uid);
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(self: Arc<Self>) {
        let most = self.bounds.running_per_uid_max;
        loop {
            let mut state = self.state.lock();
            self.work.wait_while(&mut state, Instant::now() + WORKER_LOOK, |s| s.must_wait(most));
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

    /// The job of a worker is over; called before its outcome can be seen.
    fn ended(&self, uid: u32) {
        let mut state = self.state.lock();
        state.running.remove(uid);
        self.notify_if_idle(&state);
        drop(state);
        // One of this uid's may run now.
        self.work.notify_all();
    }

    /// Takes the jobs whose token has fired out of the queue, and tells those who wait for them.
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

    /// Ends jobs that are in the queue no longer, with no lock held: what they own is dropped here.
    fn refuse(&self, gone: Vec<Queued>, why: fn(&Queued) -> Error) {
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

fn cancelled(queued: &Queued) -> Error {
    Error::new(Kind::Cancelled, format!("{}: cancelled: {}", queued.label, queued.cancel.cause().unwrap_or("no cause given")))
}

fn shutting_down() -> Error {
    Error::new(Kind::ShuttingDown, "the daemon is shutting down").hint("try again when it is back")
}
