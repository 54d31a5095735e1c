//! Tasks as the threads that they stand for: handles, parking and joining.

use super::state::{Me, On, Sim, State, with_me};
use super::time::Instant;
use super::turn::start;
use crate::sched::real;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

type Slot<T> = Arc<Mutex<Option<std::thread::Result<T>>>>;

/// A handle like [`std::thread::JoinHandle`].
pub struct JoinHandle<T>(Handle<T>);

enum Handle<T> {
    Real(std::thread::JoinHandle<T>, Thread),
    Task(Thread, Slot<T>),
}

impl<T> JoinHandle<T> {
    pub fn thread(&self) -> &Thread {
        match &self.0 {
            Handle::Real(_, thread) | Handle::Task(thread, _) => thread,
        }
    }

    pub fn is_finished(&self) -> bool {
        match &self.0 {
            Handle::Real(handle, _) => handle.is_finished(),
            Handle::Task(_, slot) => slot
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_some(),
        }
    }

    pub fn join(self) -> std::thread::Result<T> {
        let (thread, slot) = match self.0 {
            Handle::Real(handle, _) => return handle.join(),
            Handle::Task(thread, slot) => (thread, slot),
        };
        if let Place::Task(_, id) = &thread.place {
            with_me(|me| {
                me.sim.point(me.id);
                let core = me.sim.core();
                if !matches!(core.tasks[*id].state, State::Ended) {
                    me.sim.wait(core, me.id, On::Join(*id), None);
                }
            });
        }
        let result = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        result.expect("a task that has ended has a result")
    }
}

/// Starts a task, or a thread if the caller is not a task.
pub fn spawn<T: Send + 'static>(
    name: &str,
    stack_bytes: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let Some(me) = with_me(Me::clone) else {
        let handle = real::spawn(name, stack_bytes, body)?;
        let thread = Thread::real(handle.thread().clone());
        return Ok(JoinHandle(Handle::Real(handle, thread)));
    };
    let slot: Slot<T> = Arc::default();
    let theirs = slot.clone();
    let job = move || {
        let result = catch_unwind(AssertUnwindSafe(body));
        *theirs.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    };
    let name: Arc<str> = name.into();
    let id = start(&me.sim, name.clone(), Some(me.id), job);
    me.sim.point(me.id);
    let place = Place::Task(me.sim, id);
    Ok(JoinHandle(Handle::Task(
        Thread {
            name: Some(name),
            place,
        },
        slot,
    )))
}

/// A handle like [`std::thread::Thread`].
#[derive(Clone)]
pub struct Thread {
    name: Option<Arc<str>>,
    place: Place,
}

#[derive(Clone)]
enum Place {
    Real(std::thread::Thread),
    Task(Arc<Sim>, usize),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ThreadId {
    Real(std::thread::ThreadId),
    Task(u64, usize),
}

impl Thread {
    fn real(thread: std::thread::Thread) -> Self {
        Self {
            name: thread.name().map(Arc::from),
            place: Place::Real(thread),
        }
    }

    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    pub fn id(&self) -> ThreadId {
        match &self.place {
            Place::Real(thread) => ThreadId::Real(thread.id()),
            Place::Task(sim, id) => ThreadId::Task(sim.number(), *id),
        }
    }

    pub fn unpark(&self) {
        match &self.place {
            Place::Real(thread) => thread.unpark(),
            Place::Task(sim, id) => {
                let mut core = sim.core();
                core.tasks[*id].has_token = true;
                if matches!(core.tasks[*id].state, State::Waits(On::Park)) {
                    core.wake(*id);
                }
                drop(core);
                with_me(|me| me.sim.point(me.id));
            }
        }
    }
}

/// Returns the handle of this thread.
pub fn current() -> Thread {
    with_me(|me| Thread {
        name: Some(me.sim.core().tasks[me.id].name.clone()),
        place: Place::Task(me.sim.clone(), me.id),
    })
    .unwrap_or_else(|| Thread::real(std::thread::current()))
}

pub fn park() {
    if park_simulated(None).is_none() {
        std::thread::park();
    }
}

pub fn park_timeout(period: Duration) {
    if park_simulated(Some(Instant::now() + period)).is_none() {
        std::thread::park_timeout(period);
    }
}

fn park_simulated(deadline: Option<Instant>) -> Option<()> {
    with_me(|me| {
        me.sim.point(me.id);
        let mut core = me.sim.core();
        if !std::mem::take(&mut core.tasks[me.id].has_token) {
            let deadline = deadline.map(|d| d.offset(&me.sim));
            me.sim.wait(core, me.id, On::Park, deadline);
            me.sim.core().tasks[me.id].has_token = false;
        }
    })
}
