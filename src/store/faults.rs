//! Lets tests make commits fail or hold them back.

use super::schema::Transaction;
use crate::locks::{Condvar, Mutex, Rank};
use crate::sched::Instant;
use rusqlite::ffi;
use std::sync::Arc;
use std::time::Duration;

/// Maximum time that a gate holds a commit back. It ends a test that never drops its gate.
const GATE_TIME_MAX: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    DiskFull,
    Io,
    /// The commit reaches the disk, but returns an error.
    IoAfterCommit,
    Panic,
}

/// A hook that a test sets, and that is called before every commit, including probes.
pub trait CommitHook: Send + Sync {
    /// Returns the fault of this commit, or `None` to let the commit proceed.
    fn before_commit(&self) -> Option<Fault>;

    /// The store calls this when a commit has reached the disk.
    fn after_commit(&self) {}
}

#[derive(Default)]
struct Plan {
    hook: Option<Arc<dyn CommitHook>>,
    fault: Option<(Fault, u64)>,
    failing_folds: u64,
    gates: usize,
    waiting: bool,
}

pub struct Faults {
    // This lock has the same rank as the store's other locks, and is never held together with one.
    plan: Mutex<Plan>,
    changed: Condvar,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            plan: Mutex::new(Rank::Store, Plan::default()),
            changed: Condvar::new(),
        }
    }
}

/// Holds back every commit while it lives.
pub struct Gate<'a>(&'a Faults);

impl Faults {
    /// Makes the next `attempts` to commit fail, including probes.
    pub fn fail(&self, fault: Fault, attempts: u64) {
        self.plan.lock().fault = Some((fault, attempts));
    }

    /// Makes the next `attempts` to fold the log into the database fail with an I/O error.
    pub fn fail_folds(&self, attempts: u64) {
        self.plan.lock().failing_folds = attempts;
    }

    /// Calls `hook` before every commit from now on.
    pub fn ask(&self, hook: Arc<dyn CommitHook>) {
        self.plan.lock().hook = Some(hook);
    }

    /// Ends the failures that [`Faults::fail`] has begun.
    pub fn heal(&self) {
        self.plan.lock().fault = None;
    }

    pub fn gate(&self) -> Gate<'_> {
        self.plan.lock().gates += 1;
        Gate(self)
    }

    pub(super) fn pass_gate(&self) {
        let mut plan = self.plan.lock();
        plan.waiting = true;
        self.changed.notify_all();
        self.changed
            .wait_while(&mut plan, Instant::now() + GATE_TIME_MAX, |p| p.gates > 0);
        plan.waiting = false;
    }

    pub(super) fn fold(&self) -> rusqlite::Result<()> {
        let mut plan = self.plan.lock();
        if plan.failing_folds == 0 {
            return Ok(());
        }
        plan.failing_folds -= 1;
        Err(rusqlite::Error::SqliteFailure(
            ffi::Error::new(ffi::SQLITE_IOERR),
            None,
        ))
    }

    /// Returns the fault of the next commit.
    pub(super) fn next(&self) -> Option<Fault> {
        let fault = {
            let mut plan = self.plan.lock();
            let fault = plan.fault.map(|(fault, _)| fault);
            plan.fault = plan
                .fault
                .and_then(|(f, left)| (left > 1).then_some((f, left - 1)));
            fault
        };
        let hook = self.plan.lock().hook.clone();
        fault.or_else(|| hook.and_then(|hook| hook.before_commit()))
    }

    pub(super) fn after_commit(&self) {
        let hook = self.plan.lock().hook.clone();
        if let Some(hook) = hook {
            hook.after_commit();
        }
    }

    pub(super) fn commit(&self, tx: Transaction<'_>) -> rusqlite::Result<()> {
        let error = |code| Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None));
        match self.next() {
            None => {
                tx.commit()?;
                self.after_commit();
                Ok(())
            }
            Some(Fault::DiskFull) => error(ffi::SQLITE_FULL),
            Some(Fault::Io) => error(ffi::SQLITE_IOERR),
            Some(Fault::IoAfterCommit) => tx.commit().and_then(|()| error(ffi::SQLITE_IOERR)),
            Some(Fault::Panic) => panic!("a fault of the test"),
        }
    }
}

impl Gate<'_> {
    /// Waits until the writer has reached the gate with a batch. Returns false at the deadline.
    pub fn wait_for_writer(&self, deadline: Instant) -> bool {
        let mut plan = self.0.plan.lock();
        self.0
            .changed
            .wait_while(&mut plan, deadline, |p| !p.waiting)
    }
}

impl Drop for Gate<'_> {
    fn drop(&mut self) {
        self.0.plan.lock().gates -= 1;
        self.0.changed.notify_all();
    }
}
