//! Tests of images that are made from disks of VMs.

use crate::guest_runtime::{make_image_of, make_runtime};
use crate::image_register::{create, image};
use crate::world::*;
use fcd::testing::api::image::*;
use fcd::testing::api::page::ListRequest;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use std::sync::atomic::Ordering;

fn commit(vm: &str, image: &str) -> ImageCommitRequest {
    ImageCommitRequest {
        vm: vm.into(),
        image: image.parse().unwrap(),
        recipe: Some("sha256:of-a-script".into()),
        temporary: false,
    }
}

#[test]
fn stopped_vm_becomes_image() {
    let world = World::new();
    world.running("web");
    world.stop("web").unwrap();
    let made = world
        .run::<ImageCommit>(commit("web", "mine"))
        .unwrap()
        .image;
    assert_eq!(made.disk_bytes, world.show("web").unwrap().disk_bytes);
    assert_eq!(made.recipe.as_deref(), Some("sha256:of-a-script"));
    assert!(made.digest.is_some_and(|d| d.starts_with("sha256:")));
    let listed = world.call::<ImageList>(&ListRequest::default()).unwrap();
    assert_eq!(listed.images.len(), 2);
    let request = VmCreateRequest {
        name: Some("twin".parse().unwrap()),
        image: Some("mine".parse().unwrap()),
        ..VmCreateRequest::default()
    };
    world.call::<VmCreate>(&request).unwrap();
    world.start("twin").unwrap();
    let again = world.run::<ImageCommit>(commit("web", "mine"));
    assert!(again.unwrap_err().is(Kind::NameTaken));
}

#[test]
fn commit_needs_stopped_vm_with_disk() {
    let world = World::new();
    world.create("new");
    world.running("web");
    for vm in ["new", "web"] {
        let e = world.run::<ImageCommit>(commit(vm, "mine")).unwrap_err();
        assert!(e.is(Kind::WrongState));
    }
    let images = world.call::<ImageList>(&ListRequest::default()).unwrap();
    assert_eq!(images.images.len(), 1);
}

/// A name without a tag can mean another image to root than to the VM's owner.
#[test]
fn commit_by_root_is_based_on_the_image_of_the_vm() {
    const ALICE: u32 = 3001;
    let world = World::new();
    world.open_to_everybody();
    let state = &world.config.state_dir;
    make_runtime(state, "00000000000a", 7);
    make_image_of(state, "plain", "alice", Some(ALICE));
    make_image_of(state, "plain:latest", "root", None);
    as_uid(ALICE, || {
        create(&world, "web", "plain").unwrap();
        world.start("web").unwrap();
        world.stop("web").unwrap();
    });
    world.run::<ImageCommit>(commit("web", "mine")).unwrap();
    let shown = world.call::<ImageShow>(&image("mine")).unwrap();
    assert_eq!(shown.config.user, "alice");
}

/// A start never waits for a commit, and a disk that changes while it is read does not become an
/// image.
#[test]
fn start_during_commit_makes_commit_fail() {
    let world = World::with(|config| config.limits.builds_per_uid_max = 2);
    world.running("web");
    world.stop("web").unwrap();
    world.builds.are_held.store(true, Ordering::SeqCst);
    let request = ImageBuildRequest {
        name: Some("other".parse().unwrap()),
        ..ImageBuildRequest::default()
    };
    let mut build = world.begin::<ImageBuild>(request, vec![]);
    await_that("the build runs", || {
        world.builds.running.load(Ordering::SeqCst) == 1
    });
    let mut commit = world.begin::<ImageCommit>(commit("web", "mine"), vec![]);
    commit.stage("wait for another build");
    world.start("web").unwrap();
    world.builds.are_held.store(false, Ordering::SeqCst);
    build.finish(SOON).unwrap_err();
    assert!(commit.finish(SOON).unwrap_err().is(Kind::Conflict));
    let images = world.call::<ImageList>(&ListRequest::default()).unwrap();
    assert_eq!(images.images.len(), 1);
}

/// `fcctl` makes images from VMs that are deleted even if `fcctl` is killed.
#[test]
fn kept_rm_vm_becomes_image_and_is_deleted_with_its_holder() {
    let world = World::new();
    let request = VmCreateRequest {
        name: Some("web".parse().unwrap()),
        rm: true,
        hold: true,
        ..VmCreateRequest::default()
    };
    let held = world.begin::<VmCreate>(request, vec![]);
    await_that("the VM exists", || world.show("web").is_ok());
    world.place(&world.show("web").unwrap().id);
    world.start("web").unwrap();
    let keep = VmStopRequest {
        keep: true,
        ..stop("web")
    };
    world.run::<VmStop>(keep).unwrap();
    world.run::<ImageCommit>(commit("web", "mine")).unwrap();
    assert_eq!(world.state("web"), VmState::Stopped);
    held.hang_up();
    await_that("the VM is deleted", || world.show("web").is_err());
}

/// A delete may remove the new image before the commit replies. The commit must still succeed.
#[test]
fn commit_and_rm_of_one_name_end_in_one_state() {
    const ROUNDS: usize = 15;
    let world = World::new();
    world.running("web");
    world.stop("web").unwrap();
    let delete = || {
        world.call::<ImageDelete>(&ImageRequest {
            image: "mine".parse().unwrap(),
        })
    };
    for _ in 0..ROUNDS {
        let is_deleted = std::thread::scope(|scope| {
            let made = scope.spawn(|| world.run::<ImageCommit>(commit("web", "mine")));
            let mut is_deleted = false;
            while !made.is_finished() {
                match delete() {
                    Ok(_) => is_deleted = true,
                    Err(e) => assert!(e.is(Kind::ImageNotFound) || e.is(Kind::Busy), "{e}"),
                }
            }
            made.join().unwrap().unwrap();
            is_deleted
        });
        if !is_deleted {
            delete().unwrap();
        }
    }
}

/// The daemon deletes the image, because `fcctl` may be killed before it can do so.
#[test]
fn temporary_image_is_deleted_with_its_last_vm() {
    let mut world = World::new();
    world.running("web");
    world.stop("web").unwrap();
    let request = ImageCommitRequest {
        temporary: true,
        ..commit("web", "copy")
    };
    world.run::<ImageCommit>(request).unwrap();
    let request = VmCreateRequest {
        name: Some("twin".parse().unwrap()),
        image: Some("copy".parse().unwrap()),
        ..VmCreateRequest::default()
    };
    world.call::<VmCreate>(&request).unwrap();
    world.restart_daemon();
    world.daemon().images.delete_temporary_images();
    let images = || {
        let listed = world.call::<ImageList>(&ListRequest::default()).unwrap();
        listed.images.len()
    };
    assert_eq!(images(), 2, "the image is still in use");
    world.delete("twin").unwrap();
    await_that("the image is deleted", || images() == 1);
}
