//! Tests of images whose root file system is a user's file.

use crate::guest_runtime::make_runtime;
use crate::kernels::make_kernel;
use crate::world::*;
use fcd::testing::api::image::*;
use fcd::testing::api::kernel::{KernelDelete, KernelRequest};
use fcd::testing::api::page::ListRequest;
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::error::Kind;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// The size of the test's file system, which is not a multiple of the block size.
const BYTES: u64 = 64 * 1024 + 7;
/// The size of the test's disks.
const DISK_BYTES: u64 = 4 << 20;
const STRANGER: u32 = 4_000_000;

/// Returns a world with a guest runtime, and a directory for files.
fn world() -> (World, tempfile::TempDir) {
    let world = World::new();
    make_runtime(&world.config.state_dir, "00000000000a", 7);
    (world, tempfile::tempdir_in("/dev/shm").unwrap())
}

/// Writes a file that begins like an ext4 file system of 16 blocks.
pub fn make_file(dir: &Path) -> PathBuf {
    let path = dir.join("root.ext4");
    let mut bytes = vec![7; BYTES as usize];
    bytes[1024..2048].fill(0);
    bytes[1024 + 0x4] = 16;
    bytes[1024 + 0x18] = 2;
    bytes[1024 + 0x38..1024 + 0x3b].copy_from_slice(&[0x53, 0xef, 1]);
    fs::write(&path, bytes).unwrap();
    path
}

fn named(name: &str) -> ImageRegisterRequest {
    ImageRegisterRequest {
        image: name.parse().unwrap(),
        kernel: None,
    }
}

fn begin(world: &World, request: ImageRegisterRequest, fd: OwnedFd) -> Running<ImageReply> {
    world.begin::<ImageRegister>(request, vec![fd])
}

pub fn register(world: &World, name: &str, path: &Path) -> Result<Image, Failure> {
    let file = File::open(path).unwrap();
    let reply = begin(world, named(name), file.into()).finish(SOON);
    reply.map(|reply| reply.image)
}

pub fn create(world: &World, name: &str, image: &str) -> Result<Vm, Failure> {
    let request = VmCreateRequest {
        name: Some(name.parse().unwrap()),
        image: Some(image.parse().unwrap()),
        disk_bytes: Some(DISK_BYTES),
        ..VmCreateRequest::default()
    };
    let vm = world.call::<VmCreate>(&request)?.vm;
    world.place(&vm.id);
    Ok(vm)
}

pub fn image(name: &str) -> ImageRequest {
    ImageRequest {
        image: name.parse().unwrap(),
    }
}

fn images(world: &World) -> Vec<Image> {
    let listed = world.call::<ImageList>(&ListRequest::default());
    listed.unwrap().images
}

/// Returns the names in the directory of images, except `default`.
fn stored(world: &World) -> Vec<String> {
    let entries = fs::read_dir(world.config.state_dir.join("images")).unwrap();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "default").collect()
}

#[test]
fn file_in_place_is_booted_until_it_changes() {
    let (world, dir) = world();
    let path = make_file(dir.path());
    let before = fs::metadata(&path).unwrap();
    let made = register(&world, "mine", &path).unwrap();
    assert_eq!(made.disk_bytes, BYTES.next_multiple_of(4096));
    let file = made.file.unwrap();
    assert_eq!(Path::new(&file.path), path.canonicalize().unwrap());
    let shown = world.call::<ImageShow>(&image("mine")).unwrap().image;
    assert!(shown.digest.unwrap().starts_with("sha256:"));
    // Nothing was copied into the store.
    let own = fs::read_dir(world.config.state_dir.join("images/mine")).unwrap();
    let own = own.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(
        own.collect::<std::collections::BTreeSet<_>>(),
        ["files.json", "image.json"].map(str::to_owned).into()
    );

    let vm = create(&world, "web", "mine").unwrap();
    world.start("web").unwrap();
    let disk = fs::read(world.vm_dir(&vm.id).join("disk")).unwrap();
    assert_eq!(disk.len() as u64, vm.disk_bytes);
    assert!(disk[..BYTES as usize] == fs::read(&path).unwrap());
    assert!(disk[BYTES as usize..].iter().all(|byte| *byte == 0));
    world.stop("web").unwrap();
    world.start("web").unwrap();
    world.stop("web").unwrap();

    let writer = File::options().write(true).open(&path).unwrap();
    writer.write_at(b"x", 50_000).unwrap();
    let e = world.start("web").unwrap_err();
    let hint = e.fault.hint.clone().unwrap();
    assert!(
        e.is(Kind::Conflict) && e.to_string().contains("it was written"),
        "{e}"
    );
    assert!(hint.contains("fcctl image rm mine"), "{hint}");
    let listed = images(&world).into_iter().find_map(|image| image.file);
    assert!(listed.unwrap().changed.unwrap().contains("it was written"));
    // A VM that has no disk yet does not start either, and leaves nothing behind.
    create(&world, "new", "mine").unwrap();
    assert!(world.start("new").unwrap_err().is(Kind::Conflict));
    let e = world.call::<ImageDelete>(&image("mine")).unwrap_err();
    assert!(
        e.is(Kind::Conflict) && e.to_string().contains("2 VMs"),
        "{e}"
    );
    for vm in ["web", "new"] {
        world.delete(vm).unwrap();
    }
    world.call::<ImageDelete>(&image("mine")).unwrap();
    assert!(stored(&world).is_empty());
    let after = fs::metadata(&path).unwrap();
    assert_eq!((after.ino(), after.nlink()), (before.ino(), 1));
}

