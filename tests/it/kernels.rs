//! Tests of kernels over the socket: who may import them, and which imports are refused before
//! anything is read. End-to-end tests cover successful imports.

use crate::world::*;
use fcd::testing::api::kernel::*;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use std::path::PathBuf;

fn request(path: PathBuf) -> KernelImportRequest {
    KernelImportRequest {
        path,
        name: None,
        modules: None,
    }
}

#[test]
fn kernel_import_of_invalid_file_leaves_nothing() {
    let world = World::new();
    let empty = world.census();
    world.open_to_everybody();
    let denied = as_uid(4_000_000, || {
        world
            .run::<KernelImport>(request("/boot/vmlinuz".into()))
            .map(drop)
            .unwrap_err()
    });
    assert!(denied.is(Kind::Denied), "{denied:?}");
    let import = |path: PathBuf| {
        world
            .run::<KernelImport>(request(path))
            .map(drop)
            .unwrap_err()
    };
    assert!(import("vmlinuz".into()).is(Kind::InvalidArgument));
    assert!(import("/no/such/file".into()).is(Kind::PathNotFound));
    let file = tempfile::NamedTempFile::new().unwrap();
    // These are an empty file, a directory, a device, a pipe without a writer, a script, half a
    // kernel, and a 32-bit kernel.
    assert!(import(file.path().to_owned()).is(Kind::Unsupported));
    assert!(import(std::env::temp_dir()).is(Kind::Unsupported));
    assert!(import("/dev/zero".into()).is(Kind::Unsupported));
    let pipe = world.config.state_dir.with_file_name("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(import(pipe).is(Kind::Unsupported));
    for bytes in [&b"#!/bin/sh\n"[..], b"\x7fELF\x02\x01", b"\x7fELF\x01\x01"] {
        std::fs::write(file.path(), bytes).unwrap();
        assert!(import(file.path().to_owned()).is(Kind::Unsupported));
    }
    world.await_rest();
    assert_eq!(world.census(), empty);
    assert_eq!(
        world
            .call::<KernelList>(&Default::default())
            .unwrap()
            .kernels,
        []
    );
}

/// Creates the files of an imported kernel, of this version or an earlier one. Returns their
/// directory.
pub fn make_kernel(world: &World, boots_runtime: bool) -> PathBuf {
    let dir = world.config.state_dir.join("kernels/mine");
    let draft = dir.with_file_name("draft");
    std::fs::create_dir(&draft).unwrap();
    for file in ["vmlinux", "initrd"] {
        std::fs::write(draft.join(file), "x").unwrap();
    }
    let about = serde_json::json!({
        "name": "mine", "version": "6.1", "modules": [], "imported_at": 7,
        "boots_runtime": boots_runtime,
    });
    std::fs::write(draft.join("kernel.json"), about.to_string()).unwrap();
    std::fs::rename(&draft, &dir).unwrap();
    dir
}

#[test]
fn kernel_in_use_by_create_is_not_deleted() {
    const ROUNDS: u32 = 40;
    let world = World::new();
    let kernel = || "mine".parse().unwrap();
    for round in 0..ROUNDS {
        let dir = make_kernel(&world, false);
        let name = format!("web-{round}");
        let create = VmCreateRequest {
            name: Some(name.parse().unwrap()),
            kernel: Some(kernel()),
            ..Default::default()
        };
        let (created, deleted) = std::thread::scope(|scope| {
            let creates = scope.spawn(|| world.call::<VmCreate>(&create));
            let deletes =
                scope.spawn(|| world.call::<KernelDelete>(&KernelRequest { kernel: kernel() }));
            (creates.join().unwrap(), deletes.join().unwrap())
        });
        match (&created, &deleted) {
            (Ok(_), Err(e)) => assert!(e.is(Kind::Conflict) || e.is(Kind::Busy), "{e}"),
            (Err(e), Ok(_)) => assert!(e.is(Kind::KernelNotFound), "{e}"),
            other => panic!("the create and the delete both succeeded, or both failed: {other:?}"),
        }
        assert_eq!(dir.exists(), created.is_ok());
        if created.is_ok() {
            world.delete(&name).unwrap();
            world
                .call::<KernelDelete>(&KernelRequest { kernel: kernel() })
                .unwrap();
        }
    }
}

#[test]
fn kernel_in_use_by_vm_is_not_deleted() {
    let world = World::new();
    let name = || Some("mine".parse().unwrap());
    let create = || {
        world.call::<VmCreate>(&VmCreateRequest {
            name: Some("web".parse().unwrap()),
            kernel: name(),
            ..Default::default()
        })
    };
    assert!(create().unwrap_err().is(Kind::KernelNotFound));
    let dir = make_kernel(&world, false);
    let vm = create().unwrap().vm;
    world.place(&vm.id);
    world.start("web").unwrap();
    let spec = world.vmm.last_spec(&vm.id).unwrap();
    assert_eq!(
        (spec.kernel, spec.initrd),
        (dir.join("vmlinux"), dir.join("initrd"))
    );
    let named = || KernelRequest {
        kernel: "mine".parse().unwrap(),
    };
    assert_eq!(world.call::<KernelShow>(&named()).unwrap().kernel.vms, 1);
    assert!(
        world
            .call::<KernelDelete>(&named())
            .unwrap_err()
            .is(Kind::Conflict)
    );
    world.open_to_everybody();
    assert!(as_uid(4_000_000, || world
        .call::<KernelDelete>(&named())
        .unwrap_err()
        .is(Kind::Denied)));
    // Someone removed the kernel's files. The VM keeps running but cannot start again.
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(
        world
            .run::<VmRestart>(stop("web"))
            .unwrap_err()
            .is(Kind::KernelNotFound)
    );
    world.delete("web").unwrap();
    assert!(
        world
            .call::<KernelDelete>(&named())
            .unwrap_err()
            .is(Kind::KernelNotFound)
    );
}
