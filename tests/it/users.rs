//! Local users against each other: what one uid can take from the others.

use crate::world::*;
use fcd::api::Empty;
use fcd::api::daemon::Doctor;

/// A user who is neither root nor the daemon's own.
const ALICE: u32 = 3001;

#[test]
fn doctor_of_other_user_is_run_once_for_many_calls() {
    const CALLS: u64 = 100;
    let world = World::new();
    world.open_to_everybody();
    as_uid(ALICE, || (0..CALLS).for_each(|_| assert!(!world.call::<Doctor>(&Empty {}).unwrap().checks.is_empty())));
    let runs = world.vmm.checks_run();
    assert!((1..CALLS / 4).contains(&runs), "{runs} runs for {CALLS} calls");
    // Root sees the host as it is at its call.
    world.call::<Doctor>(&Empty {}).unwrap();
    assert_eq!(world.vmm.checks_run(), runs + 1);
}
