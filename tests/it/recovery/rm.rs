//! Tests of VMs that were created with `--rm`.

use crate::world::*;
use fcd::testing::api::frame::Note;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use fcd::testing::vmm::{End, Exit};

fn rm(name: &str) -> VmCreateRequest {
    VmCreateRequest {
        name: Some(name.parse().unwrap()),
        rm: true,
        ..Default::default()
    }
}

fn held(world: &World, name: &str) -> (Running<VmReply>, Vm) {
    let hold = world.begin::<VmCreate>(
        VmCreateRequest {
            hold: true,
            ..rm(name)
        },
        vec![],
    );
    let vm = hold.note(|n| {
        if let Note::Created(vm) = n {
            Some((**vm).clone())
        } else {
            None
        }
    });
    (hold, vm)
}

#[test]
fn rm_vm_is_deleted_with_its_holder() {
    let world = World::new();
    let empty = world.census();
    for running in [false, true] {
        let (hold, vm) = held(&world, "web");
        if running {
            world.place(&vm.id);
            world.start("web").unwrap();
        }
        hold.hang_up();
        world.await_gone("web");
        world.await_rest();
        assert!(world.vmm.live().is_empty());
        assert_eq!(world.census().len(), empty.len());
    }
}

#[test]
fn rm_vm_is_deleted_when_it_stops_or_dies() {
    let world = World::new();
    for how in ["stop", "die", "shut down", "fail"] {
        let (mut hold, vm) = held(&world, "web");
        world.place(&vm.id);
        if how == "fail" {
            world.vmm.fail_next_start("no such machine");
            assert!(world.start("web").unwrap_err().is(Kind::VmmFailed));
        } else {
            world.start("web").unwrap();
        }
        match how {
            "stop" => assert_eq!(world.stop("web").unwrap().synced, Some(Synced::Yes)),
            "die" => world.kill_vmm(&vm.id, Exit::Signal(9)),
            "shut down" => assert!(world.vmm.die(&vm.id, &End::GuestShutDown)),
            _ => {}
        }
        assert_eq!(hold.finish(SOON).unwrap().vm.id, vm.id, "{how}");
        world.await_rest();
        assert!(world.show("web").unwrap_err().is(Kind::VmNotFound));
    }
}

#[test]
fn rm_vm_survives_restart() {
    let world = World::new();
    let (hold, vm) = held(&world, "web");
    world.place(&vm.id);
    world.start("web").unwrap();
    assert_eq!(
        world.run::<VmRestart>(stop("web")).unwrap().vm.state,
        VmState::Running
    );
    hold.hang_up();
    world.await_gone("web");
}

/// If a VM's files cannot be removed, the VM becomes `failed`, and the daemon stops retrying.
#[test]
fn rm_vm_that_cannot_be_deleted_is_failed() {
    let world = World::new();
    let vm = world.call::<VmCreate>(&rm("web")).unwrap().vm;
    let dir = world.vm_dir(&vm.id);
    std::fs::write(&dir, "in the way").unwrap();
    assert!(world.delete("web").is_err());
    let vm = world.await_state("web", VmState::Failed);
    assert!(vm.reason.is_some());
    world.await_rest();
    std::fs::remove_file(&dir).unwrap();
    world.delete("web").unwrap();
}

#[test]
fn rm_vm_is_deleted_when_daemon_opens_again() {
    let mut world = World::new();
    world.call::<VmCreate>(&rm("still")).unwrap();
    let vm = world.call::<VmCreate>(&rm("web")).unwrap().vm;
    world.place(&vm.id);
    world.start("web").unwrap();
    world.restart_daemon();
    world.await_gone("web");
    world.await_gone("still");
    world.await_rest();
    assert!(world.vmm.live().is_empty());
}
