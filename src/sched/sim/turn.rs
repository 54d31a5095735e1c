//! Hands over from one task to the next, and begins and ends simulations.

use super::policy::Policy;
use super::ready::POINT;
use super::state::{Core, Figures, Group, Me, On, Outcome, Sim, State, set_me, with_me};
use super::worker;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

/// The points after which a simulation counts as endless.
const POINTS_MAX: u64 = 3_000_000;
/// How long the process may take for one step before it counts as stuck outside of the simulation.
const STUCK: Duration = Duration::from_secs(20);

impl Sim {
    /// Ends the simulation. The threads of its tasks are never continued.
    fn end(&self, mut core: MutexGuard<'_, Core>, outcome: Outcome) {
        core.outcome.get_or_insert(outcome);
        drop(core);
        self.ended.notify_all();
    }

    /// Hands over to the next task. Returns when it is this task's turn again.
    fn switch(&self, mut core: MutexGuard<'_, Core>, me: usize) {
        if core.outcome.is_some() {
            drop(core);
            park_for_ever();
        }
        if core.figures.points > POINTS_MAX {
            let report = format!("the simulation does not end\n{}", core.report());
            self.end(core, Outcome::Failed(report));
            park_for_ever();
        }
        let Some(next) = core.choose() else {
            let report = format!("deadlock: no task can ever run {}", core.report());
            self.end(core, Outcome::Failed(report));
            park_for_ever();
        };
        core.note(next as u64);
        if next == me {
            return;
        }
        core.figures.switches += 1;
        let mine = core.tasks[me].worker.clone();
        let has_ended = matches!(core.tasks[me].state, State::Ended);
        let theirs = core.tasks[next].worker.clone();
        drop(core);
        theirs.go();
        if !has_ended {
            mine.wait();
        }
    }

    /// Waits until another task wakes this one, or until the deadline. Returns false at the
    /// deadline.
    pub(super) fn wait(
        &self,
        mut core: MutexGuard<'_, Core>,
        me: usize,
        on: On,
        deadline: Option<Duration>,
    ) -> bool {
        core.figures.points += 1;
        core.now += POINT;
        self.progress.store(core.figures.points, Ordering::Relaxed);
        core.check_kill();
        let task = &mut core.tasks[me];
        (task.state, task.deadline, task.timed_out) = (State::Waits(on), deadline, false);
        self.switch(core, me);
        !self.core().tasks[me].timed_out
    }

    /// A place where the running task may lose its turn.
    pub(super) fn point(&self, me: usize) {
        let mut core = self.core();
        self.progress.store(core.figures.points, Ordering::Relaxed);
        core.check_kill();
        if core.is_preempted(me) || core.is_dead(me) || core.outcome.is_some() {
            self.switch(core, me);
        }
    }

    pub(super) fn finish(&self, me: usize) {
        let mut core = self.core();
        core.tasks[me].state = State::Ended;
        core.alive.retain(|id| *id != me);
        core.wake_all(|on| matches!(on, On::Join(id) if *id == me));
        core.wake_dead();
        if me == 0 {
            // The other tasks are frozen where they are.
            return self.end(core, Outcome::Passed);
        }
        self.switch(core, me);
    }
}

impl Core {
    fn check_kill(&mut self) {
        if let Some((at, group)) = self.kill_at
            && self.figures.points >= at
        {
            self.kill_at = None;
            self.kill(group);
        }
    }

    fn kill(&mut self, group: Group) {
        self.killed[group] = true;
        self.is_changed = true;
        self.wake_dead();
    }

    /// True if the group was killed and none of its tasks is in a critical section.
    fn has_ended(&self, group: Group) -> bool {
        let in_section = |task: &super::state::Task| task.group == group && task.sections > 0;
        self.killed[group] && !self.waiting().any(|(_, task)| in_section(task))
    }

    /// Wakes tasks that wait for the end of a group, if it has ended.
    pub(super) fn wake_dead(&mut self) {
        let ended: Vec<bool> = (0..self.killed.len())
            .map(|group| self.has_ended(group))
            .collect();
        self.wake_all(|on| matches!(on, On::Dead(group) if ended[*group]));
    }
}

fn park_for_ever() -> ! {
    loop {
        std::thread::park();
    }
}

