//! Tests of cancel tokens and condition waits with real threads.

use super::tests_set::wait_for;
use super::{Cancel, Condvar, Mutex, Rank, Waited};
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

const SOON: Duration = Duration::from_millis(100);
const LATE: Duration = Duration::from_secs(20);

fn is_readable(cancel: &Cancel) -> bool {
    poll(
        &mut [PollFd::new(cancel.fd(), PollFlags::POLLIN)],
        PollTimeout::ZERO,
    )
    .unwrap()
        == 1
}

#[test]
fn token_fires_once_and_stays_fired() {
    let cancel = Cancel::try_new().unwrap();
    assert!(!cancel.is_cancelled() && cancel.cause().is_none() && !is_readable(&cancel));
    cancel.clone().cancel(crate::locks::CancelCause::VmStopped);
    cancel.cancel(crate::locks::CancelCause::Requested);
    assert_eq!(cancel.cause(), Some(&crate::locks::CancelCause::VmStopped));
    assert!(cancel.is_cancelled() && is_readable(&cancel) && is_readable(&cancel));
}

#[test]
fn waker_subscribed_during_cancel_runs_exactly_once() {
    for _ in 0..2000 {
        let (cancel, calls) = (Cancel::try_new().unwrap(), Arc::new(AtomicUsize::new(0)));
        let subscription = std::thread::scope(|s| {
            s.spawn(|| cancel.cancel(crate::locks::CancelCause::Requested));
            let calls = calls.clone();
            cancel.on_cancel(move || _ = calls.fetch_add(1, Ordering::SeqCst))
        });
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        drop(subscription);
    }
}

#[test]
fn dropped_subscription_never_runs() {
    let (cancel, calls) = (Cancel::try_new().unwrap(), Arc::new(AtomicUsize::new(0)));
    let counter = calls.clone();
    drop(cancel.on_cancel(move || _ = counter.fetch_add(1, Ordering::SeqCst)));
    assert_eq!(Arc::strong_count(&calls), 1, "the closure is gone");
    cancel.cancel(crate::locks::CancelCause::Requested);
    assert_eq!(calls.load(Ordering::SeqCst), 0);
}

#[test]
fn waker_may_use_token_and_panic() {
    let cancel = Cancel::try_new().unwrap();
    let (said, heard) = mpsc::channel();
    let inner = cancel.clone();
    let first = cancel.on_cancel(move || {
        inner.cancel(crate::locks::CancelCause::Requested);
        let said2 = said.clone();
        // Subscribing within a waker calls the new waker immediately. Dropping the subscription
        // there does not wait for the waker itself.
        drop(inner.on_cancel(move || said2.send("nested").unwrap()));
        said.send(if inner.is_cancelled() {
            "fired"
        } else {
            "not fired"
        })
        .unwrap();
    });
    let second = cancel.on_cancel(|| panic!("a bad waker"));
    let own: Arc<Mutex<Option<super::Subscription>>> = Arc::new(Mutex::new(Rank::Runtimes, None));
    let owned = own.clone();
    // This waker drops its own subscription while it runs.
    let third = cancel.on_cancel(move || drop(owned.lock().take()));
    *own.lock() = Some(third);
    cancel.cancel(crate::locks::CancelCause::Requested);
    assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["nested", "fired"]);
    assert!(own.lock().is_none());
    drop((first, second));
}

/// A cancellable wait unsubscribes under its lock, where a thread must not sleep.
#[test]
fn subscription_ends_while_its_waker_runs() {
    let cancel = Cancel::try_new().unwrap();
    let (enter, entered) = mpsc::channel();
    let (leave, left) = mpsc::channel::<()>();
    let subscription = cancel.on_cancel(move || {
        enter.send(()).unwrap();
        left.recv().unwrap();
    });
    std::thread::scope(|scope| {
        scope.spawn(|| cancel.cancel(super::CancelCause::Requested));
        entered.recv().unwrap();
        // With a drop, this thread would never get to the next line.
        subscription.end_without_waiting();
        leave.send(()).unwrap();
    });
}

