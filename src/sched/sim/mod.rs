#![allow(clippy::disallowed_types)] // It is beneath the locks that the rest of fcd uses.
//! A simulation: one thread runs at a time, and a seed decides which.
//!
//! [`run`] starts a task, and every thread that a task starts is a task of the same simulation.
//! Tasks are threads of the operating system, so that thread-local values and panics work as usual,
//! but all tasks except one are parked. A task may lose its turn only at a *point*: before it takes
//! a lock, after it releases one, when it wakes or starts another task, before it polls, and where
//! it has to wait. [`Policy`] draws from the seed whether it does, and which task is next.
//!
//! Time is virtual. It advances by a little at each point, and jumps to the next deadline when no
//! task can run. If there is no deadline either, the simulation has failed: it is a deadlock, and
//! the report says where each task waits.
//!
//! Tasks belong to groups. [`kill`] ends a group as `kill -9` ends a process: its tasks never run
//! again, and nothing is unwound or dropped. Their threads and memory are lost to the process, so
//! a process that simulates many kills has to be replaced now and then. A task in a critical
//! section of a mutex finishes the section first, because the mutex may belong to another group.
//!
//! Kernel objects (eventfds, pipes, sockets) are real. They change only when a task changes them,
//! so their state depends on the seed alone.

mod locks;
mod policy;
mod polling;
mod ready;
pub(super) mod seam;
mod state;
mod tasks;
#[cfg(test)]
mod tests;
mod time;
mod turn;
mod worker;

pub use policy::{Policy, Random};
pub use state::{Figures, Group, Outcome};
pub use turn::{
    die, enter, fail, figures, group, kill, run, since_begin, sleep, spawn_into, tasks, wait_dead,
};
