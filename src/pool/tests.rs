use super::{Admission, Bounds, Counts, JobHandle, Pool};
use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, CancelCause, check};
#[cfg(any(debug_assertions, feature = "lock-check"))]
use crate::locks::{LockSet, Rank};
use crate::sched::Instant;
use std::sync::mpsc;
use std::time::Duration;

const LATE: Duration = Duration::from_secs(20);
const SOON: Duration = Duration::from_millis(100);

/// Creates a pool without a limit of running jobs per uid.
fn pool(workers: usize, queue_max: usize, queue_per_uid_max: usize) -> Pool {
    Pool::new(Bounds {
        workers,
        running_per_uid_max: workers,
        queue_max,
        queue_per_uid_max,
    })
    .unwrap()
}

impl Pool {
    /// Calls [`Pool::reserve`] and then [`QueueSlot::submit`].
    fn try_submit<T: Send + 'static>(
        &self,
        uid: u32,
        label: &str,
        cancel: &Cancel,
        job: impl FnOnce(&Cancel) -> Result<T> + Send + 'static,
    ) -> Result<JobHandle<T>> {
        Ok(self.reserve(uid)?.submit(label, cancel, job))
    }
}

fn late() -> Instant {
    Instant::now() + LATE
}

fn token() -> Cancel {
    Cancel::try_new().unwrap()
}

/// Creates a job that runs until it is released. Returns the job, a receiver that reports its
/// start, and a sender that releases it.
fn gate() -> (
    impl FnOnce(&Cancel) -> Result<u32> + Send + 'static,
    mpsc::Receiver<()>,
    mpsc::Sender<u32>,
) {
    let (running, is_running) = mpsc::channel();
    let (end, ending) = mpsc::channel();
    let job = move |_: &Cancel| {
        running.send(()).unwrap();
        ending
            .recv_timeout(LATE)
            .map_err(|_| Error::internal("nobody ended the job"))
    };
    (job, is_running, end)
}

#[test]
fn job_runs_on_worker_and_returns_result_once() {
    let pool = pool(2, 4, 4);
    let handle = pool
        .try_submit(1, "name it", &token(), |_| {
            Ok(std::thread::current().name().unwrap_or_default().to_owned())
        })
        .unwrap();
    assert!(handle.wait(late()).unwrap().starts_with("pool-"));
    assert_eq!(
        handle.wait(late()).unwrap_err().kind(),
        Kind::Internal,
        "an outcome can be taken only once"
    );
    let failed = pool
        .try_submit(1, "fail", &token(), |_| {
            Err::<(), _>(Error::new(Kind::GuestLost, "lost"))
        })
        .unwrap();
    assert_eq!(failed.wait(late()).unwrap_err().kind(), Kind::GuestLost);
    assert_eq!(
        pool.counts(),
        Counts {
            running: 0,
            queued: 0,
            places: 0
        }
    );
    assert!(pool.close(late()));
}

#[test]
fn full_queue_refuses_immediately_and_frees_its_slots() {
    let pool = pool(1, 3, 2);
    let (job, is_running, end) = gate();
    let running = pool.try_submit(1, "run", &token(), job).unwrap();
    is_running.recv_timeout(LATE).unwrap();
    let cancel = token();
    let queued = pool.try_submit(1, "queued", &cancel, |_| Ok(())).unwrap();
    let place = pool.reserve(1).unwrap();
    let mine = pool.reserve(1).map(drop).unwrap_err();
    assert_eq!(
        (mine.kind(), mine.message()),
        (
            Kind::PoolFull,
            "your share of the queue for guest transfers is full (2 waiting)"
        )
    );
    let other = pool.reserve(2).unwrap();
    let all = pool
        .try_submit(3, "x", &token(), |_| Ok(()))
        .map(drop)
        .unwrap_err();
    assert_eq!(
        (all.kind(), all.message()),
        (
            Kind::PoolFull,
            "the queue for guest transfers is full (3 waiting)"
        )
    );
    assert_eq!(
        pool.counts(),
        Counts {
            running: 1,
            queued: 1,
            places: 3
        }
    );
    drop(other);
    // A cancelled job leaves the queue even though the only worker is busy and nobody waits for the
    // job.
    cancel.cancel(CancelCause::VmStopped);
    assert_eq!(
        pool.counts(),
        Counts {
            running: 1,
            queued: 0,
            places: 1
        }
    );
    let error = queued.wait(late()).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (Kind::Cancelled, "queued: cancelled: the VM was stopped")
    );
    let last = place.submit("last", &token(), |_| Ok(5));
    end.send(4).unwrap();
    assert_eq!(
        (running.wait(late()).unwrap(), last.wait(late()).unwrap()),
        (4, 5)
    );
    assert_eq!(
        pool.counts(),
        Counts {
            running: 0,
            queued: 0,
            places: 0
        }
    );
}

