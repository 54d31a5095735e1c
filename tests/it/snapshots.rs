//! Tests of snapshots, restores and forks over the socket: who may use them and when, and what
//! remains after a failure or a stop.

use crate::world::*;
use fcd::testing::api::op::{OpCancel, OpRequest};
use fcd::testing::api::snapshot::*;
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::daemon::Caller;
use fcd::testing::error::Kind;
use fcd::testing::guest::fake::Answer;
use fcd::testing::vmm::fake::Stage;

fn save(vm: &str, name: &str) -> SnapshotCreateRequest {
    SnapshotCreateRequest {
        vm: vm.into(),
        name: Some(name.parse().unwrap()),
    }
}

fn create(world: &World, vm: &str, name: &str) -> Result<Snapshot, Failure> {
    world
        .run::<SnapshotCreate>(save(vm, name))
        .map(|r| r.snapshot)
}

fn restore(world: &World, snapshot: &str, new_vm: Option<&str>) -> Result<Vm, Failure> {
    let new_vm = new_vm.map(|name| name.parse().unwrap());
    world
        .run::<SnapshotRestore>(SnapshotRestoreRequest {
            snapshot: snapshot.into(),
            new_vm,
        })
        .map(|r| r.vm)
}

fn fork(world: &World, vm: &str, name: &str) -> Result<Vm, Failure> {
    world
        .run::<VmFork>(VmForkRequest {
            vm: vm.into(),
            name: Some(name.parse().unwrap()),
            ..Default::default()
        })
        .map(|r| r.vm)
}

fn list(world: &World) -> Vec<String> {
    let all = world
        .call::<SnapshotList>(&SnapshotListRequest::default())
        .unwrap()
        .snapshots;
    all.into_iter().map(|s| s.name.to_string()).collect()
}

