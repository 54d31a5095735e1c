//! The items of `real.rs`, with the same names and signatures.

pub use super::locks::{Condvar, Mutex, MutexGuard, OnceLock};
pub use super::polling::{before_read, poll_until};
pub use super::tasks::{JoinHandle, Thread, ThreadId, current, park, park_timeout, spawn};
pub use super::time::{Instant, Timer, fill_random, since_epoch};
pub use crate::sched::real::is_ready;
pub use std::sync::atomic::AtomicBool;

use super::turn::{begin_section, end_section, group, join_group};
use std::hash::{BuildHasherDefault, DefaultHasher};

/// Maps whose order depends on their contents alone.
pub type HashMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<DefaultHasher>>;
pub type HashSet<K> = std::collections::HashSet<K, BuildHasherDefault<DefaultHasher>>;

/// Makes a callback that outlives its daemon run as a part of that daemon. If the daemon was
/// killed, the callback does not run.
pub fn bound<T: 'static>(callback: Box<dyn FnOnce(T) + Send>) -> Box<dyn FnOnce(T) + Send> {
    let owner = group();
    Box::new(move |value| join_group(owner, || callback(value)))
}

/// A section of a fake that a simulated kill of the daemon does not cut in two.
#[must_use = "dropping it ends the section"]
pub struct Whole(());

pub fn whole() -> Whole {
    begin_section();
    Whole(())
}

impl Drop for Whole {
    fn drop(&mut self) {
        end_section();
    }
}
