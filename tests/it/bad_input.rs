//! Invalid input and failures: the right kind, a message, a hint, and nothing changed.

use crate::world::*;
use fcd::api::exec::{ExecStart, ExecStartRequest, Stream};
use fcd::api::op::{OpCancel, OpRequest, OpShow};
use fcd::api::vm::*;
use fcd::api::workspace::{
    ExportKind, ExportRequest, PrepareRequest, WorkspaceExport, WorkspacePrepare,
};
use fcd::client::Failure;
use fcd::daemon::Caller;
use fcd::error::{Code, Kind};
use fcd::guest::fake::Readiness;
use fcd::store::faults::Fault;
use fcd::vmm::fake::Stage;
use std::os::fd::OwnedFd;

/// Checks that the call fails with this kind, gives a hint, and changes nothing.
#[track_caller]
fn refused<R: std::fmt::Debug>(
    world: &World,
    kind: Kind,
    call: impl FnOnce() -> Result<R, Failure>,
) -> String {
    let before = world.census();
    let e = call().unwrap_err();
    assert_eq!((e.kind(), e.code()), (kind.name(), kind.code()), "{e:?}");
    assert!(
        e.fault.message.len() > 5 && !e.fault.message.ends_with('.'),
        "{e:?}"
    );
    let hint = e.fault.hint.as_deref().unwrap_or_default();
    // The hint must be a command that can be run, with the VM's name instead of a placeholder.
    assert!(
        !hint.is_empty() && !hint.contains("{vm}") && !hint.split_whitespace().any(|w| w == "VM"),
        "{e:?}"
    );
    world.await_rest();
    assert_eq!(world.census(), before);
    e.fault.message
}

fn create(change: impl FnOnce(&mut VmCreateRequest)) -> VmCreateRequest {
    let mut request = VmCreateRequest::default();
    change(&mut request);
    request
}

fn user(uid: u32) -> Caller {
    Caller {
        uid,
        gid: uid,
        pid: 1,
    }
}

#[test]
fn unknown_vm_is_not_found() {
    let world = World::new();
    refused(&world, Kind::VmNotFound, || world.show("nobody"));
    refused(&world, Kind::VmNotFound, || world.start("nobody"));
    refused(&world, Kind::VmNotFound, || world.stop("nobody"));
    refused(&world, Kind::VmNotFound, || {
        world.run::<VmKill>(request("nobody"))
    });
    refused(&world, Kind::VmNotFound, || world.delete("nobody"));
    refused(&world, Kind::VmNotFound, || {
        world.run::<VmWait>(VmWaitRequest {
            vm: "no".into(),
            state: None,
            timeout_ms: None,
        })
    });
    refused(&world, Kind::VmNotFound, || {
        world.call::<VmSshConfig>(&request("nobody"))
    });
    let (read, _write) = pipe();
    refused(&world, Kind::VmNotFound, || {
        world
            .begin::<WorkspacePrepare>(prepare("nobody"), vec![read])
            .finish(SOON)
    });
    refused(&world, Kind::OperationNotFound, || {
        world.call::<OpShow>(&OpRequest { op: "abc".into() })
    });
    refused(&world, Kind::OperationNotFound, || {
        world.call::<OpCancel>(&OpRequest { op: "abc".into() })
    });
    let missing = VmDeleteRequest {
        if_exists: true,
        ..delete("nobody")
    };
    assert_eq!(world.run::<VmDelete>(missing).unwrap().deleted, None);
}

#[test]
fn ambiguous_id_prefix_is_refused() {
    let world = World::new();
    // With this many VMs, two IDs start with the same character.
    let ids: Vec<String> = (0..30)
        .map(|i| world.create(&format!("v{i}")).id.to_string())
        .collect();
    let shared = |n: usize, id: &str| ids.iter().filter(|i| i.starts_with(&id[..n])).count();
    if let Some(id) = ids.iter().find(|id| shared(2, id) > 1) {
        let said = refused(&world, Kind::AmbiguousPrefix, || world.show(&id[..2]));
        assert!(said.contains(id.as_str()), "{said}");
    }
    let unique = (2..12).find(|n| shared(*n, &ids[0]) == 1).unwrap();
    assert_eq!(world.show(&ids[0][..unique]).unwrap().id.as_str(), ids[0]);
    refused(&world, Kind::VmNotFound, || world.show(&ids[0][..1]));
}

