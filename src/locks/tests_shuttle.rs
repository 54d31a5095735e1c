//! Tests of [`LockSet`] under shuttle's schedulers: `cargo test --features shuttle --lib locks::`.
//!
//! Shuttle controls everything that uses `raw.rs`: the map, the queue, the hand-over, parking and
//! cancel wakers. It does not model time, so `tests_set.rs` tests the deadlines. The eventfd and
//! the subsystems' `Mutex` and `Condvar` are not under shuttle's control (see `tests_wait.rs`).

use super::{Cancel, LockSet, Rank, check};
use shuttle::sync::atomic::{AtomicUsize, Ordering};
use shuttle::thread;
use std::sync::Arc;

const SCHEDULES: usize = 1500;

struct World {
    set: LockSet<u32>,
    owners: [AtomicUsize; 2],
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            set: LockSet::of_rank(Rank::Vm),
            owners: [AtomicUsize::new(0), AtomicUsize::new(0)],
        })
    }
    fn own(&self, key: u32) {
        assert_eq!(
            self.owners[key as usize].fetch_add(1, Ordering::SeqCst),
            0,
            "two owners of a key"
        );
        thread::yield_now();
        self.owners[key as usize].fetch_sub(1, Ordering::SeqCst);
    }
}

fn body() {
    let world = World::new();
    let cancel = Cancel::try_new().unwrap();
    let threads: Vec<_> = (0..3u32)
        .map(|t| {
            let (world, cancel) = (world.clone(), cancel.clone());
            thread::spawn(move || {
                let key = t % 2;
                drop(world.set.lock(&key));
                {
                    let guard = world.set.lock(&key);
                    world.own(*guard.key());
                }
                if let Some(guard) = world.set.try_lock(&0) {
                    world.own(*guard.key());
                }
                if let Ok(guard) = world.set.lock_cancellable(&0, &cancel) {
                    world.own(*guard.key());
                }
                assert_eq!(check::held(), 0);
            })
        })
        .collect();
    cancel.cancel(crate::locks::CancelCause::Requested);
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(world.set.is_empty());
}

#[test]
fn lock_set_survives_random_schedules() {
    shuttle::check_random(body, SCHEDULES);
}

#[test]
fn lock_set_survives_pct_schedules() {
    shuttle::check_pct(body, SCHEDULES, 3);
}

/// A waker runs at most once and never after its subscription is dropped, even if subscribing,
/// firing and dropping happen concurrently.
#[test]
fn dropped_subscription_never_runs() {
    shuttle::check_random(
        || {
            let cancel = Cancel::try_new().unwrap();
            let (calls, gone) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let firing = {
                let cancel = cancel.clone();
                thread::spawn(move || cancel.cancel(crate::locks::CancelCause::Requested))
            };
            let (calls2, gone2) = (calls.clone(), gone.clone());
            let subscription = cancel.on_cancel(move || {
                thread::yield_now();
                assert_eq!(
                    gone2.load(Ordering::SeqCst),
                    0,
                    "ran after its subscription was dropped"
                );
                calls2.fetch_add(1, Ordering::SeqCst);
            });
            drop(subscription);
            gone.store(1, Ordering::SeqCst);
            firing.join().unwrap();
            assert!(calls.load(Ordering::SeqCst) <= 1);
        },
        SCHEDULES,
    );
}

/// The checker has a separate list of held locks for each shuttle task.
#[test]
#[should_panic(expected = "locks that exclude each other")]
fn violation_of_one_task_is_found() {
    shuttle::check_random(
        || {
            let other = thread::spawn(|| {
                drop((
                    LockSet::of_rank(Rank::CreateVm).lock(&()),
                    LockSet::of_rank(Rank::Vm).lock(&1),
                ))
            });
            drop(LockSet::of_rank(Rank::Vm).lock(&1));
            other.join().unwrap();
        },
        10,
    );
}
