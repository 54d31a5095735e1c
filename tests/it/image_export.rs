//! Tests that image exports are complete, and that a slow reader delays nothing else.

use crate::guest_runtime::make_runtime;
use crate::image_register::{create, image, make_file, register};
use crate::world::*;
use fcd::testing::api::image::*;
use fcd::testing::api::op::{OpCancel, OpRequest};
use fcd::testing::api::vm::VmState;
use fcd::testing::error::Kind;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// The size of the image, which does not fit in a pipe.
const BYTES: u64 = 3 << 20;

/// Returns a world with the image `mine`, a directory, and the path of the image's file there.
fn world(idle_s: u64) -> (World, tempfile::TempDir, PathBuf) {
    let world = World::with(|config| config.limits.transfer_idle_s = idle_s);
    make_runtime(&world.config.state_dir, "00000000000a", 7);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = make_file(dir.path());
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(BYTES).unwrap();
    file.write_at(b"the end", BYTES - 7).unwrap();
    register(&world, "mine", &path).unwrap();
    (world, dir, path)
}

fn raw(name: &str) -> ImageExportRequest {
    ImageExportRequest {
        image: name.parse().unwrap(),
        format: ExportFormat::Raw,
    }
}

/// Begins an export and waits until its pipe is full. Returns the call and the pipe's read end.
fn stalled(world: &World) -> (Running<ImageExportReply>, File) {
    let (reader, writer) = pipe();
    let call = world.begin::<ImageExport>(raw("mine"), vec![writer]);
    call.stage("write the image");
    let reader = File::from(reader);
    let waiting = || rustix::io::ioctl_fionread(&reader).unwrap();
    await_that("the pipe is full", || waiting() >= 64 << 10);
    (call, reader)
}

fn read_all(mut reader: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn raw_image_arrives_as_it_is() {
    let (world, _dir, path) = world(60);
    for _ in 0..2 {
        let (mut call, reader) = stalled(&world);
        assert!(read_all(reader) == fs::read(&path).unwrap());
        assert_eq!(call.finish(SOON).unwrap().bytes, BYTES);
        // The second time, the image is in the store.
        world.run::<ImagePromote>(image("mine")).unwrap();
    }
}

/// Nobody reads the export. Starts, stops and deletes are not delayed, and the image can be
/// deleted.
#[test]
fn stalled_export_delays_nobody() {
    let (world, _dir, path) = world(60);
    let (mut call, reader) = stalled(&world);
    let vm = create(&world, "web", "mine").unwrap();
    world.start("web").unwrap();
    world.stop("web").unwrap();
    assert_eq!(world.state("web"), VmState::Stopped);
    world.delete("web").unwrap();
    assert!(!world.vm_dir(&vm.id).exists());
    world.run::<ImagePromote>(image("mine")).unwrap();
    world.call::<ImageDelete>(&image("mine")).unwrap();
    assert!(read_all(reader) == fs::read(&path).unwrap());
    call.finish(SOON).unwrap();
}

#[test]
fn export_ends_when_it_is_cancelled_or_nobody_reads() {
    let (world, _dir, _) = world(1);
    let (mut call, reader) = stalled(&world);
    let op = world.daemon().core.ops.list(&Default::default());
    let op = OpRequest {
        op: op[0].1.id.to_string(),
    };
    world.call::<OpCancel>(&op).unwrap();
    assert!(call.finish(SOON).unwrap_err().is(Kind::Cancelled));
    assert!((read_all(reader).len() as u64) < BYTES);

    let (mut call, reader) = stalled(&world);
    drop(reader);
    assert!(call.finish(SOON).unwrap_err().is(Kind::Cancelled));
    let (call, _reader) = stalled(&world);
    call.hang_up();
    world.await_rest();
    let (mut call, _reader) = stalled(&world);
    let idle = call.finish(SOON).unwrap_err();
    assert!(idle.is(Kind::TransferIdle), "{idle}");
}

#[test]
fn file_that_changes_during_export_makes_it_fail() {
    let (world, _dir, path) = world(60);
    let (mut call, reader) = stalled(&world);
    let writer = File::options().write(true).open(&path).unwrap();
    writer.write_at(b"x", BYTES - 1).unwrap();
    read_all(reader);
    let e = call.finish(SOON).unwrap_err();
    assert!(e.is(Kind::Conflict), "{e}");
    // Another export does not even begin.
    let (_reader, writer) = pipe();
    let mut call = world.begin::<ImageExport>(raw("mine"), vec![writer]);
    assert!(call.finish(SOON).unwrap_err().is(Kind::Conflict));
}

#[test]
fn export_needs_one_pipe_and_the_right_to_the_image() {
    let (world, dir, _) = world(60);
    world.open_to_everybody();
    let refused = |name: &str, fds: Vec<OwnedFd>| {
        let mut call = world.begin::<ImageExport>(raw(name), fds);
        call.finish(SOON).unwrap_err()
    };
    assert!(refused("mine", vec![]).is(Kind::InvalidRequest));
    let (reader, writer) = pipe();
    assert!(refused("none", vec![writer]).is(Kind::ImageNotFound));
    assert!(refused("mine", vec![reader]).is(Kind::InvalidArgument));
    // A file is refused, because a write to a file may block in a way that cannot be cancelled.
    let file = File::create(dir.path().join("out")).unwrap();
    assert!(refused("mine", vec![file.into()]).is(Kind::InvalidArgument));
    let (_reader, writer) = pipe();
    let denied = as_uid(4_000_000, || {
        let mut call = world.begin::<ImageExport>(raw("mine"), vec![writer]);
        call.finish(SOON).unwrap_err()
    });
    assert!(denied.is(Kind::Denied), "{denied}");
}
