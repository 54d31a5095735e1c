//! The state of a simulation and of its tasks.

use super::policy::{Policy, Random};
use super::worker::Worker;
use nix::poll::PollFlags;
use nix::sys::eventfd::EventFd;
use std::cell::RefCell;
use std::fmt::Write as _;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// A set of tasks that are killed together. Group 0 has the first task and cannot be killed.
pub type Group = usize;

/// A descriptor that a task waits for. The task has borrowed it and keeps it open.
#[derive(Clone, Copy)]
pub(super) struct Polled {
    pub(super) fd: RawFd,
    pub(super) events: PollFlags,
}

/// A timer that is set.
pub(super) struct TimerEntry {
    pub(super) due: Duration,
    pub(super) event: Weak<EventFd>,
}

/// A reason to wait.
pub(super) enum On {
    Lock(usize),
    Signal(usize),
    Park,
    Join(usize),
    Poll(Vec<Polled>),
    Dead(Group),
    Sleep,
}

pub(super) enum State {
    Ready,
    Waits(On),
    Ended,
}

pub(super) struct Task {
    pub(super) name: Arc<str>,
    pub(super) group: Group,
    pub(super) state: State,
    pub(super) deadline: Option<Duration>,
    pub(super) timed_out: bool,
    /// True if the task was unparked and has not parked since.
    pub(super) has_token: bool,
    /// How many critical sections the task is in. A killed task finishes them.
    pub(super) sections: usize,
    /// The group of the tasks that this one starts, if it is not its own.
    pub(super) spawns_into: Option<Group>,
    pub(super) priority: u64,
    pub(super) worker: Worker,
}

pub(super) struct Core {
    pub(super) now: Duration,
    pub(super) tasks: Vec<Task>,
    /// The tasks that have not ended, in order of their creation.
    pub(super) alive: Vec<usize>,
    pub(super) killed: Vec<bool>,
    pub(super) timers: Vec<TimerEntry>,
    pub(super) bytes: Random,
    pub(super) random: Random,
    pub(super) policy: Policy,
    pub(super) lowest: u64,
    /// True if a task became ready since the last choice.
    pub(super) is_changed: bool,
    pub(super) kill_at: Option<(u64, Group)>,
    pub(super) outcome: Option<Outcome>,
    pub(super) figures: Figures,
}

/// Counts of a simulation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    pub points: u64,
    pub switches: u64,
    pub polls: u64,
    pub tasks: u64,
    /// A hash of every decision. Equal hashes mean that two runs took the same path.
    pub trace: u64,
}

#[derive(Clone, Debug)]
pub enum Outcome {
    Passed,
    Failed(String),
}

pub struct Sim {
    pub(super) core: Mutex<Core>,
    pub(super) ended: Condvar,
    pub(super) begin: Instant,
    pub(super) number: u64,
    /// Counts points, for the watchdog.
    pub(super) progress: AtomicU64,
}

/// The task that runs on this thread.
#[derive(Clone)]
pub(super) struct Me {
    pub(super) sim: Arc<Sim>,
    pub(super) id: usize,
}

thread_local! {
    static ME: RefCell<Option<Me>> = const { RefCell::new(None) };
}

pub(super) fn set_me(me: Option<Me>) {
    ME.with(|cell| *cell.borrow_mut() = me);
}

/// Calls `f` with the task of this thread. Returns `None` on a thread outside of simulations.
pub(super) fn with_me<T>(f: impl FnOnce(&Me) -> T) -> Option<T> {
    ME.try_with(|cell| cell.borrow().as_ref().map(f))
        .ok()
        .flatten()
}

impl Core {
    pub(super) fn is_dead(&self, id: usize) -> bool {
        let task = &self.tasks[id];
        self.killed[task.group] && task.sections == 0
    }

    pub(super) fn wake(&mut self, id: usize) {
        let task = &mut self.tasks[id];
        if matches!(task.state, State::Waits(_)) {
            (task.state, task.deadline) = (State::Ready, None);
            self.is_changed = true;
        }
    }

    pub(super) fn wake_all(&mut self, is_woken: impl Fn(&On) -> bool) {
        for at in 0..self.alive.len() {
            let id = self.alive[at];
            if matches!(&self.tasks[id].state, State::Waits(on) if is_woken(on)) {
                self.wake(id);
            }
        }
    }

    pub(super) fn waiting(&self) -> impl Iterator<Item = (usize, &Task)> {
        self.alive.iter().map(|id| (*id, &self.tasks[*id]))
    }

    pub(super) fn add(&mut self, name: Arc<str>, worker: Worker, parent: Option<usize>) -> usize {
        self.figures.tasks += 1;
        let id = self.tasks.len();
        let priority = (1 << 32) + self.random.below(1 << 20);
        let group = parent.map_or(0, |parent| {
            let parent = &self.tasks[parent];
            parent.spawns_into.unwrap_or(parent.group)
        });
        self.tasks.push(Task {
            name,
            group,
            state: State::Ready,
            deadline: None,
            timed_out: false,
            has_token: false,
            sections: 0,
            spawns_into: None,
            priority,
            worker,
        });
        self.alive.push(id);
        self.is_changed = true;
        id
    }

    pub(super) fn note(&mut self, what: u64) {
        let trace = &mut self.figures.trace;
        *trace = (trace.rotate_left(5) ^ what).wrapping_mul(0x517C_C1B7_2722_0A95);
    }

    pub(super) fn may_run(&self, id: usize) -> bool {
        matches!(self.tasks[id].state, State::Ready) && !self.is_dead(id)
    }

    pub(super) fn report(&self) -> String {
        let mut out = format!("at {:?}:\n", self.now);
        for (id, task) in self.waiting() {
            let what = match &task.state {
                State::Ready => "is ready".to_owned(),
                State::Ended => continue,
                State::Waits(on) => match on {
                    On::Lock(at) => format!("waits for the lock at {at:#x}"),
                    On::Signal(at) => format!("waits for the condition at {at:#x}"),
                    On::Park => "is parked".to_owned(),
                    On::Join(task) => format!("joins {} ({task})", self.tasks[*task].name),
                    On::Poll(fds) => format!("polls {} descriptors", fds.len()),
                    On::Dead(group) => format!("waits for the end of group {group}"),
                    On::Sleep => "sleeps".to_owned(),
                },
            };
            let dead = if self.is_dead(id) { " (killed)" } else { "" };
            let until = task
                .deadline
                .map(|due| format!(" until {due:?}"))
                .unwrap_or_default();
            let _ = writeln!(
                out,
                "  task {id} {} of group {} {what}{until}{dead}",
                task.name, task.group
            );
        }
        out
    }
}

impl Sim {
    pub(super) fn new(seed: u64, policy: Policy) -> Arc<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            core: Mutex::new(Core {
                now: Duration::ZERO,
                tasks: Vec::with_capacity(256),
                alive: Vec::with_capacity(64),
                killed: vec![false],
                timers: Vec::new(),
                bytes: Random::new(seed, 1),
                random: Random::new(seed, 2),
                policy,
                lowest: 1 << 32,
                is_changed: false,
                kill_at: None,
                outcome: None,
                figures: Figures::default(),
            }),
            ended: Condvar::new(),
            begin: Instant::now(),
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            progress: AtomicU64::new(0),
        })
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
