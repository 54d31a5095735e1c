//! Tests of a daemon that closes while operations are in progress.

use crate::world::*;
use fcd::testing::api::op::OpState;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use fcd::testing::guest::fake::{Gate, Readiness};
use fcd::testing::ops::Filter;
use fcd::testing::store::faults::Fault;

/// A delete is queued behind a boot whose end cannot be recorded, because the store fails. Found by
/// `lock_fuzz::`: the delete ended as `internal`.
#[test]
fn queued_operation_ends_with_the_reason_of_the_one_before_it() {
    let mut world = World::new();
    world.may_lose_ends = true;
    let vm = world.create("web");
    let hangs = Readiness::Gated(Gate::closed());
    world.guest.set_readiness(world.place(&vm.id), hangs);
    let mut start = world.begin::<VmStart>(request("web"), vec![]);
    start.stage("wait for the guest");
    world.daemon().core.store.faults().fail(Fault::Io, u64::MAX);
    let mut delete = world.begin::<VmDelete>(delete("web"), vec![]);
    start.stage("wait for the store");
    world.close();
    _ = (start.finish(SOON), delete.finish(SOON));
    let all = Filter {
        all: true,
        ..Filter::default()
    };
    let ops = world.daemon().core.ops.list(&all);
    let (_, deletion) = (ops.iter().find(|(_, op)| op.method == "vm.delete")).unwrap();
    let fault = deletion.error.as_ref().unwrap();
    assert_eq!(deletion.state, OpState::Failed);
    assert_eq!(fault.kind, Kind::StoreReadOnly.name(), "{fault:?}");
    world.daemon().core.store.faults().heal();
    world.restart_daemon();
}
