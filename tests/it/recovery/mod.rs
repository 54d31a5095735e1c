//! What a daemon does about the state of an earlier one, and VMs that were created with `--rm`.

use crate::world::*;
use fcd::api::daemon::{Info, Leaks, LeaksRequest};
use fcd::api::exec::{ExecStart, ExecStartRequest};
use fcd::api::frame::Note;
use fcd::api::op::OpState;
use fcd::api::vm::*;
use fcd::error::Kind;
use fcd::ids::OpId;
use fcd::store::Intent;
use fcd::vmm::GuestEvent;
use fcd::vmm::fake::Stage;

fn rm(name: &str) -> VmCreateRequest {
    VmCreateRequest {
        name: Some(name.parse().unwrap()),
        rm: true,
        ..Default::default()
    }
}

fn held(world: &World, name: &str) -> (Running<VmReply>, Vm) {
    let hold = world.begin::<VmCreate>(
        VmCreateRequest {
            hold: true,
            ..rm(name)
        },
        vec![],
    );
    let vm = hold.note(|n| {
        if let Note::Created(vm) = n {
            Some((**vm).clone())
        } else {
            None
        }
    });
    (hold, vm)
}

#[test]
fn rm_vm_is_deleted_with_its_holder() {
    let world = World::new();
    let empty = world.census();
    for running in [false, true] {
        let (hold, vm) = held(&world, "web");
        if running {
            world.place(&vm.id);
            world.start("web").unwrap();
        }
        hold.hang_up();
        world.await_gone("web");
        world.await_rest();
        assert!(world.vmm.live().is_empty());
        assert_eq!(world.census().len(), empty.len());
    }
}

#[test]
fn rm_vm_is_deleted_when_it_stops_or_dies() {
    let world = World::new();
    for how in ["stop", "die", "shut down", "fail"] {
        let (mut hold, vm) = held(&world, "web");
        world.place(&vm.id);
        if how == "fail" {
            world.vmm.fail_next_start("no such machine");
            assert!(world.start("web").unwrap_err().is(Kind::VmmFailed));
        } else {
            world.start("web").unwrap();
        }
        match how {
            "stop" => assert_eq!(world.stop("web").unwrap().synced, Some(Synced::Yes)),
            "die" => assert!(
                world
                    .vmm
                    .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9)))
            ),
            "shut down" => assert!(world.vmm.die(&vm.id, &fcd::vmm::End::GuestShutDown)),
            _ => {}
        }
        assert_eq!(hold.finish(SOON).unwrap().vm.id, vm.id, "{how}");
        world.await_rest();
        assert!(world.show("web").unwrap_err().is(Kind::VmNotFound));
    }
}

#[test]
fn unresponsive_vmm_is_not_used_and_stops_at_once() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let exec = || {
        let (vm, argv) = ("web".to_owned(), vec!["true".to_owned()]);
        let request = ExecStartRequest {
            vm,
            argv,
            env: vec![],
            workdir: None,
            pty: None,
            streams: vec![],
            no_wait_children: false,
        };
        world.begin::<ExecStart>(request, vec![]).finish(SOON)
    };
    assert!(world.vmm.report(&vm.id, GuestEvent::Unresponsive(true)));
    await_that("it is unresponsive", || {
        world.show("web").unwrap().unresponsive
    });
    let refused = exec().unwrap_err();
    assert!(
        refused.is(Kind::GuestUnavailable) && refused.to_string().contains("does not respond"),
        "{refused}"
    );
    assert!(world.vmm.report(&vm.id, GuestEvent::Unresponsive(false)));
    await_that("it answers", || !world.show("web").unwrap().unresponsive);
    exec().unwrap();

    assert!(world.vmm.report(&vm.id, GuestEvent::Unresponsive(true)));
    await_that("it is unresponsive", || {
        world.show("web").unwrap().unresponsive
    });
    let stopped = world.stop("web").unwrap();
    assert_eq!(
        (stopped.state, stopped.synced, stopped.unresponsive),
        (VmState::Stopped, Some(Synced::No), false)
    );
    assert!(
        !world.start("web").unwrap().unresponsive,
        "the next VMM is another"
    );
}

