//! Tests of calls, reports and clean-ups that arrive at the worst moment: at the end of a boot,
//! when the VM has started again, or while something is being made.

use crate::recovery::exec;
use crate::world::*;
use fcd::testing::api::exec::ExecStart;
use fcd::testing::api::image::{ImageDelete, ImageRequest};
use fcd::testing::api::snapshot::*;
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::daemon::VmNames;
use fcd::testing::error::Kind;
use fcd::testing::vmm::fake::Stage;
use fcd::testing::vmm::{Exit, GuestEvent};

fn save(name: &str) -> SnapshotCreateRequest {
    SnapshotCreateRequest {
        vm: "web".into(),
        name: Some(name.parse().unwrap()),
    }
}

#[test]
fn reports_of_earlier_boot_are_ignored() {
    let world = World::new();
    world.points.keep_reports();
    let (vm, _) = world.running("web");
    world.stop("web").unwrap();
    await_that("the end of the first VMM is reported", || {
        world.points.has_late_end()
    });
    world.place(&vm.id);
    world.start("web").unwrap();
    let late = world.points.take_late();
    (late.guests[0].lock().unwrap())(GuestEvent::Unresponsive(true));
    late.ends.into_iter().for_each(|report| report());
    world.await_rest();
    let vm = world.show("web").unwrap();
    assert_eq!((vm.state, vm.unresponsive), (VmState::Running, false));
}

/// The clean-up after a dead VMM begins when the VM has been claimed by its next start.
#[test]
fn clean_up_of_earlier_boot_leaves_newer_one() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let gate = world.daemon().core.store.faults().gate();
    world.kill_vmm(&vm.id, Exit::Signal(9));
    assert!(gate.wait_for_writer(soon()));
    world.await_change(|s| s.vm(&vm.id).is_some_and(|r| r.state == VmState::Failed));
    world.place(&vm.id);
    let mut start = world.begin::<VmStart>(request("web"), vec![]);
    world.await_change(|s| s.vm(&vm.id).is_some_and(|r| r.state == VmState::Starting));
    drop(gate);
    assert_eq!(start.finish(SOON).unwrap().vm.state, VmState::Running);
    world.await_rest();
    assert_eq!(world.vmms_in_ledger(&vm), [2]);
}

#[test]
fn death_of_vmm_releases_its_resources() {
    let world = World::new();
    let (vm, _) = world.running("web");
    assert_eq!(world.vmms_in_ledger(&vm), [1]);
    world.kill_vmm(&vm.id, Exit::Signal(9));
    world.await_state("web", VmState::Failed);
    world.await_rest();
    assert_eq!(world.vmms_in_ledger(&vm), [0u64; 0]);
}

#[test]
fn resource_that_could_not_be_released_stays_in_ledger() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.points.refuse("kill");
    assert!(world.run::<VmKill>(request("web")).is_err());
    assert_eq!(world.state("web"), VmState::Failed);
    // A sweep leaves everything that the VMM may use.
    let former_disks = world.daemon().core.store.change_durable(|tx| {
        Ok(tx.intend(
            Some(&vm.id),
            1,
            "replaced_disks",
            format!("fc-{}-{}-1", world.daemon().core.store.install_id(), vm.id),
        ))
    });
    world.points.refuse("kill");
    world.daemon().reconciler.sweep_once();
    assert_eq!(world.vmms_in_ledger(&vm), [1]);
    assert_eq!(world.vmm.live().len(), 1);
    let is_listed = |id: u64| {
        world
            .daemon()
            .core
            .store
            .read(|s| s.ledger_row(id).is_some())
    };
    let former_disks = former_disks.unwrap();
    assert!(is_listed(former_disks));
    world.daemon().reconciler.sweep_once();
    assert_eq!(world.vmms_in_ledger(&vm), [0u64; 0]);
    assert!(world.vmm.live().is_empty() && !is_listed(former_disks));
}

#[test]
fn sweep_leaves_snapshot_that_is_being_made() {
    let world = World::new();
    world.running("web");
    world.vmm.hold_starts(Stage::Save);
    let mut saving = world.begin::<SnapshotCreate>(save("one"), vec![]);
    assert!(world.vmm.await_held(1, soon()));
    let before = world.census();
    world.daemon().reconciler.sweep_once();
    assert_eq!(world.census(), before);
    world.vmm.release_starts();
    saving.finish(SOON).unwrap();
}

