//! The daemon's log leads to a pipe that nobody reads. Nothing else may wait for it.

use crate::apart::run_apart;
use crate::world::*;
use fcd::api::vm::*;
use fcd::error::Kind;
use fcd::store::faults::Fault;
use fcd::vmm::Told;
use std::os::fd::OwnedFd;

/// A pipe that takes no byte more, and its other end.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = pipe();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    (reader, writer)
}

/// The log is the whole process's, so the test has a process of its own.
#[test]
fn nothing_waits_for_a_log_that_nobody_reads() {
    let (reader, writer) = full_pipe();
    run_apart("stalled_log::in_a_process_whose_stderr_is_full", writer);
    drop(reader);
}

#[test]
#[ignore = "a part of nothing_waits_for_a_log_that_nobody_reads"]
fn in_a_process_whose_stderr_is_full() {
    fcd::host::log::init().unwrap();
    let log_panic = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        log_panic(panic);
        // The harness catches this and shows it when the test fails.
        println!("{panic}");
    }));
    let world = World::new();
    let (web, _) = world.running("web");
    let (other, _) = world.running("other");
    world.create("rests");

    // The watcher records under the VM's lock that the VMM is silent, and logs it.
    assert!(world.vmm.tell(&web.id, Told::Unresponsive(true)));
    await_that("the row says that the VMM is silent", || world.show("web").unwrap().unresponsive);
    let forced = VmStopRequest { force: true, ..stop("web") };
    assert_eq!(world.begin::<VmStop>(forced, vec![]).finish(PROMPT).unwrap().vm.state, VmState::Stopped);
    world.begin::<VmDelete>(delete("web"), vec![]).finish(PROMPT).unwrap();

    // The store's writer logs that a commit failed, and answers those who wait for it.
    world.daemon().store.faults().fail(Fault::Io, 1);
    let refused = world.begin::<VmDelete>(delete("rests"), vec![]).finish(PROMPT).unwrap_err();
    assert!(refused.is(Kind::StoreReadOnly), "{refused}");
    assert!(world.daemon().store.wait_writable(soon()));

    // A storm of lines, and a panic whose message nobody reads.
    for n in 0..100_000 {
        log::warn!("line {n} of a storm");
    }
    let panicked = fcd::host::thread::spawn("panics", || panic!("nobody reads this")).unwrap();
    await_that("the thread that panics has ended", || panicked.is_finished());
    assert!(world.vmm.die(&other.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9))));
    await_that("the death is recorded", || world.state("other") == VmState::Failed);
    world.begin::<VmDelete>(delete("other"), vec![]).finish(PROMPT).unwrap();
    world.begin::<VmDelete>(delete("rests"), vec![]).finish(PROMPT).unwrap();
}
