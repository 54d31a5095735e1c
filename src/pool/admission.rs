//! Admission of boots and of image builds: so many at once, the rest wait in line, visibly and cancellably.

use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, Condvar, Mutex, Rank, Waited};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest wait for a permit: far beyond any sane queue, so that nothing waits for ever.
const WAIT_MAX: Duration = Duration::from_secs(6 * 3600);

/// First come, first served.
#[derive(Clone)]
pub struct Admission {
    shared: Arc<Shared>,
}

struct Shared {
    /// Names what is limited, for messages: `boots`.
    what: &'static str,
    state: Mutex<State>,
    moved: Condvar,
}

struct State {
    free: usize,
    last_ticket: u64,
    line: VecDeque<u64>,
}

/// Lets one in. Dropping it lets in the next.
#[must_use = "dropping it gives the permit back"]
pub struct Permit {
    shared: Arc<Shared>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.state.lock().free += 1;
        self.shared.moved.notify_all();
    }
}

/// A place in line; gone from it on drop, however that comes.
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
    /// `max` permits, at least one. `what` names in messages what is admitted: `boots`.
    pub fn new(what: &'static str, max: usize) -> Self {
        let state = State { free: max.max(1), last_ticket: 0, line: VecDeque::new() };
        Self { shared: Arc::new(Shared { what, state: Mutex::new(Rank::Admission, state), moved: Condvar::new() }) }
    }

    /// Waits for a permit. `on_wait` hears how many are ahead in line (0: the next), first when there is no permit
    /// at once, then whenever the number falls; no lock is held in it. Fails with `cancelled: cause` within 100 ms
    /// of the token's firing.
    pub fn enter(&self, cancel: &Cancel, mut on_wait: impl FnMut(usize)) -> Result<Permit> {
        let shared = &*self.shared;
        let deadline = Instant::now() + WAIT_MAX;
        let mut state = shared.state.lock();
        state.last_ticket += 1;
        let number = state.last_ticket;
        state.line.push_back(number);
        drop(state);
        let _ticket = Ticket { shared, number };
        let mut told = None;
        loop {
            let mut state = shared.state.lock();
            // Before the permit, so that a cancelled operation never boots.
            if let Some(cause) = cancel.cause() {
                return Err(Error::new(Kind::Cancelled, format!("wait for other {}: cancelled: {cause}", shared.what)));
            }
            if state.may_enter(number) {
                state.free -= 1;
                return Ok(Permit { shared: self.shared.clone() });
            }
            let ahead = state.ahead_of(number);
            if told != Some(ahead) {
                drop(state);
                told = Some(ahead);
                on_wait(ahead);
                continue;
            }
            let waited = shared
                .moved
                .wait_while_cancellable(&mut state, deadline, cancel, |s| !s.may_enter(number) && s.ahead_of(number) == ahead);
            if waited == Waited::TimedOut {
                let hours = WAIT_MAX.as_secs() / 3600;
                let text = format!("wait for other {}: none has ended for {hours} hours", shared.what);
                return Err(Error::new(Kind::Timeout, text).hint("run fcctl op list"));
            }
        }
    }

    /// Permits free and operations in line.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.shared.state.lock();
        (state.free, state.line.len())
    }
}