/// Simulates `body` and every thread that it starts, with decisions from `seed`. Returns when
/// `body` has returned or the simulation has failed. Tasks that are left are frozen, and their
/// memory is lost.
pub fn run(seed: u64, policy: Policy, body: impl FnOnce() + Send + 'static) -> (Outcome, Figures) {
    let sim = Sim::new(seed, policy);
    start(&sim, "world".into(), None, body);
    let first = sim.core().tasks[0].worker.clone();
    first.go();
    let mut core = sim.core();
    let mut last = u64::MAX;
    while core.outcome.is_none() {
        let waited = sim.ended.wait_timeout(core, STUCK);
        core = waited.unwrap_or_else(PoisonError::into_inner).0;
        if core.outcome.is_none() {
            let progress = sim.progress.load(Ordering::Relaxed);
            if progress == last {
                let report = format!(
                    "a task waits for something that the simulation does not control {}",
                    core.report()
                );
                core.outcome = Some(Outcome::Failed(report));
            }
            last = progress;
        }
    }
    let figures = core.figures;
    (core.outcome.clone().expect("it has ended"), figures)
}

/// Makes the simulation of this task fail. Returns only on a thread outside of simulations.
pub fn fail(why: &str) {
    with_me(|me| {
        let core = me.sim.core();
        let report = format!("{why}\n{}", core.report());
        me.sim.end(core, Outcome::Failed(report));
        park_for_ever()
    })
    .unwrap_or(())
}

/// Returns how many tasks have not ended, including those of killed groups.
pub fn tasks() -> usize {
    with_me(|me| me.sim.core().waiting().count()).unwrap_or(0)
}

/// Returns the group of this task.
pub fn group() -> Group {
    with_me(|me| me.sim.core().tasks[me.id].group).unwrap_or(0)
}

/// Creates a group.
pub fn enter() -> Group {
    with_me(|me| {
        let mut core = me.sim.core();
        core.killed.push(false);
        core.killed.len() - 1
    })
    .unwrap_or(0)
}

/// Calls `body`. The threads that it starts belong to `group`.
pub fn spawn_into<T>(group: Group, body: impl FnOnce() -> T) -> T {
    let set =
        |group| with_me(|me| std::mem::replace(&mut me.sim.core().tasks[me.id].spawns_into, group));
    let before = set(Some(group));
    let result = body();
    set(before.flatten());
    result
}

/// Calls `body` as a part of `group`. If that has been killed, this task never continues.
pub(super) fn join_group(group: Group, body: impl FnOnce()) {
    let set = |group| {
        with_me(|me| {
            let mut core = me.sim.core();
            let before = std::mem::replace(&mut core.tasks[me.id].group, group);
            drop(core);
            me.sim.point(me.id);
            before
        })
    };
    let before = set(group);
    body();
    if let Some(before) = before {
        set(before);
    }
}

/// Kills a group, as `kill -9` kills a process.
pub fn kill(group: Group) {
    with_me(|me| {
        me.sim.core().kill(group);
        me.sim.point(me.id);
    });
}

/// Kills the group of this task, after this many further points.
pub fn die(after_points: u64) {
    with_me(|me| {
        let mut core = me.sim.core();
        let (at, group) = (core.figures.points + after_points, core.tasks[me.id].group);
        core.kill_at = Some((at, group));
        drop(core);
        me.sim.point(me.id);
    });
}

/// Waits until a group has been killed and none of its tasks can run. Returns false if that has not
/// happened after `period`.
pub fn wait_dead(group: Group, period: Duration) -> bool {
    with_me(|me| {
        let core = me.sim.core();
        if core.has_ended(group) {
            return true;
        }
        let until = core.now + period;
        me.sim.wait(core, me.id, On::Dead(group), Some(until))
    })
    .unwrap_or(false)
}

/// Sleeps in virtual time.
pub fn sleep(period: Duration) {
    with_me(|me| {
        let core = me.sim.core();
        let until = core.now + period;
        me.sim.wait(core, me.id, On::Sleep, Some(until));
    });
}

/// Returns the virtual time since the simulation began.
pub fn since_begin() -> Duration {
    with_me(|me| me.sim.core().now).unwrap_or_default()
}

pub fn figures() -> Figures {
    with_me(|me| me.sim.core().figures).unwrap_or_default()
}

/// Set while a task is in a critical section.
pub(super) fn begin_section() {
    with_me(|me| me.sim.core().tasks[me.id].sections += 1);
}

pub(super) fn end_section() {
    with_me(|me| {
        let mut core = me.sim.core();
        core.tasks[me.id].sections -= 1;
        if core.is_dead(me.id) {
            core.wake_dead();
        }
    });
}

/// Adds a task that is ready to run.
pub(super) fn start(
    sim: &Arc<Sim>,
    name: Arc<str>,
    parent: Option<usize>,
    body: impl FnOnce() + Send + 'static,
) -> usize {
    let worker = worker::take();
    let id = sim.core().add(name, worker.clone(), parent);
    let me = Me {
        sim: sim.clone(),
        id,
    };
    worker.give(Box::new(move || {
        set_me(Some(me.clone()));
        drop(catch_unwind(AssertUnwindSafe(body)));
        set_me(None);
        Box::new(move || me.sim.finish(me.id))
    }));
    id
}
