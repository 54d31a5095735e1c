//! Tests that no change is lost if several threads change one VM's row at the same time. The lock
//! checker's hook widens the race windows, so these tests run in their own process.

use crate::apart::run_in_own_process;
use crate::world::*;
use fcd::testing::api::vm::*;
use fcd::testing::guest::fake::{Gate, Readiness};
use fcd::testing::locks::{Rank, check};
use fcd::testing::store::faults::Fault;
use fcd::testing::vmm::End;
use std::process::Stdio;
use std::time::Duration;

const ROUNDS: u32 = 8;
/// The pause between reading and changing a row. The hook pauses a call when the call locks the
/// operation registry.
const WINDOW: Duration = Duration::from_millis(30);

fn widen_windows() {
    check::set_chaos(Some(|rank| {
        // The hook pauses only a thread that already holds a lock of the daemon, usually the VM's.
        if rank == Rank::Ops && check::held() > 0 {
            std::thread::park_timeout(WINDOW);
        }
    }));
}

#[test]
fn concurrent_row_changes_are_all_kept() {
    run_in_own_process(
        "lost_updates::with_wide_windows_in_own_process",
        Stdio::piped(),
    );
}

#[test]
#[ignore = "a part of concurrent_row_changes_are_all_kept"]
fn with_wide_windows_in_own_process() {
    let world = World::new();
    widen_windows();
    let (web, _) = world.running("web");
    world.await_rest();
    for round in 0..ROUNDS {
        kept_fork_survives_concurrent_stop(&world, round);
    }
    assert_eq!(world.state("web"), VmState::Running);
    world.vmm.die(
        &web.id,
        &fcd::testing::vmm::End::Vmm(fcd::testing::vmm::Exit::Signal(9)),
    );
    world.await_state("web", VmState::Failed);
}

/// One thread marks a fork as kept while another thread stops the new VM.
fn kept_fork_survives_concurrent_stop(world: &World, round: u32) {
    let name = format!("twin-{round}");
    let request = VmForkRequest {
        vm: "web".into(),
        name: Some(name.parse().unwrap()),
        ..Default::default()
    };
    let mut fork = world.begin::<VmFork>(request, vec![]);
    world.await_change(|s| {
        s.vms()
            .any(|r| r.name.as_str() == name && r.state == VmState::Running)
    });
    // The guest is unreachable, so the stop does not wait for its shutdown.
    let stopped = world.run::<VmStop>(VmStopRequest {
        timeout_ms: Some(1),
        ..stop(&name)
    });
    let kept = fork.finish(SOON);
    if kept.is_ok() {
        world.await_rest();
        let shown = world.show(&name);
        assert!(
            shown.is_ok(),
            "round {round}: the fork was kept, and a stop deleted it: {stopped:?}, {shown:?}"
        );
        world.delete(&name).unwrap();
    }
    world.await_rest();
}

/// The store refuses the commit of a boot, and the VMM dies before the boot tries again. This was
/// seed 2009514 of the simulation: the VM was `running` for ever.
#[test]
fn death_during_refused_commit_is_recorded() {
    let world = World::new();
    let (vm, gate) = (world.create("web"), Gate::closed());
    let addr = world.place(&vm.id);
    let waits = Readiness::Gated(gate.clone());
    world.guest.set_readiness(addr, waits);
    let mut call = world.begin::<VmStart>(request("web"), vec![]);
    call.stage("wait for the guest");
    world
        .daemon()
        .core
        .store
        .barrier()
        .unwrap()
        .wait(soon())
        .unwrap();
    let store = &world.daemon().core.store;
    store.faults().fail(Fault::Io, 4);
    gate.open();
    await_that("the commit was refused", || store.read_only().is_some());
    world.vmm.die(&vm.id, &End::GuestShutDown);
    world.await_state("web", VmState::Stopped);
    let _ = call.finish(SOON);
    world.await_rest();
}