#[test]
fn paused_guest_stays_paused_after_daemon_restart() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    let pause = |world: &World| world.call::<VmPause>(&request("web")).map(|r| r.vm);
    let resume = |world: &World| world.call::<VmResume>(&request("web")).map(|r| r.vm);
    assert!(pause(&world).unwrap().paused && pause(&world).unwrap().paused);
    assert!(world.vmm.is_paused(&vm.id));
    let (argv, name) = (vec!["true".to_owned()], "web".to_owned());
    let exec = ExecStartRequest {
        vm: name,
        argv,
        env: vec![],
        workdir: None,
        pty: None,
        streams: vec![],
        no_wait_children: false,
    };
    let refused = world
        .begin::<ExecStart>(exec, vec![])
        .finish(SOON)
        .unwrap_err();
    assert!(
        refused.is(Kind::WrongState) && refused.to_string().contains("is paused"),
        "{refused}"
    );
    // The daemon was killed after writing the row and before telling the driver. The next one tells
    // the driver.
    world.reopen();
    assert!(world.vmm.is_paused(&vm.id));
    world.daemon().reconciler.reconcile();
    assert!(world.show("web").unwrap().paused && world.vmm.is_paused(&vm.id));
    assert!(!resume(&world).unwrap().paused && !resume(&world).unwrap().paused);
    assert!(!world.vmm.is_paused(&vm.id));
    world.edit_rows(|tx| tx.update_vm_unlocked(&vm.id, |r| r.paused = true).unwrap());
    world.reopen();
    world.daemon().reconciler.reconcile();
    assert!(world.vmm.is_paused(&vm.id));
    // A stop resumes the guest so that it can shut down. After the next start it runs.
    assert_eq!(world.stop("web").unwrap().synced, Some(Synced::Yes));
    let refused = pause(&world).unwrap_err();
    assert!(
        refused.is(Kind::WrongState) && refused.fault.hint.is_some(),
        "{refused}"
    );
    world.place(&vm.id);
    assert!(!world.start("web").unwrap().paused && !world.vmm.is_paused(&vm.id));
}

#[test]
fn concurrent_pauses_and_resumes_match_row() {
    let world = World::new();
    let (vm, _) = world.running("web");
    std::thread::scope(|s| {
        for n in 0..8 {
            let world = &world;
            s.spawn(move || {
                for i in 0..20 {
                    let call = if (n + i) % 2 == 0 {
                        world.call::<VmPause>(&request("web"))
                    } else {
                        world.call::<VmResume>(&request("web"))
                    };
                    call.unwrap();
                }
            });
        }
    });
    assert_eq!(
        world.vmm.is_paused(&vm.id),
        world.show("web").unwrap().paused
    );
}

#[test]
fn rm_vm_survives_restart() {
    let world = World::new();
    let (hold, vm) = held(&world, "web");
    world.place(&vm.id);
    world.start("web").unwrap();
    assert_eq!(
        world.run::<VmRestart>(stop("web")).unwrap().vm.state,
        VmState::Running
    );
    hold.hang_up();
    world.await_gone("web");
}

/// If its files cannot be removed, the VM stays as `failed`, and the daemon does not retry forever.
#[test]
fn rm_vm_that_cannot_be_deleted_is_failed() {
    let world = World::new();
    let vm = world.call::<VmCreate>(&rm("web")).unwrap().vm;
    let dir = world.config.state_dir.join("vms").join(vm.id.as_str());
    std::fs::write(&dir, "in the way").unwrap();
    assert!(world.delete("web").is_err());
    let vm = world.await_state("web", VmState::Failed);
    assert!(vm.reason.is_some());
    world.await_rest();
    std::fs::remove_file(&dir).unwrap();
    world.delete("web").unwrap();
}

