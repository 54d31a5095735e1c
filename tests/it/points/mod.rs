//! Counts effects on the host and commits of the store as points. The n-th point can fail, or it
//! can be the last action of its daemon: afterwards no effect and no commit of this daemon happens,
//! as if `kill -9` had ended it.

mod drivers;

pub use drivers::{HookedVm, PointCommands, PointDriver, PointTransport};

use fcd::testing::daemon::EffectPlan;
use fcd::testing::error::{Error, Kind, Result};
use fcd::testing::store::faults::{CommitHook, Fault};
use fcd::testing::vmm::{Died, GuestEvent};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Skips the effect and returns an error.
    Fail,
    /// Like `Fail`, but commits of the store fail too.
    FailCommits,
    /// The daemon is dead from this point on.
    Crash,
}

#[derive(Default)]
pub struct Points {
    armed: Mutex<Option<(Mode, u64)>>,
    seen: AtomicU64,
    dead: AtomicBool,
    /// Part of the name of the point at which the daemon dies.
    last: Mutex<Option<&'static str>>,
    /// The name of the armed point that was reached, for messages.
    hit: Mutex<Option<String>>,
    held: Mutex<Held>,
    released: Condvar,
    /// The method of a VMM that fails the next time that it is called.
    refused: Mutex<Option<&'static str>>,
    /// The reports of VMMs, if they are kept instead of delivered.
    late: Mutex<Option<LateReports>>,
}

/// Reports of VMMs that a test delivers when it wants to.
#[derive(Default)]
pub struct LateReports {
    /// Each reports the end of one VMM.
    pub ends: Vec<Box<dyn FnOnce() + Send>>,
    /// Each reports events of one guest, in the order in which the guests were watched.
    pub guests: Vec<GuestReport>,
}

type ReportEvent = Box<dyn Fn(GuestEvent) + Send>;
pub type GuestReport = Arc<Mutex<ReportEvent>>;

/// A point that a test has chosen to hold the first thread which reaches it.
#[derive(Default)]
enum Held {
    #[default]
    Nothing,
    Awaited(&'static str),
    Reached,
}

fn dead() -> Error {
    Error::new(Kind::Host, "the daemon of this test is dead")
}

impl Points {
    /// Arms the n-th point from now on, counted from 1.
    pub fn arm(&self, mode: Mode, n: u64) {
        self.seen.store(0, Ordering::SeqCst);
        *self.hit.lock().unwrap() = None;
        *self.armed.lock().unwrap() = Some((mode, n));
    }
    /// Kills the daemon: from now on, none of its effects and commits happen.
    pub fn die(&self) {
        self.dead.store(true, Ordering::SeqCst);
    }
    /// Makes the daemon die at the next point whose name contains `what`.
    pub fn die_at(&self, what: &'static str) {
        *self.last.lock().unwrap() = Some(what);
    }
    /// Makes the first thread that reaches a point of this name wait for [`Points::release`].
    pub fn hold(&self, what: &'static str) {
        *self.held.lock().unwrap() = Held::Awaited(what);
    }
    /// True if a thread waits.
    pub fn is_holding(&self) -> bool {
        matches!(*self.held.lock().unwrap(), Held::Reached)
    }
    pub fn release(&self) {
        *self.held.lock().unwrap() = Held::Nothing;
        self.released.notify_all();
    }
    fn wait_if_held(&self, what: &str) {
        let mut held = self.held.lock().unwrap();
        if matches!(*held, Held::Awaited(wanted) if what.contains(wanted)) {
            *held = Held::Reached;
            while matches!(*held, Held::Reached) {
                held = self.released.wait(held).unwrap();
            }
        }
    }
    pub fn disarm(&self) {
        *self.armed.lock().unwrap() = None;
    }
    /// Makes the next call of this method of a VMM fail.
    pub fn refuse(&self, method: &'static str) {
        *self.refused.lock().unwrap() = Some(method);
    }
    fn is_refused(&self, method: &str) -> Result<()> {
        let refused = self.refused.lock().unwrap().take_if(|m| *m == method);
        refused.map_or(Ok(()), |method| {
            Err(Error::new(Kind::VmmFailed, format!("{method}: refused")))
        })
    }
    /// Holds or refuses a method of a VMM, if a test has asked for that.
    fn may_call(&self, method: &str) -> Result<()> {
        self.wait_if_held(method);
        self.is_refused(method)
    }
    /// Returns what a VMM calls with the events of its guest.
    fn guest_report(&self, told: ReportEvent) -> ReportEvent {
        let told: GuestReport = Arc::new(Mutex::new(told));
        if let Some(late) = &mut *self.late.lock().unwrap() {
            late.guests.push(told.clone());
        }
        Box::new(move |event| (told.lock().unwrap())(event))
    }
    /// Returns what a VMM calls when it has ended.
    fn end_report(points: &Arc<Self>, died: Died) -> Died {
        let points = points.clone();
        Box::new(move |end| {
            let report: Box<dyn FnOnce() + Send> = Box::new(move || died(end));
            if let Some(late) = &mut *points.late.lock().unwrap() {
                return late.ends.push(report);
            }
            report();
        })
    }
    /// Keeps the reports of VMMs from now on, until [`Points::take_late`].
    pub fn keep_reports(&self) {
        *self.late.lock().unwrap() = Some(LateReports::default());
    }
    pub fn has_late_end(&self) -> bool {
        let late = self.late.lock().unwrap();
        late.as_ref().is_some_and(|late| !late.ends.is_empty())
    }
    pub fn take_late(&self) -> LateReports {
        self.late.lock().unwrap().take().unwrap_or_default()
    }
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }
    /// Returns the name of the armed point, or `None` if it was not reached.
    pub fn hit(&self) -> Option<String> {
        self.hit.lock().unwrap().clone()
    }

