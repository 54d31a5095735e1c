//! A test of a daemon that logs to a pipe that nobody reads. Nothing except the log may wait for
//! the pipe.

use crate::apart::run_in_own_process;
use crate::world::*;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use fcd::testing::store::faults::Fault;
use fcd::testing::vmm::GuestEvent;
use std::os::fd::OwnedFd;

/// Returns the write end and the read end of a full pipe.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = pipe();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    (reader, writer)
}

/// The whole process shares one log, so this test runs in its own process.
#[test]
fn stalled_log_delays_nothing() {
    let (reader, writer) = full_pipe();
    run_in_own_process("stalled_log::with_full_stderr_in_own_process", writer);
    drop(reader);
}

#[test]
#[ignore = "a part of stalled_log_delays_nothing"]
fn with_full_stderr_in_own_process() {
    fcd::testing::host::log::init().unwrap();
    let log_panic = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        log_panic(panic);
        // The test harness captures this line and shows it if the test fails.
        println!("{panic}");
    }));
    let world = World::new();
    let (web, _) = world.running("web");
    let (other, _) = world.running("other");
    world.create("rests");

    // The watcher takes the VM's lock to record that the VMM does not respond. It also logs this
    // fact.
    assert!(world.vmm.report(&web.id, GuestEvent::Unresponsive(true)));
    await_that("the row says that the VMM is silent", || {
        world.show("web").unwrap().unresponsive
    });
    let forced = VmStopRequest {
        force: true,
        ..stop("web")
    };
    assert_eq!(
        world
            .begin::<VmStop>(forced, vec![])
            .finish(PROMPT)
            .unwrap()
            .vm
            .state,
        VmState::Stopped
    );
    world
        .begin::<VmDelete>(delete("web"), vec![])
        .finish(PROMPT)
        .unwrap();

    // The store's writer logs the failed commit and answers the waiting calls.
    world.daemon().core.store.faults().fail(Fault::Io, 1);
    let refused = world
        .begin::<VmDelete>(delete("rests"), vec![])
        .finish(PROMPT)
        .unwrap_err();
    assert!(refused.is(Kind::StoreReadOnly), "{refused}");
    assert!(world.daemon().core.store.wait_writable(soon()));

    // Many log lines fill the queue. Nobody reads the panic's message either.
    for n in 0..100_000 {
        log::warn!("line {n} of a storm");
    }
    let panicked =
        fcd::testing::host::thread::spawn("panics", || panic!("nobody reads this")).unwrap();
    await_that("the thread that panics has ended", || {
        panicked.is_finished()
    });
    assert!(world.vmm.die(
        &other.id,
        &fcd::testing::vmm::End::Vmm(fcd::testing::vmm::Exit::Signal(9))
    ));
    await_that("the death is recorded", || {
        world.state("other") == VmState::Failed
    });
    world
        .begin::<VmDelete>(delete("other"), vec![])
        .finish(PROMPT)
        .unwrap();
    world
        .begin::<VmDelete>(delete("rests"), vec![])
        .finish(PROMPT)
        .unwrap();
}
