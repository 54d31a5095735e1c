//! Tests of [`LockSet`] with real threads. `tests_shuttle.rs` tests it under shuttle.

use super::record::KeyRecord;
use super::slots::Slots;
use super::{Cancel, KeyGuard, LockSet, MutexGuard, Rank, Region, WaitCancelled, operation_scope};
use crate::sched::Instant;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// Limit of the time that a cancelled waiter may take to leave.
const LEAVE_MAX: Duration = Duration::from_millis(100);

// Guards must not be Send. If a guard were Send, `f` would be ambiguous and this would not compile.
trait NotSend<A> {
    fn f() {}
}
impl<T: ?Sized> NotSend<()> for T {}
impl<T: ?Sized + Send> NotSend<u8> for T {}
const _: fn() = || {
    <MutexGuard<'static, ()> as NotSend<_>>::f();
    <KeyGuard<'static, u32> as NotSend<_>>::f();
    <Region as NotSend<_>>::f();
    <super::OperationScope as NotSend<_>>::f();
};

/// Waits until another thread has made `condition` true.
#[track_caller]
pub(super) fn wait_for(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "the condition has not come true in time"
        );
        std::thread::yield_now();
    }
}

fn waiters(set: &LockSet<u32>) -> usize {
    set.records().iter().map(|r| r.waiters.len()).sum()
}

#[test]
fn contended_keys_have_one_owner_at_a_time() {
    const KEYS: u32 = 4;
    const ROUNDS: usize = 4000;
    let set = LockSet::of_rank(Rank::Vm);
    let owners: Vec<AtomicUsize> = (0..KEYS).map(|_| AtomicUsize::new(0)).collect();
    let (had, cancelled) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // The tokens of the waits in progress. Another thread fires them.
    let (tokens, to_fire) = mpsc::sync_channel::<Cancel>(64);
    std::thread::scope(|s| {
        s.spawn(move || {
            to_fire
                .into_iter()
                .for_each(|token: Cancel| token.cancel(crate::locks::CancelCause::Requested))
        });
        for thread in 0..8u64 {
            let (set, owners, had, cancelled, tokens) =
                (&set, &owners, &had, &cancelled, tokens.clone());
            s.spawn(move || {
                let mut x = thread * 7919 + 1;
                for _ in 0..ROUNDS {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    let key = (x % u64::from(KEYS)) as u32;
                    let guards = match (x >> 8) % 8 {
                        0 | 1 => set.try_lock(&key).into_iter().collect(),
                        2 | 3 => {
                            let token = Cancel::try_new().unwrap();
                            let _ = tokens.try_send(token.clone());
                            let got = set.lock_cancellable(&key, &token);
                            cancelled.fetch_add(usize::from(got.is_err()), Ordering::Relaxed);
                            got.into_iter().collect()
                        }
                        _ => vec![set.lock(&key)],
                    };
                    for g in &guards {
                        assert_eq!(
                            owners[*g.key() as usize].fetch_add(1, Ordering::SeqCst),
                            0,
                            "two owners of a key"
                        );
                        had.fetch_add(1, Ordering::Relaxed);
                    }
                    if x % 16 == 0 {
                        std::thread::yield_now();
                    }
                    for g in &guards {
                        owners[*g.key() as usize].fetch_sub(1, Ordering::SeqCst);
                    }
                }
            });
        }
        drop(tokens);
    });
    assert!(set.is_empty(), "{:?}", set.records());
    assert!(had.into_inner() > ROUNDS, "the threads got their locks");
    assert!(cancelled.into_inner() > 0, "some waits were cancelled");
}

#[test]
fn waiters_are_served_in_order_after_one_leaves() {
    let set = LockSet::of_rank(Rank::Vm);
    let (order, seen) = mpsc::channel();
    let cancel = Cancel::try_new().unwrap();
    let held = set.lock(&1);
    std::thread::scope(|s| {
        for i in 0..6u32 {
            let (set, order, cancel) = (&set, order.clone(), cancel.clone());
            s.spawn(move || {
                if i == 2 {
                    assert_eq!(set.lock_cancellable(&1, &cancel).err(), Some(WaitCancelled));
                    return;
                }
                let _guard = set.lock(&1);
                order.send(i).unwrap();
            });
            wait_for(|| waiters(set) == i as usize + 1);
        }
        cancel.cancel(crate::locks::CancelCause::Requested);
        wait_for(|| waiters(&set) == 5);
        assert!(
            s.spawn(|| set.try_lock(&2).is_some()).join().unwrap(),
            "another key is free"
        );
        drop(held);
    });
    drop(order);
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 3, 4, 5]);
    assert!(set.is_empty());
}

