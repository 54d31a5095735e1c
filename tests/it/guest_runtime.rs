//! Tests of VMs whose image has no kernel and no init, and that boot with a guest runtime.

use crate::image_register::create;
use crate::world::*;
use fcd::testing::api::image::{ImageConfig, ImagePrune, ImagePruneRequest};
use fcd::testing::api::vm::{
    Init, Synced, VmCreate, VmCreateRequest, VmShow, VmStart, VmStop, VmStopRequest,
};
use fcd::testing::error::Kind;
use fcd::testing::guest::fake::Answer;
use fcd::testing::vmm::fake::Stage;
use std::path::{Path, PathBuf};

/// Registers an image that has only a root file system.
fn make_image(state_dir: &Path, name: &str) {
    make_image_of(state_dir, name, "dev", None);
}

/// Registers an image whose commands run as `user`. An image with an owner is private.
pub fn make_image_of(state_dir: &Path, name: &str, user: &str, owner_uid: Option<u32>) {
    let dir = state_dir.join("images").join(name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("rootfs.ext4"), vec![0; 8192]).unwrap();
    let config = ImageConfig {
        user: user.to_owned(),
        ..ImageConfig::default()
    };
    let image = serde_json::json!({
        "format": 2, "name": name, "os": "", "kernel_version": "", "packages": [], "built_at": 7,
        "config": config, "files": [{"name": "rootfs.ext4", "bytes": 8192, "sha256": ""}],
        "owner_uid": owner_uid, "private": owner_uid.is_some(),
    });
    std::fs::write(dir.join("image.json"), image.to_string()).unwrap();
}

/// Publishes a runtime with empty contents, and returns its directory.
pub fn make_runtime(state_dir: &Path, id: &str, built_at: u64) -> PathBuf {
    let dir = state_dir.join("runtimes").join(id);
    std::fs::create_dir_all(&dir).unwrap();
    let files = ["vmlinux", "initrd", "runtime.ext4"].map(|name| {
        std::fs::write(dir.join(name), id).unwrap();
        serde_json::json!({"name": name, "bytes": id.len(), "sha256": ""})
    });
    let runtime = serde_json::json!({
        "id": id, "kernel_version": "6.1", "packages": [], "built_at": built_at, "own_digest": "", "files": files,
    });
    std::fs::write(dir.join("runtime.json"), runtime.to_string()).unwrap();
    dir
}

#[test]
fn image_without_init_boots_newest_runtime() {
    let world = World::new();
    let state = world.config.state_dir.clone();
    make_image(&state, "small");
    let request = VmCreateRequest {
        name: Some("a".parse().unwrap()),
        image: Some("small".parse().unwrap()),
        work_disk_bytes: Some(32 << 20),
        ..VmCreateRequest::default()
    };
    let vm = world.call::<VmCreate>(&request).unwrap().vm;
    world.place(&vm.id);
    let e = world.start("a").unwrap_err();
    let hint = e.fault.hint.clone().unwrap_or_default();
    assert!(
        e.is(Kind::ImageNotFound) && hint.contains("image build"),
        "{e:?}"
    );

    let old = make_runtime(&state, "00000000000a", 7);
    world.start("a").unwrap();
    let spec = world.vmm.last_spec(&vm.id).unwrap();
    assert_eq!(
        (&spec.kernel, &spec.initrd, spec.runtime_disk.as_ref()),
        (
            &old.join("vmlinux"),
            &old.join("initrd"),
            Some(&old.join("runtime.ext4"))
        )
    );
    assert!(
        spec.boot_args.contains(" fcd.runtime "),
        "{}",
        spec.boot_args
    );
    let seed = std::fs::read(&spec.seed).unwrap();
    let text = String::from_utf8_lossy(&seed);
    assert!(text.contains("user=dev\0working_dir=\0"));

    // A running VM keeps its runtime. The next boot takes the newest one.
    let new = make_runtime(&state, "00000000000b", 8);
    let prune = || {
        let request = ImagePruneRequest { all: false };
        world.call::<ImagePrune>(&request).unwrap().runtimes
    };
    assert_eq!(prune(), Vec::<String>::new());
    assert_eq!(world.stop("a").unwrap().synced, Some(Synced::Yes));
    assert_eq!(prune(), ["00000000000a"]);
    world.start("a").unwrap();
    let spec = world.vmm.last_spec(&vm.id).unwrap();
    assert_eq!(spec.runtime_disk, Some(new.join("runtime.ext4")));

    let (own, _) = world.running("own");
    let spec = world.vmm.last_spec(&own.id).unwrap();
    assert_eq!(spec.runtime_disk, None);
    assert!(!spec.boot_args.contains("fcd.runtime"));
}

