//! Tests of panics in a request, in a job and in an operation's thread. No VM stays `starting`, no
//! lock stays held, and the daemon keeps serving.

use crate::points::HookedVm;
use crate::world::*;
use fcd::testing::api::Empty;
use fcd::testing::api::daemon::{Check, Doctor, Info, Leaks, LeaksRequest};
use fcd::testing::api::snapshot::*;
use fcd::testing::api::vm::*;
use fcd::testing::error::{Kind, Result};
use fcd::testing::ids::Tag;
use fcd::testing::locks::Cancel;
use fcd::testing::vmm::console::Consoles;
use fcd::testing::vmm::fake::Fake;
use fcd::testing::vmm::{
    self, Capabilities, Driver, GuestEvent, Identity, Processes, Running, Tagged, VmRef, VmmSpec,
};
use fcd::testing::workspace::remote::{self, GuestWorkspace};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// A driver that wraps the fake and panics once in one method.
struct Panics {
    inner: Arc<Fake>,
    at: Mutex<Option<&'static str>>,
}

impl Panics {
    fn pass(&self, method: &'static str) {
        let mut at = self.at.lock().unwrap();
        if *at == Some(method) {
            *at = None;
            drop(at);
            panic!("a panic of the test in {method}");
        }
    }
    fn at(&self, method: &'static str) {
        *self.at.lock().unwrap() = Some(method);
    }
}

impl Driver for Panics {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    fn warm_up(&self, kernel: &Path, cancel: &Cancel) {
        self.inner.warm_up(kernel, cancel);
    }
    fn consoles(&self) -> &Consoles {
        self.inner.consoles()
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
        self.pass("start");
        let running = self.inner.start(spec, cancel, spawned)?;
        self.pass("started");
        Ok(running)
    }
    fn adopt(&self, spec: &VmmSpec, identity: &Identity) -> Result<Running> {
        self.inner.adopt(spec, identity)
    }
    fn clear(&self, dir: &Path, tag: &Tag) -> Result<()> {
        self.inner.clear(dir, tag)
    }
    fn remains(&self, vms: &Path, install: &str) -> Result<Vec<String>> {
        self.inner.remains(vms, install)
    }
    fn watch_guest(
        &self,
        dir: &Path,
        identity: &Identity,
        told: Box<dyn Fn(GuestEvent) + Send>,
    ) -> Result<()> {
        self.inner.watch_guest(dir, identity, told)
    }
    fn vm(&self, at: VmRef) -> Result<Box<dyn vmm::Vm + '_>> {
        Ok(Box::new(HookedVm {
            inner: self.inner.vm(at)?,
            before: Box::new(|method| {
                self.pass(method);
                Ok(())
            }),
        }))
    }
    fn can_load(&self, driver: &str, elsewhere: bool) -> Result<()> {
        self.inner.can_load(driver, elsewhere)
    }
    fn checks(&self) -> Vec<Check> {
        self.pass("checks");
        self.inner.checks()
    }
}

impl Processes for Panics {
    fn find(&self, tag: &str) -> Result<Option<Identity>> {
        self.inner.processes().find(tag)
    }

    fn list(&self, tag_prefix: &str) -> Result<Vec<Tagged>> {
        self.inner.processes().list(tag_prefix)
    }

    fn is_alive(&self, identity: &Identity) -> bool {
        self.inner.processes().is_alive(identity)
    }

    fn is_ours(&self, identity: &Identity, tag: &str) -> bool {
        self.inner.processes().is_ours(identity, tag)
    }

    fn runs(&self, identity: &Identity) -> bool {
        self.inner.processes().runs(identity)
    }