#[test]
fn rm_vm_is_deleted_when_daemon_opens_again() {
    let mut world = World::new();
    world.call::<VmCreate>(&rm("still")).unwrap();
    let vm = world.call::<VmCreate>(&rm("web")).unwrap().vm;
    world.place(&vm.id);
    world.start("web").unwrap();
    world.reopen();
    world.daemon().reconciler.reconcile();
    world.await_gone("web");
    world.await_gone("still");
    world.await_rest();
    assert!(world.vmm.live().is_empty());
}

/// Remains of an earlier daemon count as leaks only once the daemon has reconciled.
#[test]
fn leaks_are_reported_after_reconcile() {
    let mut world = World::new();
    world.edit_rows(|tx| {
        tx.intend(None, 0, "snapshot", "0123456789ab");
    });
    world.reopen();
    let mut asked = world.begin::<Leaks>(LeaksRequest { fix: false }, vec![]);
    world.call::<Info>(&fcd::api::Empty {}).unwrap();
    world.daemon().reconciler.reconcile();
    assert_eq!(asked.finish(SOON).unwrap().leaks, []);
}

/// Running VMs outlive the daemon: the process is the same, and every call works on it again.
#[test]
fn running_vm_is_adopted() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.import_all("web");
    world.reopen();
    assert_eq!(
        world.state("web"),
        VmState::Running,
        "reads are served before it was looked at"
    );
    world.daemon().reconciler.reconcile();
    let again = world.show("web").unwrap();
    assert_eq!(
        (again.pid, again.ssh_addr, again.state),
        (vm.pid, vm.ssh_addr, VmState::Running)
    );
    assert_eq!(world.vmm.kills(), 0);
    world.import_all("web");
    // The new daemon sees when it dies.
    assert!(
        world
            .vmm
            .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9)))
    );
    world.await_state("web", VmState::Failed);
}

/// The reconciler hangs at another VM and has not reached this one yet.
#[test]
fn stop_and_delete_after_restart_do_not_wait_for_reconciler() {
    for verb in ["stop", "stop --force", "kill", "restart", "rm -f"] {
        let mut world = World::new();
        world.running("first");
        let (vm, _) = world.running("web");
        world.reopen();
        world.vmm.hold_starts(Stage::Adopt);
        std::thread::scope(|scope| {
            let daemon = world.daemon().clone();
            let reconciler = scope.spawn(move || daemon.reconciler.reconcile());
            assert!(world.vmm.await_held(1, soon()));
            // Whichever VM the reconciler hangs at, the call is answered.
            for name in ["first", "web"] {
                let forced = VmStopRequest {
                    force: verb == "stop --force",
                    ..stop(name)
                };
                match verb {
                    "kill" => drop(
                        world
                            .begin::<VmKill>(request(name), vec![])
                            .finish(PROMPT)
                            .unwrap(),
                    ),
                    "restart" => drop(
                        world
                            .begin::<VmRestart>(forced, vec![])
                            .finish(PROMPT)
                            .unwrap(),
                    ),
                    "rm -f" => drop(
                        world
                            .begin::<VmDelete>(delete(name), vec![])
                            .finish(PROMPT)
                            .unwrap(),
                    ),
                    _ => drop(
                        world
                            .begin::<VmStop>(forced, vec![])
                            .finish(PROMPT)
                            .unwrap(),
                    ),
                }
            }
            world.vmm.release_starts();
            reconciler.join().unwrap();
        });
        world.await_rest();
        let state = world.show("web").ok().map(|vm| vm.state);
        let wanted = match verb {
            "restart" => Some(VmState::Running),
            "rm -f" => None,
            _ => Some(VmState::Stopped),
        };
        assert_eq!(state, wanted, "{verb}");
        assert_eq!(
            world.vmm.live().len(),
            if verb == "restart" { 2 } else { 0 },
            "{verb}"
        );
        if verb == "restart" {
            assert!(
                !world.vmm.adoptions().iter().skip(1).any(|id| *id == vm.id),
                "adopted what this daemon has started"
            );
        }
    }
}

