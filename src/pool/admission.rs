//! Limits how many boots or image builds run at the same time. The rest wait in a queue. Each wait
//! can be cancelled and reports its position in the queue.

use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, Condvar, Mutex, Rank, Waited};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest wait for a permit. No real queue takes this long; the bound prevents endless waits.
const WAIT_MAX: Duration = Duration::from_secs(6 * 3600);

/// Hands out a fixed number of permits in the order of arrival.
#[derive(Clone)]
pub struct Admission {
    shared: Arc<Shared>,
}

struct Shared {
    /// The name of what is limited, such as `boots`, for messages.
    what: &'static str,
    state: Mutex<State>,
    moved: Condvar,
}

struct State {
    free: usize,
    last_ticket: u64,
    line: VecDeque<u64>,
}

/// Permission to run. Dropping it admits the next waiter in the queue.
#[must_use = "dropping it returns the permit"]
pub struct Permit {
    shared: Arc<Shared>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.state.lock().free += 1;
        self.shared.moved.notify_all();
    }
}

/// A position in the queue. Dropping it leaves the queue, also on errors and panics.
struct Ticket<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.shared.state.lock().line.retain(|n| *n != self.number);
        self.shared.moved.notify_all();
    }
}

impl State {
    fn ahead_of(&self, number: u64) -> usize {
        self.line.iter().take_while(|n| **n != number).count()
    }
    fn may_enter(&self, number: u64) -> bool {
        self.free > 0 && self.line.front() == Some(&number)
    }
}

impl Admission {
    /// Creates `max` permits, at least one. `what` names what is limited in messages, such as
    /// `boots`.
    pub fn new(what: &'static str, max: usize) -> Self {
        let state = State {
            free: max.max(1),
            last_ticket: 0,
            line: VecDeque::new(),
        };
        Self {
            shared: Arc::new(Shared {
                what,
                state: Mutex::new(Rank::Admission, state),
                moved: Condvar::new(),
            }),
        }
    }

    /// Waits for a permit. `on_wait` is called with the number of waiters ahead, first if the
    /// caller cannot enter at once, and then whenever the number falls. No lock is held during the
    /// call.
    ///
    /// # Errors
    /// `cancelled` within 100 ms after the token fires, and `timeout` after `WAIT_MAX`.
    pub fn enter(&self, cancel: &Cancel, mut on_wait: impl FnMut(usize)) -> Result<Permit> {
        let shared = &*self.shared;
        let deadline = Instant::now() + WAIT_MAX;
        let mut state = shared.state.lock();
        state.last_ticket += 1;
        let number = state.last_ticket;
        state.line.push_back(number);
        drop(state);
        let _ticket = Ticket { shared, number };
        let mut reported = None;
        loop {
            let mut state = shared.state.lock();
            // Check the token before taking a permit, so that a cancelled operation never boots.
            if let Some(cause) = cancel.cause() {
                return Err(Error::new(
                    Kind::Cancelled,
                    format!("wait for other {}: cancelled: {cause}", shared.what),
                ));
            }
            if state.may_enter(number) {
                state.free -= 1;
                return Ok(Permit {
                    shared: self.shared.clone(),
                });
            }
            let ahead = state.ahead_of(number);
            if reported != Some(ahead) {
                drop(state);
                reported = Some(ahead);
                on_wait(ahead);
                continue;
            }
            let waited = shared
                .moved
                .wait_while_cancellable(&mut state, deadline, cancel, |s| {
                    !s.may_enter(number) && s.ahead_of(number) == ahead
                });
            if waited == Waited::TimedOut {
                let hours = WAIT_MAX.as_secs() / 3600;
                let text = format!(
                    "wait for other {}: none has finished for {hours} hours",
                    shared.what
                );
                return Err(Error::new(Kind::Timeout, text).hint("run fcctl op list"));
            }
        }
    }

    /// Returns the number of free permits and the number of waiters.
    #[cfg(any(test, feature = "fakes"))]
    pub fn counts(&self) -> (usize, usize) {
        let state = self.shared.state.lock();
        (state.free, state.line.len())
    }
}