/// The variables of a VM are written before its row.
#[test]
fn sweep_leaves_directory_of_vm_that_is_being_created() {
    let world = World::new();
    let create = VmCreateRequest {
        env: vec![("TOKEN".into(), "secret".into())],
        ..named("web")
    };
    let mut creating = while_creating(&world, || {
        let creating = world.begin::<VmCreate>(create, vec![]);
        await_creates(&world, 1);
        let before = world.census();
        world.daemon().reconciler.sweep_once();
        assert_eq!(world.census(), before);
        creating
    });
    creating.finish(SOON).unwrap();
}

#[test]
fn silence_of_vmm_that_saves_its_guest_is_expected() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.vmm.hold_starts(Stage::Save);
    let mut saving = world.begin::<SnapshotCreate>(save("one"), vec![]);
    assert!(world.vmm.await_held(1, soon()));
    let threads = world.daemon().core.thread_count();
    assert!(world.vmm.report(&vm.id, GuestEvent::Unresponsive(true)));
    await_that("the report has been handled", || {
        world.daemon().core.thread_count() == threads
    });
    assert!(!world.show("web").unwrap().unresponsive);
    world.vmm.release_starts();
    saving.finish(SOON).unwrap();
}

#[test]
fn guest_that_could_not_be_resumed_after_save_is_resumed_later() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.points.refuse("resume");
    world.run::<SnapshotCreate>(save("one")).unwrap();
    await_that("the guest is resumed", || !world.vmm.is_paused(&vm.id));
    world.await_rest();
}

#[test]
fn refused_pause_is_undone() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.points.refuse("pause");
    let e = world.call::<VmPause>(&request("web")).unwrap_err();
    assert!(e.is(Kind::VmmFailed), "{e:?}");
    assert!(!world.show("web").unwrap().paused && !world.vmm.is_paused(&vm.id));
}

/// The call begins before the daemon has recorded the end of the VMM.
#[test]
fn call_on_vm_whose_vmm_has_just_died_is_refused() {
    let world = World::new();
    world.points.keep_reports();
    let (vm, _) = world.running("web");
    world.kill_vmm(&vm.id, Exit::Signal(9));
    let e = world.run::<ExecStart>(exec("web", "true")).unwrap_err();
    assert!(
        e.is(Kind::GuestUnavailable) && e.fault.message.contains("its VMM has died"),
        "{e:?}"
    );
    await_that("the end of the VMM is reported", || {
        world.points.has_late_end()
    });
    let late = world.points.take_late();
    late.ends.into_iter().for_each(|report| report());
    world.await_state("web", VmState::Failed);
    world.await_rest();
}

/// The deletion of the new VM begins after its boot and before the fork keeps it.
#[test]
fn fork_whose_deletion_has_begun_is_not_kept() {
    let world = World::new();
    world.running("web");
    // The boot removes the former disks last.
    world.points.hold("release a resource");
    let fork = VmForkRequest {
        vm: "web".into(),
        name: Some("twin".parse().unwrap()),
        ..Default::default()
    };
    let mut fork = world.begin::<VmFork>(fork, vec![]);
    await_that("the boot is complete", || world.points.is_holding());
    let twin = world.show("twin").unwrap();
    let mut deleted = while_locked(&world, &twin, || {
        world.points.release();
        world.await_waiters(1);
        world.points.hold("kill the VMM");
        let deleted = world.begin::<VmDelete>(delete("twin"), vec![]);
        world.await_waiters(2);
        deleted
    });
    let e = fork.finish(SOON).unwrap_err();
    assert!(e.is(Kind::Superseded), "{e:?}");
    await_that("the VMM is being killed", || world.points.is_holding());
    world.points.release();
    deleted.finish(SOON).unwrap();
    world.await_rest();
}

/// The guest is resumed while its VMM still handles the pause.
#[test]
fn pause_that_takes_long_does_not_outlast_resume() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.points.hold("pause");
    let mut pause = world.begin::<VmPause>(request("web"), vec![]);
    await_that("the VMM handles the pause", || world.points.is_holding());
    world.call::<VmResume>(&request("web")).unwrap();
    world.points.release();
    pause.finish(SOON).unwrap();
    assert!(!world.show("web").unwrap().paused && !world.vmm.is_paused(&vm.id));
}