#[test]
fn waiter_is_never_overtaken() {
    let set = LockSet::of_rank(Rank::Vm);
    for _ in 0..300 {
        let had = AtomicBool::new(false);
        let held = set.lock(&1);
        std::thread::scope(|s| {
            s.spawn(|| {
                let _guard = set.lock(&1);
                had.store(true, Ordering::SeqCst);
            });
            wait_for(|| waiters(&set) == 1);
            drop(held);
            // The release gave the lock to the waiter, even if the waiter has not run yet.
            let tried = set.try_lock(&1);
            assert!(
                tried.is_none() || had.load(Ordering::SeqCst),
                "a try overtook a waiter"
            );
            drop(tried);
            drop(set.lock(&1));
            assert!(had.load(Ordering::SeqCst), "a lock overtook a waiter");
        });
    }
}

#[test]
fn cancelled_waiter_leaves_immediately() {
    let set = LockSet::of_rank(Rank::Workspace);
    for _ in 0..20 {
        let held = set.lock(&1);
        let cancel = Cancel::try_new().unwrap();
        std::thread::scope(|s| {
            let waiter = s.spawn(|| {
                let outcome = set.lock_cancellable(&1, &cancel).map(drop);
                (outcome, Instant::now())
            });
            wait_for(|| waiters(&set) == 1);
            let fired = Instant::now();
            cancel.cancel(crate::locks::CancelCause::VmStopped);
            let (outcome, left) = waiter.join().unwrap();
            assert_eq!(outcome, Err(WaitCancelled));
            assert!(left - fired < LEAVE_MAX, "left after {:?}", left - fired);
        });
        assert_eq!(waiters(&set), 0);
        assert_eq!(set.len(), 1, "the holder is not disturbed");
        drop(held);
        assert_eq!(
            set.lock_cancellable(&1, &cancel).map(drop),
            Err(WaitCancelled),
            "fired before"
        );
        assert!(set.is_empty());
    }
}

#[test]
fn concurrent_grant_and_cancel_lose_no_lock() {
    let set = LockSet::of_rank(Rank::Workspace);
    let mut granted = 0;
    for round in 0..1000 {
        let cancel = Cancel::try_new().unwrap();
        let held = set.lock(&1);
        std::thread::scope(|s| {
            let waiter = s.spawn(|| set.lock_cancellable(&1, &cancel).map(drop));
            wait_for(|| waiters(&set) == 1);
            let firing = s.spawn(|| cancel.cancel(crate::locks::CancelCause::Requested));
            if round % 2 == 0 {
                std::thread::yield_now();
            }
            drop(held);
            granted += usize::from(waiter.join().unwrap().is_ok());
            firing.join().unwrap();
        });
        assert!(set.is_empty(), "{:?}", set.records());
    }
    assert!(granted > 0, "some waiters were granted the lock");
}

#[test]
fn records_hold_operation_thread_and_time() {
    let set = LockSet::of_rank(Rank::Vm);
    let before = Instant::now();
    assert!(set.records().is_empty());
    let scope = operation_scope("vm.stop 3f2a");
    let inner = operation_scope("vm.kill 77aa");
    drop(inner);
    let held = set.lock(&7);
    drop(scope);
    std::thread::scope(|s| {
        #[allow(clippy::disallowed_methods)]
        let waiter = std::thread::Builder::new()
            .name("conn-7".into())
            .spawn_scoped(s, || {
                let _scope = operation_scope(Arc::<str>::from("vm.delete 9b1c"));
                let guard = set.lock(&7);
                (set.records(), guard.key().to_owned())
            });
        wait_for(|| waiters(&set) == 1);
        let records = set.records();
        let [
            KeyRecord {
                key,
                holder: Some(holder),
                waiters: waiting,
            },
        ] = records.as_slice()
        else {
            panic!("{records:?}")
        };
        assert_eq!(
            (key.as_str(), holder.operation.as_deref()),
            ("7", Some("vm.stop 3f2a"))
        );
        assert_eq!(Some(holder.thread.as_str()), std::thread::current().name());
        assert!(holder.since >= before && holder.since <= Instant::now());
        assert_eq!(
            (waiting[0].thread.as_str(), waiting[0].operation.as_deref()),
            ("conn-7", Some("vm.delete 9b1c"))
        );
        let (handed, queued) = (Instant::now(), waiting[0].since);
        drop(held);
        let (records, key) = waiter.unwrap().join().unwrap();
        let holder = records[0].holder.as_ref().unwrap();
        assert_eq!(
            (key, holder.operation.as_deref()),
            (7, Some("vm.delete 9b1c"))
        );
        assert!(
            holder.since >= handed && holder.since > queued,
            "a holder's time begins with the hand-over"
        );
    });
    assert!(set.is_empty());
}

#[test]
fn released_keys_leave_no_entries() {
    let set = LockSet::of_rank(Rank::Vm);
    for id in 0..100_000u32 {
        drop(set.lock(&id));
        drop(set.try_lock(&id));
    }
    assert_eq!((set.len(), set.capacity() < 64), (0, true));
    // All these locks are held at the same time, as if by many threads.
    let slots = Slots::new(Rank::Vm);
    assert!((0..3000).all(|id| slots.enter_if_free(&id)));
    assert_eq!(slots.len(), 3000);
    (0..3000).for_each(|id| slots.release(&id));
    assert_eq!((slots.len(), slots.capacity() < 64), (0, true));
}