#[test]
fn dropping_a_subscription_waits_for_its_running_waker() {
    let cancel = Cancel::try_new().unwrap();
    let (running, is_running) = mpsc::channel();
    let (resume, may_resume) = mpsc::channel();
    let is_over = Arc::new(AtomicBool::new(false));
    let over = is_over.clone();
    let subscription = cancel.on_cancel(move || {
        running.send(()).unwrap();
        may_resume.recv_timeout(LATE).unwrap();
        over.store(true, Ordering::SeqCst);
    });
    std::thread::scope(|s| {
        s.spawn(|| cancel.cancel(crate::locks::CancelCause::Requested));
        is_running.recv_timeout(LATE).unwrap();
        // Others can subscribe and unsubscribe while that waker runs.
        drop(cancel.on_cancel(|| {}));
        let dropping = s.spawn(|| {
            drop(subscription);
            assert!(
                is_over.load(Ordering::SeqCst),
                "the waker still ran when its subscription was gone"
            );
        });
        std::thread::yield_now();
        assert!(!dropping.is_finished());
        resume.send(()).unwrap();
        dropping.join().unwrap();
    });
}

#[test]
fn wait_ends_on_condition_deadline_or_cancel() {
    let (mutex, condvar) = (Mutex::new(Rank::Pool, 0), Condvar::new());
    let cancel = Cancel::try_new().unwrap();
    let soon = || Instant::now() + Duration::from_millis(5);
    assert!(!condvar.wait_while(&mut mutex.lock(), soon(), |v| *v == 0));
    assert!(condvar.wait_while(&mut mutex.lock(), Instant::now(), |v| *v != 0));
    assert_eq!(
        condvar.wait_while_cancellable(&mut mutex.lock(), soon(), &cancel, |v| *v == 0),
        Waited::TimedOut
    );
    std::thread::scope(|s| {
        let plain =
            s.spawn(|| condvar.wait_while(&mut mutex.lock(), Instant::now() + LATE, |v| *v == 0));
        let parked = s.spawn(|| {
            condvar.wait_while_cancellable(&mut mutex.lock(), Instant::now() + LATE, &cancel, |v| {
                *v == 0
            })
        });
        *mutex.lock() = 1;
        condvar.notify_all();
        assert!(plain.join().unwrap());
        assert_eq!(parked.join().unwrap(), Waited::Done);
    });
    let started = Instant::now();
    let looked = &AtomicBool::new(false);
    std::thread::scope(|s| {
        let (mutex, condvar, cancel) = (&mutex, &condvar, &cancel);
        let parked = s.spawn(move || {
            condvar.wait_while_cancellable(&mut mutex.lock(), Instant::now() + LATE, cancel, |_| {
                looked.store(true, Ordering::SeqCst);
                true
            })
        });
        wait_for(|| looked.load(Ordering::SeqCst));
        let fired = Instant::now();
        cancel.cancel(crate::locks::CancelCause::Requested);
        assert_eq!(parked.join().unwrap(), Waited::Cancelled);
        assert!(fired.elapsed() < SOON, "{:?}", fired.elapsed());
    });
    assert!(started.elapsed() < LATE);
    let done =
        condvar.wait_while_cancellable(&mut mutex.lock(), Instant::now(), &cancel, |_| false);
    assert_eq!(done, Waited::Done, "what is done is done, cancelled or not");
}

#[test]
fn cancellable_wait_loses_no_wake_up() {
    let (mutex, condvar) = (Mutex::new(Rank::Pool, 0u32), Condvar::new());
    let begun = Instant::now();
    for round in 0..2000 {
        let cancel = Cancel::try_new().unwrap();
        let looked = AtomicBool::new(false);
        std::thread::scope(|s| {
            let waiter = s.spawn(|| {
                condvar.wait_while_cancellable(
                    &mut mutex.lock(),
                    Instant::now() + LATE,
                    &cancel,
                    |v| {
                        looked.store(true, Ordering::SeqCst);
                        *v == round
                    },
                )
            });
            if round % 4 < 2 {
                wait_for(|| looked.load(Ordering::SeqCst));
            }
            if round % 2 == 0 {
                cancel.cancel(crate::locks::CancelCause::Requested);
                assert_eq!(waiter.join().unwrap(), Waited::Cancelled);
                *mutex.lock() += 1;
            } else {
                *mutex.lock() += 1;
                condvar.notify_all();
                assert_eq!(waiter.join().unwrap(), Waited::Done);
            }
        });
        // A waiter that misses its wake-up finds at its deadline that the condition has changed.
        assert!(begun.elapsed() < LATE, "round {round} lost a wake-up");
    }
}