#[test]
fn path_that_leads_elsewhere_is_never_read() {
    let (world, dir) = world();
    let path = make_file(dir.path());
    register(&world, "mine", &path).unwrap();
    create(&world, "web", "mine").unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, vec![9; BYTES as usize]).unwrap();
    let kept = dir.path().join("kept");
    fs::rename(&path, &kept).unwrap();
    let refused = |says: &str| {
        let e = world.start("web").unwrap_err();
        assert!(e.is(Kind::Conflict) && e.to_string().contains(says), "{e}");
    };
    refused("it is gone");
    symlink(&secret, &path).unwrap();
    refused("symbolic link");
    fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    refused("a pipe");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    refused("a directory");
    fs::remove_dir(&path).unwrap();
    fs::copy(&kept, &path).unwrap();
    refused("another file");
    fs::remove_file(&path).unwrap();
    fs::rename(&kept, &path).unwrap();
    // A rename changes the file's ctime, which then no longer proves that the content is unchanged.
    refused("attributes");
}

#[test]
fn unusable_descriptors_are_refused_and_leave_nothing() {
    let (world, dir) = world();
    world.open_to_everybody();
    let path = make_file(dir.path());
    let open = |path: &Path| OwnedFd::from(File::open(path).unwrap());
    let refused = |fds: Vec<OwnedFd>| {
        let call = world.begin::<ImageRegister>(named("mine"), fds);
        let mut call = call;
        call.finish(SOON).unwrap_err()
    };
    assert!(refused(vec![]).is(Kind::InvalidRequest));
    assert!(refused(vec![open(&path), open(&path)]).is(Kind::InvalidRequest));
    let (reader, _writer) = pipe();
    for fd in [open(dir.path()), open(Path::new("/dev/zero")), reader] {
        assert!(refused(vec![fd]).is(Kind::InvalidArgument));
    }
    let flags = rustix::fs::OFlags::PATH;
    let by_path = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
    assert!(refused(vec![by_path]).is(Kind::InvalidArgument));
    // Another user cannot register the file, even with a descriptor of it.
    let fd = open(&path);
    let theirs = as_uid(STRANGER, || {
        let mut call = begin(&world, named("mine"), fd);
        call.finish(SOON).map(drop).unwrap_err()
    });
    assert!(theirs.is(Kind::Denied), "{theirs}");
    let empty = dir.path().join("empty");
    fs::write(&empty, "").unwrap();
    let not_ext4 = register(&world, "mine", &empty).unwrap_err();
    assert!(not_ext4.is(Kind::InvalidImage));
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(BYTES - 4096).unwrap();
    let short = register(&world, "mine", &path).unwrap_err();
    assert!(short.is(Kind::InvalidImage), "{short}");
    let unknown = ImageRegisterRequest {
        kernel: Some("none".parse().unwrap()),
        ..named("mine")
    };
    let e = begin(&world, unknown, open(&path))
        .finish(SOON)
        .unwrap_err();
    assert!(e.is(Kind::KernelNotFound));
    world.await_rest();
    assert_eq!((stored(&world).len(), images(&world).len()), (0, 1));
}

#[test]
fn file_that_changes_during_check_is_not_registered() {
    let (world, dir) = world();
    let path = make_file(dir.path());
    world.builds.checks_are_held.store(true, Ordering::SeqCst);
    let mut call = begin(&world, named("mine"), File::open(&path).unwrap().into());
    await_that("the check runs", || {
        world.builds.checks_running.load(Ordering::SeqCst) == 1
    });
    // The name is taken as soon as the registration begins.
    assert!(register(&world, "mine", &path).unwrap_err().is(Kind::Busy));
    let writer = File::options().write(true).open(&path).unwrap();
    writer.write_at(b"x", 50_000).unwrap();
    world.builds.checks_are_held.store(false, Ordering::SeqCst);
    assert!(call.finish(SOON).unwrap_err().is(Kind::Conflict));
    assert!(stored(&world).is_empty());
    register(&world, "mine", &path).unwrap();
    let again = register(&world, "mine", &path).unwrap_err();
    assert!(again.is(Kind::NameTaken));
}

