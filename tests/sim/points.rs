//! Counts effects on the host and commits of the store as points. At one of them, the fault of the
//! history happens.

#[path = "../it/points/drivers.rs"]
mod drivers;

pub use drivers::{PointCommands, PointDriver, PointTransport};

use crate::plan::{Fault, FaultKind};
use fcd::testing::daemon::EffectPlan;
use fcd::testing::error::{Error, Kind, Result};
use fcd::testing::sched::sim;
use fcd::testing::store::faults::{CommitHook, Fault as CommitFault};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// The drivers compare with this. A simulated kill ends the thread, so nothing ever sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    #[allow(dead_code, reason = "see above")]
    Crash,
}

/// The points of all daemons of a history.
pub struct Points {
    fault: Fault,
    seen: AtomicU64,
    hit: Mutex<Option<String>>,
    has_failed_commit: AtomicBool,
}

fn dead() -> Error {
    Error::internal("a killed daemon continues")
}

impl Points {
    pub fn new(fault: Fault) -> Self {
        Self {
            fault,
            seen: AtomicU64::new(0),
            hit: Mutex::new(None),
            has_failed_commit: AtomicBool::new(false),
        }
    }

    /// Returns the point at which the fault happened.
    pub fn hit(&self) -> Option<String> {
        self.hit.lock().unwrap().clone()
    }

    /// Makes later points have no fault.
    pub fn disarm(&self) {
        self.seen.store(u64::MAX / 2, Ordering::SeqCst);
    }

    pub fn refuses(&self) -> bool {
        self.fault.kind == FaultKind::Fail
    }

    pub fn is_slow(&self) -> bool {
        matches!(self.fault.kind, FaultKind::Slow(_))
    }

    pub fn kills(&self) -> bool {
        matches!(self.fault.kind, FaultKind::Kill(_))
    }

    /// True if the fault of this history was a commit that failed.
    pub fn has_failed_commit(&self) -> bool {
        self.has_failed_commit.load(Ordering::SeqCst)
    }

    /// Passes a point. Returns true if its effect must fail.
    fn fails(&self, what: &str) -> bool {
        let number = self.seen.fetch_add(1, Ordering::SeqCst) + 1;
        if number != self.fault.at {
            return false;
        }
        *self.hit.lock().unwrap() = Some(what.to_owned());
        log::debug!("the fault: {what}");
        match self.fault.kind {
            FaultKind::Fail => return true,
            FaultKind::Slow(period) => sim::sleep(period),
            FaultKind::Kill(later) => sim::die(later),
        }
        false
    }

    fn pass(&self, what: &str) -> Result<()> {
        if self.fails(what) {
            return Err(Error::new(
                Kind::Host,
                format!("{what}: a fault of the simulation"),
            ));
        }
        Ok(())
    }

    #[allow(clippy::unnecessary_wraps, clippy::unused_self)] // The other points' signature.
    fn reach(&self, _what: &str) -> Result<()> {
        Ok(())
    }

    #[allow(clippy::unused_self)] // The other points' signature.
    fn is_dead(&self) -> bool {
        false
    }

    #[allow(clippy::unnecessary_wraps, clippy::unused_self)] // The other points' signature.
    fn is_refused(&self, _method: &str) -> Result<()> {
        Ok(())
    }

    #[allow(clippy::unnecessary_wraps, clippy::unused_self)] // The other points' signature.
    fn may_call(&self, _method: &str) -> Result<()> {
        Ok(())
    }

    #[allow(clippy::unused_self)] // The other points' signature.
    fn wait_if_held(&self, _what: &str) {}

    #[allow(clippy::unused_self)] // The other points' signature.
    fn guest_report<T>(&self, told: T) -> T {
        told
    }

    fn end_report<T>(_points: &Arc<Self>, died: T) -> T {
        died
    }

    fn is_it(&self, what: &str) -> Option<Mode> {
        // The effect has happened, so it cannot fail.
        let _ = self.fails(what);
        None
    }
}

impl EffectPlan for Points {
    fn before(&self, what: &str) -> Result<()> {
        self.pass(what)
    }
}

impl CommitHook for Points {
    fn before_commit(&self) -> Option<CommitFault> {
        let fails = self.fails("before a commit");
        self.has_failed_commit.fetch_or(fails, Ordering::SeqCst);
        fails.then_some(CommitFault::Io)
    }
    fn after_commit(&self) {
        let _ = self.fails("after a commit");
    }
}
