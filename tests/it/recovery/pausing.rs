//! Tests with guests that are paused, and with VMMs that do not respond.

use super::exec;
use crate::world::*;
use fcd::testing::api::exec::ExecStart;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use fcd::testing::vmm::GuestEvent;

#[test]
fn unresponsive_vmm_is_not_used_and_stops_at_once() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let exec = || {
        world
            .begin::<ExecStart>(exec("web", "true"), vec![])
            .finish(SOON)
    };
    assert!(world.vmm.report(&vm.id, GuestEvent::Unresponsive(true)));
    await_that("the VM is unresponsive", || {
        world.show("web").unwrap().unresponsive
    });
    let refused = exec().unwrap_err();
    assert!(
        refused.is(Kind::GuestUnavailable) && refused.to_string().contains("does not respond"),
        "{refused}"
    );
    assert!(world.vmm.report(&vm.id, GuestEvent::Unresponsive(false)));
    await_that("the VM responds", || {
        !world.show("web").unwrap().unresponsive
    });
    exec().unwrap();

    assert!(world.vmm.report(&vm.id, GuestEvent::Unresponsive(true)));
    await_that("the VM is unresponsive", || {
        world.show("web").unwrap().unresponsive
    });
    let stopped = world.stop("web").unwrap();
    assert_eq!(
        (stopped.state, stopped.synced, stopped.unresponsive),
        (VmState::Stopped, Some(Synced::No), false)
    );
    assert!(
        !world.start("web").unwrap().unresponsive,
        "the new VMM responds"
    );
}

#[test]
fn paused_guest_stays_paused_after_daemon_restart() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    let pause = |world: &World| world.call::<VmPause>(&request("web")).map(|r| r.vm);
    let resume = |world: &World| world.call::<VmResume>(&request("web")).map(|r| r.vm);
    assert!(pause(&world).unwrap().paused && pause(&world).unwrap().paused);
    assert!(world.vmm.is_paused(&vm.id));
    let refused = world
        .begin::<ExecStart>(exec("web", "true"), vec![])
        .finish(SOON)
        .unwrap_err();
    assert!(
        refused.is(Kind::WrongState) && refused.to_string().contains("is paused"),
        "{refused}"
    );
    // A restart of the daemon leaves the guest paused. If a daemon is killed after it writes the
    // row and before it calls the driver, the next daemon calls the driver.
    world.reopen();
    assert!(world.vmm.is_paused(&vm.id));
    world.daemon().reconciler.reconcile();
    assert!(world.show("web").unwrap().paused && world.vmm.is_paused(&vm.id));
    assert!(!resume(&world).unwrap().paused && !resume(&world).unwrap().paused);
    assert!(!world.vmm.is_paused(&vm.id));
    world.edit_rows(|tx| tx.update_vm_unlocked(&vm.id, |r| r.paused = true).unwrap());
    world.restart_daemon();
    assert!(world.vmm.is_paused(&vm.id));
    // A stop resumes the guest so that the guest can shut down. After the next start the guest is
    // not paused.
    assert_eq!(world.stop("web").unwrap().synced, Some(Synced::Yes));
    let refused = pause(&world).unwrap_err();
    assert!(
        refused.is(Kind::WrongState) && refused.fault.hint.is_some(),
        "{refused}"
    );
    world.place(&vm.id);
    assert!(!world.start("web").unwrap().paused && !world.vmm.is_paused(&vm.id));
}

#[test]
fn concurrent_pauses_and_resumes_match_row() {
    let world = World::new();
    let (vm, _) = world.running("web");
    std::thread::scope(|s| {
        for n in 0..8 {
            let world = &world;
            s.spawn(move || {
                for i in 0..20 {
                    let call = if (n + i) % 2 == 0 {
                        world.call::<VmPause>(&request("web"))
                    } else {
                        world.call::<VmResume>(&request("web"))
                    };
                    call.unwrap();
                }
            });
        }
    });
    assert_eq!(
        world.vmm.is_paused(&vm.id),
        world.show("web").unwrap().paused
    );
}
