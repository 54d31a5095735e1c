//! Tests with VMMs that ended while no daemon was running.

use crate::world::*;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use fcd::testing::vmm::Exit;
use std::path::Path;

/// Creates a VM whose VMM ends with `exit` while no daemon is running.
fn world_without_vmm(exit: Exit) -> (World, Vm) {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.shut();
    world.kill_vmm(&vm.id, exit);
    (world, vm)
}

#[test]
fn host_is_scanned_once_for_all_missing_vmms() {
    const VMS: usize = 10;
    let mut world = World::new();
    let vms: Vec<_> = (0..VMS)
        .map(|n| world.running(&format!("vm-{n}")).0)
        .collect();
    world.shut();
    for vm in &vms[1..] {
        world.kill_vmm(&vm.id, Exit::Signal(7));
    }
    world.reopen();
    let before = world.vmm.scans();
    world.daemon().reconciler.reconcile();
    assert_eq!(
        world.vmm.scans(),
        before + 2,
        "one scan serves all missing VMs, and the sweep makes another"
    );
    assert_eq!(world.state("vm-0"), VmState::Running);
    assert!((1..VMS).all(|n| world.state(&format!("vm-{n}")) == VmState::Failed));
}

#[test]
fn vmm_that_died_between_daemons_is_failed() {
    let (mut world, _) = world_without_vmm(Exit::Signal(9));
    world.restart_daemon();
    let vm = world.show("web").unwrap();
    assert_eq!((vm.state, vm.pid), (VmState::Failed, None));
    assert!(vm.reason.unwrap().contains("while fcd was not running"));
    assert_eq!(world.start("web").unwrap().state, VmState::Running);
}

/// Makes the store look as if the host had been rebooted since the VM was started.
fn reboot_host(world: &mut World, vm: &Vm) {
    world.edit_rows(|tx| {
        tx.update_vm_unlocked(&vm.id, |r| {
            r.identity.as_mut().unwrap().boot_id = "another".into()
        })
        .unwrap()
    });
    world.restart_daemon();
}

#[test]
fn vm_after_host_reboot_is_stopped() {
    let (mut world, vm) = world_without_vmm(Exit::Signal(7));
    reboot_host(&mut world, &vm);
    let vm = world.show("web").unwrap();
    assert_eq!(vm.state, VmState::Stopped);
    assert_eq!(vm.reason.as_deref(), Some("the host was rebooted"));
    assert_eq!(world.vmms_in_ledger(&vm), [0u64; 0]);
}

fn set_restart(world: &World, vm: &str, restart: Restart) -> Vm {
    let request = VmSetRequest {
        vm: vm.to_owned(),
        restart: Some(restart),
        ..VmSetRequest::default()
    };
    world.call::<VmSet>(&request).unwrap().vm
}

#[test]
fn vm_with_restart_starts_again_after_host_reboot() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    let set = set_restart(&world, "web", Restart::Always);
    assert_eq!(set.restart, Restart::Always);
    world.shut();
    world.kill_vmm(&vm.id, Exit::Signal(7));
    reboot_host(&mut world, &vm);
    await_that("the VM runs again", || {
        world.state("web") == VmState::Running
    });
    assert_eq!(world.show("web").unwrap().reason, None);

    // A VM that its owner has stopped stays stopped.
    world.stop("web").unwrap();
    world.restart_daemon();
    assert_eq!(world.state("web"), VmState::Stopped);
}

#[test]
fn vm_without_restart_stays_stopped_after_host_reboot() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    set_restart(&world, "web", Restart::Always);
    set_restart(&world, "web", Restart::No);
    world.shut();
    world.kill_vmm(&vm.id, Exit::Signal(7));
    reboot_host(&mut world, &vm);
    assert_eq!(world.state("web"), VmState::Stopped);
}

#[test]
fn vm_that_is_deleted_at_its_end_cannot_restart() {
    let world = World::new();
    let request = VmCreateRequest {
        rm: true,
        restart: Restart::Always,
        ..VmCreateRequest::default()
    };
    let e = world.call::<VmCreate>(&request).unwrap_err();
    assert!(e.is(Kind::InvalidArgument), "{e:?}");
    let (vm, _) = world.running("web");
    let request = VmSetRequest {
        vm: vm.name.to_string(),
        rm: Some(true),
        restart: Some(Restart::Always),
        ..VmSetRequest::default()
    };
    let e = world.call::<VmSet>(&request).unwrap_err();
    assert_eq!(
        e.fault.message,
        "a VM that is deleted when it ends cannot restart"
    );
    assert!(!world.show("web").unwrap().rm);
}

/// Replaces the console log of a VM that has started.
fn overwrite_console(dir: &Path, words: &str) {
    let log = dir.join("console.log");
    // The thread that reads consoles records the start with a delay. Text that it appends later
    // would hide the words.
    await_that("the start is in the log", || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("--- fcd: started"))
    });
    std::fs::write(&log, format!("--- fcd: started ---\r\n{words}")).unwrap();
}

/// The earlier daemon logged the guest's last output and died before it saw the VMM exit.
#[test]
fn missing_vmm_is_judged_by_guests_last_words() {
    for (words, state, reason) in [
        (
            "[    9.2] reboot: Power down\r\n",
            VmState::Stopped,
            "the guest shut itself down",
        ),
        (
            "[    4.2] Kernel panic - not syncing: sysrq triggered crash\r\n",
            VmState::Failed,
            "while fcd was not running: the guest's kernel panicked: sysrq triggered crash",
        ),
        (
            "",
            VmState::Failed,
            "the VMM ended while fcd was not running, for an unknown reason",
        ),
    ] {
        let (mut world, vm) = world_without_vmm(Exit::Unknown);
        overwrite_console(&world.vm_dir(&vm.id), words);
        world.restart_daemon();
        let vm = world.show("web").unwrap();
        assert_eq!(
            (vm.state, vm.reason.as_deref()),
            (state, Some(reason)),
            "{words}"
        );
    }
}

/// Nobody recorded the guest's console, but QEMU's own log says how the guest ended.
#[test]
fn missing_vmm_is_judged_by_its_own_log() {
    const RESET: &str =
        "while fcd was not running: the guest was reset, according to the VMM's log";
    for (log, state, reason) in [
        (
            "qemu_system_shutdown_request reason=6\n",
            VmState::Stopped,
            "the guest shut itself down",
        ),
        (
            "vm_state_notify running 0 reason 11 (shutdown)\n",
            VmState::Failed,
            RESET,
        ),
        (
            "qemu: terminating on signal 15 from pid 1 (init)\n",
            VmState::Failed,
            "the VMM was ended from the host (host-signal)",
        ),
    ] {
        let (mut world, vm) = world_without_vmm(Exit::Unknown);
        let dir = world.vm_dir(&vm.id);
        overwrite_console(&dir, "");
        std::fs::write(dir.join("vmm.log"), log).unwrap();
        world.restart_daemon();
        let vm = world.show("web").unwrap();
        assert!(
            vm.state == state && vm.reason.as_ref().unwrap().contains(reason),
            "{log}: {:?} {:?}",
            vm.state,
            vm.reason
        );
    }
}