#[test]
fn cancel_of_queued_job_wakes_its_waiter_immediately() {
    let pool = pool(1, 4, 4);
    let (job, is_running, end) = gate();
    let running = pool.try_submit(1, "run", &token(), job).unwrap();
    is_running.recv_timeout(LATE).unwrap();
    let cancel = token();
    let (owned, is_dropped) = mpsc::channel::<()>();
    let queued = pool
        .try_submit(1, "queued", &cancel, move |_| {
            let _owned = owned;
            Ok(())
        })
        .unwrap();
    std::thread::scope(|s| {
        let waiter = s.spawn(|| (queued.wait(late()).unwrap_err(), Instant::now()));
        let fired = Instant::now();
        cancel.cancel(CancelCause::VmDeleted);
        let (error, heard) = waiter.join().unwrap();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (Kind::Cancelled, "queued: cancelled: the VM was deleted")
        );
        assert!(heard - fired < SOON, "{:?}", heard - fired);
    });
    assert_eq!(
        is_dropped.recv_timeout(LATE),
        Err(mpsc::RecvTimeoutError::Disconnected),
        "the job's values are dropped"
    );
    assert_eq!(pool.counts().queued, 0);
    end.send(0).unwrap();
    running.wait(late()).unwrap();
}

#[test]
fn cancelled_running_job_is_still_waited_for() {
    let pool = pool(1, 4, 4);
    let (job, is_running, end) = gate();
    let cancel = token();
    let handle = pool.try_submit(1, "run", &cancel, job).unwrap();
    is_running.recv_timeout(LATE).unwrap();
    let early = handle
        .wait(Instant::now() + Duration::from_millis(5))
        .unwrap_err();
    assert_eq!(early.kind(), Kind::Timeout);
    cancel.cancel(CancelCause::Requested);
    let early = handle
        .wait(Instant::now() + Duration::from_millis(5))
        .unwrap_err();
    assert_eq!(early.kind(), Kind::Timeout, "the job still runs");
    end.send(9).unwrap();
    assert_eq!(
        handle.wait(late()).unwrap(),
        9,
        "the result of a cancelled job that succeeds is returned"
    );
}

#[test]
fn job_panic_does_not_end_the_worker() {
    let pool = pool(1, 4, 4);
    let panicking = pool
        .try_submit(1, "bad", &token(), |_| -> Result<()> { panic!("oh no") })
        .unwrap();
    let error = panicking.wait(late()).unwrap_err();
    assert_eq!(
        (error.kind(), error.message()),
        (Kind::Internal, "bad: the job panicked")
    );
    assert_eq!(pool.counts().running, 0);
    let next = pool
        .try_submit(1, "good", &token(), |_| Ok(check::held()))
        .unwrap();
    let held = next.wait(late()).unwrap();
    // The lock checker counts one: the region of the job itself.
    assert!(held <= 1, "{held} held at the start of a job");
}

#[test]
fn jobs_run_in_order_of_submission() {
    let pool = pool(1, 64, 64);
    let (job, is_running, end) = gate();
    let first = pool.try_submit(1, "first", &token(), job).unwrap();
    is_running.recv_timeout(LATE).unwrap();
    let (order, seen) = mpsc::channel();
    let handles: Vec<_> = (0..20)
        .map(|i| {
            let order = order.clone();
            pool.try_submit(i % 3, "next", &token(), move |_| {
                order.send(i).map_err(|_| Error::internal("gone"))
            })
            .unwrap()
        })
        .collect();
    end.send(0).unwrap();
    first.wait(late()).unwrap();
    handles.iter().for_each(|h| h.wait(late()).unwrap());
    assert_eq!(
        seen.try_iter().collect::<Vec<_>>(),
        (0..20).collect::<Vec<_>>()
    );
}

