//! Limits how many boots or image builds run at the same time. The rest wait in a queue. Each wait
//! can be cancelled and reports its position in the queue. Permits may be limited per user, so that
//! one user cannot take all of them.

use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, Condvar, Mutex, Rank, Waited};
use crate::sched::Instant;
use crate::uids::UidCounts;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

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
    line: VecDeque<Waiter>,
    /// The permits that users have now.
    running: UidCounts,
    /// The number of permits that one user may have.
    per_uid_max: usize,
}

#[derive(Clone, Copy)]
struct Waiter {
    number: u64,
    uid: Option<u32>,
}

/// Permission to run. Dropping it admits the next waiter in the queue.
#[must_use = "dropping it returns the permit"]
pub struct Permit {
    shared: Arc<Shared>,
    uid: Option<u32>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.free += 1;
        if let Some(uid) = self.uid {
            state.running.remove(uid);
        }
        drop(state);
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
        let number = self.number;
        self.shared.state.lock().line.retain(|w| w.number != number);
        self.shared.moved.notify_all();
    }
}

impl State {
    fn ahead_of(&self, number: u64) -> usize {
        self.line.iter().take_while(|w| w.number != number).count()
    }

    /// True if a permit is free and nobody before this waiter may take it.
    fn may_enter(&self, number: u64) -> bool {
        let has_room = |w: &&Waiter| {
            let running = w.uid.map_or(0, |uid| self.running.of(uid));
            running < self.per_uid_max
        };
        let first = self.line.iter().find(has_room);
        self.free > 0 && first.is_some_and(|w| w.number == number)
    }
}

impl Admission {
    /// Creates `max` permits, at least one. `what` is the name of the limited thing in messages,
    /// such as `boots`.
    pub fn new(what: &'static str, max: usize) -> Self {
        Self::with_state(what, max, usize::MAX)
    }

    /// Like [`Self::new`], but keeps one permit for other users if there is more than one.
    pub fn fair(what: &'static str, max: usize) -> Self {
        Self::with_state(what, max, max.saturating_sub(1).max(1))
    }

    fn with_state(what: &'static str, max: usize, per_uid_max: usize) -> Self {
        let state = State {
            free: max.max(1),
            last_ticket: 0,
            line: VecDeque::new(),
            running: UidCounts::default(),
            per_uid_max,
        };
        Self {
            shared: Arc::new(Shared {
                what,
                state: Mutex::new(Rank::Admission, state),
                moved: Condvar::new(),
            }),
        }
    }

    /// Waits for a permit. If the caller cannot enter at once, calls `on_wait` with the number of
    /// waiters ahead, and again whenever the number falls. No lock is held during the call.
    ///
    /// # Errors
    /// `cancelled` within 100 ms after the token fires, and `timeout` after `WAIT_MAX`.
    pub fn enter(&self, cancel: &Cancel, on_wait: impl FnMut(usize)) -> Result<Permit> {
        self.enter_line(None, cancel, on_wait)
    }

    /// Like [`Self::enter`], for a user. Waiters of other users may overtake while this user has as
    /// many permits as one user may have.
    ///
    /// # Errors
    /// Those of [`Self::enter`].
    pub fn enter_as(
        &self,
        uid: u32,
        cancel: &Cancel,
        on_wait: impl FnMut(usize),
    ) -> Result<Permit> {
        self.enter_line(Some(uid), cancel, on_wait)
    }

    fn enter_line(
        &self,
        uid: Option<u32>,
        cancel: &Cancel,
        mut on_wait: impl FnMut(usize),
    ) -> Result<Permit> {
        let shared = &*self.shared;
        let deadline = Instant::now() + WAIT_MAX;
        let mut state = shared.state.lock();
        state.last_ticket += 1;
        let number = state.last_ticket;
        state.line.push_back(Waiter { number, uid });
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
                if let Some(uid) = uid {
                    state.running.add(uid);
                }
                return Ok(Permit {
                    shared: self.shared.clone(),
                    uid,
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
