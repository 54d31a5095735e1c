#![allow(unsafe_code)] // The descriptors of all waiting tasks are polled together.
//! Finds out which tasks can run, and chooses the next one.

use super::policy::Policy;
use super::state::{Core, On, Polled, State};
use nix::poll::{PollFd, PollTimeout, poll};
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// How much time passes at each point.
pub(super) const POINT: Duration = Duration::from_micros(1);
/// One of this many choices first looks which descriptors are ready.
const POLL_ONE_IN: u64 = 4;

impl Core {
    /// Chooses the next task, and lets time pass if none can run. Returns `None` if none ever will.
    pub(super) fn choose(&mut self) -> Option<usize> {
        self.expire();
        // Looking at the descriptors costs a system call, so it is not done every time.
        if self.random.one_in(POLL_ONE_IN) {
            self.poll_all();
        }
        loop {
            let ready = self.count_ready();
            if ready > 0 {
                return Some(self.pick(ready));
            }
            self.poll_all();
            if self.count_ready() == 0 {
                let next = self.next_deadline()?;
                self.now = self.now.max(next);
                self.expire();
            }
        }
    }

    fn count_ready(&self) -> usize {
        self.alive.iter().filter(|id| self.may_run(**id)).count()
    }

    fn pick(&mut self, ready: usize) -> usize {
        self.is_changed = false;
        let nth = match &self.policy {
            Policy::Walk(_) => self.random.below(ready as u64) as usize,
            Policy::Priorities(_) => 0,
        };
        let mut can_run = self.alive.iter().copied().filter(|id| self.may_run(*id));
        match &self.policy {
            Policy::Walk(_) => can_run.nth(nth),
            Policy::Priorities(_) => can_run.max_by_key(|id| self.tasks[*id].priority),
        }
        .expect("one was counted")
    }

    /// Fires timers, and wakes the tasks whose deadline has passed.
    fn expire(&mut self) {
        self.fire_timers();
        for at in 0..self.alive.len() {
            let id = self.alive[at];
            if self.tasks[id].deadline.is_some_and(|due| due <= self.now) {
                self.tasks[id].timed_out = true;
                self.wake(id);
            }
        }
    }

    fn next_deadline(&self) -> Option<Duration> {
        let alive = self.alive.iter().filter(|id| !self.is_dead(**id));
        let deadlines = alive.filter_map(|id| self.tasks[*id].deadline);
        deadlines.chain(self.timers.iter().map(|t| t.due)).min()
    }

    /// True if the running task must let another task be chosen at this point.
    pub(super) fn is_preempted(&mut self, id: usize) -> bool {
        self.figures.points += 1;
        self.now += POINT;
        match &mut self.policy {
            Policy::Walk(one_in) => {
                let one_in = *one_in;
                self.random.one_in(one_in)
            }
            Policy::Priorities(changes) => {
                if changes.first().is_some_and(|at| *at <= self.figures.points) {
                    changes.remove(0);
                    self.lowest = self.lowest.saturating_sub(1);
                    self.tasks[id].priority = self.lowest;
                    return true;
                }
                // A descriptor may be ready too, so look now and then.
                self.is_changed || self.figures.points.is_multiple_of(32)
            }
        }
    }

    fn fire_timers(&mut self) {
        let now = self.now;
        self.timers.retain(|t| {
            let Some(timer) = t.event.upgrade() else {
                return false;
            };
            if t.due <= now {
                let _ = timer.write(1);
            }
            t.due > now
        });
    }

    /// Wakes the tasks of which a descriptor is ready.
    fn poll_all(&mut self) {
        let (mut fds, mut owners) = (Vec::new(), Vec::new());
        for (id, task) in self.waiting() {
            if let State::Waits(On::Poll(polled)) = &task.state
                && !self.is_dead(id)
            {
                for Polled { fd, events } in polled {
                    // SAFETY: the task has borrowed the descriptor until it is woken.
                    let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
                    fds.push(PollFd::new(fd, *events));
                    owners.push(id);
                }
            }
        }
        if fds.is_empty() {
            return;
        }
        self.figures.polls += 1;
        if !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(ready) if ready > 0) {
            return;
        }
        let ready: Vec<usize> = fds
            .iter()
            .zip(owners)
            .filter(|(fd, _)| fd.revents().is_none_or(|r| !r.is_empty()))
            .map(|(_, owner)| owner)
            .collect();
        for id in ready {
            self.wake(id);
        }
    }
}