#[test]
fn calls_that_need_guest_adopt_it() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.reopen();
    world.import_all("web");
    assert_eq!(world.vmm.adoptions(), std::slice::from_ref(&vm.id));
    world.reopen();
    assert!(
        world.call::<VmPause>(&request("web")).unwrap().vm.paused && world.vmm.is_paused(&vm.id)
    );
    // The reconciler has nothing left to do.
    world.daemon().reconciler.reconcile();
    assert_eq!(world.vmm.adoptions().len(), 2);
    assert!(
        world
            .vmm
            .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9)))
    );
    world.await_state("web", VmState::Failed);
}

#[test]
fn stop_continues_stop_of_earlier_daemon() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.edit_rows(|tx| {
        tx.update_vm_unlocked(&vm.id, |r| r.state = VmState::Stopping)
            .unwrap()
    });
    world.reopen();
    assert_eq!(world.stop("web").unwrap().state, VmState::Stopped);
    world.daemon().reconciler.reconcile();
    assert_eq!(
        (world.state("web"), world.vmm.kills()),
        (VmState::Stopped, 0)
    );
}

#[test]
fn stopped_vms_are_usable_at_once_without_host_scan() {
    const VMS: usize = 40;
    let mut world = World::new();
    for n in 0..VMS {
        world.create(&format!("made-{n}"));
    }
    for n in 0..3 {
        let name = format!("rests-{n}");
        world.running(&name);
        world.stop(&name).unwrap();
    }
    world.reopen();
    let before = world.vmm.scans();
    for name in ["made-0", "rests-0"] {
        let set = VmSetRequest {
            vm: name.into(),
            vcpus: Some(2),
            ..Default::default()
        };
        world.call::<VmSet>(&set).unwrap();
    }
    assert_eq!(world.vmm.scans(), before);
    world.daemon().reconciler.reconcile();
    // The sweep itself scans once.
    assert_eq!(world.vmm.scans(), before + 1);
}

#[test]
fn host_is_scanned_once_for_all_missing_vmms() {
    const VMS: usize = 10;
    let mut world = World::new();
    let vms: Vec<_> = (0..VMS)
        .map(|n| world.running(&format!("vm-{n}")).0)
        .collect();
    world.shut();
    for vm in &vms[1..] {
        assert!(
            world
                .vmm
                .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(7)))
        );
    }
    world.reopen();
    let before = world.vmm.scans();
    world.daemon().reconciler.reconcile();
    assert_eq!(
        world.vmm.scans(),
        before + 2,
        "one for all VMs, and the sweep's"
    );
    assert_eq!(world.state("vm-0"), VmState::Running);
    assert!((1..VMS).all(|n| world.state(&format!("vm-{n}")) == VmState::Failed));
}

#[test]
fn running_vms_are_reconciled_first() {
    let mut world = World::new();
    // In order of their IDs, a running VM would come first by chance now and then.
    let boots: Vec<_> = (0..8)
        .map(|n| world.running(&format!("boots-{n}")).0)
        .collect();
    let (vm, _) = world.running("runs");
    world.edit_rows(|tx| {
        for vm in &boots {
            tx.update_vm_unlocked(&vm.id, |r| r.state = VmState::Starting)
                .unwrap();
        }
    });
    world.reopen();
    world.vmm.hold_starts(Stage::Adopt);
    std::thread::scope(|scope| {
        let daemon = world.daemon().clone();
        let reconciler = scope.spawn(move || daemon.reconciler.reconcile());
        assert!(world.vmm.await_held(1, soon()));
        assert!((0..8).all(|n| world.state(&format!("boots-{n}")) == VmState::Starting));
        world.vmm.release_starts();
        reconciler.join().unwrap();
    });
    assert_eq!(world.vmm.adoptions(), [vm.id]);
}

/// Its image was removed, but it runs and its death is still noticed.
#[test]
fn running_vm_without_image_is_adopted() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    std::fs::remove_dir_all(world.config.state_dir.join("images/default")).unwrap();
    world.reopen();
    world.daemon().reconciler.reconcile();
    let again = world.show("web").unwrap();
    assert_eq!((again.pid, again.state), (vm.pid, VmState::Running));
    assert!(again.reason.is_some_and(|r| r.contains("image")));
    assert!(
        world
            .vmm
            .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9)))
    );
    world.await_state("web", VmState::Failed);
}

