//! Shares work between callers that ask for it at the same time. A run in progress is shared, and
//! its result is kept for a short time.

use crate::error::{Error, Kind, Result};
use crate::locks::{Condvar, Mutex, Rank};
use crate::sched::Instant;
use std::time::Duration;

/// Allows at most one run at a time.
pub(super) struct SingleFlight<T> {
    /// How long a result is reused.
    kept: Duration,
    state: Mutex<State<T>>,
    ended: Condvar,
}

struct State<T> {
    is_running: bool,
    last: Option<Finished<T>>,
}

struct Finished<T> {
    value: T,
    began: Instant,
    ended: Instant,
}

/// How fresh a result must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freshness {
    /// The result may come from an earlier run, if it is still kept.
    Recent,
    /// The result must come from a run that began after the call.
    New,
}

/// Ends the run when it is dropped, also after a panic.
struct Run<'a, T>(&'a SingleFlight<T>);

impl<T> Drop for Run<'_, T> {
    fn drop(&mut self) {
        self.0.state.lock().is_running = false;
        self.0.ended.notify_all();
    }
}

impl<T: Clone> SingleFlight<T> {
    pub(super) fn new(kept: Duration) -> Self {
        Self {
            kept,
            state: Mutex::new(
                Rank::Runtimes,
                State {
                    is_running: false,
                    last: None,
                },
            ),
            ended: Condvar::new(),
        }
    }

    /// Returns the result of the last run, of the run in progress, or of a new run on this thread,
    /// depending on `freshness`.
    ///
    /// # Errors
    /// `busy` at the deadline, if another caller's run takes too long.
    pub(super) fn get(
        &self,
        freshness: Freshness,
        deadline: Instant,
        run: impl FnOnce() -> T,
    ) -> Result<T> {
        let called = Instant::now();
        let mut state = self.state.lock();
        loop {
            let is_fresh = |last: &&Finished<T>| match freshness {
                Freshness::Recent => last.ended.elapsed() < self.kept,
                Freshness::New => last.began >= called,
            };
            if let Some(last) = state.last.as_ref().filter(is_fresh) {
                return Ok(last.value.clone());
            }
            if !state.is_running {
                break;
            }
            if !self
                .ended
                .wait_while(&mut state, deadline, |s| s.is_running)
            {
                return Err(
                    Error::new(Kind::Busy, "another caller's run takes too long")
                        .hint("try again in a moment"),
                );
            }
        }
        state.is_running = true;
        drop(state);
        let (ending, began) = (Run(self), Instant::now());
        let value = run();
        let former = self.state.lock().last.replace(Finished {
            value: value.clone(),
            began,
            ended: Instant::now(),
        });
        drop((ending, former));
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const LONG: Duration = Duration::from_secs(3600);

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// Calls `get` on another thread.
    fn ask<'s, 'e>(
        scope: &'s std::thread::Scope<'s, 'e>,
        flight: &'e SingleFlight<usize>,
        freshness: Freshness,
        runs: &'e AtomicUsize,
    ) -> std::thread::ScopedJoinHandle<'s, usize> {
        scope.spawn(move || {
            flight
                .get(freshness, soon(), || runs.fetch_add(1, Ordering::SeqCst))
                .unwrap()
        })
    }

    #[test]
    fn concurrent_callers_share_one_run() {
        let (flight, runs) = (SingleFlight::new(LONG), AtomicUsize::new(0));
        let (begun, may_end) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                flight.get(Freshness::Recent, soon(), || {
                    begun.wait();
                    may_end.wait();
                    7
                })
            });
            begun.wait();
            let others: Vec<_> = (0..50)
                .map(|_| ask(scope, &flight, Freshness::Recent, &runs))
                .collect();
            may_end.wait();
            assert_eq!(first.join().unwrap().unwrap(), 7);
            assert!(others.into_iter().all(|t| t.join().unwrap() == 7));
        });
        assert_eq!(runs.into_inner(), 0);
    }

    #[test]
    fn recent_result_is_kept_and_old_one_is_not() {
        let runs = AtomicUsize::new(0);
        for (kept, expected) in [(LONG, [0, 0, 0]), (Duration::ZERO, [0, 1, 2])] {
            let flight = SingleFlight::new(kept);
            runs.store(0, Ordering::SeqCst);
            let got: Vec<_> = (0..3)
                .map(|_| {
                    flight
                        .get(Freshness::Recent, soon(), || {
                            runs.fetch_add(1, Ordering::SeqCst)
                        })
                        .unwrap()
                })
                .collect();
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn new_result_never_comes_from_run_that_began_earlier() {
        let (flight, runs) = (SingleFlight::new(LONG), AtomicUsize::new(0));
        let (begun, may_end) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                flight.get(Freshness::New, soon(), || {
                    begun.wait();
                    may_end.wait();
                    100
                })
            });
            begun.wait();
            let other = ask(scope, &flight, Freshness::New, &runs);
            may_end.wait();
            // The other call began its own run, either after it waited for the first run or because
            // that run was over.
            assert_eq!(other.join().unwrap(), 0);
        });
    }

    #[test]
    fn run_that_panics_allows_the_next() {
        let flight = SingleFlight::<u32>::new(LONG);
        let run = || flight.get(Freshness::Recent, soon(), || panic!("a panic of the test"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        assert_eq!(flight.get(Freshness::Recent, soon(), || 1).unwrap(), 1);
    }

    #[test]
    fn wait_for_another_run_ends_at_deadline() {
        let flight = SingleFlight::new(LONG);
        flight.state.lock().is_running = true;
        let e = flight
            .get(Freshness::Recent, Instant::now(), || 1)
            .unwrap_err();
        assert_eq!(e.kind(), Kind::Busy);
    }
}