    fn wait_exit(&self, identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool> {
        self.inner.processes().wait_exit(identity, deadline, cancel)
    }

    fn kill(&self, identity: &Identity, deadline: Instant) -> Result<()> {
        self.pass("kill");
        self.inner.processes().kill(identity, deadline)
    }

    fn watch(&self, dir: &Path, identity: &Identity, died: fcd::testing::vmm::Died) -> Result<()> {
        self.inner.processes().watch(dir, identity, died)
    }
}

fn world() -> (World, Arc<Panics>) {
    let mut driver = None;
    let world = World::with_driver(
        |inner| {
            driver
                .insert(Arc::new(Panics {
                    inner,
                    at: Mutex::default(),
                }))
                .clone()
        },
        |_| {},
    );
    (world, driver.unwrap())
}

#[test]
fn panic_in_request_is_internal_error() {
    let (world, driver) = world();
    driver.at("checks");
    let mut client = world.client();
    let e = client.call::<Doctor>(&Empty {}).unwrap_err();
    assert!(e.is(Kind::Internal) && e.fault.hint.is_some(), "{e:?}");
    // The same connection still works.
    client.call::<Info>(&Empty {}).unwrap();
    client.call::<Doctor>(&Empty {}).unwrap();
}

#[test]
fn panic_in_boot_fails_vm() {
    for at in ["start", "started"] {
        let (world, driver) = world();
        world.create("web");
        driver.at(at);
        let e = world.start("web").unwrap_err();
        assert!(e.is(Kind::Internal) && e.fault.hint.is_some(), "{e:?}");
        let vm = world.await_state("web", VmState::Failed);
        assert!(vm.reason.is_some() && vm.op.is_none());
        assert!(world.vmm.live().is_empty());
        world.await_rest();
        assert_eq!(world.vmms_in_ledger(&vm), [0u64; 0]);
        assert_eq!(world.start("web").unwrap().state, VmState::Running);
    }
}

#[test]
fn panic_in_stop_and_delete_fails_vm() {
    let (world, driver) = world();
    world.running("web");
    driver.at("kill");
    world.guest.on(fcd::testing::image::SHUTDOWN_COMMAND, |_| {
        panic!("a panic of the test in the shutdown")
    });
    assert!(world.stop("web").unwrap_err().is(Kind::Internal));
    world.await_state("web", VmState::Failed);
    world.await_rest();
    driver.at("");
    world.start("web").unwrap();
    driver.at("kill");
    assert!(world.delete("web").unwrap_err().is(Kind::Internal));
    world.await_state("web", VmState::Failed);
    world.await_rest();
    assert!(world.vmm.live().is_empty());
    world.delete("web").unwrap();
}

#[test]
fn panic_is_reported_to_successor() {
    let (world, _) = world();
    world.running("web");
    let (let_panic, may_panic) = std::sync::mpsc::channel::<()>();
    let may_panic = Mutex::new(may_panic);
    world
        .guest
        .on(fcd::testing::image::SHUTDOWN_COMMAND, move |_| {
            let _ = may_panic.lock().unwrap().recv();
            panic!("a panic of the test in the shutdown")
        });
    let mut stop = world.begin::<VmStop>(stop("web"), vec![]);
    stop.stage("sync and shut down");
    let successor = VmDeleteRequest {
        force: false,
        ..delete("web")
    };
    let mut gone = world.begin::<VmDelete>(successor, vec![]);
    gone.op();
    drop(let_panic);
    assert!(stop.finish(SOON).unwrap_err().is(Kind::Internal));
    let e = gone.finish(SOON).unwrap_err();
    assert!(
        e.is(Kind::Internal) && e.fault.message.contains("an earlier operation"),
        "{e:?}"
    );
    world.await_rest();
    assert!(world.vmm.live().is_empty());
}

#[test]
fn panic_of_rm_vm_still_removes_it() {
    let (world, driver) = world();
    let request_ = VmCreateRequest {
        name: Some("web".parse().unwrap()),
        rm: true,
        ..Default::default()
    };
    world.call::<VmCreate>(&request_).unwrap();
    driver.at("start");
    assert!(world.start("web").unwrap_err().is(Kind::Internal));
    world.await_gone("web");
    world.await_rest();
}

#[test]
fn panic_in_job_frees_worker() {
    let (world, _) = world();
    world.running("web");
    world.guest.on(
        &remote::receive_command(&GuestWorkspace::new(GUEST_PATH), false),
        |_| panic!("a panic of the test in a job"),
    );
    for _ in 0..4 {
        let Import { mut call, stream } = world.import("web");
        write_payload(stream, b"x");
        let e = call.finish(SOON).unwrap_err();
        assert!(e.is(Kind::Internal), "{e:?}");
    }
    world.await_rest();
    assert_eq!(
        world.workspace_state("web"),
        Some(WorkspaceState::Incomplete)
    );
    assert_eq!(world.stop("web").unwrap().state, VmState::Stopped);
}

/// After the panic the guest is resumed and the incomplete snapshot is deleted.
#[test]
fn panic_in_snapshot_resumes_guest() {
    let (world, driver) = world();
    let (vm, _) = world.running("web");
    driver.at("save");
    let e = world
        .run::<SnapshotCreate>(SnapshotCreateRequest {
            vm: "web".into(),
            name: None,
        })
        .unwrap_err();
    assert!(e.is(Kind::Internal), "{e:?}");
    world.await_rest();
    assert!(!world.vmm.is_paused(&vm.id));
    let leaks = world
        .call::<Leaks>(&LeaksRequest { fix: true })
        .unwrap()
        .leaks;
    assert!(leaks.len() == 1 && leaks[0].removed, "{leaks:?}");
    world
        .run::<SnapshotCreate>(SnapshotCreateRequest {
            vm: "web".into(),
            name: None,
        })
        .unwrap();
}