#[test]
fn taken_name_is_refused() {
    let world = World::new();
    world.create("web");
    let said = refused(&world, Kind::NameTaken, || {
        world.call::<VmCreate>(&create(|r| r.name = Some("web".parse().unwrap())))
    });
    assert!(said.contains("web"));
    // One of twenty concurrent calls succeeds.
    let answers: Vec<_> = std::thread::scope(|scope| {
        let one = || world.call::<VmCreate>(&create(|r| r.name = Some("race".parse().unwrap())));
        let threads: Vec<_> = (0..20).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(answers.iter().filter(|a| a.is_ok()).count(), 1);
    assert!(
        answers
            .iter()
            .flat_map(|a| a.as_ref().err())
            .all(|e| e.is(Kind::NameTaken) && e.code() == Code::AlreadyExists)
    );
    assert_eq!(
        world
            .call::<VmList>(&VmListRequest {
                all: true,
                ..Default::default()
            })
            .unwrap()
            .vms
            .len(),
        2
    );
    // The name of a deleted VM is free again.
    world.delete("race").unwrap();
    world.create("race");
}

#[test]
fn invalid_parameters_are_refused() {
    let world = World::new();
    let raw = |method: &str, params: &str| {
        let params = serde_json::value::RawValue::from_string(params.to_owned()).unwrap();
        world.client().call_raw(method, &params, SOON)
    };
    refused(&world, Kind::InvalidArgument, || {
        raw("vm.create", r#"{"name":"../x"}"#)
    });
    refused(&world, Kind::InvalidArgument, || {
        raw("vm.create", r#"{"name":"-a"}"#)
    });
    refused(&world, Kind::InvalidArgument, || {
        raw("vm.create", r#"{"colour":"red"}"#)
    });
    refused(&world, Kind::MethodNotFound, || raw("vm.dance", "{}"));
    refused(&world, Kind::ImageNotFound, || {
        world.call::<VmCreate>(&create(|r| r.image = Some("none".parse().unwrap())))
    });
    for mem in [0, 64] {
        refused(&world, Kind::InvalidArgument, || {
            world.call::<VmCreate>(&create(|r| r.mem_mib = Some(mem)))
        });
    }
    for mem in [1 << 40, u64::MAX] {
        refused(&world, Kind::MemoryLimit, || {
            world.call::<VmCreate>(&create(|r| r.mem_mib = Some(mem)))
        });
    }
    for vcpus in [0, 33, u32::MAX] {
        refused(&world, Kind::InvalidArgument, || {
            world.call::<VmCreate>(&create(|r| r.vcpus = Some(vcpus)))
        });
    }
    for disk in [0, ROOTFS_BYTES - 4096, ROOTFS_BYTES + 1, u64::MAX] {
        refused(&world, Kind::InvalidArgument, || {
            world.call::<VmCreate>(&create(|r| r.disk_bytes = Some(disk)))
        });
    }
    world.create("web");
    refused(&world, Kind::InvalidArgument, || {
        world.call::<VmSet>(&VmSetRequest {
            vm: "web".into(),
            ..Default::default()
        })
    });
    let shrink = VmSetRequest {
        vm: "web".into(),
        disk_bytes: Some(4096),
        ..Default::default()
    };
    refused(&world, Kind::InvalidArgument, || {
        world.call::<VmSet>(&shrink)
    });
    refused(&world, Kind::InvalidArgument, || {
        world.call::<VmCreate>(&create(|r| r.hold = true))
    });
}

#[test]
fn damaged_or_missing_image_is_refused() {
    let world = World::new();
    world.create("web");
    let image = world.config.state_dir.join("images/default");
    std::fs::write(image.join("vmlinux"), "longer than before").unwrap();
    refused(&world, Kind::Host, || {
        world.call::<VmCreate>(&create(|_| {}))
    });
    let e = world.start("web").unwrap_err();
    assert!(e.is(Kind::Host) && e.fault.hint.is_some(), "{e:?}");
    assert_eq!(world.state("web"), VmState::Failed);
    std::fs::remove_dir_all(&image).unwrap();
    refused(&world, Kind::ImageNotFound, || {
        world.call::<VmCreate>(&create(|_| {}))
    });
    world.delete("web").unwrap();
}

#[test]
fn invalid_guest_paths_are_refused() {
    let world = World::new();
    world.running("web");
    for path in [
        "/etc",
        "../x",
        "",
        "/",
        "/root",
        "/root/../etc",
        "/root/.ssh",
        "/root//x",
        "/root/x\n",
        "root/x",
        "/rootx/y",
    ] {
        let (read, _write) = pipe();
        let request = PrepareRequest {
            guest_path: path.into(),
            ..prepare("web")
        };
        refused(&world, Kind::InvalidGuestPath, || {
            world
                .begin::<WorkspacePrepare>(request, vec![read])
                .finish(SOON)
        });
    }
    let (read, _write) = pipe();
    let request = PrepareRequest {
        subdir: "../x".into(),
        ..prepare("web")
    };
    let e = world
        .begin::<WorkspacePrepare>(request, vec![read])
        .finish(SOON)
        .unwrap_err();
    assert!(e.is(Kind::InvalidArgument), "{e:?}");
}

#[test]
fn calls_in_wrong_state_are_refused() {
    let world = World::new();
    world.create("web");
    refused(&world, Kind::WrongState, || {
        world.run::<VmKill>(request("web"))
    });
    refused(&world, Kind::WrongState, || {
        world.call::<VmSshConfig>(&request("web"))
    });
    let (read, _write) = pipe();
    refused(&world, Kind::WrongState, || {
        world
            .begin::<WorkspacePrepare>(prepare("web"), vec![read])
            .finish(SOON)
    });
    refused(&world, Kind::WrongState, || {
        exec(&world, "web", vec![], vec![])
    });
    assert_eq!(world.stop("web").unwrap().state, VmState::Created);
    world.place(&world.show("web").unwrap().id);
    world.start("web").unwrap();
    assert_eq!(world.start("web").unwrap().state, VmState::Running);
    refused(&world, Kind::WrongState, || {
        world.run::<VmDelete>(VmDeleteRequest {
            force: false,
            ..delete("web")
        })
    });
    let (_out, into) = pipe();
    let export = ExportRequest {
        vm: "web".into(),
        kind: ExportKind::Patch,
        no_wait: false,
    };
    refused(&world, Kind::WorkspaceNotFound, || {
        world
            .begin::<WorkspaceExport>(export, vec![into])
            .finish(SOON)
    });
}

fn exec(
    world: &World,
    vm: &str,
    streams: Vec<Stream>,
    fds: Vec<OwnedFd>,
) -> Result<fcd::api::exec::ExecReply, Failure> {
    let request = ExecStartRequest {
        vm: vm.into(),
        argv: vec!["true".into()],
        env: vec![],
        workdir: None,
        pty: None,
        streams,
        no_wait_children: false,
    };
    world.begin::<ExecStart>(request, fds).finish(SOON)
}

#[test]
fn wrong_descriptors_are_refused() {
    let world = World::new();
    world.running("web");
    let others = || -> Vec<OwnedFd> {
        let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
        let (_read, write) = pipe();
        vec![
            tempfile::tempfile().unwrap().into(),
            socket.into(),
            std::fs::File::open("/").unwrap().into(),
            std::fs::File::open("/dev/null").unwrap().into(),
            write,
        ]
    };
    for fd in others() {
        refused(&world, Kind::InvalidArgument, || {
            exec(&world, "web", vec![Stream::Stdin], vec![fd])
        });
    }
    for fd in others() {
        refused(&world, Kind::InvalidArgument, || {
            world
                .begin::<WorkspacePrepare>(prepare("web"), vec![fd])
                .finish(SOON)
        });
    }
    let (read, _write) = pipe();
    refused(&world, Kind::InvalidArgument, || {
        exec(&world, "web", vec![Stream::Stdout], vec![read])
    });
    let (read, _write) = pipe();
    refused(&world, Kind::InvalidArgument, || {
        exec(&world, "web", vec![], vec![read])
    });
    refused(&world, Kind::InvalidArgument, || {
        exec(&world, "web", vec![Stream::Stdin], vec![])
    });
    let (a, _a) = pipe();
    let (b, _b) = pipe();
    refused(&world, Kind::InvalidArgument, || {
        exec(
            &world,
            "web",
            vec![Stream::Stdin, Stream::Stdin],
            vec![a, b],
        )
    });
    let (a, b) = pipe();
    refused(&world, Kind::InvalidRequest, || {
        world
            .begin::<WorkspacePrepare>(prepare("web"), vec![a, b])
            .finish(SOON)
    });
    refused(&world, Kind::InvalidRequest, || {
        world
            .begin::<WorkspacePrepare>(prepare("web"), vec![])
            .finish(SOON)
    });
    let (a, _b) = pipe();
    let e = world
        .begin::<VmStart>(request("web"), vec![a])
        .finish(SOON)
        .unwrap_err();
    assert!(e.is(Kind::InvalidRequest), "{e:?}");
}

#[test]
fn full_pool_refuses_transfers() {
    let world = World::with(|c| (c.limits.pool_workers, c.limits.pool_queue) = (1, 1));
    world.running("web");
    world.running("other");
    let running = world.import("web");
    let queued = world.queue_import("other");
    await_that("the second waits in the queue", || {
        world.daemon().transfers.pool.counts().queued == 1
    });
    let before = world.census();
    let mut refused = world.queue_import("web");
    let e = refused.call.finish(SOON).unwrap_err();
    assert!(
        e.is(Kind::PoolFull)
            && e.code() == Code::Busy
            && e.fault.retryable
            && e.fault.hint.is_some(),
        "{e:?}"
    );
    assert_eq!(world.census(), before);
    // Lifecycle calls still work.
    assert_eq!(world.stop("other").unwrap().state, VmState::Stopped);
    for mut import in [running, queued] {
        import.call.hang_up();
        let _ = import.call.finish(SOON);
    }
    world.await_rest();
}

#[test]
fn quota_of_one_uid_is_enforced() {
    let world = World::with(|c| {
        (c.limits.vms_per_uid_max, c.limits.operations_per_uid_max) = (2, 1);
        (c.limits.mem_mib_max, c.limits.mem_mib_per_uid_max) = (4096, 1024);
    });
    let one = world.create("one");
    world.create("two");
    world.place(&one.id);
    refused(&world, Kind::VmLimit, || {
        world.call::<VmCreate>(&create(|_| {}))
    });
    // Another user has its own quota.
    world
        .daemon()
        .creator
        .create(&user(1000), &create(|_| {}))
        .unwrap();
    world.vmm.hold_starts(Stage::AfterSpawn);
    let mut first = world.begin::<VmStart>(request("one"), vec![]);
    assert!(world.vmm.await_held(1, soon()));
    let e = world.start("two").unwrap_err();
    assert!(
        e.is(Kind::OperationLimit) && e.fault.hint.is_some(),
        "{e:?}"
    );
    // Calls that end something are never refused because of a quota.
    let mut stop_ = world.begin::<VmStop>(stop("one"), vec![]);
    assert_eq!(stop_.finish(PROMPT).unwrap().vm.state, VmState::Stopped);
    assert!(first.finish(PROMPT).is_err());
    world.vmm.release_starts();
    world.start("one").unwrap();
    let said = refused(&world, Kind::MemoryLimit, || world.start("two"));
    assert!(said.contains("1024"), "{said}");
    world.stop("one").unwrap();
    world.start("two").unwrap();
}

#[test]
fn memory_quota_counts_pending_changes() {
    let world = World::with(|c| c.limits.mem_mib_max = 1536);
    world.running("one");
    world.create("two");
    refused(&world, Kind::MemoryLimit, || world.start("two"));
    let set = |vm: &str, mem| {
        world
            .call::<VmSet>(&VmSetRequest {
                vm: vm.into(),
                mem_mib: Some(mem),
                ..Default::default()
            })
            .unwrap();
    };
    set("two", 512);
    let two = world.show("two").unwrap();
    world.place(&two.id);
    world.start("two").unwrap();
    // A pending change counts, because a restart would apply it.
    set("two", 1024);
    let e = world.run::<VmRestart>(stop("two")).unwrap_err();
    assert!(
        e.is(Kind::MemoryLimit) && e.fault.message.contains("it was stopped"),
        "{e:?}"
    );
    assert_eq!(world.state("two"), VmState::Stopped);
    set("two", 256);
    assert_eq!(
        world.run::<VmRestart>(stop("two")).unwrap().vm.state,
        VmState::Running
    );
}

fn ops_seen(world: &World, caller: &Caller) -> Vec<fcd::api::op::Op> {
    let request = fcd::api::op::OpListRequest {
        all: true,
        ..Default::default()
    };
    let page = world.daemon().core.op_list(caller, &request).unwrap();
    assert_eq!(page.next, None);
    page.ops
        .iter()
        .map(|raw| serde_json::from_str(raw.get()).unwrap())
        .collect()
}

#[test]
fn vm_of_another_uid_is_not_found() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let (daemon, them) = (world.daemon(), user(1000));
    assert!(
        daemon
            .views
            .list(
                &them,
                &VmListRequest {
                    all: true,
                    ..Default::default()
                }
            )
            .unwrap()
            .vms
            .is_empty()
    );
    let import = world.import("web");
    let op = ops_seen(&world, &root())[0].id.to_string();
    for text in ["web", vm.id.as_str(), &vm.id.as_str()[..4]] {
        let kinds = [
            daemon.views.show(&them, text).unwrap_err().kind(),
            daemon.lifecycle.start(&them, text).unwrap_err().kind(),
            daemon
                .lifecycle
                .stop(&them, &stop(text))
                .unwrap_err()
                .kind(),
            daemon.lifecycle.kill(&them, text).unwrap_err().kind(),
            daemon
                .lifecycle
                .delete(&them, &delete(text))
                .unwrap_err()
                .kind(),
            daemon.sessions.ssh_config(&them, text).unwrap_err().kind(),
            daemon
                .controls
                .set(
                    &them,
                    &VmSetRequest {
                        vm: text.into(),
                        vcpus: Some(1),
                        ..Default::default()
                    },
                )
                .unwrap_err()
                .kind(),
            daemon
                .transfers
                .export(
                    &them,
                    ExportRequest {
                        vm: text.into(),
                        kind: ExportKind::Tree,
                        no_wait: true,
                    },
                    vec![pipe().1],
                )
                .map(|_| ())
                .unwrap_err()
                .kind(),
        ];
        // If the pipe's reader has exited, the call fails for that before it reveals anything about
        // the VM.
        assert!(
            kinds
                .iter()
                .all(|k| matches!(k, Kind::VmNotFound | Kind::Cancelled)),
            "{kinds:?}"
        );
    }
    assert!(ops_seen(&world, &them).is_empty());
    assert_eq!(
        daemon.core.op_find(&them, &op).unwrap_err().kind(),
        Kind::OperationNotFound
    );
    assert_eq!(
        daemon.core.op_cancel(&them, &op).unwrap_err().kind(),
        Kind::OperationNotFound
    );
    // An owner sees what root does to the owner's VM.
    let mine = daemon
        .creator
        .create(&them, &create(|r| r.name = Some("mine".parse().unwrap())))
        .unwrap();
    world.start("mine").unwrap();
    let seen = ops_seen(&world, &them);
    assert_eq!(
        seen.iter()
            .map(|op| (op.method.as_str(), &op.vm))
            .collect::<Vec<_>>(),
        [("vm.start", &Some(mine.id))]
    );
    assert_eq!(
        daemon.core.op_find(&them, seen[0].id.as_str()).unwrap().id,
        seen[0].id
    );
    let (pruned, _) = daemon.lifecycle.prune(&them).unwrap();
    assert!(pruned.deleted.is_empty());
    assert_eq!(world.state("web"), VmState::Running);
    import.call.hang_up();
    world.await_rest();
}

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
    // A stop cannot ask this guest to shut down, and reports that.
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

/// The reserve lets kill and delete through. Everything else is refused and undone.
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

/// The work of a stop is done when its commit fails. The commit is retried until the disk accepts
/// it.
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
        world.guest.on(fcd::image::SHUTDOWN_COMMAND, |_| {
            fcd::guest::fake::Answer::status(0).stdout("synced\n")
        });
        let mut down = world.begin::<VmStop>(stop("web"), vec![]);
        down.stage("sync and shut down");
        world.daemon().core.store.faults().fail(fault, 3);
        assert!(world.vmm.die(&vm.id, &fcd::vmm::End::GuestShutDown));
        assert_eq!(
            down.finish(SOON).unwrap().vm.state,
            VmState::Stopped,
            "{fault:?}"
        );
        world.await_rest();
    }
}
