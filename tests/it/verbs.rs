//! Tests of the other calls over the real socket: set, wait, op.*, logs, exec and prune.

use crate::world::*;
use fcd::testing::api::Empty;
use fcd::testing::api::daemon::{DebugLocks, Doctor, Info};
use fcd::testing::api::exec::*;
use fcd::testing::api::frame::Note;
use fcd::testing::api::image::ImageList;
use fcd::testing::api::op::*;
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::daemon::Caller;
use fcd::testing::error::Kind;
use fcd::testing::guest::fake::{Answer, Gate};
use fcd::testing::ids::Labels;
use fcd::testing::vmm::fake::Keyboard;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

#[test]
fn set_applies_at_next_start() {
    let world = World::new();
    let vm = world.create("web");
    let set = |vcpus, mem_mib, disk_bytes| {
        world
            .call::<VmSet>(&VmSetRequest {
                vm: "web".into(),
                vcpus,
                mem_mib,
                disk_bytes,
                ..Default::default()
            })
            .unwrap()
            .vm
    };
    // A stopped VM changes immediately.
    let now = set(Some(2), None, None);
    assert_eq!((now.vcpus, now.pending), (2, None));
    world.place(&vm.id);
    world.start("web").unwrap();
    let now = set(None, Some(2048), Some(2 * ROOTFS_BYTES));
    assert_eq!((now.mem_mib, now.disk_bytes), (1024, ROOTFS_BYTES));
    assert_eq!(
        now.pending,
        Some(Pending {
            mem_mib: Some(2048),
            disk_bytes: Some(2 * ROOTFS_BYTES),
            ..Pending::default()
        })
    );
    let now = set(Some(3), None, None);
    assert_eq!(
        now.pending,
        Some(Pending {
            vcpus: Some(3),
            mem_mib: Some(2048),
            disk_bytes: Some(2 * ROOTFS_BYTES),
            ..Pending::default()
        })
    );
    assert_eq!(world.vmm.last_spec(&vm.id).unwrap().vcpus, 2);
    let now = world.run::<VmRestart>(stop("web")).unwrap().vm;
    assert_eq!(
        (now.vcpus, now.mem_mib, now.disk_bytes, now.pending),
        (3, 2048, 2 * ROOTFS_BYTES, None)
    );
    let spec = world.vmm.last_spec(&vm.id).unwrap();
    assert_eq!((spec.vcpus, spec.mem_mib), (3, 2048));
    let disk =
        fcd::testing::disk::root::disk_size(&spec.disk, fcd::testing::disk::Method::Qcow2).unwrap();
    assert_eq!(disk, 2 * ROOTFS_BYTES);
}

