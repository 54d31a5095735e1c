//! Tests of the recovery from the state that an earlier daemon left, and of VMs that were created
//! with `--rm`.

mod adopting;
mod missing_vmms;
mod pausing;
mod rm;

use crate::world::*;
use fcd::testing::api::daemon::{Info, Leaks, LeaksRequest};
use fcd::testing::api::exec::{ExecStart, ExecStartRequest};
use fcd::testing::api::frame::Note;
use fcd::testing::api::op::OpState;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use fcd::testing::ids::OpId;
use fcd::testing::store::Intent;
use fcd::testing::vmm::Exit;
use fcd::testing::vmm::fake::Stage;

pub fn exec(vm: &str, program: &str) -> ExecStartRequest {
    ExecStartRequest {
        vm: vm.into(),
        argv: vec![program.into()],
        env: vec![],
        workdir: None,
        user: None,
        pty: None,
        streams: vec![],
        no_wait_children: false,
    }
}

/// Leftovers of an earlier daemon count as leaks only after the daemon has reconciled.
#[test]
fn leaks_are_reported_after_reconcile() {
    let mut world = World::new();
    world.edit_rows(|tx| {
        tx.intend(None, 0, "snapshot", "0123456789ab");
    });
    world.reopen();
    let mut asked = world.begin::<Leaks>(LeaksRequest { fix: false }, vec![]);
    world.call::<Info>(&fcd::testing::api::Empty {}).unwrap();
    world.daemon().reconciler.reconcile();
    assert_eq!(asked.finish(SOON).unwrap().leaks, []);
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
    // The sweep scans the host exactly once.
    assert_eq!(world.vmm.scans(), before + 1);
}

/// Checks how the next daemon recovers from each state in which a daemon can die. A second recovery
/// changes nothing.
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
            world.kill_vmm(&vm.id, Exit::Signal(9));
        }
        let op = fcd::testing::api::op::Op {
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
        world.restart_daemon();
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
        world.restart_daemon();
        world.await_rest();
        assert_eq!(world.census(), once, "{what}");
    }
}

/// An interrupted first start is undone, and the VM is `created` again.
#[test]
fn interrupted_first_start_is_undone() {
    let mut world = World::new();
    let vm = world.create("web");
    world.edit_rows(|tx| {
        tx.update_vm_unlocked(&vm.id, |r| r.state = VmState::Starting)
            .unwrap()
    });
    world.restart_daemon();
    let vm = world.show("web").unwrap();
    assert_eq!(vm.state, VmState::Created);
    assert!(vm.reason.is_some());
}

/// The reconciler does not touch VMs that were created after the daemon opened.
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
    world.restart_daemon();
    let mut left: Vec<_> = std::fs::read_dir(&vms)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    let mut wanted = vec![vm.id.to_string(), "not ours".to_owned()];
    wanted.sort();
    assert_eq!(left, wanted);
}

/// SIGTERM arrives while operations of every kind run. The daemon exits in time, and the next
/// daemon leaves every VM in a valid state.
#[test]
fn close_during_operations_ends_in_time() {
    let mut world = World::new();
    world.running("web");
    let vm = world.create("boots");
    world.place(&vm.id);
    let mut import = world.import("web");
    world.vmm.hold_starts(Stage::AfterSpawn);
    let mut start = world.begin::<VmStart>(request("boots"), vec![]);
    assert!(world.vmm.await_held(1, soon()));
    let gate = fcd::testing::guest::fake::Gate::closed();
    world.guest.on("", move |_| {
        fcd::testing::guest::fake::Answer::default().hold(&gate)
    });
    let mut session = world.begin::<ExecStart>(exec("web", "cat"), vec![]);
    session.note(|n| matches!(n, Note::Session { .. }).then_some(()));
    let mut wait = world.begin::<VmWait>(
        VmWaitRequest {
            vm: "web".into(),
            state: None,
            timeout_ms: None,
        },
        vec![],
    );
    let begun = std::time::Instant::now();
    world.shut();
    assert!(
        begun.elapsed() < SOON / 2,
        "it waited although everything had ended: {:?}",
        begun.elapsed()
    );
    let e = import.call.finish(SOON).unwrap_err();
    assert!(e.fault.message.contains("shutting down"), "{e:?}");
    assert!(start.finish(SOON).is_err());
    // The wait may begin before or after the daemon closes, and the test cannot tell which.
    let e = wait.finish(SOON).unwrap_err();
    assert!(e.is(Kind::ShuttingDown) || e.unreachable, "{e:?}");
    let e = session.finish(SOON).unwrap_err();
    assert!(e.fault.message.contains("shutting down"), "{e:?}");
    world.vmm.release_starts();
    world.restart_daemon();
    assert_eq!(
        (world.state("web"), world.state("boots")),
        (VmState::Running, VmState::Created)
    );
    assert_eq!(
        world.workspace_state("web"),
        Some(WorkspaceState::Incomplete)
    );
}

/// The log has not received the guest's last output yet when the VM's files are deleted.
#[test]
fn delete_with_pending_console_output_succeeds() {
    let world = World::new();
    for _ in 0..10 {
        let (vm, _) = world.running("web");
        let log = world.vm_dir(&vm.id).join("console.log");
        let until = std::time::Instant::now() + std::time::Duration::from_millis(100);
        let writer = fcd::testing::host::thread::spawn("writer", move || {
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