    /// Counts this point. Returns the mode if this is the armed point. Commits do not count with
    /// `Mode::Fail`.
    fn is_it(&self, what: &str) -> Option<Mode> {
        let (mode, n) = (*self.armed.lock().unwrap())?;
        let is_commit = what.contains("commit");
        if is_commit && mode == Mode::Fail {
            return None;
        }
        (self.seen.fetch_add(1, Ordering::SeqCst) + 1 == n).then(|| {
            *self.hit.lock().unwrap() = Some(what.to_owned());
            if mode == Mode::Crash {
                self.dead.store(true, Ordering::SeqCst);
            }
            mode
        })
    }

    pub fn pass(&self, what: &str) -> Result<()> {
        self.wait_if_held(what);
        self.reach(what)?;
        match self.is_it(what) {
            None => Ok(()),
            Some(Mode::Crash) => Err(dead()),
            Some(_) => Err(Error::new(
                Kind::Host,
                format!("{what}: a fault of the test's"),
            )),
        }
    }

    /// Passes a point without an effect on the host, which only [`Points::die_at`] counts. Returns
    /// an error if the daemon is dead.
    pub fn reach(&self, what: &str) -> Result<()> {
        if self
            .last
            .lock()
            .unwrap()
            .is_some_and(|last| what.contains(last))
        {
            self.die();
        }
        if self.is_dead() { Err(dead()) } else { Ok(()) }
    }
}

impl EffectPlan for Points {
    fn before(&self, what: &str) -> Result<()> {
        self.pass(what)
    }
}

impl CommitHook for Points {
    fn before_commit(&self) -> Option<Fault> {
        if self.is_dead() {
            return Some(Fault::Io);
        }
        if self.is_it("before a commit").is_some() {
            return Some(Fault::Io);
        }
        // The commit succeeds. No later effect or commit does.
        self.is_it("after a commit").map(|_| Fault::IoAfterCommit)
    }
}
