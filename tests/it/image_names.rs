//! Tests of image names. Each user has separate names.

use crate::guest_runtime::{make_image_of, make_runtime};
use crate::image_register::{create, image};
use crate::world::*;
use fcd::testing::api::image::*;
use fcd::testing::api::page::ListRequest;
use fcd::testing::api::snapshot::*;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;

const ALICE: u32 = 3001;
const BOB: u32 = 3002;

/// Returns a world in which the host has an image `tool`.
fn world() -> World {
    let world = World::new();
    world.open_to_everybody();
    let state = &world.config.state_dir;
    make_runtime(state, "00000000000a", 7);
    make_image_of(state, "tool", "host", None);
    world
}

fn tag(world: &World, from: &str, name: &str) -> Result<Image, fcd::testing::client::Failure> {
    let request = ImageTagRequest {
        image: from.parse().unwrap(),
        name: name.parse().unwrap(),
        shared: false,
    };
    Ok(world.call::<ImageTag>(&request)?.image)
}

fn names(world: &World) -> Vec<String> {
    let list = world.call::<ImageList>(&ListRequest::default()).unwrap();
    list.images.iter().map(|i| i.name.to_string()).collect()
}

#[test]
fn users_give_the_same_name_to_their_images() {
    let world = world();
    for uid in [ALICE, BOB] {
        as_uid(uid, || {
            let made = tag(&world, "tool", "mine:1").unwrap();
            assert_eq!(made.name.to_string(), "mine:1");
            let again = tag(&world, "tool", "mine:1").unwrap_err();
            assert!(again.is(Kind::NameTaken), "{again}");
            assert_eq!(names(&world), ["default", "mine:1", "tool"]);
        });
    }
    let all = ["@3001/mine:1", "@3002/mine:1", "default", "tool"];
    assert_eq!(names(&world), all);
    let absent = world.call::<ImageShow>(&image("mine:1")).unwrap_err();
    assert!(absent.is(Kind::ImageNotFound), "{absent}");
    as_uid(BOB, || {
        let denied = world.call::<ImageShow>(&image("@3001/mine:1"));
        assert!(denied.unwrap_err().is(Kind::Denied));
        let deleted = world.call::<ImageDelete>(&image("mine:1")).unwrap().deleted;
        assert_eq!(deleted.to_string(), "mine:1");
    });
    assert_eq!(names(&world), [all[0], all[2], all[3]]);
    // Root deletes another user's image only by its full name.
    world.call::<ImageDelete>(&image(all[0])).unwrap();
}

#[test]
fn new_name_cannot_have_another_owner() {
    let world = world();
    let refused = |name: &str| {
        let e = tag(&world, "tool", name).unwrap_err();
        assert!(e.is(Kind::InvalidArgument), "{e}");
    };
    refused("@3001/mine");
    as_uid(BOB, || refused("@3001/mine"));
    let own = as_uid(BOB, || tag(&world, "tool", "@3002/mine").unwrap());
    assert_eq!(own.name.to_string(), "mine");
}

/// A user can use a name of the host for an own image, which does not affect other users.
#[test]
fn own_name_comes_before_the_name_of_the_host() {
    let world = world();
    as_uid(ALICE, || {
        let before = create(&world, "before", "tool").unwrap();
        assert_eq!(before.image.to_string(), "tool");
        tag(&world, "default", "tool").unwrap();
        assert_eq!(names(&world), ["default", "tool"]);
        let shown = world.call::<ImageShow>(&image("tool")).unwrap();
        assert_eq!(shown.config.user, "");
        let own = create(&world, "own", "tool").unwrap();
        assert_eq!(own.image.to_string(), "tool");
        // The image of the first VM is still the host's.
        assert_ne!(own.image_digest, before.image_digest);
        let vms = world.call::<ImageShow>(&image("tool")).unwrap().image.vms;
        assert_eq!(vms, 1);
    });
    let of_host = world.call::<ImageShow>(&image("tool")).unwrap();
    assert_eq!(
        (of_host.config.user.as_str(), of_host.image.vms),
        ("host", 1)
    );
    as_uid(BOB, || {
        let shown = world.call::<ImageShow>(&image("tool")).unwrap();
        assert_eq!(shown.config.user, "host");
    });
}

/// A user can give an image any recipe, so a tag by another user does not copy the recipe.
#[test]
fn recipe_of_another_user_is_not_taken_over() {
    let world = world();
    as_uid(ALICE, || {
        world.running("web");
        world.stop("web").unwrap();
        let request = ImageCommitRequest {
            vm: "web".into(),
            image: "built".parse().unwrap(),
            recipe: Some("sha256:of-a-script".into()),
            temporary: false,
        };
        world.run::<ImageCommit>(request).unwrap();
        assert!(tag(&world, "built", "again").unwrap().recipe.is_some());
    });
    assert_eq!(tag(&world, "@3001/built", "taken").unwrap().recipe, None);
}

#[test]
fn root_shares_image_of_another_user() {
    let world = world();
    let share = |name: &str| {
        let request = ImageTagRequest {
            image: format!("@{ALICE}/mine").parse().unwrap(),
            name: name.parse().unwrap(),
            shared: true,
        };
        world.call::<ImageTag>(&request)
    };
    as_uid(ALICE, || {
        tag(&world, "tool", "mine").unwrap();
        let denied = share("ours").unwrap_err();
        assert!(denied.is(Kind::Denied), "{denied}");
    });
    share("ours").unwrap();
    as_uid(BOB, || create(&world, "web", "ours").unwrap());
}

/// The owner may have given the name of the VM's image to another image since.
#[test]
fn fork_and_restore_keep_the_image_of_their_vm() {
    let world = world();
    as_uid(ALICE, || {
        let digest = world.running("web").0.image_digest;
        assert!(digest.is_some());
        let save = SnapshotCreateRequest {
            vm: "web".into(),
            name: Some("saved".parse().unwrap()),
        };
        world.run::<SnapshotCreate>(save).unwrap();
        let other = tag(&world, "tool", "default").unwrap();
        assert_ne!(other.digest, digest);
        let fork = VmForkRequest {
            vm: "web".into(),
            name: Some("twin".parse().unwrap()),
            ..Default::default()
        };
        let twin = world.run::<VmFork>(fork).unwrap().vm;
        assert_eq!(twin.image_digest, digest);
        let restore = SnapshotRestoreRequest {
            snapshot: "saved".into(),
            new_vm: Some("third".parse().unwrap()),
        };
        let third = world.run::<SnapshotRestore>(restore).unwrap().vm;
        assert_eq!(third.image_digest, digest);
    });
}
