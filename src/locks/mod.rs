#![allow(clippy::disallowed_types)] // The one place that names the raw types.
//! Locks whose order a checker enforces at run time, in debug builds and with the feature `lock-check`. The table is
//! in `rank.rs`; a violation panics, before anything blocks, and is counted. Otherwise the checker costs nothing.

mod cancel;
mod mutex;
pub mod rank;
mod raw;
mod record;
mod set;

#[cfg(any(debug_assertions, feature = "lock-check"))]
#[path = "check_on.rs"]
pub mod check;
#[cfg(not(any(debug_assertions, feature = "lock-check")))]
#[path = "check_off.rs"]
pub mod check;

pub use cancel::{Cancel, KnownCause, Subscription};
pub use check::{assert_none_held, require_memory_only};
pub use mutex::{Condvar, Mutex, MutexGuard, Region, Waited, region};
pub use rank::Rank;
pub use record::{OperationScope, Party, operation_scope};
pub use set::{KeyGuard, LockSet, WaitCancelled};

#[cfg(all(test, not(feature = "shuttle"), any(debug_assertions, feature = "lock-check")))]
mod tests;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests_set;
#[cfg(all(test, feature = "shuttle"))]
mod tests_shuttle;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests_wait;
