#![allow(clippy::disallowed_types)] // The one place that names the raw types.
//! Locks whose order a checker enforces in debug builds. The table is in `rank.rs`.

mod cancel;
mod mutex;
pub mod rank;
mod set;

#[cfg(any(debug_assertions, feature = "lock-check"))]
#[path = "check_on.rs"]
pub mod check;
#[cfg(not(any(debug_assertions, feature = "lock-check")))]
#[path = "check_off.rs"]
pub mod check;

pub use cancel::Cancel;
pub use mutex::{Condvar, Mutex, MutexGuard, Region, region};
pub use rank::Rank;
pub use set::{KeyGuard, LockSet, WaitCancelled};
