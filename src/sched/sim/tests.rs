use super::*;
use crate::sched::{self, Condvar, Instant, Mutex};
use std::sync::Arc;
use std::time::Duration;

#[track_caller]
fn passes(seed: u64, body: impl FnOnce() + Send + 'static) -> Figures {
    match run(seed, Policy::Walk(4), body) {
        (Outcome::Passed, figures) => figures,
        (Outcome::Failed(why), _) => panic!("seed {seed}: {why}"),
    }
}

fn spawn(body: impl FnOnce() + Send + 'static) -> sched::JoinHandle<()> {
    sched::spawn("task", 0, body).unwrap()
}

/// Three tasks append their number to a list, in an order that the seed decides.
fn order_of(seed: u64) -> (Vec<u32>, u64) {
    let list = Arc::new(Mutex::new(Vec::new()));
    let theirs = list.clone();
    let figures = passes(seed, move || {
        let tasks: Vec<_> = (0..3)
            .map(|n| {
                let list = theirs.clone();
                spawn(move || (0..3).for_each(|_| list.lock().push(n)))
            })
            .collect();
        tasks.into_iter().for_each(|task| task.join().unwrap());
    });
    let order = list.lock().clone();
    (order, figures.trace)
}

#[test]
fn seed_decides_order_of_tasks() {
    let orders: Vec<_> = (0..50).map(order_of).collect();
    assert_eq!(orders, (0..50).map(order_of).collect::<Vec<_>>());
    let different: std::collections::HashSet<_> = orders.into_iter().collect();
    assert!(different.len() > 20, "{}", different.len());
}

#[test]
fn time_jumps_to_next_deadline() {
    let began = std::time::Instant::now();
    passes(1, || {
        let (before, of_day) = (Instant::now(), sched::since_epoch());
        sched::park_timeout(Duration::from_secs(3600));
        let slept = before.elapsed();
        assert!(slept >= Duration::from_secs(3600) && slept < Duration::from_secs(3601));
        assert_eq!(sched::since_epoch() - of_day, slept);
    });
    assert!(began.elapsed() < Duration::from_secs(60));
}

#[test]
fn condition_waits_end_by_notification_or_deadline() {
    for seed in 0..20 {
        passes(seed, || {
            let pair = Arc::new((Mutex::new(false), Condvar::new()));
            let theirs = pair.clone();
            let task = spawn(move || {
                *theirs.0.lock() = true;
                theirs.1.notify_all();
            });
            let mut is_set = pair.0.lock();
            let until = Instant::now() + Duration::from_secs(5);
            while !*is_set {
                assert!(!pair.1.wait_until(&mut is_set, until).timed_out());
            }
            assert!(pair.1.wait_until(&mut is_set, until).timed_out());
            assert!(Instant::now() >= until);
            drop(is_set);
            task.join().unwrap();
        });
    }
}

#[test]
fn poll_wakes_when_another_task_writes() {
    for seed in 0..20 {
        passes(seed, || {
            let (reader, writer) = std::io::pipe().unwrap();
            let task = spawn(move || {
                sched::park_timeout(Duration::from_secs(1));
                drop(std::io::Write::write_all(&mut &writer, b"x"));
            });
            let poll = |seconds| {
                let fd = std::os::fd::AsFd::as_fd(&reader);
                let flags = nix::poll::PollFlags::POLLIN;
                let until = Instant::now() + Duration::from_millis(seconds);
                sched::poll_until(&mut [nix::poll::PollFd::new(fd, flags)], Some(until)).unwrap()
            };
            assert_eq!(poll(500), 0);
            assert_eq!(poll(10_000), 1);
            assert!(since_begin() < Duration::from_secs(2));
            task.join().unwrap();
        });
    }
}

#[test]
fn tasks_that_wait_for_each_other_are_reported() {
    let is_deadlock = |seed| {
        let (outcome, _) = run(seed, Policy::Walk(2), || {
            let locks = Arc::new((Mutex::new(()), Mutex::new(())));
            let theirs = locks.clone();
            let task = spawn(move || drop((theirs.0.lock(), theirs.1.lock())));
            drop((locks.1.lock(), locks.0.lock()));
            task.join().unwrap();
        });
        matches!(outcome, Outcome::Failed(why) if why.contains("waits for the lock"))
    };
    let found: Vec<bool> = (0..20).map(is_deadlock).collect();
    assert!(found.contains(&true) && found.contains(&false));
    assert_eq!(found, (0..20).map(is_deadlock).collect::<Vec<_>>());
}

#[test]
fn killed_group_finishes_its_section_and_nothing_else() {
    for seed in 0..20 {
        passes(seed, || {
            let shared = Arc::new((Mutex::new([0, 0]), Mutex::new(())));
            let theirs = shared.clone();
            let victims = enter();
            let begun = Arc::new(Mutex::new(false));
            let is_begun = begun.clone();
            spawn_into(victims, || {
                spawn(move || {
                    *is_begun.lock() = true;
                    loop {
                        let mut pair = theirs.0.lock();
                        pair[0] += 1;
                        drop(theirs.1.lock());
                        pair[1] += 1;
                    }
                })
            });
            while !*begun.lock() {
                sleep(Duration::from_millis(1));
            }
            kill(victims);
            assert!(wait_dead(victims, Duration::from_secs(1)));
            let now = *shared.0.lock();
            assert_eq!(now[0], now[1]);
            sleep(Duration::from_secs(1));
            assert_eq!(*shared.0.lock(), now);
        });
    }
}

#[test]
fn timer_fires_in_virtual_time() {
    passes(3, || {
        let timer = sched::Timer::try_new().unwrap();
        let is_ready = || sched::is_ready(timer.fd(), nix::poll::PollFlags::POLLIN);
        timer.set(Duration::from_secs(60)).unwrap();
        sleep(Duration::from_secs(59));
        assert!(!is_ready());
        sleep(Duration::from_secs(2));
        assert!(is_ready());
        timer.unset();
        assert!(!is_ready());
    });
}

/// `cargo test --release --features sim --lib sched::sim::tests::cost -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn cost_of_points_and_switches() {
    for (policy, name) in [
        (Policy::Walk(1), "switches"),
        (Policy::Walk(1 << 60), "points"),
    ] {
        let began = std::time::Instant::now();
        let (_, figures) = run(1, policy, || {
            let lock = Arc::new(Mutex::new(0));
            let tasks: Vec<_> = (0..10)
                .map(|_| {
                    let lock = lock.clone();
                    spawn(move || (0..5_000).for_each(|_| *lock.lock() += 1))
                })
                .collect();
            tasks.into_iter().for_each(|task| task.join().unwrap());
        });
        println!(
            "{name}: {:?} for {} points and {} switches",
            began.elapsed(),
            figures.points,
            figures.switches
        );
    }
}
