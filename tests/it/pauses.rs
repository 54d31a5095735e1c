//! Tests of guests that do not respond because they were paused after a call began.

use crate::world::*;
use fcd::testing::api::exec::{ExecStart, ExecStartRequest};
use fcd::testing::api::workspace::WorkspacePrepare;
use fcd::testing::client::Failure;
use fcd::testing::error::Kind;
use fcd::testing::vmm::GuestEvent;
use std::sync::Arc;

fn exec(world: &World) -> Failure {
    let request = ExecStartRequest {
        vm: "web".into(),
        argv: vec!["true".into()],
        env: vec![],
        workdir: None,
        user: None,
        pty: None,
        streams: vec![],
        no_wait_children: false,
    };
    world.run::<ExecStart>(request).unwrap_err()
}

fn import(world: &World) -> Failure {
    let (read, _write) = pipe();
    let mut call = world.begin::<WorkspacePrepare>(prepare("web"), vec![read]);
    call.finish(SOON).unwrap_err()
}

/// Makes dialing time out after `pause` has run. The pause runs on its own thread, as in the
/// daemon, where a thread that dials a guest never pauses it.
fn pause_while_dialing(
    world: &World,
    addr: std::net::SocketAddr,
    pause: impl Fn() + Send + Sync + 'static,
) {
    let pause = Arc::new(pause);
    world.guest.fail_dialing(addr, move || {
        let pause = pause.clone();
        let paused = fcd::testing::host::thread::spawn("pause", move || pause());
        paused.unwrap().join().unwrap();
        Kind::Timeout
    });
}

#[test]
fn calls_name_pause_by_full_disk_that_began_while_dialing() {
    for call in [exec, import] {
        let world = World::new();
        let (web, addr) = world.running("web");
        let (vmm, id) = (world.vmm.clone(), web.id.clone());
        pause_while_dialing(&world, addr, move || {
            assert!(vmm.report(&id, GuestEvent::Paused(true)));
        });
        let e = call(&world);
        assert!(e.is(Kind::DiskFull), "{e:?}");
        assert!(
            e.fault
                .message
                .ends_with("VM web is paused: the host's disk is full"),
            "{e:?}"
        );
        assert!(world.vmm.report(&web.id, GuestEvent::Paused(false)));
    }
}

#[test]
fn calls_name_pause_by_owner_that_began_while_dialing() {
    for call in [exec, import] {
        let world = World::new();
        let (_, addr) = world.running("web");
        let controls = world.daemon().controls.clone();
        pause_while_dialing(&world, addr, move || {
            controls.pause_vm(&root(), "web").unwrap();
        });
        let e = call(&world);
        assert!(e.is(Kind::WrongState), "{e:?}");
        assert!(e.fault.message.ends_with("VM web is paused"), "{e:?}");
    }
}
