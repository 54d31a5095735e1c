//! Tests with a guest or a disk that breaks under a running daemon.

use super::{create, exec, refused};
use crate::world::*;
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::WorkspacePrepare;
use fcd::testing::client::Failure;
use fcd::testing::error::{Code, Kind};
use fcd::testing::guest::fake::Readiness;
use fcd::testing::store::faults::Fault;

#[test]
fn dead_or_replaced_guest_is_reported() {
    let world = World::new();
    let (_, addr) = world.running("web");
    world.guest.set_unreachable(addr, true);
    let e = exec(&world, "web", vec![], vec![]).unwrap_err();
    assert!(
        e.is(Kind::GuestUnavailable) && e.fault.message.contains("exec in VM web"),
        "{e:?}"
    );
    let (read, _write) = pipe();
    let e = world
        .begin::<WorkspacePrepare>(prepare("web"), vec![read])
        .finish(SOON)
        .unwrap_err();
    assert!(
        e.is(Kind::GuestUnavailable) && e.code() == Code::GuestUnavailable,
        "{e:?}"
    );
    // The guest cannot be asked to shut down, and the stop reports that.
    assert_eq!(world.stop("web").unwrap().synced, Some(Synced::Timeout));
    world.guest.set_unreachable(addr, false);
    world.guest.set_readiness(
        addr,
        Readiness::Fails(Kind::HostKeyMismatch, "another host key".into()),
    );
    let e = world.start("web").unwrap_err();
    assert!(e.is(Kind::HostKeyMismatch), "{e:?}");
    assert_eq!(world.state("web"), VmState::Failed);
    assert!(world.vmm.live().is_empty());
    world.await_rest();
}

/// The disk reserve lets kill and delete succeed. Every other change is refused and undone.
#[test]
fn full_disk_allows_kill_and_delete() {
    let world = World::new();
    world.running("web");
    world.running("other");
    let faults = || world.daemon().core.store.faults();
    let refill = || {
        faults().heal();
        assert!(world.daemon().core.store.wait_writable(soon()));
    };
    type Call<'a> = &'a dyn Fn() -> Result<(), Failure>;
    let calls: [Call<'_>; 5] = [
        &|| world.call::<VmCreate>(&create(|_| {})).map(|_| ()),
        &|| world.stop("web").map(|_| ()),
        &|| {
            world
                .call::<VmSet>(&VmSetRequest {
                    vm: "web".into(),
                    vcpus: Some(2),
                    ..Default::default()
                })
                .map(|_| ())
        },
        &|| world.run::<VmRestart>(stop("web")).map(|_| ()),
        &|| {
            let (read, _write) = pipe();
            world
                .begin::<WorkspacePrepare>(prepare("web"), vec![read])
                .finish(SOON)
                .map(|_| ())
        },
    ];
    for call in calls {
        faults().fail(Fault::DiskFull, 1);
        refused(&world, Kind::DiskFull, call);
        refill();
    }
    faults().fail(Fault::DiskFull, 1);
    assert_eq!(
        world.run::<VmKill>(request("web")).unwrap().vm.state,
        VmState::Stopped
    );
    refill();
    faults().fail(Fault::DiskFull, 1);
    world.delete("web").unwrap();
    refill();
    // A refused start leaves the VM unchanged.
    world.stop("other").unwrap();
    faults().fail(Fault::DiskFull, 1);
    refused(&world, Kind::DiskFull, || world.start("other"));
    refill();
    world.start("other").unwrap();
}

/// The disk accepts no writes. Kill still ends the VMM, and the result is recorded once the disk
/// works again.
#[test]
fn broken_disk_allows_kill() {
    let world = World::new();
    world.running("web");
    world.daemon().core.store.faults().fail(Fault::Io, u64::MAX);
    refused(&world, Kind::StoreReadOnly, || world.stop("web"));
    refused(&world, Kind::StoreReadOnly, || world.delete("web"));
    assert_eq!(world.state("web"), VmState::Running);
    assert_eq!(world.vmm.live().len(), 1);
    let e = world.run::<VmKill>(request("web")).unwrap_err();
    assert!(
        e.code() == Code::Host && e.fault.message.contains("was killed"),
        "{e:?}"
    );
    assert!(world.vmm.live().is_empty());
    world.daemon().core.store.faults().heal();
    assert!(world.daemon().core.store.wait_writable(soon()));
    world.await_state("web", VmState::Failed);
    world.start("web").unwrap();
}

/// The guest has already stopped when the commit fails. The commit is retried until the disk works.
#[test]
fn stop_commit_is_retried_until_disk_works() {
    for fault in [
        Fault::DiskFull,
        Fault::Io,
        Fault::IoAfterCommit,
        Fault::Panic,
    ] {
        let world = World::new();
        let (vm, _) = world.running("web");
        world.guest.on(fcd::testing::image::SHUTDOWN_COMMAND, |_| {
            fcd::testing::guest::fake::Answer::status(0).stdout("synced\n")
        });
        let mut down = world.begin::<VmStop>(stop("web"), vec![]);
        down.stage("sync and shut down");
        world.daemon().core.store.faults().fail(fault, 3);
        assert!(
            world
                .vmm
                .die(&vm.id, &fcd::testing::vmm::End::GuestShutDown)
        );
        assert_eq!(
            down.finish(SOON).unwrap().vm.state,
            VmState::Stopped,
            "{fault:?}"
        );
        world.await_rest();
    }
}
