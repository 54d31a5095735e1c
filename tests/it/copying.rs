//! Tests copies with `fcctl cp`, which the daemon sees as exec sessions that run tar.

use crate::world::*;
use fcd::testing::api::exec::{ExecStart, ExecStartRequest, Stream};
use fcd::testing::error::Kind;
use std::io::Write;

const BYTES: u64 = 4096;

#[test]
fn stop_ends_copy_that_guest_does_not_read() {
    let world = World::new();
    let (_, addr) = world.running("web");
    drop(world.guest.stall_reads(addr, BYTES));
    let (read, write) = pipe();
    let request = ExecStartRequest {
        vm: "web".into(),
        argv: vec!["sh".into(), "-c".into(), "tar -x".into()],
        env: vec![],
        workdir: Some("/".into()),
        user: Some("0".into()),
        pty: None,
        streams: vec![Stream::Stdin],
        no_wait_children: false,
    };
    let mut call = world.begin::<ExecStart>(request, vec![read]);
    let tar = vec![7; 4 * BYTES as usize];
    std::fs::File::from(write).write_all(&tar).unwrap();
    await_that("the command runs", || world.guest.live(addr) == 1);
    world.stop("web").unwrap();
    let e = call.finish(SOON).unwrap_err();
    assert!(e.is(Kind::Cancelled), "{e:?}");
    assert!(e.fault.message.contains("the VM was stopped"), "{e:?}");
    assert_eq!(world.guest.live_total(), 0);
}