/// The image is deleted after a create has found it and before the new VM's row names it.
#[test]
fn image_of_vm_that_is_being_created_is_not_deleted() {
    let world = World::new();
    let image = || ImageRequest {
        image: "default".parse().unwrap(),
    };
    let mut creating = while_creating(&world, || {
        let creating = world.begin::<VmCreate>(named("web"), vec![]);
        await_creates(&world, 1);
        let e = world.call::<ImageDelete>(&image()).unwrap_err();
        assert!(e.is(Kind::Busy), "{e:?}");
        creating
    });
    creating.finish(SOON).unwrap();
}

/// Both creates look for the port before one of them takes it.
#[test]
fn port_is_given_to_one_of_two_creates() {
    let world = World::new();
    let port = |name| VmCreateRequest {
        ports: vec![serde_json::from_str(r#"{"host_port": 9123, "guest_port": 80}"#).unwrap()],
        ..named(name)
    };
    let creating = while_creating(&world, || {
        let creating = ["a", "b"].map(|name| world.begin::<VmCreate>(port(name), vec![]));
        await_creates(&world, 2);
        creating
    });
    let results = creating.map(|mut creating| creating.finish(SOON));
    let refused: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    assert!(
        refused.len() == 1 && refused[0].is(Kind::PortTaken),
        "{refused:?}"
    );
}

fn named(name: &str) -> VmCreateRequest {
    VmCreateRequest {
        name: Some(name.parse().unwrap()),
        ..Default::default()
    }
}

/// Runs `body` while no VM's row can be created.
fn while_creating<T>(world: &World, body: impl FnOnce() -> T) -> T {
    let names = &world.daemon().core.locks.create_vm;
    while_held(|| names.lock(&VmNames), body)
}

fn await_creates(world: &World, n: usize) {
    await_that("the creates wait for the lock of the names", || {
        let records = world.daemon().core.locks.create_vm.records();
        records.iter().any(|record| record.waiters.len() == n)
    });
}

/// The stop arrives when the guest has answered and before the boot is committed.
#[test]
fn stop_at_the_end_of_a_boot_ends_the_vm() {
    let (world, mut start, _) = at_the_end_of_a_boot();
    let mut stop = world.begin::<VmStop>(stop("web"), vec![]);
    stop.op();
    world.points.release();
    cancelled_by_stop(start.finish(SOON));
    assert_eq!(stop.finish(SOON).unwrap().vm.state, VmState::Stopped);
    assert!(world.vmm.live().is_empty());
}

/// The VMM dies when the guest has answered. Its death is recorded just before the boot is
/// committed.
#[test]
fn death_at_the_end_of_a_boot_fails_the_start() {
    let (world, mut start, vm) = at_the_end_of_a_boot();
    while_locked(&world, &vm, || {
        world.kill_vmm(&vm.id, Exit::Signal(11));
        world.await_waiters(1);
        world.points.release();
        world.await_waiters(2);
    });
    let e = start.finish(SOON).unwrap_err();
    assert!(
        e.is(Kind::VmmFailed) && e.fault.message.contains("SIGSEGV"),
        "{e:?}"
    );
    world.await_rest();
    assert_eq!(world.state("web"), VmState::Failed);
    assert_eq!(world.vmms_in_ledger(&vm), [0u64; 0]);
}

/// A stop has aborted the boot when the VMM dies, so the death is not the cause.
#[test]
fn death_after_a_stop_is_not_the_cause() {
    let (world, mut start, vm) = at_the_end_of_a_boot();
    let mut stop = world.begin::<VmStop>(stop("web"), vec![]);
    stop.op();
    while_locked(&world, &vm, || {
        world.kill_vmm(&vm.id, Exit::Signal(11));
        world.await_waiters(1);
        world.points.release();
    });
    cancelled_by_stop(start.finish(SOON));
    let stopped = stop.finish(SOON).unwrap().vm;
    assert_eq!((stopped.state, stopped.reason), (VmState::Stopped, None));
}

/// Starts a VM, and holds the boot when the guest has answered.
fn at_the_end_of_a_boot() -> (World, Running<VmReply>, Vm) {
    let world = World::new();
    let vm = world.create("web");
    world.place(&vm.id);
    world.points.hold("the guest is ready");
    let start = world.begin::<VmStart>(request("web"), vec![]);
    await_that("the guest is ready", || world.points.is_holding());
    (world, start, vm)
}

#[track_caller]
fn cancelled_by_stop(start: Result<VmReply, Failure>) {
    let e = start.unwrap_err();
    assert!(
        e.is(Kind::Cancelled) && e.fault.message.contains("the VM was stopped"),
        "{e:?}"
    );
}