#[test]
fn close_waits_for_running_and_refuses_queued_jobs() {
    let pool = pool(1, 4, 4);
    let (job, is_running, end) = gate();
    let running = pool.try_submit(1, "run", &token(), job).unwrap();
    is_running.recv_timeout(LATE).unwrap();
    let queued = pool.try_submit(1, "queued", &token(), |_| Ok(())).unwrap();
    let place = pool.reserve(1).unwrap();
    assert!(
        !pool.close(Instant::now() + Duration::from_millis(5)),
        "a job still runs"
    );
    assert_eq!(queued.wait(late()).unwrap_err().kind(), Kind::ShuttingDown);
    assert_eq!(
        pool.reserve(1).map(drop).unwrap_err().kind(),
        Kind::ShuttingDown
    );
    assert_eq!(
        place
            .submit("late", &token(), |_| Ok(()))
            .wait(late())
            .unwrap_err()
            .kind(),
        Kind::ShuttingDown
    );
    end.send(3).unwrap();
    assert_eq!(running.wait(late()).unwrap(), 3);
    assert!(pool.close(late()));
    assert_eq!(
        pool.counts(),
        Counts {
            running: 0,
            queued: 0,
            places: 0
        }
    );
}

#[test]
fn dropped_pool_refuses_queued_jobs() {
    let pool = pool(1, 4, 4);
    let (job, is_running, end) = gate();
    let running = pool.try_submit(1, "run", &token(), job).unwrap();
    is_running.recv_timeout(LATE).unwrap();
    let queued = pool.try_submit(1, "queued", &token(), |_| Ok(())).unwrap();
    drop(pool);
    assert_eq!(queued.wait(late()).unwrap_err().kind(), Kind::ShuttingDown);
    end.send(1).unwrap();
    assert_eq!(running.wait(late()).unwrap(), 1);
}

