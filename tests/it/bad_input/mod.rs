//! Tests of invalid requests. Each fails with the right kind, a message and a hint, and changes
//! nothing.

mod broken_host;
mod limits;
mod owners;

use crate::world::*;
use fcd::testing::api::exec::{ExecStart, ExecStartRequest, Stream};
use fcd::testing::api::op::{OpCancel, OpRequest, OpShow};
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::{
    ExportKind, ExportRequest, PrepareRequest, WorkspaceExport, WorkspacePrepare,
};
use fcd::testing::client::Failure;
use fcd::testing::daemon::Caller;
use fcd::testing::error::{Code, Kind};
use std::os::fd::OwnedFd;

/// Checks that the call fails with this kind, gives a hint, and changes nothing. Returns the
/// error's message.
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
        world.call::<VmSshConfig>(&ssh_config("nobody"))
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
    // Exactly one of twenty concurrent calls succeeds.
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
        world.call::<VmSshConfig>(&ssh_config("web"))
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
) -> Result<fcd::testing::api::exec::ExecReply, Failure> {
    let request = ExecStartRequest {
        vm: vm.into(),
        argv: vec!["true".into()],
        env: vec![],
        workdir: None,
        user: None,
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