#[test]
fn snapshot_is_created_shown_restored_and_deleted() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.import_all("web");
    let workspace = world.show("web").unwrap().workspace.unwrap();
    let made = create(&world, "web", "one").unwrap();
    assert_eq!(
        (&made.vm, made.vm_name.as_str(), made.driver.as_str()),
        (&vm.id, "web", "fake")
    );
    let unnamed = world
        .run::<SnapshotCreate>(SnapshotCreateRequest {
            vm: "web".into(),
            name: None,
        })
        .unwrap()
        .snapshot;
    assert_eq!(unnamed.name.as_str(), "web-1");
    assert!(!world.vmm.is_paused(&vm.id));
    for text in ["one", made.id.as_str(), &made.id.as_str()[..11]] {
        let found = world
            .call::<SnapshotShow>(&SnapshotRequest {
                snapshot: text.into(),
            })
            .unwrap()
            .snapshot;
        assert_eq!(found, made, "{text}");
    }
    let of = |vm: &str| {
        world.call::<SnapshotList>(&SnapshotListRequest {
            vm: Some(vm.into()),
            ..Default::default()
        })
    };
    assert_eq!(of("web").unwrap().snapshots.len(), 2);
    assert!(of("other").unwrap_err().is(Kind::VmNotFound));
    // The snapshot exists only for its owner and root.
    let stranger = Caller {
        uid: 4_000_000,
        gid: 0,
        pid: 0,
    };
    assert_eq!(
        world
            .daemon()
            .snapshots
            .snapshot_show(&stranger, "one")
            .unwrap_err()
            .kind(),
        Kind::SnapshotNotFound
    );
    assert_eq!(
        world
            .daemon()
            .snapshots
            .snapshot_delete(&stranger, "one")
            .unwrap_err()
            .kind(),
        Kind::SnapshotNotFound
    );
    assert!(
        world
            .daemon()
            .snapshots
            .snapshot_list(&stranger, &SnapshotListRequest::default())
            .unwrap()
            .snapshots
            .is_empty()
    );

    // A restore also restores the VM's settings at the time of the snapshot, and drops a pending
    // change of memory.
    world
        .call::<VmSet>(&VmSetRequest {
            vm: "web".into(),
            mem_mib: Some(2048),
            ..Default::default()
        })
        .unwrap();
    assert!(
        restore(&world, "one", None)
            .unwrap_err()
            .is(Kind::WrongState)
    );
    world.stop("web").unwrap();
    let back = restore(&world, "one", None).unwrap();
    assert_eq!(
        (&back.id, back.state, back.mem_mib, &back.workspace),
        (&vm.id, VmState::Running, 1024, &Some(workspace))
    );
    let spec = world.vmm.last_spec(&vm.id).unwrap();
    assert_eq!(spec.saved.unwrap().driver, "fake");
    // The next start boots the VM normally.
    world.stop("web").unwrap();
    world.start("web").unwrap();
    assert_eq!(world.vmm.last_spec(&vm.id).unwrap().saved, None);

    world.delete("web").unwrap();
    let e = restore(&world, "one", None).unwrap_err();
    assert!(
        e.is(Kind::VmNotFound) && e.fault.hint.as_ref().is_some_and(|h| h.contains("--as")),
        "{e:?}"
    );
    let other = restore(&world, "one", Some("other")).unwrap();
    assert!(
        other.id != vm.id && other.state == VmState::Running && !other.rm,
        "{other:?}"
    );
    for name in ["one", "web-1"] {
        world
            .call::<SnapshotDelete>(&SnapshotRequest {
                snapshot: name.into(),
            })
            .unwrap();
    }
    assert_eq!(list(&world), [""; 0]);
    assert_eq!(
        std::fs::read_dir(world.config.state_dir.join("snapshots"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(world.state("other"), VmState::Running);
}

#[test]
fn snapshots_survive_daemon_restart() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    let made = create(&world, "web", "one").unwrap();
    world.reopen();
    world.daemon().reconciler.reconcile();
    assert_eq!(
        world
            .call::<SnapshotShow>(&SnapshotRequest {
                snapshot: "one".into()
            })
            .unwrap()
            .snapshot,
        made
    );
    world.stop("web").unwrap();
    assert_eq!(restore(&world, "one", None).unwrap().id, vm.id);
}

/// The stop arrives while the guest is paused for a save.
#[test]
fn stop_during_save_ends_guest_immediately() {
    let world = World::new();
    let empty = world.census();
    for force in [false, true] {
        let (vm, _) = world.running("web");
        world.vmm.hold_starts(Stage::Save);
        let mut saving = world.begin::<SnapshotCreate>(save("web", "one"), vec![]);
        assert!(world.vmm.await_held(1, soon()));
        assert!(world.vmm.is_paused(&vm.id));
        // A resume must wait until the save ends, because the saved state must be of one moment.
        world.call::<VmResume>(&request("web")).unwrap();
        assert!(world.vmm.is_paused(&vm.id));
        assert!(create(&world, "web", "two").unwrap_err().is(Kind::Busy));
        let stopped = world
            .run::<VmStop>(VmStopRequest {
                force,
                ..stop("web")
            })
            .unwrap()
            .vm;
        assert_eq!(stopped.state, VmState::Stopped);
        let e = saving.finish(SOON).unwrap_err();
        assert!(
            e.is(Kind::Cancelled) && e.fault.message.contains("the VM was stopped"),
            "{e:?}"
        );
        world.vmm.release_starts();
        assert_eq!(list(&world), [""; 0]);
        world.delete("web").unwrap();
        world.await_rest();
        assert_eq!(world.census(), empty);
    }
}

#[test]
fn guest_is_resumed_after_save_or_failure() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.vmm.hold_starts(Stage::Save);
    let mut saving = world.begin::<SnapshotCreate>(save("web", "one"), vec![]);
    assert!(world.vmm.await_held(1, soon()));
    // The owner pauses the guest during the save, so the guest stays paused.
    world.call::<VmPause>(&request("web")).unwrap();
    world.vmm.release_starts();
    saving.finish(SOON).unwrap();
    assert!(world.vmm.is_paused(&vm.id));
    assert!(
        create(&world, "web", "two")
            .unwrap_err()
            .is(Kind::WrongState),
        "a paused guest cannot prepare itself"
    );
    world.call::<VmResume>(&request("web")).unwrap();
    assert!(!world.vmm.is_paused(&vm.id));

    world.vmm.hold_starts(Stage::Save);
    let mut saving = world.begin::<SnapshotCreate>(save("web", "two"), vec![]);
    assert!(world.vmm.await_held(1, soon()));
    let op = saving.note(|n| {
        if let fcd::testing::api::frame::Note::Op { op } = n {
            Some(op.clone())
        } else {
            None
        }
    });
    world
        .call::<OpCancel>(&OpRequest { op: op.to_string() })
        .unwrap();
    assert!(saving.finish(SOON).unwrap_err().is(Kind::Cancelled));
    world.vmm.release_starts();
    assert!(!world.vmm.is_paused(&vm.id));
    assert_eq!(list(&world), ["one"]);
}