#[test]
fn vmm_that_died_between_daemons_is_failed() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.shut();
    assert!(
        world
            .vmm
            .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9)))
    );
    world.reopen();
    world.daemon().reconciler.reconcile();
    let vm = world.show("web").unwrap();
    assert_eq!((vm.state, vm.pid), (VmState::Failed, None));
    assert!(vm.reason.unwrap().contains("while fcd was not running"));
    assert_eq!(world.start("web").unwrap().state, VmState::Running);
}

#[test]
fn vm_after_host_reboot_is_stopped() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.shut();
    assert!(
        world
            .vmm
            .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(7)))
    );
    world.edit_rows(|tx| {
        tx.update_vm_unlocked(&vm.id, |r| {
            r.identity.as_mut().unwrap().boot_id = "another".into()
        })
        .unwrap()
    });
    world.reopen();
    world.daemon().reconciler.reconcile();
    assert_eq!(world.state("web"), VmState::Stopped);
}

/// What the next daemon makes of each state that a daemon can die in. A second recovery changes
/// nothing.
#[test]
fn every_state_is_reconciled() {
    use VmState::*;
    for (state, intent, lives, wanted) in [
        (Created, None, false, Some(Created)),
        (Created, None, true, Some(Created)),
        (Starting, None, false, Some(Stopped)),
        (Starting, None, true, Some(Stopped)),
        (Stopping, None, true, Some(Stopped)),
        (Stopping, None, false, Some(Stopped)),
        (Stopping, Some(Intent::Restart), true, Some(Running)),
        (Deleting, None, true, None),
        (Deleting, None, false, None),
        (Stopped, None, true, Some(Stopped)),
        (Failed, None, true, Some(Failed)),
    ] {
        let mut world = World::new();
        let (vm, _) = world.running("web");
        world.shut();
        if !lives {
            assert!(
                world
                    .vmm
                    .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9)))
            );
        }
        let op = fcd::api::op::Op {
            id: OpId::random(),
            method: "vm.something".into(),
            vm: Some(vm.id.clone()),
            owner_uid: vm.owner_uid,
            state: OpState::Running,
            may_cancel: false,
            progress: Default::default(),
            started_at: 1,
            ended_at: None,
            result: None,
            error: None,
        };
        let owned = matches!(state, Starting | Stopping | Deleting).then(|| op.id.clone());
        world.edit_rows(|tx| {
            tx.put_op(op.clone());
            tx.update_vm_unlocked(&vm.id, |r| {
                (r.state, r.intent, r.op) = (state, intent, owned)
            })
            .unwrap();
        });
        world.reopen();
        world.daemon().reconciler.reconcile();
        world.await_rest();
        let what = format!("{state:?} {intent:?}, its VMM alive: {lives}");
        assert_eq!(world.show("web").ok().map(|vm| vm.state), wanted, "{what}");
        let running = usize::from(wanted == Some(Running));
        assert_eq!(world.vmm.live().len(), running, "{what}");
        let ended = world.op(&op.id);
        assert!(
            ended.state == OpState::Failed && ended.error.is_some(),
            "{what}: {ended:?}"
        );
        let once = world.census();
        world.reopen();
        world.daemon().reconciler.reconcile();
        world.await_rest();
        assert_eq!(world.census(), once, "{what}");
    }
}

/// A first start that was in progress is undone to `created`.
#[test]
fn interrupted_first_start_is_undone() {
    let mut world = World::new();
    let vm = world.create("web");
    world.edit_rows(|tx| {
        tx.update_vm_unlocked(&vm.id, |r| r.state = VmState::Starting)
            .unwrap()
    });
    world.reopen();
    world.daemon().reconciler.reconcile();
    let vm = world.show("web").unwrap();
    assert_eq!(vm.state, VmState::Created);
    assert!(vm.reason.is_some());
}

