//! Tests of adding ports to existing VMs and removing them.

use crate::world::*;
use fcd::testing::api::port::{Port, Protocol, loopback};
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::error::Kind;
use std::net::TcpListener;

fn port(host_port: u16, guest_port: u16) -> Port {
    Port {
        host_addr: loopback(),
        host_port,
        guest_port,
        protocol: Protocol::Tcp,
    }
}

/// Returns a free port below the range from which the kernel picks ports for other sockets. `n`
/// distinguishes the ports of one test.
fn free(n: u16) -> u16 {
    let from = 10_100 + u16::try_from(std::process::id() % 9_000).unwrap() + n * 100;
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (from..from + 100).find(is_free).expect("no free port")
}

fn of(vm: &str, ports: &[Port]) -> VmPortsRequest {
    VmPortsRequest {
        vm: vm.into(),
        ports: ports.to_vec(),
        auto: false,
    }
}

fn add(world: &World, vm: &str, ports: &[Port]) -> Result<Vec<Port>, Failure> {
    let reply = world.call::<VmPortAdd>(&of(vm, ports))?;
    assert!(reply.ports.iter().all(|port| reply.vm.ports.contains(port)));
    Ok(reply.ports)
}

fn remove(world: &World, vm: &str, ports: &[Port]) -> Result<Vec<Port>, Failure> {
    let reply = world.call::<VmPortRemove>(&of(vm, ports))?;
    assert!(!reply.ports.iter().any(|port| reply.vm.ports.contains(port)));
    Ok(reply.vm.ports)
}

#[test]
fn ports_of_running_vm_change_at_once_and_are_kept() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    let first = port(free(0), 80);
    let added = add(&world, "web", &[first, port(0, 81)]).unwrap();
    assert_eq!((added.len(), added[0]), (2, first));
    assert!(added[1].host_port != 0 && added[1].guest_port == 81);
    assert_eq!(world.vmm.ports(&vm.id), Some(added.clone()));
    assert_eq!(remove(&world, "web", &[first]).unwrap(), [added[1]]);
    assert_eq!(world.vmm.ports(&vm.id), Some(vec![added[1]]));
    world.reopen();
    world.daemon().reconciler.reconcile();
    assert_eq!(world.show("web").unwrap().ports, [added[1]]);
    assert_eq!(world.vmm.ports(&vm.id), Some(vec![added[1]]));
    world.run::<VmRestart>(stop("web")).unwrap();
    assert_eq!(world.vmm.ports(&vm.id), Some(vec![added[1]]));
    // Another VM can have the port that was removed.
    world.create("other");
    add(&world, "other", &[first]).unwrap();
}

#[test]
fn ports_of_stopped_vm_are_opened_by_its_start() {
    let world = World::new();
    let vm = world.create("web");
    let (kept, gone) = (port(free(0), 80), port(free(1), 81));
    add(&world, "web", &[kept, gone]).unwrap();
    remove(&world, "web", &[gone]).unwrap();
    world.place(&vm.id);
    world.start("web").unwrap();
    assert_eq!(world.vmm.ports(&vm.id), Some(vec![kept]));
}

#[test]
fn refused_change_of_ports_changes_nothing() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let (own, others) = (port(free(0), 80), port(free(1), 80));
    add(&world, "web", &[own]).unwrap();
    world.create("other");
    add(&world, "other", &[others]).unwrap();
    let listener = TcpListener::bind(("127.0.0.1", free(2))).unwrap();
    let occupied = port(listener.local_addr().unwrap().port(), 80);
    let new = port(free(3), 80);
    let many: Vec<Port> = (0..64).map(|i| port(20_000 + i, 80)).collect();
    let before = (world.show("web").unwrap(), world.vmm.ports(&vm.id));
    let check = |result: Result<Vec<Port>, Failure>, kind: Kind| {
        let e = result.unwrap_err();
        assert!(e.is(kind) && e.fault.hint.is_some(), "{e:?}");
        let after = (world.show("web").unwrap(), world.vmm.ports(&vm.id));
        assert_eq!(after, before, "{e:?}");
    };
    check(add(&world, "web", &[new, others]), Kind::PortTaken);
    check(
        add(&world, "web", &[new, port(own.host_port, 99)]),
        Kind::PortTaken,
    );
    check(add(&world, "web", &[new, occupied]), Kind::PortTaken);
    check(add(&world, "web", &[new, new]), Kind::InvalidArgument);
    check(add(&world, "web", &[]), Kind::InvalidArgument);
    check(add(&world, "web", &many), Kind::InvalidArgument);
    check(remove(&world, "web", &[own, new]), Kind::InvalidArgument);
    check(remove(&world, "web", &[]), Kind::InvalidArgument);
    world.vmm.fail_next_change("no");
    check(add(&world, "web", &[new]), Kind::VmmFailed);
    world.vmm.fail_next_change("no");
    check(remove(&world, "web", &[own]), Kind::VmmFailed);
    add(&world, "web", &[new]).unwrap();
}

