#![allow(clippy::disallowed_types)] // The one place that names the raw types.
//! The daemon's locks, with a checker that enforces their order at run time.
//!
//! - [`Mutex`] and [`Condvar`] guard data in memory. [`LockSet`] has one lock per key, such as a
//!   VM's id.
//! - [`region`] marks what a thread is about to block on (a guest, a VMM, a host command). It is
//!   checked like a lock, so that no thread blocks while it holds a lock that does not allow it.
//! - [`Cancel`] is the token that ends a wait early.
//!
//! Every lock has a [`Rank`]; the table in `rank.rs` lists the ranks that may be held when another
//! is taken. In debug builds and with the feature `lock-check`, a violation is counted and panics
//! before the thread blocks. In other builds the checker compiles to nothing.

mod cancel;
mod cause;
mod durable;
#[cfg(any(debug_assertions, feature = "lock-check"))]
mod meter;
mod mutex;
pub mod rank;
mod raw;
mod record;
mod set;
mod slots;
mod stats;

#[cfg(any(debug_assertions, feature = "lock-check"))]
#[path = "check_on.rs"]
pub mod check;
#[cfg(not(any(debug_assertions, feature = "lock-check")))]
#[path = "check_off.rs"]
pub mod check;

pub use cancel::Cancel;
pub use cause::CancelCause;
pub use check::{assert_none_held, may_block};
pub use durable::{durable_wait, durable_waits};
pub use mutex::{Condvar, Mutex, Waited, region};
pub use rank::Rank;
pub use record::{KeyRecord, Party, operation_scope};
pub use set::{KeyGuard, LockKey, LockSet};
pub use stats::{ClassStats, stats};
#[cfg(test)]
use {
    cancel::Subscription,
    mutex::{MutexGuard, Region},
    record::OperationScope,
    set::WaitCancelled,
};

#[cfg(all(
    test,
    not(feature = "shuttle"),
    any(debug_assertions, feature = "lock-check")
))]
mod tests;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests_set;
#[cfg(all(test, feature = "shuttle"))]
mod tests_shuttle;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests_wait;