/// Reconciling leaves VMs alone that were created after the daemon opened.
#[test]
fn vm_created_before_reconcile_is_left_alone() {
    let mut world = World::new();
    world.reopen();
    world.running("web");
    let starts = world.begin::<VmStart>(request(world.create("other").name.as_str()), vec![]);
    world.daemon().reconciler.reconcile();
    assert_eq!(world.state("web"), VmState::Running);
    drop(starts);
    world.await_rest();
}

#[test]
fn leftover_directories_are_removed() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.shut();
    let vms = world.config.state_dir.join("vms");
    std::fs::create_dir_all(vms.join("0123456789ab/run")).unwrap();
    std::fs::create_dir(vms.join("not ours")).unwrap();
    world.reopen();
    world.daemon().reconciler.reconcile();
    let mut left: Vec<_> = std::fs::read_dir(&vms)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    let mut wanted = vec![vm.id.to_string(), "not ours".to_owned()];
    wanted.sort();
    assert_eq!(left, wanted);
}

/// SIGTERM while every kind of operation runs. The daemon ends in time, and the next one continues
/// from there.
#[test]
fn close_during_operations_ends_in_time() {
    let mut world = World::new();
    world.running("web");
    let vm = world.create("boots");
    world.place(&vm.id);
    let mut import = world.import("web");
    world.vmm.hold_starts(fcd::vmm::fake::Stage::AfterSpawn);
    let mut start = world.begin::<VmStart>(request("boots"), vec![]);
    assert!(world.vmm.await_held(1, soon()));
    let gate = fcd::guest::fake::Gate::closed();
    world
        .guest
        .on("", move |_| fcd::guest::fake::Answer::default().hold(&gate));
    let exec = ExecStartRequest {
        vm: "web".into(),
        argv: vec!["cat".into()],
        env: vec![],
        workdir: None,
        pty: None,
        streams: vec![],
        no_wait_children: false,
    };
    let mut session = world.begin::<ExecStart>(exec, vec![]);
    session.note(|n| matches!(n, Note::Session { .. }).then_some(()));
    let mut wait = world.begin::<VmWait>(
        VmWaitRequest {
            vm: "web".into(),
            state: None,
            timeout_ms: None,
        },
        vec![],
    );
    world.shut();
    let e = import.call.finish(SOON).unwrap_err();
    assert!(e.fault.message.contains("shutting down"), "{e:?}");
    assert!(start.finish(SOON).is_err());
    // The call may arrive too late, and nothing shows when it arrived.
    let e = wait.finish(SOON).unwrap_err();
    assert!(e.is(Kind::ShuttingDown) || e.unreachable, "{e:?}");
    let e = session.finish(SOON).unwrap_err();
    assert!(e.fault.message.contains("shutting down"), "{e:?}");
    world.vmm.release_starts();
    world.reopen();
    world.daemon().reconciler.reconcile();
    assert_eq!(
        (world.state("web"), world.state("boots")),
        (VmState::Running, VmState::Created)
    );
    assert_eq!(
        world.workspace_state("web"),
        Some(WorkspaceState::Incomplete)
    );
}

/// A VMM that could not be killed is remembered until a later start has killed it.
#[test]
fn start_kills_vmm_of_earlier_start() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let store = &world.daemon().core.store;
    store
        .change_durable(|tx| tx.update_vm_unlocked(&vm.id, |r| r.state = VmState::Failed))
        .unwrap();
    let again = world.start("web").unwrap();
    assert_eq!(again.state, VmState::Running);
    assert_ne!(again.pid, vm.pid);
    assert_eq!(world.vmm.live().len(), 1);
}

/// The guest's last output is still on its way to the log when its files are deleted.
#[test]
fn delete_with_pending_console_output_succeeds() {
    let world = World::new();
    for _ in 0..10 {
        let (vm, _) = world.running("web");
        let log = world
            .config
            .state_dir
            .join("vms")
            .join(vm.id.as_str())
            .join("console.log");
        let until = std::time::Instant::now() + std::time::Duration::from_millis(100);
        let writer = fcd::host::thread::spawn("writer", move || {
            while std::time::Instant::now() < until {
                let _ = std::fs::write(&log, "the last words");
            }
        });
        world.delete("web").unwrap();
        writer.unwrap().join().unwrap();
    }
    assert_eq!(
        std::fs::read_dir(world.config.state_dir.join("vms"))
            .unwrap()
            .count(),
        0
    );
}