#[test]
fn concurrent_submits_and_cancels_lose_no_job() {
    let pool = pool(4, 16, 8);
    let outcomes: Vec<[usize; 3]> = std::thread::scope(|s| {
        let submit = |uid: u32| {
            let pool = &pool;
            move || {
                let mut seen = [0; 3];
                for i in 0..300u32 {
                    let cancel = token();
                    match pool.try_submit(uid % 3, "job", &cancel, move |_| Ok(i)) {
                        Err(e) => {
                            assert_eq!(e.kind(), Kind::PoolFull);
                            seen[2] += 1;
                        }
                        Ok(handle) => {
                            if (i + uid).is_multiple_of(3) {
                                cancel.cancel(CancelCause::Requested);
                            }
                            match handle.wait(late()) {
                                Ok(value) => {
                                    assert_eq!(value, i);
                                    seen[0] += 1;
                                }
                                Err(e) => {
                                    assert_eq!(e.kind(), Kind::Cancelled);
                                    seen[1] += 1;
                                }
                            }
                        }
                    }
                }
                seen
            }
        };
        let threads: Vec<_> = (0..8).map(|uid| s.spawn(submit(uid))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(outcomes.iter().flatten().sum::<usize>(), 8 * 300);
    assert!(outcomes.iter().map(|o| o[0]).sum::<usize>() > 0);
    assert_eq!(
        pool.counts(),
        Counts {
            running: 0,
            queued: 0,
            places: 0
        }
    );
    assert!(pool.close(late()));
}

#[test]
#[cfg(debug_assertions)]
fn job_waiter_may_hold_a_workspace_lock() {
    let pool = pool(1, 4, 4);
    let workspaces = LockSet::of_rank(Rank::Workspace);
    let held = workspaces.lock(&1);
    let ranks = pool
        .try_submit(1, "ranks", &token(), |_| Ok(check::dump()))
        .unwrap()
        .wait(late())
        .unwrap();
    assert!(
        ranks.contains("holds pool job at src/pool/job.rs"),
        "{ranks}"
    );
    assert!(
        ranks.contains("holds wait for a pool job") || ranks.contains("holds workspace_locks[1]"),
        "{ranks}"
    );
    drop(held);
}

#[test]
fn fair_admission_keeps_a_permit_for_other_users() {
    let admission = Admission::fair("pulls", 2);
    let ended = token();
    let alice = admission.enter_as(1, &token(), |_| ()).unwrap();
    // The second call of the same user waits until its token has fired.
    let waited = admission.enter_as(1, &ended, |_| ended.cancel(CancelCause::Requested));
    assert_eq!(waited.map(drop).unwrap_err().kind(), Kind::Cancelled);
    let bob = admission
        .enter_as(2, &token(), |_| panic!("the user must not wait"))
        .unwrap();
    drop(alice);
    drop(
        admission
            .enter_as(1, &token(), |_| panic!("the user must not wait"))
            .unwrap(),
    );
    drop(bob);
    assert_eq!(admission.counts(), (2, 0));
}

#[test]
fn admission_grants_its_permits_in_order() {
    let admission = Admission::new("boots", 2);
    let cancel = token();
    let first = admission
        .enter(&cancel, |_| panic!("the boot must not wait"))
        .unwrap();
    let second = admission
        .enter(&cancel, |_| panic!("the boot must not wait"))
        .unwrap();
    let (order, seen) = mpsc::channel();
    std::thread::scope(|s| {
        for i in 0..4usize {
            let (waits, is_waiting) = mpsc::channel();
            let (admission, cancel, order) = (&admission, &cancel, order.clone());
            s.spawn(move || {
                let mut told = Vec::new();
                let permit = admission.enter(cancel, |ahead| {
                    told.push(ahead);
                    let _ = waits.send(ahead);
                });
                order.send((i, told)).unwrap();
                drop(permit.unwrap());
            });
            assert_eq!(is_waiting.recv_timeout(LATE), Ok(i));
        }
        assert_eq!(admission.counts(), (0, 4));
        // One permit is left, so the boots are admitted one by one.
        drop(first);
    });
    drop((order, second));
    for (i, (who, told)) in seen.into_iter().enumerate() {
        assert_eq!(who, i, "first come, first served");
        assert!(
            told.first() == Some(&i) && told.windows(2).all(|w| w[0] > w[1]),
            "{told:?}"
        );
    }
    assert_eq!(admission.counts(), (2, 0));
}

#[test]
fn cancelled_boot_never_takes_a_permit() {
    let (admission, cancel) = (Admission::new("boots", 1), token());
    cancel.cancel(CancelCause::VmDeleted);
    let entered = admission.enter(&cancel, |_| ()).map(drop);
    assert_eq!(entered.unwrap_err().kind(), Kind::Cancelled);
    assert_eq!(admission.counts(), (1, 0));
}

#[test]
fn cancelled_boot_leaves_the_queue_immediately() {
    let admission = Admission::new("boots", 1);
    let permit = admission.enter(&token(), |_| ()).unwrap();
    let (cancel, others) = (token(), token());
    std::thread::scope(|s| {
        let (waits, is_waiting) = mpsc::channel();
        let (waits2, admission, cancel, others) = (waits.clone(), &admission, &cancel, &others);
        let leaver = s.spawn(move || {
            let error = admission
                .enter(cancel, |_| waits.send(()).unwrap())
                .map(drop)
                .unwrap_err();
            (error, Instant::now())
        });
        is_waiting.recv_timeout(LATE).unwrap();
        let stayer = s.spawn(move || {
            admission
                .enter(others, |_| waits2.send(()).unwrap())
                .map(drop)
        });
        is_waiting.recv_timeout(LATE).unwrap();
        let fired = Instant::now();
        cancel.cancel(CancelCause::VmDeleted);
        let (error, left) = leaver.join().unwrap();
        assert_eq!(
            (error.kind(), error.message()),
            (
                Kind::Cancelled,
                "wait for other boots: cancelled: the VM was deleted"
            )
        );
        assert!(left - fired < SOON, "{:?}", left - fired);
        assert_eq!(
            is_waiting.recv_timeout(LATE),
            Ok(()),
            "the next waiter moves up and is notified"
        );
        drop(permit);
        stayer.join().unwrap().unwrap();
    });
    assert_eq!(admission.counts(), (1, 0));
    assert_eq!(
        admission
            .enter(&cancel, |_| ())
            .map(drop)
            .unwrap_err()
            .kind(),
        Kind::Cancelled,
        "a token that has already fired is refused"
    );
    assert_eq!(admission.counts(), (1, 0));
}

/// A job that reports its start and runs until the test ends it.
struct Held {
    handle: JobHandle<u32>,
    is_running: mpsc::Receiver<()>,
    end: mpsc::Sender<u32>,
}

impl Held {
    fn submit(pool: &Pool, uid: u32) -> Self {
        let (job, is_running, end) = gate();
        Self {
            handle: pool.try_submit(uid, "hold", &token(), job).unwrap(),
            is_running,
            end,
        }
    }
    fn await_running(&self) {
        self.is_running.recv_timeout(LATE).unwrap();
    }
    fn runs(&self) -> bool {
        self.is_running.try_recv().is_ok()
    }
    fn end(self) {
        self.end.send(0).unwrap();
        self.handle.wait(late()).unwrap();
    }
}

fn shared_pool(workers: usize, running_per_uid_max: usize) -> Pool {
    Pool::new(Bounds {
        workers,
        running_per_uid_max,
        queue_max: 64,
        queue_per_uid_max: 32,
    })
    .unwrap()
}

#[test]
fn one_uid_never_holds_every_worker() {
    let pool = shared_pool(4, 3);
    let mut theirs: Vec<_> = (0..10).map(|_| Held::submit(&pool, 1)).collect();
    theirs[..3].iter().for_each(Held::await_running);
    let other = Held::submit(&pool, 2);
    other.await_running();
    assert_eq!(
        pool.counts(),
        Counts {
            running: 4,
            queued: 7,
            places: 7
        }
    );
    // A free worker takes another job of the same uid only while the uid is below its limit.
    other.end();
    assert_eq!((pool.counts().running, theirs[3].runs()), (3, false));
    theirs.remove(0).end();
    theirs[2].await_running();
    for held in theirs {
        held.end();
    }
    assert!(pool.close(late()));
}

#[test]
fn free_worker_takes_job_of_uid_with_fewest_running() {
    let pool = shared_pool(3, 3);
    let mut running: Vec<_> = (0..3).map(|_| Held::submit(&pool, 1)).collect();
    running.iter().for_each(Held::await_running);
    let mut queued: Vec<_> = [1, 1, 2, 0]
        .into_iter()
        .map(|uid| Held::submit(&pool, uid))
        .collect();
    // Uid 1 still runs two jobs. Of the other uids, uid 2 has waited longer than root.
    running.remove(0).end();
    queued[2].await_running();
    running.remove(0).end();
    queued[3].await_running();
    assert!(!queued[0].runs() && !queued[1].runs());
    running.extend(queued.drain(2..));
    running.into_iter().for_each(Held::end);
    queued.into_iter().for_each(Held::end);
}

#[test]
fn close_runs_queued_jobs_of_uid_at_its_bound() {
    let pool = shared_pool(4, 1);
    let mut held: Vec<_> = (0..3).map(|_| Held::submit(&pool, 1)).collect();
    held[0].await_running();
    std::thread::scope(|s| {
        let closed = s.spawn(|| pool.close(late()));
        for held in held.drain(..) {
            held.end();
        }
        assert!(closed.join().unwrap(), "all jobs have ended");
    });
}

#[test]
fn cancelled_job_of_uid_at_its_bound_leaves_queue() {
    let pool = shared_pool(2, 1);
    let running = Held::submit(&pool, 1);
    running.await_running();
    let cancel = token();
    let queued = pool.try_submit(1, "queued", &cancel, |_| Ok(())).unwrap();
    cancel.cancel(CancelCause::VmStopped);
    assert_eq!(queued.wait(late()).unwrap_err().kind(), Kind::Cancelled);
    assert_eq!(
        pool.counts(),
        Counts {
            running: 1,
            queued: 0,
            places: 0
        }
    );
    running.end();
}
