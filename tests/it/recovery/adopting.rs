//! Tests with VMMs that keep running while the daemon restarts.

use crate::world::*;
use fcd::testing::api::Call;
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::vmm::Exit;
use fcd::testing::vmm::fake::Stage;

/// A running VM survives a restart of the daemon: its process stays the same, and every call works
/// again.
#[test]
fn running_vm_is_adopted() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.import_all("web");
    world.reopen();
    assert_eq!(
        world.state("web"),
        VmState::Running,
        "reads are served before the VM is reconciled"
    );
    world.daemon().reconciler.reconcile();
    let again = world.show("web").unwrap();
    assert_eq!(
        (again.pid, again.ssh_addr, again.state),
        (vm.pid, vm.ssh_addr, VmState::Running)
    );
    assert_eq!(world.vmm.kills(), 0);
    world.import_all("web");
    // The new daemon notices when the VMM dies.
    world.kill_vmm(&vm.id, Exit::Signal(9));
    world.await_state("web", VmState::Failed);
}

/// Makes a call and waits a short time for its reply.
fn finish<C: Call>(world: &World, request: C::Request) -> Result<(), Failure>
where
    C::Request: Send + 'static,
    C::Reply: Send + 'static,
{
    world.begin::<C>(request, vec![]).finish(PROMPT).map(|_| ())
}

/// The reconciler is blocked at one VM and has not reached the other yet.
#[test]
fn stop_and_delete_after_restart_do_not_wait_for_reconciler() {
    for verb in ["stop", "stop --force", "kill", "restart", "rm -f"] {
        let mut world = World::new();
        world.running("first");
        let (vm, _) = world.running("web");
        world.reopen();
        world.vmm.hold_starts(Stage::Adopt);
        std::thread::scope(|scope| {
            let daemon = world.daemon().clone();
            let reconciler = scope.spawn(move || daemon.reconciler.reconcile());
            assert!(world.vmm.await_held(1, soon()));
            // The call is answered no matter which VM blocks the reconciler.
            for name in ["first", "web"] {
                let forced = VmStopRequest {
                    force: verb == "stop --force",
                    ..stop(name)
                };
                let answered = match verb {
                    "kill" => finish::<VmKill>(&world, request(name)),
                    "restart" => finish::<VmRestart>(&world, forced),
                    "rm -f" => finish::<VmDelete>(&world, delete(name)),
                    _ => finish::<VmStop>(&world, forced),
                };
                answered.unwrap();
            }
            world.vmm.release_starts();
            reconciler.join().unwrap();
        });
        world.await_rest();
        let state = world.show("web").ok().map(|vm| vm.state);
        let wanted = match verb {
            "restart" => Some(VmState::Running),
            "rm -f" => None,
            _ => Some(VmState::Stopped),
        };
        assert_eq!(state, wanted, "{verb}");
        assert_eq!(
            world.vmm.live().len(),
            if verb == "restart" { 2 } else { 0 },
            "{verb}"
        );
        if verb == "restart" {
            assert!(
                !world.vmm.adoptions().iter().skip(1).any(|id| *id == vm.id),
                "the daemon adopted a VMM that it had started itself"
            );
        }
    }
}

#[test]
fn calls_that_need_guest_adopt_it() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.reopen();
    world.import_all("web");
    assert_eq!(world.vmm.adoptions(), std::slice::from_ref(&vm.id));
    world.reopen();
    assert!(
        world.call::<VmPause>(&request("web")).unwrap().vm.paused && world.vmm.is_paused(&vm.id)
    );
    // The reconciler has nothing left to do.
    world.daemon().reconciler.reconcile();
    assert_eq!(world.vmm.adoptions().len(), 2);
    world.kill_vmm(&vm.id, Exit::Signal(9));
    world.await_state("web", VmState::Failed);
}

#[test]
fn running_vms_are_reconciled_first() {
    let mut world = World::new();
    // If the reconciler went in order of IDs, a running VM would sometimes be first by chance.
    let boots: Vec<_> = (0..8)
        .map(|n| world.running(&format!("boots-{n}")).0)
        .collect();
    let (vm, _) = world.running("runs");
    world.edit_rows(|tx| {
        for vm in &boots {
            tx.update_vm_unlocked(&vm.id, |r| r.state = VmState::Starting)
                .unwrap();
        }
    });
    world.reopen();
    world.vmm.hold_starts(Stage::Adopt);
    std::thread::scope(|scope| {
        let daemon = world.daemon().clone();
        let reconciler = scope.spawn(move || daemon.reconciler.reconcile());
        assert!(world.vmm.await_held(1, soon()));
        assert!((0..8).all(|n| world.state(&format!("boots-{n}")) == VmState::Starting));
        world.vmm.release_starts();
        reconciler.join().unwrap();
    });
    assert_eq!(world.vmm.adoptions(), [vm.id]);
}

/// The VM's image was removed. The VM still runs, and the daemon notices its death.
#[test]
fn running_vm_without_image_is_adopted() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    std::fs::remove_dir_all(world.config.state_dir.join("images/default")).unwrap();
    world.restart_daemon();
    let again = world.show("web").unwrap();
    assert_eq!((again.pid, again.state), (vm.pid, VmState::Running));
    assert!(again.reason.is_some_and(|r| r.contains("image")));
    world.kill_vmm(&vm.id, Exit::Signal(9));
    world.await_state("web", VmState::Failed);
}

/// The daemon remembers a VMM that it could not kill. A later start kills it.
#[test]
fn start_kills_vmm_of_earlier_start() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let store = &world.daemon().core.store;
    store
        .change_durable(|tx| tx.update_vm_unlocked(&vm.id, |r| r.state = VmState::Failed))
        .unwrap();
    let again = world.start("web").unwrap();
    assert_eq!(again.state, VmState::Running);
    assert_ne!(again.pid, vm.pid);
    assert_eq!(world.vmm.live().len(), 1);
}

#[test]
fn vmm_that_could_not_be_adopted_is_retried() {
    let mut world = World::new();
    let (vm, addr) = world.running("web");
    world.shut();
    world.vmm.fail_next_adopt("no answer in time");
    world.restart_daemon();
    let reason = world.show("web").unwrap().reason.unwrap();
    assert!(
        reason.contains("could not be adopted") && reason.contains("no answer in time"),
        "{reason}"
    );
    world.vmm.fail_next_adopt("no answer in time");
    world.daemon().reconciler.sweep_once();
    assert!(world.show("web").unwrap().reason.is_some());
    world.daemon().reconciler.sweep_once();
    let adopted = world.show("web").unwrap();
    assert_eq!(
        (adopted.state, adopted.reason, adopted.ssh_addr),
        (VmState::Running, None, Some(addr))
    );
    world.vmm.guest_says(&vm.id, "on again\n");
    assert_eq!(world.stop("web").unwrap().synced, Some(Synced::Yes));
}
