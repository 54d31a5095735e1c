//! Tests of what `debug.locks` reports about the locks of a working daemon.

use crate::apart::run_in_own_process;
use crate::guest_runtime::make_image_of;
use crate::world::*;
use fcd::testing::api::Empty;
use fcd::testing::api::daemon::{DebugLocks, DebugLocksReply};
use fcd::testing::api::image::{ImageCommit, ImageCommitRequest};
use fcd::testing::api::op::{OpList, OpListRequest};
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use fcd::testing::locks::{Rank, check};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

fn locks(world: &World) -> DebugLocksReply {
    world.call::<DebugLocks>(&Empty {}).unwrap()
}

/// A start takes the VM's lock on the connection's thread. The waiter's operation used to be blank.
#[test]
fn waiting_call_is_shown_with_its_method() {
    let world = World::new();
    let vm = world.create("web");
    let mut start = while_locked(&world, &vm, || {
        let start = world.begin::<VmStart>(request("web"), vec![]);
        await_that("the start waits for the lock", || {
            let waits = locks(&world).locks.into_iter().flat_map(|l| l.waiters);
            waits.map(|w| w.operation).eq(["vm.start"])
        });
        start
    });
    start.finish(SOON).unwrap();
}

#[test]
fn work_shows_in_counts_and_observed_edges() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.await_rest();
    let waits = fcd::testing::locks::durable_waits().into_iter();
    let waits = waits.filter_map(|wait| wait.operation);
    let waits: Vec<_> = waits.filter(|op| op.contains(vm.id.as_str())).collect();
    assert!(waits.is_empty(), "these waits have ended: {waits:?}");
    let reply = locks(&world);
    for class in ["vm_locks", "create_vm", "store"] {
        let counted = reply.classes.iter().find(|c| c.class == class).unwrap();
        let sum = |counts: &[u64]| counts.iter().sum::<u64>();
        assert!(
            sum(&counted.waits) > 0 && sum(&counted.holds) > 0,
            "{counted:?}"
        );
    }
    let disk = reply.classes.iter().find(|c| c.class == "durable_wait");
    assert!(disk.is_some_and(|c| !c.waits.is_empty()), "{reply:?}");
    let edge = reply.edges.iter();
    let edge = edge.filter(|e| (e.from.as_str(), e.to.as_str()) == ("vm_locks", "store"));
    let sites: Vec<_> = edge.map(|e| (&e.from_site, &e.to_site)).collect();
    assert!(
        sites.len() == 1 && sites[0].0.starts_with("src/") && sites[0].1.contains("src/store/"),
        "{sites:?}"
    );
}

static SECTIONS: AtomicUsize = AtomicUsize::new(0);
static PUBLISHED_LATE: OnceLock<PathBuf> = OnceLock::new();

/// Another operation publishes an image of the same name after a commit has begun and before the
/// commit has reserved the name.
#[test]
fn image_published_before_reservation_is_seen() {
    run_in_own_process("lock_reports::late_image_in_own_process", Stdio::piped());
}

#[test]
#[ignore = "a part of image_published_before_reservation_is_seen"]
fn late_image_in_own_process() {
    let world = World::new();
    world.running("web");
    world.stop("web").unwrap();
    PUBLISHED_LATE.set(world.config.state_dir.clone()).unwrap();
    check::set_chaos(Some(|rank| {
        // The first section begins the work, and the second reserves the name.
        if rank == Rank::ImageOps && SECTIONS.fetch_add(1, Ordering::SeqCst) == 1 {
            make_image_of(PUBLISHED_LATE.get().unwrap(), "late", "host", None);
        }
    }));
    let request = ImageCommitRequest {
        vm: "web".into(),
        image: "late".parse().unwrap(),
        recipe: None,
        temporary: false,
    };
    let refused = world.run::<ImageCommit>(request).unwrap_err();
    check::set_chaos(None);
    assert!(refused.is(Kind::NameTaken), "{refused}");
    let request = OpListRequest {
        all: true,
        ..OpListRequest::default()
    };
    let ops = world.call::<OpList>(&request).unwrap().ops;
    assert!(
        ops.iter().all(|op| op.method != "image.commit"),
        "the name was refused only after the disk had been read"
    );
    world.await_rest();
}