/// Another runtime may be published after a boot has chosen the newest one, and before the VM's row
/// names it.
#[test]
fn prune_keeps_runtime_that_boot_has_chosen() {
    let world = World::with(|config| config.limits.boots_max = 1);
    let state = world.config.state_dir.clone();
    make_image(&state, "small");
    let chosen = make_runtime(&state, "00000000000a", 7);
    let vm = create(&world, "a", "small").unwrap();
    world.place(&world.create("other").id);
    world.vmm.hold_starts(Stage::AfterSpawn);
    let mut other = world.begin::<VmStart>(request("other"), vec![]);
    assert!(world.vmm.await_held(1, soon()));
    let mut start = world.begin::<VmStart>(request("a"), vec![]);
    start.stage("wait for other boots");
    while_locked(&world, &vm, || {
        world.vmm.release_starts();
        await_that("the boot is about to change the VM's row", || {
            let mut locks = world.daemon().core.debug_locks().locks.into_iter();
            locks.any(|lock| lock.holder.is_some() && !lock.waiters.is_empty())
        });
        make_runtime(&state, "00000000000b", 8);
        let request = ImagePruneRequest { all: false };
        let pruned = world.call::<ImagePrune>(&request).unwrap();
        assert_eq!(pruned.runtimes, Vec::<String>::new());
    });
    other.finish(SOON).unwrap();
    let vm = start.finish(SOON).unwrap().vm;
    let spec = world.vmm.last_spec(&vm.id).unwrap();
    assert_eq!(spec.runtime_disk, Some(chosen.join("runtime.ext4")));
    assert!(chosen.exists());
}

#[test]
fn init_of_image_is_run_and_must_power_off_itself() {
    let world = World::new();
    let state = world.config.state_dir.clone();
    make_image(&state, "small");
    make_runtime(&state, "00000000000a", 7);
    let request = |image: Option<&str>| VmCreateRequest {
        name: Some("a".parse().unwrap()),
        image: image.map(|name| name.parse().unwrap()),
        init: Some(Init::Image),
        ..VmCreateRequest::default()
    };
    let e = world.call::<VmCreate>(&request(None)).unwrap_err();
    assert!(e.is(Kind::Unsupported), "{e:?}");
    let vm = world.call::<VmCreate>(&request(Some("small"))).unwrap().vm;
    world.place(&vm.id);
    world.start("a").unwrap();
    let spec = world.vmm.last_spec(&vm.id).unwrap();
    assert!(
        spec.boot_args.contains(" systemd.firstboot=no "),
        "{}",
        spec.boot_args
    );
    let seed = std::fs::read(&spec.seed).unwrap();
    assert!(String::from_utf8_lossy(&seed).contains("\ninit=image\n"));
    assert_eq!(world.stop("a").unwrap().synced, Some(Synced::Yes));

    // The image's services may still write between the guest's sync and its end.
    world.start("a").unwrap();
    world.guest.on("/.fcd/lib/shutdown 1", |_| {
        Answer::status(0).stdout("synced\n")
    });
    let request = VmStopRequest {
        vm: "a".into(),
        timeout_ms: Some(100),
        force: false,
        keep: false,
    };
    let vm = world.run::<VmStop>(request).unwrap().vm;
    assert_eq!(vm.synced, Some(Synced::Timeout));
    let request = fcd::testing::api::vm::VmRequest { vm: "a".into() };
    assert_eq!(world.call::<VmShow>(&request).unwrap().vm.init, Init::Image);
}
