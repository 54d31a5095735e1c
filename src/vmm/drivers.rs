//! Combines all drivers into one. The configured driver starts new VMs. Each running VM is managed
//! by the driver that started it.

use super::console::Consoles;
use super::{
    Capabilities, Died, Driver, GuestEvent, Identity, Processes, Running, Tagged, Vm, VmRef,
    VmmSpec,
};
use crate::api::daemon::Check;
use crate::error::{Error, Kind, Result};
use crate::ids::Tag;
use crate::locks::Cancel;
use crate::sched::Instant;
use std::path::Path;
use std::sync::Arc;

pub struct Drivers {
    starts: Arc<dyn Driver>,
    /// All drivers, including `starts`.
    all: Vec<Arc<dyn Driver>>,
    /// The reason for the choice of `starts`, if the configuration left it open.
    choice: Option<Check>,
}

impl Drivers {
    pub fn new(starts: Arc<dyn Driver>, others: Vec<Arc<dyn Driver>>) -> Self {
        let all = std::iter::once(starts.clone()).chain(others).collect();
        Self {
            starts,
            all,
            choice: None,
        }
    }

    pub fn with_check(self, choice: Check) -> Self {
        Self {
            choice: Some(choice),
            ..self
        }
    }

    /// Returns the driver that started this process. Fails with `vmm_failed` if the process has
    /// exited.
    fn of(&self, identity: &Identity) -> Result<&dyn Driver> {
        let driver = self
            .all
            .iter()
            .find(|driver| driver.processes().runs(identity));
        driver.map(|d| &**d).ok_or_else(|| {
            Error::new(
                Kind::VmmFailed,
                format!("talk to the VMM {}: it has exited", identity.pid),
            )
        })
    }
}

impl Driver for Drivers {
    fn describe(&self) -> String {
        self.starts.describe()
    }

    fn capabilities(&self) -> Capabilities {
        self.starts.capabilities()
    }

    fn capabilities_of(&self, running: &Identity) -> Option<Capabilities> {
        self.of(running).ok().map(Driver::capabilities)
    }

    fn warm_up(&self, kernel: &Path, cancel: &Cancel) {
        self.starts.warm_up(kernel, cancel);
    }

    /// All drivers share the same consoles.
    fn consoles(&self) -> &Consoles {
        self.starts.consoles()
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
        self.starts.start(spec, cancel, spawned)
    }

    fn vm(&self, at: VmRef) -> Result<Box<dyn Vm + '_>> {
        self.of(&at.identity)?.vm(at)
    }

    fn can_load(&self, driver: &str, elsewhere: bool) -> Result<()> {
        self.starts.can_load(driver, elsewhere)
    }

    fn adopt(&self, spec: &VmmSpec, identity: &Identity) -> Result<Running> {
        self.of(identity)?.adopt(spec, identity)
    }

    fn watch_guest(
        &self,
        dir: &Path,
        identity: &Identity,
        on_event: Box<dyn Fn(GuestEvent) + Send>,
    ) -> Result<()> {
        // If the VMM has already exited, there are no events to report.
        self.of(identity)
            .map_or(Ok(()), |driver| driver.watch_guest(dir, identity, on_event))
    }

    fn clear(&self, dir: &Path, tag: &Tag) -> Result<()> {
        self.all
            .iter()
            .try_for_each(|driver| driver.clear(dir, tag))
    }

    fn remains(&self, vms: &Path, install: &str) -> Result<Vec<String>> {
        let mut tags = Vec::new();
        for driver in &self.all {
            tags.extend(driver.remains(vms, install)?);
        }
        Ok(tags)
    }

    fn checks(&self) -> Vec<Check> {
        self.choice
            .iter()
            .cloned()
            .chain(self.starts.checks())
            .collect()
    }
}

impl Processes for Drivers {
    fn find(&self, tag: &str) -> Result<Option<Identity>> {
        for driver in &self.all {
            if let Some(identity) = driver.processes().find(tag)? {
                return Ok(Some(identity));
            }
        }
        Ok(None)
    }

    fn list(&self, tag_prefix: &str) -> Result<Vec<Tagged>> {
        let mut all = Vec::new();
        for driver in &self.all {
            all.extend(driver.processes().list(tag_prefix)?);
        }
        Ok(all)
    }

    fn is_alive(&self, identity: &Identity) -> bool {
        self.starts.processes().is_alive(identity)
    }

    fn is_ours(&self, identity: &Identity, tag: &str) -> bool {
        self.all
            .iter()
            .any(|driver| driver.processes().is_ours(identity, tag))
    }

    fn runs(&self, identity: &Identity) -> bool {
        self.all
            .iter()
            .any(|driver| driver.processes().runs(identity))
    }

    fn wait_exit(&self, identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool> {
        self.starts
            .processes()
            .wait_exit(identity, deadline, cancel)
    }

    fn kill(&self, identity: &Identity, deadline: Instant) -> Result<()> {
        self.starts.processes().kill(identity, deadline)
    }

    fn watch(&self, dir: &Path, identity: &Identity, died: Died) -> Result<()> {
        // Each driver keeps the reasons that its own VMMs give for their end. If the VMM has
        // already exited, any driver reports that.
        let driver = self.of(identity).unwrap_or(&*self.starts);
        driver.processes().watch(dir, identity, died)
    }
}

#[cfg(all(test, feature = "fakes"))]
mod tests {
    use super::*;
    use crate::ids::VmId;
    use crate::vmm::End;
    use crate::vmm::fake::{Fake, spec};
    use std::sync::mpsc::channel;

    #[test]
    fn watch_of_other_drivers_vmm_reports_its_end() {
        crate::locks::may_block("file access");
        let (starts, other) = (
            Arc::new(Fake::new().unwrap()),
            Arc::new(Fake::new().unwrap()),
        );
        let dir = tempfile::tempdir().unwrap();
        let vm = VmId::random();
        let spec = spec(Tag::new("00000001", &vm, 1), dir.path());
        std::fs::create_dir_all(&spec.dir).unwrap();
        let cancel = Cancel::try_new().unwrap();
        let running = other.start(&spec, &cancel, &mut |_| {}).unwrap();
        let drivers = Drivers::new(starts, vec![other.clone()]);
        let (ended, ends) = channel();
        let died = Box::new(move |end| ended.send(end).unwrap());
        drivers.watch(&spec.dir, &running.identity, died).unwrap();
        assert!(other.die(&vm, &End::GuestShutDown));
        assert_eq!(ends.recv().unwrap(), End::GuestShutDown);
    }
}
