//! Tests of `--publish auto`: forwards that follow what a guest listens on.

use crate::world::*;
use fcd::testing::api::port::{AutoPorts, Port, Protocol, RefusalCause, loopback};
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use fcd::testing::guest::fake::Answer;
use fcd::testing::vmm::End;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

/// How the script that lists listeners begins.
const LIST: &str = "seen=$(";

/// The listeners of all guests, in the form of the kernel.
#[derive(Clone, Default)]
struct Listeners(Arc<Mutex<String>>);

impl Listeners {
    fn of(world: &World) -> Self {
        let listeners = Self::default();
        let list = listeners.0.clone();
        world.guest.on(LIST, move |_| {
            Answer::status(0).stdout(list.lock().unwrap().clone())
        });
        listeners
    }

    fn set(&self, ports: &[u16]) {
        let line = |port: &u16| format!("00000000:{port:04X}\n");
        self.write(&(line(&22) + &ports.iter().map(line).collect::<String>()));
    }

    fn write(&self, list: &str) {
        list.clone_into(&mut self.0.lock().unwrap());
    }
}

fn forward(port: u16) -> Port {
    Port {
        host_addr: loopback(),
        host_port: port,
        guest_port: port,
        protocol: Protocol::Tcp,
    }
}

/// Returns a free port that no other module of these tests uses. Each call needs its own `n` from 0
/// to 9, because the tests run at the same time.
fn free(n: u16) -> u16 {
    let from = 2_100 + u16::try_from(std::process::id() % 7_000).unwrap() + n * 100;
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (from..from + 100).find(is_free).expect("no free port")
}

fn create(world: &World, name: &str) -> Vm {
    let request = VmCreateRequest {
        name: Some(name.parse().unwrap()),
        auto_ports: true,
        ..Default::default()
    };
    let vm = world.call::<VmCreate>(&request).unwrap().vm;
    assert_eq!(vm.auto_ports, Some(AutoPorts::default()));
    world.place(&vm.id);
    vm
}

fn change(vm: &str, ports: &[Port], auto: bool) -> VmPortsRequest {
    VmPortsRequest {
        vm: vm.into(),
        ports: ports.to_vec(),
        auto,
    }
}

/// Waits until exactly these ports are forwarded and these are refused.
fn await_ports(world: &World, vm: &Vm, open: &[u16], refused: &[u16]) {
    let open: Vec<Port> = open.iter().copied().map(forward).collect();
    world.await_change(|state| {
        let row = state.vm(&vm.id).unwrap();
        let auto = row.auto_ports.clone().unwrap_or_default();
        let are_refused = auto.refused.iter().map(|r| r.guest_port);
        row.ports == open && auto.open == open && are_refused.eq(refused.iter().copied())
    });
    await_that("the VMM forwards the same ports", || {
        world.vmm.ports(&vm.id).as_ref() == Some(&open)
    });
}

#[test]
fn forwards_follow_the_listeners_of_the_guest() {
    let mut world = World::new();
    let (listeners, a, b) = (Listeners::of(&world), free(0), free(1));
    listeners.set(&[a]);
    let vm = create(&world, "web");
    world.start("web").unwrap();
    await_ports(&world, &vm, &[a], &[]);
    listeners.set(&[a, b]);
    await_ports(&world, &vm, &[a, b], &[]);
    // An answer of another form changes nothing.
    listeners.write("../../etc/passwd\n");
    world.reopen();
    world.daemon().reconciler.reconcile();
    await_ports(&world, &vm, &[a, b], &[]);
    listeners.set(&[b]);
    await_ports(&world, &vm, &[b], &[]);
    let stopped = world.stop("web").unwrap();
    assert_eq!(
        (stopped.ports, stopped.auto_ports),
        (vec![], Some(AutoPorts::default()))
    );
    world.await_rest();
    world.place(&vm.id);
    world.start("web").unwrap();
    await_ports(&world, &vm, &[b], &[]);
    world.vmm.die(&vm.id, &End::GuestShutDown);
    assert_eq!(world.await_state("web", VmState::Stopped).ports, []);
}

