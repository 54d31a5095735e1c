//! Counts the threads of operations, so that `Daemon::close` can wait for them.

use crate::locks::{Condvar, Mutex, Rank};
use crate::sched::Instant;
use std::sync::Arc;

struct Shared {
    running: Mutex<usize>,
    idle: Condvar,
}

/// Counts the operation threads.
pub(super) struct Threads {
    shared: Arc<Shared>,
}

/// Counts one thread until this is dropped.
pub(super) struct Counted {
    shared: Arc<Shared>,
}

impl Threads {
    pub(super) fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                running: Mutex::new(Rank::Runtimes, 0),
                idle: Condvar::new(),
            }),
        }
    }

    pub(super) fn enter(&self) -> Counted {
        *self.shared.running.lock() += 1;
        Counted {
            shared: self.shared.clone(),
        }
    }

    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn count(&self) -> usize {
        *self.shared.running.lock()
    }

    /// Waits until no thread runs. Returns false if some still run at the deadline.
    pub(super) fn wait_idle(&self, deadline: Instant) -> bool {
        let mut running = self.shared.running.lock();
        self.shared
            .idle
            .wait_while(&mut running, deadline, |n| *n > 0)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        *self.shared.running.lock() -= 1;
        self.shared.idle.notify_all();
    }
}
