//! The fakes of a daemon with a point before each of their effects.

use super::{Mode, Points, dead};
use fcd::testing::api::daemon::Check;
use fcd::testing::api::exec::Exit;
use fcd::testing::api::port::Port;
use fcd::testing::error::Result;
use fcd::testing::guest::{ExecSpec, Streams, Target, Transport};
use fcd::testing::host::{Command, Commands, command::Output};
use fcd::testing::ids::Tag;
use fcd::testing::locks::Cancel;
use fcd::testing::sched::Instant;
use fcd::testing::vmm::console::Consoles;
use fcd::testing::vmm::{
    Capabilities, Died, Driver, GuestEvent, Identity, Processes, Running, SaveTo, Tagged, Vm,
    VmRef, VmmSpec,
};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

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
        self.0.watch_guest(dir, identity, self.1.guest_report(told))
    }
    fn vm(&self, at: VmRef) -> Result<Box<dyn Vm + '_>> {
        Ok(Box::new(HookedVm {
            inner: self.0.vm(at)?,
            before: Box::new(|method| match method {
                "set_rates" => self.1.pass("limit the guest's devices"),
                "set_balloon" => self.1.pass("set the balloon"),
                "forward" => self.1.pass("change the ports"),
                "press_ctrl_alt_del" => self.1.pass("press the keys"),
                method => self.1.may_call(method),
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
        self.1.is_refused("kill")?;
        self.0.processes().kill(identity, deadline)
    }

    fn watch(&self, dir: &Path, identity: &Identity, died: Died) -> Result<()> {
        let died = Points::end_report(&self.1, died);
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
        self.0.wait_ready(target, deadline, cancel)?;
        self.1.wait_if_held("the guest is ready");
        Ok(())
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
