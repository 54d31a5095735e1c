//! Counts effects on the host and commits of the store as points. The n-th point can fail, or it
//! can be the last action of its daemon: afterwards no effect and no commit of this daemon happens,
//! as if `kill -9` had ended it.

use fcd::testing::api::daemon::Check;
use fcd::testing::api::exec::Exit;
use fcd::testing::api::port::Port;
use fcd::testing::daemon::EffectPlan;
use fcd::testing::error::{Error, Kind, Result};
use fcd::testing::guest::{ExecSpec, Streams, Target, Transport};
use fcd::testing::host::{Command, Commands, command::Output};
use fcd::testing::ids::Tag;
use fcd::testing::locks::Cancel;
use fcd::testing::store::faults::{CommitHook, Fault};
use fcd::testing::vmm::console::Consoles;
use fcd::testing::vmm::{
    Capabilities, Driver, GuestEvent, Identity, Processes, Running, SaveTo, Tagged, Vm, VmRef,
    VmmSpec,
};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

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
}

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

/// A driver with a point before each effect on the host and another after the VMM's process is
/// spawned.
pub struct PointDriver(pub Arc<dyn Driver>, pub Arc<Points>);

impl Driver for PointDriver {
    fn describe(&self) -> String {
        self.0.describe()
    }
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }
    fn warm_up(&self, kernel: &Path, cancel: &Cancel) {
        self.0.warm_up(kernel, cancel);
    }
    fn consoles(&self) -> &Consoles {
        self.0.consoles()
    }

    fn processes(&self) -> &dyn Processes {
        self
    }
    fn start(
        &self,
        spec: &VmmSpec,
        cancel: &Cancel,
        spawned: &mut dyn FnMut(&Identity),
    ) -> Result<Running> {
        self.1.pass("spawn the VMM")?;
        let mut is_dead = false;
        let running = self.0.start(spec, cancel, &mut |identity| {
            // If the daemon dies here, the process is not recorded anywhere.
            is_dead = self.1.is_dead()
                || matches!(self.1.is_it("the VMM was spawned"), Some(Mode::Crash));
            if !is_dead {
                spawned(identity);
            }
        })?;
        if is_dead { Err(dead()) } else { Ok(running) }
    }
    fn adopt(&self, spec: &VmmSpec, identity: &Identity) -> Result<Running> {
        self.1.reach(&format!("adopt the VMM of {}", spec.vm))?;
        self.0.adopt(spec, identity)
    }
    fn watch_guest(
        &self,
        dir: &Path,
        identity: &Identity,
        told: Box<dyn Fn(GuestEvent) + Send>,
    ) -> Result<()> {
        self.1
            .reach(&format!("listen to the VMM in {}", dir.display()))?;
        self.0.watch_guest(dir, identity, told)
    }
    fn vm(&self, at: VmRef) -> Result<Box<dyn Vm + '_>> {
        Ok(Box::new(HookedVm {
            inner: self.0.vm(at)?,
            before: Box::new(|method| match method {
                "set_rates" => self.1.pass("limit the guest's devices"),
                "set_balloon" => self.1.pass("set the balloon"),
                "forward" => self.1.pass("change the ports"),
                "press_ctrl_alt_del" => self.1.pass("press the keys"),
                _ => Ok(()),
            }),
        }))
    }
    fn can_load(&self, driver: &str, elsewhere: bool) -> Result<()> {
        self.0.can_load(driver, elsewhere)
    }
    fn clear(&self, dir: &Path, tag: &Tag) -> Result<()> {
        self.0.clear(dir, tag)
    }
    fn remains(&self, vms: &Path, install: &str) -> Result<Vec<String>> {
        self.0.remains(vms, install)
    }
    fn checks(&self) -> Vec<Check> {
        self.0.checks()
    }
}

impl Processes for PointDriver {
    fn find(&self, tag: &str) -> Result<Option<Identity>> {
        self.0.processes().find(tag)
    }

    fn list(&self, tag_prefix: &str) -> Result<Vec<Tagged>> {
        self.0.processes().list(tag_prefix)
    }