#[test]
fn conflict_is_reported_until_its_listener_ends() {
    let world = World::new();
    let (listeners, port) = (Listeners::of(&world), free(2));
    let vm = create(&world, "web");
    world.create("other");
    world
        .call::<VmPortAdd>(&change("other", &[forward(port)], false))
        .unwrap();
    listeners.set(&[port]);
    world.start("web").unwrap();
    await_ports(&world, &vm, &[], &[port]);
    let refused = world.show("web").unwrap().auto_ports.unwrap().refused;
    let text = format!("port 127.0.0.1:{port}/tcp belongs to another VM");
    assert_eq!(refused[0].reason, text);
    world
        .call::<VmPortRemove>(&change("other", &[forward(port)], false))
        .unwrap();
    listeners.set(&[]);
    await_ports(&world, &vm, &[], &[]);
    listeners.set(&[port]);
    await_ports(&world, &vm, &[port], &[]);
    // A port that the owner removes stays removed while the listener lasts.
    world
        .call::<VmPortRemove>(&change("web", &[forward(port)], false))
        .unwrap();
    await_ports(&world, &vm, &[], &[port]);
}

#[test]
fn unreachable_listener_is_reported_until_it_can_be_reached() {
    let world = World::new();
    let (listeners, port) = (Listeners::of(&world), free(3));
    listeners.write(&format!(
        "00000000:0016\n00000000:0050\n0100007F:{port:04X}\n"
    ));
    let vm = create(&world, "web");
    world.start("web").unwrap();
    await_ports(&world, &vm, &[], &[80, port]);
    let refused = world.show("web").unwrap().auto_ports.unwrap().refused;
    let causes: Vec<RefusalCause> = refused.iter().map(|r| r.cause).collect();
    assert_eq!(causes, [RefusalCause::Privileged, RefusalCause::Loopback]);
    assert!(refused[1].reason.contains("0.0.0.0"), "{refused:?}");
    listeners.set(&[port]);
    await_ports(&world, &vm, &[port], &[]);
}

#[test]
fn following_begins_and_ends_while_the_vm_runs() {
    let world = World::new();
    let (listeners, a, own) = (Listeners::of(&world), free(4), free(5));
    listeners.set(&[a]);
    let (vm, _) = world.running("web");
    let off = world.call::<VmPortRemove>(&change("web", &[], true));
    assert!(off.unwrap_err().is(Kind::InvalidArgument));
    let added = world
        .call::<VmPortAdd>(&change("web", &[forward(own)], true))
        .unwrap();
    assert_eq!(added.ports, [forward(own)]);
    world.await_change(|state| state.vm(&vm.id).unwrap().ports == [forward(own), forward(a)]);
    let removed = world
        .call::<VmPortRemove>(&change("web", &[], true))
        .unwrap();
    assert_eq!(removed.ports, [forward(a)]);
    assert_eq!(
        (removed.vm.ports, removed.vm.auto_ports),
        (vec![forward(own)], None)
    );
    assert_eq!(world.vmm.ports(&vm.id), Some(vec![forward(own)]));
    world.await_rest();

    let cut_off = VmCreateRequest {
        name: Some("cut-off".parse().unwrap()),
        net: Some(Net::None),
        ..Default::default()
    };
    let refused = world.call::<VmCreate>(&VmCreateRequest {
        auto_ports: true,
        ..cut_off.clone()
    });
    assert!(refused.unwrap_err().is(Kind::InvalidArgument));
    world.call::<VmCreate>(&cut_off).unwrap();
    let refused = world.call::<VmPortAdd>(&change("cut-off", &[], true));
    assert!(refused.unwrap_err().is(Kind::InvalidArgument));
    assert_eq!(world.show("cut-off").unwrap().auto_ports, None);
}
