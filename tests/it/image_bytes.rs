//! Tests of the limit of the disk space that one user's images may take.

use crate::image_register::create;
use crate::pulls;
use crate::world::*;
use fcd::testing::api::image::*;
use fcd::testing::api::page::ListRequest;
use fcd::testing::api::vm::{VmCreate, VmCreateRequest};
use fcd::testing::client::Failure;
use fcd::testing::error::Kind;
use std::sync::atomic::Ordering;

const ALICE: u32 = 3001;

/// Returns a world whose daemon accepts every user and has this limit.
fn world(limit: u64) -> World {
    let world = pulls::world_with(|config| config.registry.image_bytes_per_uid_max = limit);
    world.open_to_everybody();
    world
}

/// Returns the disk space that the image of these tests takes once it is pulled.
fn pulled_bytes() -> u64 {
    let world = world(u64::MAX);
    pulls::pull(&world, "measured", false).allocated_bytes
}

fn begin_pull(world: &World, name: &str) -> Running<ImageReply> {
    let request = ImagePullRequest {
        name: Some(name.parse().unwrap()),
        ..pulls::request(false)
    };
    world.begin::<ImagePull>(request, vec![pulls::stream(name)])
}

fn tag(world: &World, image: &str, name: &str) -> Result<Image, Failure> {
    let request = ImageTagRequest {
        image: image.parse().unwrap(),
        name: name.parse().unwrap(),
        shared: false,
    };
    world.call::<ImageTag>(&request).map(|reply| reply.image)
}

fn images(world: &World) -> usize {
    let listed = world.call::<ImageList>(&ListRequest::default());
    listed.unwrap().images.len()
}

#[test]
fn parallel_pulls_do_not_exceed_the_limit_together() {
    let world = world(pulled_bytes() / 2 * 3);
    let before = images(&world);
    world.builds.checks_are_held.store(true, Ordering::SeqCst);
    let pulls = as_uid(ALICE, || ["a", "b"].map(|name| begin_pull(&world, name)));
    await_that("both images are complete", || {
        world.builds.checks_running.load(Ordering::SeqCst) == 2
    });
    world.builds.checks_are_held.store(false, Ordering::SeqCst);
    let refused = pulls.map(|mut pull| pull.finish(SOON).err());
    let refused: Vec<Failure> = refused.into_iter().flatten().collect();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused[0].is(Kind::Exhausted), "{}", refused[0]);
    assert_eq!(images(&world), before + 1);
}

/// Neither of two images is published when the second one is checked.
#[test]
fn image_that_is_being_published_counts() {
    let world = world(pulled_bytes() / 2 * 3);
    world.points.hold("publish the image");
    let mut first = as_uid(ALICE, || begin_pull(&world, "a"));
    await_that("the first image is admitted", || world.points.is_holding());
    let mut second = as_uid(ALICE, || begin_pull(&world, "b"));
    let e = second.finish(SOON).map(drop).unwrap_err();
    assert!(e.is(Kind::Exhausted), "{e}");
    world.points.release();
    first.finish(SOON).unwrap();
}

#[test]
fn tags_of_one_image_count_once() {
    let world = world(pulled_bytes() / 2 * 5);
    as_uid(ALICE, || {
        begin_pull(&world, "one").finish(SOON).unwrap();
        tag(&world, "one", "one:1").unwrap();
        tag(&world, "one", "one:2").unwrap();
        begin_pull(&world, "two").finish(SOON).unwrap();
        tag(&world, "two", "two:1").unwrap();
    });
}

#[test]
fn tag_of_another_users_image_counts() {
    let bytes = pulled_bytes();
    let world = world(bytes / 2 * 3);
    pulls::pull(&world, "of root", true);
    as_uid(ALICE, || {
        begin_pull(&world, "mine").finish(SOON).unwrap();
        let e = tag(&world, "app:1", "app:mine").unwrap_err();
        assert!(e.is(Kind::Exhausted), "{e}");
        let rm = crate::image_register::image("mine");
        world.call::<ImageDelete>(&rm).unwrap();
        tag(&world, "app:1", "app:mine").unwrap();
    });
}

#[test]
fn commit_counts_against_the_limit() {
    // Even an empty file system with a kernel and an initrd is larger than this limit.
    let world = world(4096);
    as_uid(ALICE, || {
        create(&world, "web", "default").unwrap();
        world.start("web").unwrap();
        world.stop("web").unwrap();
        let request = ImageCommitRequest {
            vm: "web".into(),
            image: "mine".parse().unwrap(),
            recipe: None,
            temporary: false,
        };
        let e = world.run::<ImageCommit>(request).unwrap_err();
        assert!(e.is(Kind::Exhausted), "{e}");
    });
    assert_eq!(images(&world), 1);
}

#[test]
fn prune_counts_a_file_of_several_tags_once() {
    let bytes = pulled_bytes();
    let world = world(u64::MAX);
    let prune = || {
        let request = ImagePruneRequest { all: true };
        let pruned = world.call::<ImagePrune>(&request).unwrap();
        (pruned.images.len(), pruned.bytes)
    };
    as_uid(ALICE, || {
        begin_pull(&world, "one").finish(SOON).unwrap();
        tag(&world, "one", "one:1").unwrap();
        tag(&world, "one", "one:2").unwrap();
        let request = VmCreateRequest {
            name: Some("web".parse().unwrap()),
            image: Some("one:2".parse().unwrap()),
            ..VmCreateRequest::default()
        };
        world.call::<VmCreate>(&request).unwrap();
        // The VM's image has the same file.
        assert_eq!(prune(), (2, 0));
        world.delete("web").unwrap();
        assert_eq!(prune(), (1, bytes));
    });
}
