//! Several threads change one VM's row at the same time, and none undoes what another wrote. The windows are widened by
//! the hook of the lock checker, so these run in a process of their own.

use crate::apart::run_apart;
use crate::world::*;
use fcd::api::vm::*;
use fcd::locks::{Rank, check};
use std::process::Stdio;
use std::time::Duration;

const ROUNDS: u32 = 8;
/// Between the look at a row and the change of it, where a verb takes the lock of the operation registry.
const WINDOW: Duration = Duration::from_millis(30);

fn widen_windows() {
    check::set_chaos(Some(|rank| {
        // Only where the thread holds a lock of the daemon already: the VM's, most often.
        if rank == Rank::Ops && check::held() > 0 {
            std::thread::park_timeout(WINDOW);
        }
    }));
}

#[test]
fn no_change_of_a_row_undoes_another() {
    run_apart("lost_updates::in_a_process_with_wide_windows", Stdio::piped());
}

#[test]
#[ignore = "a part of no_change_of_a_row_undoes_another"]
fn in_a_process_with_wide_windows() {
    let world = World::new();
    widen_windows();
    let (web, _) = world.running("web");
    world.await_rest();
    for round in 0..ROUNDS {
        a_fork_that_is_kept_stays_after_a_stop(&world, round);
    }
    assert_eq!(world.state("web"), VmState::Running);
    world.vmm.die(&web.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9)));
    world.await_state("web", VmState::Failed);
}

/// The fork says that it is kept while somebody stops the new VM.
fn a_fork_that_is_kept_stays_after_a_stop(world: &World, round: u32) {
    let name = format!("twin-{round}");
    let request = VmForkRequest { vm: "web".into(), name: Some(name.parse().unwrap()) };
    let mut fork = world.begin::<VmFork>(request, vec![]);
    world.await_change(|s| s.vms().any(|r| r.name.as_str() == name && r.state == VmState::Running));
    // Its guest is not reached, so it is not waited for.
    let stopped = world.run::<VmStop>(VmStopRequest { timeout_ms: Some(1), ..stop(&name) });
    let kept = fork.finish(SOON);
    if kept.is_ok() {
        world.await_rest();
        let shown = world.show(&name);
        assert!(shown.is_ok(), "round {round}: the fork was kept, and a stop deleted it: {stopped:?}, {shown:?}");
        world.delete(&name).unwrap();
    }
    world.await_rest();
}
