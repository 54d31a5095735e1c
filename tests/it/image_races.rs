//! Races of pull, tag, rm, create and start for one name. One operation is stopped at a point while
//! the others run, for every point, or all of them begin at once.

use crate::image_register::image;
use crate::pulls;
use crate::world::*;
use fcd::testing::api::daemon::{Leaks, LeaksRequest};
use fcd::testing::api::image::*;
use fcd::testing::api::page::ListRequest;
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::error::Kind;
use std::collections::BTreeSet;
use std::sync::Barrier;

const NAME: &str = "app:1";
/// An image that stays, and that the tag is made of.
const OTHER: &str = "other";
const VM: &str = "web";

/// The state of the name before the race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Nothing,
    SameImage,
    AnotherImage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Pull,
    Tag,
    Remove,
    Start,
}

/// The points of each operation.
const POINTS: [(Verb, &str); 8] = [
    (Verb::Pull, "pull the image"),
    (Verb::Pull, "reserve the name"),
    (Verb::Pull, "publish the image"),
    (Verb::Pull, "provide the guest runtime"),
    (Verb::Tag, "tag the image"),
    (Verb::Remove, "delete the image"),
    (Verb::Start, "prepare the directory"),
    (Verb::Start, "spawn the VMM"),
];

/// The orders in which the others run while one operation is stopped.
const ORDERS: [[Verb; 4]; 3] = [
    [Verb::Remove, Verb::Tag, Verb::Start, Verb::Pull],
    [Verb::Tag, Verb::Start, Verb::Remove, Verb::Pull],
    [Verb::Start, Verb::Remove, Verb::Tag, Verb::Pull],
];

fn world() -> World {
    let world = pulls::world_with(|config| config.registry.pulls_per_uid_max = 8);
    pulls::pull(&world, "other", false);
    let request = tag_request(NAME, OTHER);
    world.call::<ImageTag>(&request).unwrap();
    world.call::<ImageDelete>(&image(NAME)).unwrap();
    world
}

fn tag_request(image: &str, name: &str) -> ImageTagRequest {
    ImageTagRequest {
        image: image.parse().unwrap(),
        name: name.parse().unwrap(),
        shared: false,
    }
}

fn make(world: &World, before: Before) {
    match before {
        Before::Nothing => {}
        Before::SameImage => drop(pulls::pull(world, "pulled", false)),
        Before::AnotherImage => drop(pulls::pull(world, "before", false)),
    }
}

fn create(world: &World) -> Result<(), Failure> {
    let request = VmCreateRequest {
        name: Some(VM.parse().unwrap()),
        image: Some(NAME.parse().unwrap()),
        ..VmCreateRequest::default()
    };
    let vm = world.call::<VmCreate>(&request)?.vm;
    world.place(&vm.id);
    Ok(())
}

/// Runs an operation on the name to its end.
fn run(world: &World, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Pull => {
            let fds = vec![pulls::stream("pulled")];
            let mut call = world.begin::<ImagePull>(pulls::request(false), fds);
            call.finish(SOON).map(drop)
        }
        Verb::Tag => world.call::<ImageTag>(&tag_request(OTHER, NAME)).map(drop),
        Verb::Remove => world.call::<ImageDelete>(&image(NAME)).map(drop),
        Verb::Start => {
            create(world)?;
            world.start(VM).map(drop)
        }
    }
}

/// True if an operation may fail like this because others use the name at the same time.
fn is_expected(failure: &Failure) -> bool {
    [
        Kind::Busy,
        Kind::Conflict,
        Kind::ImageNotFound,
        Kind::NameTaken,
        Kind::VmNotFound,
    ]
    .iter()
    .any(|kind| failure.is(*kind))
}