#[test]
fn cancelled_registration_leaves_nothing() {
    let (world, dir) = world();
    let path = make_file(dir.path());
    world.builds.checks_are_held.store(true, Ordering::SeqCst);
    let call = begin(&world, named("mine"), File::open(&path).unwrap().into());
    await_that("the check runs", || {
        world.builds.checks_running.load(Ordering::SeqCst) == 1
    });
    call.hang_up();
    world.await_rest();
    assert!(stored(&world).is_empty());
    world.builds.checks_are_held.store(false, Ordering::SeqCst);
    register(&world, "mine", &path).unwrap();
}

#[test]
fn image_in_place_is_private_and_counts_against_the_limit() {
    let world = World::with(|config| config.limits.images_per_uid_max = 1);
    make_runtime(&world.config.state_dir, "00000000000a", 7);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    world.open_to_everybody();
    let path = make_file(dir.path());
    std::os::unix::fs::chown(&path, Some(STRANGER), None).unwrap();
    // Only the owner can open the file. Even the uid that checks file systems cannot.
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(&path, private).unwrap();
    let fd = File::open(&path).unwrap().into();
    as_uid(STRANGER, || {
        begin(&world, named("theirs"), fd).finish(SOON).unwrap();
        let fd = File::open("/proc/self/exe").unwrap().into();
        let e = begin(&world, named("more"), fd).finish(SOON).unwrap_err();
        assert!(e.is(Kind::Denied));
    });
    let again = File::open(&path).unwrap().into();
    as_uid(STRANGER, || {
        let e = begin(&world, named("more"), again)
            .finish(SOON)
            .unwrap_err();
        assert!(e.is(Kind::Exhausted), "{e}");
        create(&world, "own", "theirs").unwrap();
        world.start("own").unwrap();
    });
    let other = as_uid(STRANGER + 1, || {
        let listed = images(&world);
        assert_eq!(listed.len(), 1);
        create(&world, "web", "theirs").unwrap_err()
    });
    assert!(other.is(Kind::ImageNotFound), "{other}");
    // Root must use the image's full name, so that root does not boot another user's image by
    // mistake.
    let e = create(&world, "web", "theirs").unwrap_err();
    assert!(e.is(Kind::ImageNotFound), "{e}");
    let theirs = format!("@{STRANGER}/theirs");
    let vm = create(&world, "explicit", &theirs).unwrap();
    assert_eq!(vm.image.to_string(), theirs);
    world
        .call::<ImageTag>(&ImageTagRequest {
            image: theirs.parse().unwrap(),
            name: "alias".parse().unwrap(),
            shared: false,
        })
        .unwrap();
    create(&world, "web", "alias").unwrap();
    world.start("web").unwrap();
    assert!(
        register(&world, "mine", &path)
            .unwrap_err()
            .is(Kind::Denied)
    );
}

#[test]
fn registered_kernel_is_the_default_and_stays() {
    let (world, dir) = world();
    let path = make_file(dir.path());
    let kernel = make_kernel(&world, true);
    let request = ImageRegisterRequest {
        kernel: Some("mine".parse().unwrap()),
        ..named("root")
    };
    let fd = || File::open(&path).unwrap().into();
    let made = begin(&world, request.clone(), fd()).finish(SOON).unwrap();
    assert_eq!(made.image.kernel, "kernel mine");
    let vm = create(&world, "web", "root").unwrap();
    world.start("web").unwrap();
    assert_eq!(
        world.vmm.last_spec(&vm.id).unwrap().kernel,
        kernel.join("vmlinux")
    );
    world.delete("web").unwrap();
    let delete = || {
        world.call::<KernelDelete>(&KernelRequest {
            kernel: "mine".parse().unwrap(),
        })
    };
    let e = delete().unwrap_err();
    assert!(
        e.is(Kind::Conflict) && e.to_string().contains("image root"),
        "{e}"
    );
    world.call::<ImageDelete>(&image("root")).unwrap();
    delete().unwrap();
    // A kernel of an earlier version cannot start the runtime's init.
    make_kernel(&world, false);
    let e = begin(&world, request, fd()).finish(SOON).unwrap_err();
    assert!(e.is(Kind::Unsupported), "{e}");
}

