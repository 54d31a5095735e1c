//! Decides which thread runs and what time it is: the operating system, or a simulation.
//!
//! Whatever lets threads meet or depends on the moment goes through this module: mutexes,
//! condition variables, threads, parking, `poll`, timers, the clocks, random bytes, and the order
//! of hash maps. In a normal build the items are those of std and parking_lot, so they cost
//! nothing. With the feature `sim` a simulation can take every decision, from a seed:
//! [`sim`](self::sim) explains how. Threads that a simulation has not started still use the
//! operating system.
//!
//! `tests/it/under_sched.rs` checks that the daemon's code uses nothing else.

#[cfg_attr(
    feature = "sim",
    allow(
        dead_code,
        unused_imports,
        reason = "only threads outside a simulation use it"
    )
)]
mod real;
#[cfg(feature = "sim")]
pub mod sim;

#[cfg(not(feature = "sim"))]
pub use real::*;
#[cfg(feature = "sim")]
pub use sim::seam::*;
