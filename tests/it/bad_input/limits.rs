//! Tests of the limits of the pool, of VMs and of memory.

use super::{create, refused, user};
use crate::world::*;
use fcd::testing::api::vm::*;
use fcd::testing::error::{Code, Kind};
use fcd::testing::guest::fake::Answer;
use fcd::testing::vmm::fake::Stage;

#[test]
fn full_pool_refuses_transfers() {
    let world = World::with(|c| (c.limits.pool_workers, c.limits.pool_queue) = (1, 1));
    world.running("web");
    world.running("other");
    let running = world.import("web");
    let queued = world.queue_import("other");
    await_that("the second import is queued", || {
        world.daemon().transfers.pool.counts().queued == 1
    });
    let (before, ops) = (world.census(), world.ops());
    let mut refused = world.queue_import("web");
    let e = refused.call.finish(SOON).unwrap_err();
    assert!(
        e.is(Kind::PoolFull)
            && e.code() == Code::Busy
            && e.fault.retryable
            && e.fault.hint.is_some(),
        "{e:?}"
    );
    assert_eq!((world.census(), world.ops()), (before, ops));
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
    // A quota never refuses a call that ends a VM.
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

/// The VMM of a stopping VM still has its memory.
#[test]
fn memory_of_stopping_vm_is_counted() {
    let world = World::with(|c| c.limits.mem_mib_max = 1536);
    world.running("one");
    let two = world.call::<VmCreate>(&create(|r| r.mem_mib = Some(513)));
    let two = two.unwrap().vm;
    world.place(&two.id);
    let start = || world.start(two.name.as_str());
    let ops = world.ops();
    refused(&world, Kind::MemoryLimit, start);
    assert_eq!(world.ops(), ops, "a refused call is not recorded");
    world.guest.on(fcd::testing::image::SHUTDOWN_COMMAND, |_| {
        Answer::status(0).stdout("synced\n")
    });
    let mut stopping = world.begin::<VmStop>(stop("one"), vec![]);
    stopping.stage("sync and shut down");
    let e = start().unwrap_err();
    assert!(e.is(Kind::MemoryLimit), "{e:?}");
    world.run::<VmKill>(request("one")).unwrap();
    stopping.finish(SOON).unwrap();
    start().unwrap();
}