#[test]
fn register_create_and_rm_of_one_name_end_in_one_state() {
    const ROUNDS: usize = 25;
    let (world, dir) = world();
    let path = make_file(dir.path());
    for round in 0..ROUNDS {
        let vm = format!("web-{round}");
        let (made, created, deleted) = std::thread::scope(|scope| {
            let made = scope.spawn(|| register(&world, "mine", &path));
            let created = scope.spawn(|| {
                create(&world, &vm, "mine")?;
                world.start(&vm)
            });
            let deleted = scope.spawn(|| world.call::<ImageDelete>(&image("mine")));
            (
                made.join().unwrap(),
                created.join().unwrap(),
                deleted.join().unwrap(),
            )
        });
        // No other image had the name, so the registration succeeds.
        made.unwrap();
        let is_there = stored(&world) == ["mine"];
        assert_eq!(is_there, deleted.is_err());
        match created {
            Ok(_) => assert!(is_there, "a VM runs without its image"),
            Err(e) => assert!(e.is(Kind::ImageNotFound), "{e}"),
        }
        let _ = world.delete(&vm);
        if is_there {
            world.call::<ImageDelete>(&image("mine")).unwrap();
        }
    }
}

/// VMs of a promoted image keep their disks, and new ones need no file.
#[test]
fn promoted_image_and_its_vms_do_not_need_the_file() {
    let (world, dir) = world();
    let path = make_file(dir.path());
    register(&world, "mine", &path).unwrap();
    create(&world, "old", "mine").unwrap();
    world.start("old").unwrap();
    let content = fs::read(&path).unwrap();
    let made = world.run::<ImagePromote>(image("mine")).unwrap().image;
    assert_eq!((made.file, made.vms), (None, 1));
    fs::remove_file(&path).unwrap();
    world.stop("old").unwrap();
    world.start("old").unwrap();
    let vm = create(&world, "new", "mine").unwrap();
    world.start("new").unwrap();
    let stored = world.config.state_dir.join("images/mine/rootfs.ext4");
    assert!(fs::read(&stored).unwrap().starts_with(&content));
    assert_eq!(vm.disk_bytes, DISK_BYTES);
    // A second promotion changes nothing.
    world.run::<ImagePromote>(image("mine")).unwrap();
    world.run::<ImagePromote>(image("default")).unwrap();
    let e = world.run::<ImagePromote>(image("none")).unwrap_err();
    assert!(e.is(Kind::ImageNotFound));
}

#[test]
fn only_the_owner_promotes_and_only_what_was_registered() {
    let (world, dir) = world();
    world.open_to_everybody();
    let path = make_file(dir.path());
    register(&world, "mine", &path).unwrap();
    let denied = as_uid(STRANGER, || {
        let call = world.run::<ImagePromote>(image("mine"));
        call.map(drop).unwrap_err()
    });
    assert!(denied.is(Kind::Denied), "{denied}");
    fs::write(&path, "x").unwrap();
    let e = world.run::<ImagePromote>(image("mine")).unwrap_err();
    assert!(e.is(Kind::Conflict), "{e}");
    world.await_rest();
    assert_eq!(stored(&world), ["mine"]);
}

#[test]
fn promote_and_rm_of_one_name_end_in_one_state() {
    const ROUNDS: usize = 25;
    let (world, dir) = world();
    let path = make_file(dir.path());
    for _ in 0..ROUNDS {
        register(&world, "mine", &path).unwrap();
        let (promoted, deleted) = std::thread::scope(|scope| {
            let promoted = scope.spawn(|| world.run::<ImagePromote>(image("mine")));
            let deleted = scope.spawn(|| world.call::<ImageDelete>(&image("mine")));
            (promoted.join().unwrap(), deleted.join().unwrap())
        });
        match (&promoted, &deleted) {
            (Ok(_), _) => {}
            (Err(e), Ok(_)) => assert!(e.is(Kind::ImageNotFound), "{e}"),
            (Err(e), Err(_)) => panic!("both calls failed: {e}"),
        }
        assert_eq!(stored(&world).is_empty(), deleted.is_ok());
        if let Err(e) = deleted {
            assert!(e.is(Kind::Busy), "{e}");
            world.call::<ImageDelete>(&image("mine")).unwrap();
        }
    }
}

/// A commit saves the VM's disk even if the image's file is gone.
#[test]
fn disk_of_vm_is_committed_without_the_file() {
    let (world, dir) = world();
    let path = make_file(dir.path());
    register(&world, "mine", &path).unwrap();
    create(&world, "web", "mine").unwrap();
    world.start("web").unwrap();
    world.stop("web").unwrap();
    fs::remove_file(&path).unwrap();
    assert!(world.start("web").unwrap_err().is(Kind::Conflict));
    let request = ImageCommitRequest {
        vm: "web".into(),
        image: "saved".parse().unwrap(),
        recipe: None,
        temporary: false,
    };
    let saved = world.run::<ImageCommit>(request).unwrap().image;
    assert_eq!((saved.file, saved.disk_bytes), (None, DISK_BYTES));
    world.delete("web").unwrap();
    world.call::<ImageDelete>(&image("mine")).unwrap();
    create(&world, "again", "saved").unwrap();
    world.start("again").unwrap();
}