#[test]
fn snapshot_of_unprepared_guest_does_not_pause_it() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.await_rest();
    let before = world.census();
    world.guest.on("/usr/lib/fcd/busybox sh -c", |_| {
        Answer::status(1).stderr("no such thing")
    });
    let e = create(&world, "web", "one").unwrap_err();
    assert!(
        e.is(Kind::GuestCommandFailed) && e.fault.message.contains("no such thing"),
        "{e:?}"
    );
    assert!(!world.vmm.is_paused(&vm.id));
    assert!(
        fork(&world, "web", "twin")
            .unwrap_err()
            .is(Kind::GuestCommandFailed)
    );
    world.await_gone("twin");
    world.await_rest();
    assert_eq!(world.census(), before);
}

#[test]
fn fork_is_complete_or_absent() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let before = world.census();
    assert!(fork(&world, "web", "web").unwrap_err().is(Kind::NameTaken));
    assert!(
        fork(&world, "nobody", "twin")
            .unwrap_err()
            .is(Kind::VmNotFound)
    );
    world.vmm.fail_next_start("no such machine");
    let e = fork(&world, "web", "twin").unwrap_err();
    assert!(
        e.is(Kind::VmmFailed) && e.fault.message.contains("no such machine"),
        "{e:?}"
    );
    world.await_gone("twin");
    world.await_rest();
    assert_eq!(world.census(), before);

    // A cancellation at any stage leaves nothing behind.
    for stage in [Stage::Save, Stage::BeforeSpawn, Stage::AfterSpawn] {
        world.vmm.hold_starts(stage);
        let mut forking = world.begin::<VmFork>(
            VmForkRequest {
                vm: "web".into(),
                name: Some("twin".parse().unwrap()),
                ..Default::default()
            },
            vec![],
        );
        assert!(world.vmm.await_held(1, soon()));
        let op = forking.note(|n| {
            if let fcd::testing::api::frame::Note::Op { op } = n {
                Some(op.clone())
            } else {
                None
            }
        });
        world
            .call::<OpCancel>(&OpRequest { op: op.to_string() })
            .unwrap();
        assert!(
            forking.finish(SOON).unwrap_err().is(Kind::Cancelled),
            "{stage:?}"
        );
        world.vmm.release_starts();
        world.await_gone("twin");
        world.await_rest();
        assert_eq!(world.census(), before, "{stage:?}");
        assert!(!world.vmm.is_paused(&vm.id));
    }

    let labels: fcd::testing::ids::Labels = serde_json::from_str(r#"{"ci":"yes"}"#).unwrap();
    let set = VmSetRequest {
        vm: "web".into(),
        labels: labels.clone(),
        ..Default::default()
    };
    world.call::<VmSet>(&set).unwrap();
    let request = VmForkRequest {
        vm: "web".into(),
        name: Some("twin".parse().unwrap()),
        labels: serde_json::from_str(r#"{"stage":"2"}"#).unwrap(),
    };
    let twin = world.run::<VmFork>(request).unwrap().vm;
    assert_eq!(
        serde_json::to_string(&twin.labels).unwrap(),
        r#"{"ci":"yes","stage":"2"}"#
    );
    assert!(
        twin.state == VmState::Running && !twin.rm && twin.ports.is_empty(),
        "{twin:?}"
    );
    assert_eq!(
        list(&world),
        [""; 0],
        "the fork's temporary snapshot is gone"
    );
    // The original and the clone are independent.
    world.delete("web").unwrap();
    assert_eq!(world.state("twin"), VmState::Running);
}

#[test]
fn failed_restore_leaves_startable_vm() {
    let world = World::new();
    world.running("web");
    let made = create(&world, "web", "one").unwrap();
    world.stop("web").unwrap();
    let dir = world
        .config
        .state_dir
        .join("snapshots")
        .join(made.id.as_str());
    // The snapshot's memory file is empty. The daemon notices this before it changes the VM's disk.
    let disk = world.vmm.last_spec(&made.vm).unwrap().disk;
    let mut mine = std::fs::read(&disk).unwrap();
    mine.extend(b"what was written since");
    std::fs::write(&disk, &mine).unwrap();
    let memory = std::fs::read(dir.join("private/memory")).unwrap();
    std::fs::write(dir.join("private/memory"), "").unwrap();
    let e = restore(&world, "one", None).unwrap_err();
    assert!(
        e.is(Kind::Host) && e.fault.message.contains("damaged"),
        "{e:?}"
    );
    assert_eq!(world.state("web"), VmState::Failed);
    assert!(
        restore(&world, "one", Some("twin"))
            .unwrap_err()
            .is(Kind::Host)
    );
    world.await_gone("twin");
    assert_eq!(std::fs::read(&disk).unwrap(), mine);
    world.start("web").unwrap();
    world.stop("web").unwrap();
    world.stop("web").unwrap();
    // The memory file is restored.
    std::fs::write(dir.join("private/memory"), &memory).unwrap();
    let aside = disk.with_file_name("former");
    world.vmm.fail_next_start("another version made it");
    let e = restore(&world, "one", None).unwrap_err();
    assert!(
        e.is(Kind::VmmFailed) && e.fault.message.contains("another version"),
        "{e:?}"
    );
    world.await_rest();
    assert_eq!(
        (std::fs::read(&disk).unwrap(), aside.exists()),
        (mine.clone(), false)
    );
    // A stop interrupts the restore.
    world.vmm.hold_starts(Stage::AfterSpawn);
    let mut restoring = world.begin::<SnapshotRestore>(
        SnapshotRestoreRequest {
            snapshot: "one".into(),
            new_vm: None,
        },
        vec![],
    );
    assert!(world.vmm.await_held(1, soon()));
    assert!(aside.join("disk").exists() && std::fs::read(&disk).unwrap() != mine);
    world.stop("web").unwrap();
    world.vmm.release_starts();
    assert!(restoring.finish(SOON).is_err());
    world.await_rest();
    assert_eq!(
        (std::fs::read(&disk).unwrap(), aside.exists()),
        (mine.clone(), false)
    );
    world.start("web").unwrap();
    world.stop("web").unwrap();
    // A successful restore leaves nothing behind.
    restore(&world, "one", None).unwrap();
    assert!(std::fs::read(&disk).unwrap() != mine && !aside.exists());
    world.stop("web").unwrap();
    std::fs::write(&disk, &mine).unwrap();
    // The snapshot's disk is missing, so the VM keeps its own disk.
    std::fs::remove_file(dir.join("disk")).unwrap();
    assert!(restore(&world, "one", None).is_err());
    assert_eq!(std::fs::read(&disk).unwrap(), mine);
    world.start("web").unwrap();
}

#[test]
fn snapshot_in_use_is_not_deleted() {
    let world = World::new();
    world.running("web");
    create(&world, "web", "one").unwrap();
    world.stop("web").unwrap();
    world.vmm.hold_starts(Stage::BeforeSpawn);
    let mut restoring = world.begin::<SnapshotRestore>(
        SnapshotRestoreRequest {
            snapshot: "one".into(),
            new_vm: None,
        },
        vec![],
    );
    assert!(world.vmm.await_held(1, soon()));
    let delete = || {
        world.call::<SnapshotDelete>(&SnapshotRequest {
            snapshot: "one".into(),
        })
    };
    let e = delete().unwrap_err();
    assert!(e.is(Kind::Busy) && e.fault.hint.is_some(), "{e:?}");
    world.vmm.release_starts();
    restoring.finish(SOON).unwrap();
    world.await_rest();
    delete().unwrap();
    assert_eq!(world.state("web"), VmState::Running);
}