/// The names in a directory.
fn entries(world: &World, dir: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(world.config.state_dir.join(dir)).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Checks that images, VMs and files agree, and that a restarted daemon has nothing to repair.
#[track_caller]
fn is_sane(world: &mut World, at: &str) {
    world.await_rest();
    let listed = world.call::<ImageList>(&ListRequest::default()).unwrap();
    let listed: BTreeSet<String> = listed
        .images
        .iter()
        .map(|image| image.name.to_string())
        .collect();
    // Every directory is an image, so nothing unfinished is left, and no image is damaged.
    assert_eq!(entries(world, "images"), listed, "{at}");
    match world.call::<ImageShow>(&image(NAME)) {
        Ok(_) => assert!(listed.contains(NAME), "{at}"),
        Err(e) => assert!(
            e.is(Kind::ImageNotFound) && !listed.contains(NAME),
            "{at}: {e}"
        ),
    }
    if let Ok(vm) = world.show(VM) {
        assert!(listed.contains(NAME), "{at}: {vm:?} has no image");
        let shown = world.call::<ImageShow>(&image(NAME)).unwrap().image;
        assert_eq!(vm.image_digest, shown.digest, "{at}");
        if vm.state == VmState::Running {
            let spec = world.vmm.last_spec(&vm.id).unwrap();
            for file in [&spec.kernel, &spec.initrd, &spec.disk] {
                assert!(file.exists(), "{at}: {} is missing", file.display());
            }
        } else {
            world.start(VM).unwrap();
        }
    }
    let leaks = |world: &World| {
        let request = LeaksRequest { fix: false };
        world.call::<Leaks>(&request).unwrap().leaks
    };
    assert!(leaks(world).is_empty(), "{at}: {:?}", leaks(world));
    world.restart_daemon();
    world.await_rest();
    let census = world.census();
    world.restart_daemon();
    world.await_rest();
    assert_eq!(world.census(), census, "{at}");
    assert!(leaks(world).is_empty(), "{at}: {:?}", leaks(world));
}

fn clean_up(world: &World) {
    let _ = world.delete(VM);
    let _ = world.call::<ImageDelete>(&image(NAME));
    assert_eq!(
        entries(world, "images"),
        ["default", OTHER].map(str::to_owned).into()
    );
    assert!(entries(world, "vms").is_empty());
}

#[test]
fn operation_that_is_stopped_at_any_point_and_others_end_in_one_state() {
    let mut world = world();
    let mut reached = BTreeSet::new();
    for (number, (verb, point)) in POINTS.into_iter().enumerate() {
        for before in [Before::Nothing, Before::SameImage, Before::AnotherImage] {
            make(&world, before);
            let order = ORDERS[(number + before as usize) % ORDERS.len()];
            let at = format!("{before:?}, {verb:?} at {point:?}, then {order:?}");
            let points = world.points.clone();
            points.hold(point);
            let others = order.into_iter().filter(|other| *other != verb);
            let results = std::thread::scope(|scope| {
                let world = &world;
                let stopped = scope.spawn(move || run(world, verb));
                // The name may not allow the operation, which then ends before the point.
                await_that("the operation stops or ends", || {
                    points.is_holding() || stopped.is_finished()
                });
                if points.is_holding() {
                    reached.insert(point);
                }
                // A pull may wait for the stopped operation, so it is the last one.
                let mut results = Vec::new();
                let mut waiting = Vec::new();
                for other in others {
                    if other == Verb::Pull {
                        waiting.push(scope.spawn(move || run(world, other)));
                    } else {
                        results.push((other, run(world, other)));
                    }
                }
                points.release();
                results.extend(
                    waiting
                        .into_iter()
                        .map(|pull| (Verb::Pull, pull.join().unwrap())),
                );
                results.push((verb, stopped.join().unwrap()));
                results
            });
            for (verb, result) in &results {
                if let Err(e) = result {
                    assert!(is_expected(e), "{at}: {verb:?}: {e}");
                }
            }
            is_sane(&mut world, &at);
            clean_up(&world);
        }
    }
    let wanted: BTreeSet<&str> = POINTS.iter().map(|(_, point)| *point).collect();
    assert_eq!(reached, wanted, "every point was reached");
}

#[test]
fn operations_that_begin_at_once_end_in_one_state() {
    const ROUNDS: usize = 12;
    const VERBS: [Verb; 5] = [Verb::Pull, Verb::Tag, Verb::Remove, Verb::Start, Verb::Pull];
    let mut world = world();
    for round in 0..ROUNDS {
        let befores = [Before::Nothing, Before::SameImage, Before::AnotherImage];
        let before = befores[round % befores.len()];
        make(&world, before);
        let barrier = Barrier::new(VERBS.len());
        let results = std::thread::scope(|scope| {
            let (world, barrier) = (&world, &barrier);
            let run = |verb| {
                scope.spawn(move || {
                    barrier.wait();
                    (verb, run(world, verb))
                })
            };
            let running = VERBS.map(run);
            running.map(|thread| thread.join().unwrap())
        });
        for (verb, result) in &results {
            if let Err(e) = result {
                assert!(is_expected(e), "round {round}, {before:?}, {verb:?}: {e}");
            }
        }
        is_sane(
            &mut world,
            &format!("round {round}, {before:?}: {results:?}"),
        );
        clean_up(&world);
    }
}