#[test]
fn ports_of_vm_without_network_or_in_transition_are_refused() {
    let world = World::new();
    let cut_off = VmCreateRequest {
        name: Some("cut-off".parse().unwrap()),
        net: Some(Net::None),
        ..Default::default()
    };
    world.call::<VmCreate>(&cut_off).unwrap();
    let e = add(&world, "cut-off", &[port(0, 80)]).unwrap_err();
    assert!(e.is(Kind::InvalidArgument), "{e:?}");
    let vm = world.create("web");
    world.place(&vm.id);
    world
        .vmm
        .hold_starts(fcd::testing::vmm::fake::Stage::AfterSpawn);
    let start = world.begin::<VmStart>(request("web"), vec![]);
    assert!(world.vmm.await_held(1, soon()));
    let e = add(&world, "web", &[port(0, 80)]).unwrap_err();
    assert!(
        e.is(Kind::WrongState)
            && e.fault
                .hint
                .as_deref()
                .is_some_and(|h| h.contains("--state running web")),
        "{e:?}"
    );
    world.vmm.release_starts();
    drop(start);
    world.await_state("web", VmState::Running);
}

/// A hung VMM delays the change of ports, but not the VM's stop. The next start opens the port.
#[test]
fn stop_does_not_wait_for_change_of_ports() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let new = port(free(0), 80);
    world.vmm.hold_changes();
    std::thread::scope(|s| {
        let adding = s.spawn(|| add(&world, "web", &[new]));
        assert!(world.vmm.await_held_changes(1, soon()));
        let forced = VmStopRequest {
            force: true,
            ..stop("web")
        };
        let stopped = world.run::<VmStop>(forced).unwrap().vm;
        assert_eq!(
            (stopped.state, stopped.ports),
            (VmState::Stopped, vec![new])
        );
        world.vmm.release_changes();
        assert_eq!(adding.join().unwrap().unwrap(), [new]);
    });
    world.place(&vm.id);
    world.start("web").unwrap();
    assert_eq!(world.vmm.ports(&vm.id), Some(vec![new]));
}

/// The VM stops and starts while its old VMM closes the port. The new VMM has opened it again.
#[test]
fn removal_of_ports_follows_stop_and_start() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let gone = port(free(0), 80);
    add(&world, "web", &[gone]).unwrap();
    world.vmm.hold_changes();
    std::thread::scope(|s| {
        let removing = s.spawn(|| remove(&world, "web", &[gone]));
        assert!(world.vmm.await_held_changes(1, soon()));
        let forced = VmStopRequest {
            force: true,
            ..stop("web")
        };
        world.run::<VmStop>(forced).unwrap();
        world.place(&vm.id);
        world.start("web").unwrap();
        assert_eq!(world.vmm.ports(&vm.id), Some(vec![gone]));
        world.vmm.release_changes();
        assert_eq!(removing.join().unwrap().unwrap(), []);
    });
    assert_eq!(world.vmm.ports(&vm.id), Some(vec![]));
}

#[test]
fn concurrent_changes_of_ports_all_take_effect() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let begun = std::time::Instant::now();
    world.vmm.hold_changes();
    std::thread::scope(|s| {
        let adding: Vec<_> = (1..=4)
            .map(|n| {
                s.spawn({
                    let world = &world;
                    move || add(world, "web", &[port(0, n)])
                })
            })
            .collect();
        assert!(world.vmm.await_held_changes(1, soon()));
        world.vmm.release_changes();
        adding
            .into_iter()
            .for_each(|one| drop(one.join().unwrap().unwrap()));
    });
    let row = world.show("web").unwrap().ports;
    assert_eq!((row.len(), world.vmm.ports(&vm.id)), (4, Some(row.clone())));
    std::thread::scope(|s| {
        for one in &row {
            s.spawn(|| remove(&world, "web", std::slice::from_ref(one)).unwrap());
        }
    });
    assert_eq!(world.vmm.ports(&vm.id), Some(vec![]));
    assert_eq!(world.show("web").unwrap().ports, []);
    assert!(begun.elapsed() < SOON, "a change waited for its deadline");
}

/// An earlier daemon died after it changed the row and before it changed the VMM's ports.
#[test]
fn ports_of_adopted_vm_match_row() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    let (kept, extra, missing) = (port(free(0), 1), port(free(1), 2), port(free(2), 3));
    add(&world, "web", &[kept, extra]).unwrap();
    let listener = TcpListener::bind(("127.0.0.1", free(3))).unwrap();
    let lost = port(listener.local_addr().unwrap().port(), 4);
    world.edit_rows(|tx| {
        tx.update_vm_unlocked(&vm.id, |r| r.ports = vec![kept, missing, lost])
            .unwrap()
    });
    world.reopen();
    world.daemon().reconciler.reconcile();
    assert_eq!(world.vmm.ports(&vm.id), Some(vec![kept, missing]));
    assert_eq!(world.show("web").unwrap().ports, [kept, missing]);
}