/// An earlier daemon wrote the guest's last words to the log, and died before it saw the VMM exit.
#[test]
fn missing_vmm_is_judged_by_guests_last_words() {
    for (words, state, reason) in [
        (
            "[    9.2] reboot: Power down\r\n",
            VmState::Stopped,
            "the guest shut itself down",
        ),
        (
            "[    4.2] Kernel panic - not syncing: sysrq triggered crash\r\n",
            VmState::Failed,
            "while fcd was not running: the guest's kernel panicked: sysrq triggered crash",
        ),
        (
            "",
            VmState::Failed,
            "the VMM ended while fcd was not running, for an unknown reason",
        ),
    ] {
        let mut world = World::new();
        let (vm, _) = world.running("web");
        world.shut();
        assert!(
            world
                .vmm
                .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Unknown))
        );
        let log = world
            .config
            .state_dir
            .join("vms")
            .join(vm.id.as_str())
            .join("console.log");
        std::fs::write(log, format!("--- fcd: started ---\r\n{words}")).unwrap();
        world.reopen();
        world.daemon().reconciler.reconcile();
        let vm = world.show("web").unwrap();
        assert_eq!(
            (vm.state, vm.reason.as_deref()),
            (state, Some(reason)),
            "{words}"
        );
    }
}

/// Nobody recorded the guest's console, but QEMU wrote to its own log that it ended by itself.
#[test]
fn missing_vmm_is_judged_by_its_own_log() {
    const RESET: &str = "while fcd was not running: the guest was reset, as its VMM's log says";
    for (log, state, reason) in [
        (
            "qemu_system_shutdown_request reason=6\n",
            VmState::Stopped,
            "the guest shut itself down",
        ),
        (
            "vm_state_notify running 0 reason 11 (shutdown)\n",
            VmState::Failed,
            RESET,
        ),
        (
            "qemu: terminating on signal 15 from pid 1 (init)\n",
            VmState::Failed,
            "the VMM was ended from the host (host-signal)",
        ),
    ] {
        let mut world = World::new();
        let (vm, _) = world.running("web");
        world.shut();
        assert!(
            world
                .vmm
                .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Unknown))
        );
        let dir = world.config.state_dir.join("vms").join(vm.id.as_str());
        std::fs::write(dir.join("console.log"), "--- fcd: started ---\r\n").unwrap();
        std::fs::write(dir.join("vmm.log"), log).unwrap();
        world.reopen();
        world.daemon().reconciler.reconcile();
        let vm = world.show("web").unwrap();
        assert!(
            vm.state == state && vm.reason.as_ref().unwrap().contains(reason),
            "{log}: {:?} {:?}",
            vm.state,
            vm.reason
        );
    }
}

#[test]
fn vmm_that_could_not_be_adopted_is_retried() {
    let mut world = World::new();
    let (vm, addr) = world.running("web");
    world.shut();
    world.vmm.fail_next_adopt("no answer in time");
    world.reopen();
    world.daemon().reconciler.reconcile();
    let reason = world.show("web").unwrap().reason.unwrap();
    assert!(
        reason.contains("could not be adopted") && reason.contains("no answer in time"),
        "{reason}"
    );
    world.vmm.fail_next_adopt("no answer in time");
    world.daemon().reconciler.sweep_once();
    assert!(world.show("web").unwrap().reason.is_some());
    world.daemon().reconciler.sweep_once();
    let adopted = world.show("web").unwrap();
    assert_eq!(
        (adopted.state, adopted.reason, adopted.ssh_addr),
        (VmState::Running, None, Some(addr))
    );
    world.vmm.guest_says(&vm.id, "on again\n");
    assert_eq!(world.stop("web").unwrap().synced, Some(Synced::Yes));
}