#[test]
fn labels_are_kept_changed_and_bounded() {
    let mut world = World::new();
    let labels = |text: &str| -> Labels { serde_json::from_str(text).unwrap() };
    let create = VmCreateRequest {
        name: Some("web".parse().unwrap()),
        labels: labels(r#"{"ci":"yes","owner":"ann"}"#),
        ..Default::default()
    };
    world.call::<VmCreate>(&create).unwrap();
    let set = |added: &str, removed: &[&str]| VmSetRequest {
        vm: "web".into(),
        labels: labels(added),
        remove_labels: removed.iter().map(|key| key.parse().unwrap()).collect(),
        ..Default::default()
    };
    let changed = world
        .call::<VmSet>(&set(r#"{"stage":"2","owner":"bob"}"#, &["ci", "none"]))
        .unwrap();
    let expected = labels(r#"{"owner":"bob","stage":"2"}"#);
    assert_eq!(
        (changed.vm.labels, changed.vm.pending),
        (expected.clone(), None)
    );
    // A request above the limit changes nothing.
    let many: Vec<String> = (0..31).map(|n| format!(r#""k{n}":"""#)).collect();
    let e = world
        .call::<VmSet>(&set(&format!("{{{}}}", many.join(",")), &[]))
        .unwrap_err();
    assert_eq!(
        e.fault.message,
        "set VM web: a VM has at most 32 labels, and these are 33"
    );
    world.restart_daemon();
    assert_eq!(world.show("web").unwrap().labels, expected);
    let brief = world.call::<VmListBrief>(&VmListRequest {
        all: true,
        brief: true,
        ..Default::default()
    });
    assert_eq!(brief.unwrap().vms[0].labels, expected);
}

#[test]
fn rename_frees_old_name_and_needs_free_one() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.create("db");
    let rename = |vm: &str, name: &str| VmRenameRequest {
        vm: vm.into(),
        name: name.parse().unwrap(),
    };
    let e = world.call::<VmRename>(&rename("web", "db")).unwrap_err();
    assert!(e.is(Kind::NameTaken), "{e}");
    assert_eq!(e.fault.message, "rename VM web: the name db is taken");
    let renamed = world.call::<VmRename>(&rename("web", "shop")).unwrap().vm;
    assert_eq!(
        (renamed.id.clone(), renamed.state),
        (vm.id.clone(), VmState::Running)
    );
    // The same name again changes nothing.
    world.call::<VmRename>(&rename("shop", "shop")).unwrap();
    assert!(world.show("web").unwrap_err().is(Kind::VmNotFound));
    world.create("web");
    world.restart_daemon();
    assert_eq!(world.show("shop").unwrap().id, vm.id);
    world.stop("shop").unwrap();
    world.start("shop").unwrap();
}

/// The boot and the set write to the same row.
#[test]
fn set_during_boot_loses_nothing() {
    let world = World::new();
    for round in 0..10 {
        let name = format!("v{round}");
        let vm = world.create(&name);
        world.place(&vm.id);
        let mut start = world.begin::<VmStart>(request(&name), vec![]);
        let mut client = world.client();
        for n in 0..20 {
            let set = VmSetRequest {
                vm: name.clone(),
                vcpus: Some(1 + n % 4),
                ..Default::default()
            };
            client.call::<VmSet>(&set).unwrap();
        }
        let vm = start.finish(SOON).unwrap().vm;
        assert!(
            vm.pid.is_some() && vm.driver.is_some() && vm.disk_driver.is_some(),
            "{vm:?}"
        );
        world.call::<VmSshConfig>(&ssh_config(&name)).unwrap();
    }
}

#[test]
fn wait_ends_at_state() {
    let world = World::new();
    let vm = world.create("web");
    world.place(&vm.id);
    let wait = |state, timeout_ms| VmWaitRequest {
        vm: "web".into(),
        state,
        timeout_ms,
    };
    assert!(
        world
            .run::<VmWait>(wait(Some(VmState::Running), Some(1)))
            .unwrap_err()
            .is(Kind::Timeout)
    );
    let mut running = world.begin::<VmWait>(wait(Some(VmState::Running), None), vec![]);
    world.start("web").unwrap();
    assert_eq!(running.finish(SOON).unwrap().vm.state, VmState::Running);
    // A wait for the end of a VM also ends when the VM fails.
    let mut end = world.begin::<VmWait>(wait(None, Some(u64::MAX)), vec![]);
    assert!(world.vmm.die(
        &vm.id,
        &fcd::testing::vmm::End::Vmm(fcd::testing::vmm::Exit::Signal(9))
    ));
    assert_eq!(end.finish(SOON).unwrap().vm.state, VmState::Failed);
    let mut gone = world.begin::<VmWait>(wait(Some(VmState::Running), None), vec![]);
    world.delete("web").unwrap();
    assert!(gone.finish(SOON).unwrap_err().is(Kind::VmNotFound));
}

#[test]
fn operations_are_listed_shown_awaited_and_kept() {
    let mut world = World::new();
    world.running("web");
    let import = world.import("web");
    let running = world
        .call::<OpList>(&OpListRequest {
            all: false,
            ..Default::default()
        })
        .unwrap()
        .ops;
    assert_eq!(running.len(), 1);
    let op = &running[0];
    assert_eq!(
        (op.method.as_str(), op.state, op.may_cancel),
        ("workspace.prepare", OpState::Running, true)
    );
    let shown = world
        .call::<OpShow>(&OpRequest {
            op: op.id.as_str()[..6].to_owned(),
        })
        .unwrap()
        .op;
    assert_eq!(shown.id, op.id);
    let wait = |timeout_ms| OpWaitRequest {
        op: op.id.to_string(),
        timeout_ms,
    };
    let e = world.run::<OpWait>(wait(Some(1))).unwrap_err();
    assert!(
        e.is(Kind::Timeout) && e.fault.op.as_ref() == Some(&op.id),
        "{e:?}"
    );
    let mut waiting = world.begin::<OpWait>(wait(None), vec![]);
    let cancelling = world
        .call::<OpCancel>(&OpRequest {
            op: op.id.to_string(),
        })
        .unwrap()
        .op;
    assert_eq!(cancelling.state, OpState::Cancelling);
    assert_eq!(waiting.finish(SOON).unwrap().op.state, OpState::Cancelled);
    let e = world
        .call::<OpCancel>(&OpRequest {
            op: op.id.to_string(),
        })
        .unwrap_err();
    assert!(e.is(Kind::WrongState) && e.fault.hint.is_some(), "{e:?}");
    drop(import);
    world.await_rest();
    let all = |world: &World| {
        world
            .call::<OpList>(&OpListRequest {
                all: true,
                ..Default::default()
            })
            .unwrap()
            .ops
    };
    let before = all(&world);
    assert_eq!(
        before.len(),
        2,
        "the operations are the start and the import"
    );
    world.reopen();
    world.daemon().reconciler.reconcile();
    let sorted = |mut ops: Vec<Op>| {
        ops.sort_by(|a, b| a.id.cmp(&b.id));
        // The progress changes all the time, so it is not compared.
        ops.into_iter()
            .map(|op| (op.id, op.state, op.result, op.error))
            .collect::<Vec<_>>()
    };
    assert_eq!(sorted(all(&world)), sorted(before));
}

#[test]
fn stop_cannot_be_cancelled() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.guest.on(fcd::testing::image::SHUTDOWN_COMMAND, |_| {
        Answer::status(0).stdout("synced\n")
    });
    let mut down = world.begin::<VmStop>(stop("web"), vec![]);
    let op = down.op();
    let e = world
        .call::<OpCancel>(&OpRequest { op: op.to_string() })
        .unwrap_err();
    assert!(e.is(Kind::WrongState), "{e:?}");
    assert!(
        world
            .vmm
            .die(&vm.id, &fcd::testing::vmm::End::GuestShutDown)
    );
    assert_eq!(down.finish(SOON).unwrap().vm.state, VmState::Stopped);
}

/// Without `more` the reply comes immediately and carries the operation's ID.
#[test]
fn call_without_more_returns_operation() {
    let world = World::new();
    let vm = world.create("web");
    world.place(&vm.id);
    let params = serde_json::value::to_raw_value(&request("web")).unwrap();
    let answer = world.client().call_raw("vm.start", &params, SOON).unwrap();
    let OpStarted { op } = serde_json::from_str(answer.get()).unwrap();
    let ended = world
        .run::<OpWait>(OpWaitRequest {
            op: op.to_string(),
            timeout_ms: None,
        })
        .unwrap()
        .op;
    assert_eq!(ended.state, OpState::Ok);
    let VmReply { vm } = serde_json::from_value(ended.result.unwrap()).unwrap();
    assert_eq!(vm.state, VmState::Running);
}

#[test]
fn prune_deletes_vms_that_do_not_run() {
    let world = World::new();
    world.create("rests");
    world.running("runs");
    let deleted = world.run::<VmPrune>(Empty {}).unwrap().deleted;
    assert_eq!(deleted.len(), 1);
    let left: Vec<_> = world
        .call::<VmList>(&VmListRequest {
            all: true,
            ..Default::default()
        })
        .unwrap()
        .vms;
    assert_eq!(
        left.iter().map(|vm| vm.name.as_str()).collect::<Vec<_>>(),
        ["runs"]
    );
}

#[test]
fn logs_follow_until_the_vm_is_deleted() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.vmm.guest_says(&vm.id, "hello\r\n");
    let logs = VmLogsRequest {
        vm: "web".into(),
        tail: None,
        follow: true,
    };
    let mut follow = world.begin::<VmLogs>(logs, vec![]);
    follow.note(|n| matches!(n, Note::Log(c) if c.text.contains("hello")).then_some(()));
    world.vmm.guest_says(&vm.id, "again\r\n");
    follow.note(|n| matches!(n, Note::Log(c) if c.text.contains("again")).then_some(()));
    world.delete("web").unwrap();
    assert!(follow.finish(SOON).unwrap().bytes > 0);
    world.create("still");
    let logs = VmLogsRequest {
        vm: "still".into(),
        tail: Some(3),
        follow: false,
    };
    assert_eq!(
        world.run::<VmLogs>(logs).unwrap().bytes,
        0,
        "a VM that never ran has an empty log"
    );
}

fn exec(vm: &str, streams: Vec<Stream>) -> ExecStartRequest {
    ExecStartRequest {
        vm: vm.into(),
        argv: vec!["cat".into()],
        env: vec![],
        workdir: None,
        user: None,
        pty: None,
        streams,
        no_wait_children: false,
    }
}

#[test]
fn exec_relays_its_streams() {
    let world = World::new();
    world.running("web");
    world.guest.on("", |call| {
        Answer::status(7).stdout(call.stdin.clone()).stderr("oops")
    });
    let ((stdin, to), (from, stdout), (errors, stderr)) = (pipe(), pipe(), pipe());
    let streams = vec![Stream::Stdin, Stream::Stdout, Stream::Stderr];
    let mut call = world.begin::<ExecStart>(exec("web", streams), vec![stdin, stdout, stderr]);
    let mut to = std::fs::File::from(to);
    to.write_all(b"a\0b").unwrap();
    drop(to);
    assert_eq!(call.finish(SOON).unwrap().exit, Exit::Status(7));
    let read = |fd: OwnedFd| {
        let mut bytes = Vec::new();
        std::fs::File::from(fd).read_to_end(&mut bytes).unwrap();
        bytes
    };
    assert_eq!(
        (read(from).as_slice(), read(errors).as_slice()),
        (&b"a\0b"[..], &b"oops"[..])
    );
}

#[test]
fn exec_is_signalled_resized_and_ended() {
    let world = World::new();
    let (_, addr) = world.running("web");
    let gate = Gate::closed();
    let hold = gate.clone();
    world
        .guest
        .on("exec", move |_| Answer::default().hold(&hold));
    world.guest.on("cd", {
        let hold = gate.clone();
        move |_| Answer::default().hold(&hold)
    });
    world.guest.on("cat", {
        let hold = gate.clone();
        move |_| Answer::default().hold(&hold)
    });
    let begin = || {
        let call = world.begin::<ExecStart>(exec("web", vec![]), vec![]);
        let session = call.note(|n| {
            if let Note::Session { session } = n {
                Some(session.clone())
            } else {
                None
            }
        });
        (call, session)
    };
    let (mut call, session) = begin();
    let size = PtySize { rows: 5, cols: 9 };
    world
        .call::<ExecResize>(&ExecResizeRequest {
            session: session.clone(),
            size,
        })
        .unwrap();
    await_that("the terminal is resized", || {
        world.guest.resizes() == [size]
    });
    world
        .call::<ExecSignal>(&ExecSignalRequest {
            session: session.clone(),
            signal: "INT".into(),
        })
        .unwrap();
    assert_eq!(call.finish(SOON).unwrap().exit, Exit::Signal("INT".into()));
    await_that("the session is gone", || {
        world.daemon().leftovers().sessions == 0
    });
    let e = world
        .call::<ExecSignal>(&ExecSignalRequest {
            session,
            signal: "INT".into(),
        })
        .unwrap_err();
    assert!(e.is(Kind::SessionNotFound), "{e:?}");
    // The caller is killed.
    let (call, _) = begin();
    await_that("the command runs", || world.guest.live(addr) == 1);
    call.hang_up();
    await_that("the command has ended", || world.guest.live(addr) == 0);
    // The connection to the guest breaks. The exit status must not be 0.
    let (mut call, _) = begin();
    await_that("the command runs", || world.guest.live(addr) == 1);
    world.guest.lose(addr);
    assert!(call.finish(SOON).unwrap_err().is(Kind::GuestLost));
    // The VM is stopped.
    let (mut call, _) = begin();
    await_that("the command runs", || world.guest.live(addr) == 1);
    world.stop("web").unwrap();
    let e = call.finish(PROMPT).unwrap_err();
    assert!(
        e.is(Kind::Cancelled) && e.fault.message.contains("the VM was stopped"),
        "{e:?}"
    );
}

fn connect(world: &World, port: u32) -> Result<UnixStream, Failure> {
    let request = VmConnectRequest {
        vm: "web".into(),
        port,
    };
    let (reply, fd) = world.client().call_for_fd::<VmConnect>(&request)?;
    assert_eq!(reply.vm.name.as_str(), "web");
    Ok(fd.into())
}

/// The daemon passes the stream to the caller and keeps no copy.
#[test]
fn vsock_stream_belongs_to_caller() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    let taken = world.vmm.listen(&vm.id, 5000);
    let mut stream = connect(&world, 5000).unwrap();
    let mut guests = taken.recv_timeout(SOON).unwrap();
    world.shut();
    stream.write_all(b"to the guest").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut got = String::new();
    guests.read_to_string(&mut got).unwrap();
    assert_eq!(got, "to the guest");
    drop(guests);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn vsock_without_listener_is_refused() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let kind = |port| {
        let e = connect(&world, port).unwrap_err();
        assert!(
            e.fault.hint.is_some() || e.is(Kind::GuestUnavailable),
            "{e:?}"
        );
        e.kind().to_owned()
    };
    assert_eq!(kind(u32::MAX), "invalid_argument");
    assert_eq!(kind(1), "guest_unavailable");
    let _taken = world.vmm.listen(&vm.id, 1);
    connect(&world, 1).unwrap();
    world.call::<VmPause>(&request("web")).unwrap();
    assert_eq!(kind(1), "wrong_state");
    world.call::<VmResume>(&request("web")).unwrap();
    let somebody = Caller {
        uid: 4242,
        gid: 4242,
        pid: 1,
    };
    let e = world
        .daemon()
        .sessions
        .connect(
            &somebody,
            &VmConnectRequest {
                vm: "web".into(),
                port: 1,
            },
        )
        .unwrap_err();
    assert_eq!(e.kind(), Kind::VmNotFound);
    world.stop("web").unwrap();
    assert_eq!(kind(1), "wrong_state");
}

/// Starts a VM whose guest is unreachable over SSH.
fn out_of_reach(world: &World) {
    let (_, addr) = world.running("web");
    world.guest.set_unreachable(addr, true);
}

#[test]
fn stop_of_unreachable_guest_presses_keys() {
    let world = World::new();
    out_of_reach(&world);
    world.vmm.set_keyboard(Keyboard::Heard);
    assert_eq!(world.stop("web").unwrap().synced, Some(Synced::Yes));
    assert_eq!(world.vmm.kills(), 0);
}

/// The guest accepts the connection, and its shutdown command never ends.
#[test]
fn stop_of_hanging_guest_leaves_time_for_the_keys() {
    let world = World::new();
    world.running("web");
    hang_shutdown(&world);
    world.vmm.set_keyboard(Keyboard::Heard);
    // SSH gets half of the time.
    let timeout = std::time::Duration::from_secs(4);
    let request = VmStopRequest {
        timeout_ms: Some(timeout.as_millis() as u64),
        ..stop("web")
    };
    let begun = std::time::Instant::now();
    let stopped = world.run::<VmStop>(request).unwrap().vm;
    assert!(begun.elapsed() < timeout, "the keys were pressed too late");
    assert_eq!(stopped.synced, Some(Synced::Yes));
    assert_eq!((world.vmm.presses(), world.vmm.kills()), (1, 0));
}

#[test]
fn stop_that_is_cut_short_presses_no_keys() {
    let world = World::new();
    world.running("web");
    hang_shutdown(&world);
    world.vmm.set_keyboard(Keyboard::Heard);
    let mut down = world.begin::<VmStop>(stop("web"), vec![]);
    await_that("the guest is asked", || world.guest.live_total() == 1);
    world.run::<VmKill>(request("web")).unwrap();
    assert_eq!(down.finish(SOON).unwrap().vm.state, VmState::Stopped);
    assert_eq!(world.vmm.presses(), 0);
}

fn hang_shutdown(world: &World) {
    let gate = fcd::testing::guest::fake::Gate::closed();
    world
        .guest
        .on(fcd::testing::image::SHUTDOWN_COMMAND, move |_| {
            Answer::default().hold(&gate)
        });
}

#[test]
fn stop_of_deaf_guest_kills_at_deadline_or_by_force() {
    let world = World::new();
    out_of_reach(&world);
    world.vmm.set_keyboard(Keyboard::Ignored);
    let soon = VmStopRequest {
        timeout_ms: Some(50),
        ..stop("web")
    };
    assert_eq!(
        world.run::<VmStop>(soon).unwrap().vm.synced,
        Some(Synced::Timeout)
    );
    assert_eq!((world.vmm.presses(), world.vmm.kills()), (1, 1));
    world.start("web").unwrap();
    let never = VmStopRequest {
        timeout_ms: Some(3_600_000),
        ..stop("web")
    };
    let mut down = world.begin::<VmStop>(never, vec![]);
    await_that("the keys are pressed again", || world.vmm.presses() == 2);
    world
        .run::<VmStop>(VmStopRequest {
            force: true,
            ..stop("web")
        })
        .unwrap();
    assert_eq!(down.finish(SOON).unwrap().vm.state, VmState::Stopped);
}

/// The kernel of an older image would reset at Ctrl-Alt-Del before the guest syncs anything.
#[test]
fn stop_presses_no_keys_for_old_image() {
    let world = World::new();
    let path = world.config.state_dir.join("images/default/image.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace("\"guest_version\":4", "\"guest_version\":2"),
    )
    .unwrap();
    out_of_reach(&world);
    world.vmm.set_keyboard(Keyboard::Heard);
    assert_eq!(world.stop("web").unwrap().synced, Some(Synced::Timeout));
    assert_eq!((world.vmm.presses(), world.vmm.kills()), (0, 1));
}

#[test]
fn info_describes_daemon() {
    let world = World::new();
    world.running("web");
    let info = world.call::<Info>(&Empty {}).unwrap();
    assert_eq!(
        (info.version.as_str(), info.pid),
        (env!("CARGO_PKG_VERSION"), std::process::id())
    );
    let images = world.call::<ImageList>(&Default::default()).unwrap().images;
    assert_eq!((images[0].name.as_str(), images[0].vms), ("default", 1));
    let checks = world.call::<Doctor>(&Empty {}).unwrap().checks;
    for id in ["store", "image", "root-disk"] {
        assert!(checks.iter().any(|c| c.id == id), "{id}: {checks:?}");
    }
    let import = world.import("web");
    let debug = world.call::<DebugLocks>(&Empty {}).unwrap();
    let held = debug
        .locks
        .iter()
        .find(|l| l.set == "workspace_locks")
        .expect("the import holds a workspace lock");
    assert!(
        held.holder
            .as_ref()
            .is_some_and(|h| h.operation.contains("workspace.prepare")),
        "{held:?}"
    );
    assert_eq!(debug.violations, 0);
    import.call.hang_up();
    world.await_rest();
}
