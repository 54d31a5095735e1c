//! The drain: transfers may finish for a while, then they are cancelled; stops finish or stay as rows.

use super::Daemon;
use crate::locks::{CancelCause, Condvar, Mutex, Rank, check};
use std::sync::Arc;
use std::time::Instant;

struct Shared {
    running: Mutex<usize>,
    idle: Condvar,
}

/// How many threads of operations run.
pub struct Threads {
    shared: Arc<Shared>,
}

/// One of them, for as long as this lives.
pub struct Counted {
    shared: Arc<Shared>,
}

impl Threads {
    pub fn new() -> Self {
        Self { shared: Arc::new(Shared { running: Mutex::new(Rank::Runtimes, 0), idle: Condvar::new() }) }
    }

    pub fn enter(&self) -> Counted {
        *self.shared.running.lock() += 1;
        Counted { shared: self.shared.clone() }
    }

    pub fn count(&self) -> usize {
        *self.shared.running.lock()
    }

    /// Waits until none runs. False at the deadline.
    fn wait_idle(&self, deadline: Instant) -> bool {
        let mut running = self.shared.running.lock();
        self.shared.idle.wait_while(&mut running, deadline, |n| *n > 0)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        *self.shared.running.lock() -= 1;
        self.shared.idle.notify_all();
    }
}

impl Daemon {
    /// Call it when no new call can come. VMs run on.
    pub fn close(&self, transfers_until: Instant, deadline: Instant) {
        self.closing.cancel(CancelCause::DaemonStops);
        if !self.threads.wait_idle(transfers_until) {
            log::info!("cancelling what still runs");
        }
        // Sessions run on their callers' threads.
        self.runtimes.cancel_everything(&CancelCause::DaemonStops);
        self.threads.wait_idle(deadline);
        self.pool.close(deadline);
        self.close_network();
        self.end_all_attempts();
        self.store.close();
        let violations = check::violations();
        if violations > 0 {
            log::error!("{violations} violations of the lock order");
        }
    }
}