    fn is_alive(&self, identity: &Identity) -> bool {
        self.0.processes().is_alive(identity)
    }

    fn is_ours(&self, identity: &Identity, tag: &str) -> bool {
        self.0.processes().is_ours(identity, tag)
    }

    fn runs(&self, identity: &Identity) -> bool {
        self.0.processes().runs(identity)
    }

    fn wait_exit(&self, identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool> {
        self.0.processes().wait_exit(identity, deadline, cancel)
    }

    fn kill(&self, identity: &Identity, deadline: Instant) -> Result<()> {
        self.1.pass("kill the VMM")?;
        self.0.processes().kill(identity, deadline)
    }

    fn watch(&self, dir: &Path, identity: &Identity, died: fcd::testing::vmm::Died) -> Result<()> {
        self.0.processes().watch(dir, identity, died)
    }
}

/// A VM that calls `before` with the name of each method before it runs the method.
pub struct HookedVm<'a> {
    pub inner: Box<dyn Vm + 'a>,
    pub before: Box<dyn Fn(&'static str) -> Result<()> + 'a>,
}

impl Vm for HookedVm<'_> {
    fn pause(&self, cancel: &Cancel) -> Result<()> {
        (self.before)("pause")?;
        self.inner.pause(cancel)
    }
    fn resume(&self, cancel: &Cancel) -> Result<()> {
        (self.before)("resume")?;
        self.inner.resume(cancel)
    }
    fn save(&self, spec: &VmmSpec, to: SaveTo<'_>, cancel: &Cancel) -> Result<String> {
        (self.before)("save")?;
        self.inner.save(spec, to, cancel)
    }
    fn set_rates(&self, spec: &VmmSpec, cancel: &Cancel) -> Result<()> {
        (self.before)("set_rates")?;
        self.inner.set_rates(spec, cancel)
    }
    fn set_balloon(&self, keep_mib: u64, cancel: &Cancel) -> Result<()> {
        (self.before)("set_balloon")?;
        self.inner.set_balloon(keep_mib, cancel)
    }
    fn balloon_mib(&self, cancel: &Cancel) -> Result<u64> {
        (self.before)("balloon_mib")?;
        self.inner.balloon_mib(cancel)
    }
    fn forward(&self, add: &[Port], remove: &[Port], cancel: &Cancel) -> Result<()> {
        (self.before)("forward")?;
        self.inner.forward(add, remove, cancel)
    }
    fn forwarded(&self, cancel: &Cancel) -> Result<Vec<Port>> {
        (self.before)("forwarded")?;
        self.inner.forwarded(cancel)
    }
    fn metrics(&self, cancel: &Cancel) -> Result<Vec<serde_json::Value>> {
        (self.before)("metrics")?;
        self.inner.metrics(cancel)
    }
    fn connect(&self, port: u32, cancel: &Cancel) -> Result<UnixStream> {
        (self.before)("connect")?;
        self.inner.connect(port, cancel)
    }
    fn press_ctrl_alt_del(&self, cancel: &Cancel) -> Result<()> {
        (self.before)("press_ctrl_alt_del")?;
        self.inner.press_ctrl_alt_del(cancel)
    }
}

pub struct PointTransport(pub Arc<dyn Transport>, pub Arc<Points>);

impl Transport for PointTransport {
    fn wait_ready(&self, target: &Target, deadline: Instant, cancel: &Cancel) -> Result<()> {
        self.0.wait_ready(target, deadline, cancel)
    }
    fn exec(
        &self,
        target: &Target,
        spec: &ExecSpec,
        streams: Streams<'_>,
        cancel: &Cancel,
    ) -> Result<Exit> {
        self.1.pass("run a command in the guest")?;
        self.0.exec(target, spec, streams, cancel)
    }
}

pub struct PointCommands<C>(pub C, pub Arc<Points>);

impl<C: Commands> Commands for PointCommands<C> {
    fn run(
        &self,
        command: &Command,
        cancel: &Cancel,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Output> {
        self.1.pass("run a host command")?;
        self.0.run(command, cancel, on_line)
    }
}
