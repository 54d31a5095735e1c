//! Tests of operations whose claim the store could not record.

use crate::world::*;
use fcd::testing::api::op::{Op, OpState};
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use fcd::testing::locks::{Rank, check};
use fcd::testing::ops::Filter;
use fcd::testing::store::faults::Fault;
use fcd::testing::vmm::End;
use std::sync::Mutex;
use std::time::Duration;

/// The name of the thread that may not take a VM's lock.
static HELD: Mutex<Option<String>> = Mutex::new(None);

fn wait_if_held(rank: Rank) {
    let is_held = || {
        let held = HELD.lock().unwrap();
        held.is_some() && held.as_deref() == std::thread::current().name()
    };
    while rank == Rank::Vm && is_held() {
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

fn find_op(world: &World, method: &str) -> Option<Op> {
    let all = Filter {
        all: true,
        ..Filter::default()
    };
    let ops = world.daemon().core.ops.list(&all);
    ops.into_iter()
        .map(|(_, op)| op)
        .find(|op| op.method == method)
}

/// A stop is queued behind a start, the store undoes the claim of the start, and a delete claims
/// the VM before the start's thread notices. Found by `lock_fuzz::`: the stop got the delete's
/// result.
#[test]
fn operation_queued_behind_undone_claim_does_not_pass_to_next_claim() {
    let world = World::new();
    let vm = world.create("web");
    world.place(&vm.id);
    let store = &world.daemon().core.store;
    let gate = store.faults().gate();
    let mut start = world.begin::<VmStart>(request("web"), vec![]);
    await_that("the start has begun", || {
        find_op(&world, "vm.start").is_some()
    });
    let begun = find_op(&world, "vm.start").unwrap();
    *HELD.lock().unwrap() = Some(format!("op-{}", begun.id));
    check::set_chaos(Some(wait_if_held));
    let mut stop = world.begin::<VmStop>(stop("web"), vec![]);
    await_that("the stop is queued", || {
        find_op(&world, "vm.stop").is_some()
    });
    store.faults().fail(Fault::Io, 1);
    drop(gate);
    assert!(store.wait_writable(soon()));
    world.delete("web").unwrap();
    *HELD.lock().unwrap() = None;
    check::set_chaos(None);
    assert!(start.finish(SOON).unwrap_err().is(Kind::StoreReadOnly));
    assert!(stop.finish(SOON).is_err());
    let stop = find_op(&world, "vm.stop").unwrap();
    assert_eq!(stop.state, OpState::Failed);
    assert_eq!(stop.error.unwrap().kind, Kind::Superseded.name());
}

/// A VMM dies while a delete is in progress, which expects the death, and then the store undoes the
/// claim of the delete. This was seed 4028002 of the simulation: the VM was `running` for ever.
#[test]
fn death_during_undone_claim_is_recorded() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.await_rest();
    let store = &world.daemon().core.store;
    let gate = store.faults().gate();
    let mut delete = world.begin::<VmDelete>(delete("web"), vec![]);
    world.await_change(|s| s.vm(&vm.id).unwrap().state == VmState::Deleting);
    world.vmm.die(&vm.id, &End::GuestShutDown);
    store.faults().fail(Fault::Io, 1);
    drop(gate);
    assert!(delete.finish(SOON).unwrap_err().is(Kind::StoreReadOnly));
    world.await_state("web", VmState::Stopped);
    world.await_rest();
}
