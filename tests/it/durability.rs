//! Tests that nobody learns of a change, and nothing on the host follows from it, before the change
//! is on disk. A commit fails or is held back, which shows what happens in the meantime.

use crate::keys;
use crate::points::Mode;
use crate::world::*;
use fcd::testing::api::snapshot::*;
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::{ExportKind, ExportRequest, WorkspaceExport};
use fcd::testing::error::Kind;
use fcd::testing::guest::fake::Answer;
use fcd::testing::locks::durable_waits;
use fcd::testing::store::WorkspaceOf;
use fcd::testing::store::faults::{Fault, Faults};
use std::io::Read;

fn faults(world: &World) -> &Faults {
    world.daemon().core.store.faults()
}

fn await_writable(world: &World) {
    assert!(world.daemon().core.store.wait_writable(soon()));
}

/// Waits until a thread with this label waits for the disk. Every test of this process is seen, so
/// no other test may use the label for that.
fn await_durable_wait(operation: &str) {
    await_that("the operation waits for the disk", || {
        let mut waits = durable_waits().into_iter();
        waits.any(|wait| wait.operation.as_deref() == Some(operation))
    });
}

fn save() -> SnapshotCreateRequest {
    SnapshotCreateRequest {
        vm: "web".into(),
        name: Some("one".parse().unwrap()),
    }
}

fn export(vm: &str) -> ExportRequest {
    ExportRequest {
        vm: vm.into(),
        kind: ExportKind::Patch,
        no_wait: false,
    }
}

#[test]
fn call_without_more_is_answered_once_durable() {
    const METHOD: &str = "snapshot.restore";
    let world = World::new();
    world.running("web");
    world.run::<SnapshotCreate>(save()).unwrap();
    world.stop("web").unwrap();
    world.await_rest();
    let gate = faults(&world).gate();
    let refused = std::thread::scope(|scope| {
        let call = || keys::send(&world, METHOD, r#"{"snapshot":"one"}"#, None, false);
        let call = scope.spawn(call);
        await_durable_wait(METHOD);
        faults(&world).fail(Fault::Io, 1);
        drop(gate);
        call.join().unwrap()
    });
    assert_eq!(keys::kind(&refused), Kind::StoreReadOnly.name());
    await_writable(&world);
    world.await_rest();
    assert_eq!(world.state("web"), VmState::Stopped);
}

#[test]
fn export_sends_nothing_before_its_operation_is_durable() {
    let world = World::new();
    world.running("web");
    world.import_all("web");
    world.await_rest();
    faults(&world).fail(Fault::Io, 1);
    let (out, into) = pipe();
    let mut export = world.begin::<WorkspaceExport>(export("web"), vec![into]);
    let e = export.finish(SOON).unwrap_err();
    assert!(e.is(Kind::StoreReadOnly), "{e:?}");
    let mut sent = Vec::new();
    std::fs::File::from(out).read_to_end(&mut sent).unwrap();
    assert_eq!(sent, b"");
    await_writable(&world);
}

#[test]
fn end_of_operation_is_reported_once_durable() {
    const COMMAND: &str = "run a command in the guest";
    let world = World::new();
    let (vm, _) = world.running("web");
    world.import_all("web");
    world.await_rest();
    world.points.hold(COMMAND);
    let (_out, into) = pipe();
    let mut export = world.begin::<WorkspaceExport>(export("web"), vec![into]);
    await_that("the export runs", || world.points.is_holding());
    let gate = faults(&world).gate();
    world.points.release();
    await_durable_wait(&format!("workspace.export {}", vm.id));
    assert_eq!(world.daemon().core.ops.running(), 1);
    drop(gate);
    export.finish(SOON).unwrap();
}

/// If the daemon died after the first byte and before the mark, the guest's half of a tree would be
/// taken for a whole one.
#[test]
fn import_sends_nothing_before_incomplete_mark_is_durable() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.import_all("web");
    world.await_rest();
    let calls = world.guest.calls().len();
    let workspaces = &world.daemon().core.locks.workspace;
    let mut call = while_held(
        || workspaces.lock(&WorkspaceOf(vm.id.clone())),
        || {
            let Import { call, stream } = world.queue_import("web");
            call.stage("wait for another import");
            drop(stream);
            faults(&world).fail(Fault::Io, 1);
            call
        },
    );
    let e = call.finish(SOON).unwrap_err();
    assert!(e.is(Kind::StoreReadOnly), "{e:?}");
    assert_eq!(world.guest.calls().len(), calls);
    await_writable(&world);
    world.await_rest();
    assert_eq!(world.workspace_state("web"), Some(WorkspaceState::Complete));
}

#[test]
fn snapshot_keeps_its_files_until_its_deletion_is_durable() {
    let world = World::new();
    world.running("web");
    world.run::<SnapshotCreate>(save()).unwrap();
    world.await_rest();
    let (before, one) = (
        world.census(),
        SnapshotRequest {
            snapshot: "one".into(),
        },
    );
    faults(&world).fail(Fault::Io, 1);
    let e = world.call::<SnapshotDelete>(&one).unwrap_err();
    assert!(e.is(Kind::StoreReadOnly), "{e:?}");
    await_writable(&world);
    assert_eq!(world.census(), before);
    world.call::<SnapshotDelete>(&one).unwrap();
}

#[test]
fn guest_is_paused_once_that_is_durable() {
    let world = World::new();
    let (vm, _) = world.running("web");
    faults(&world).fail(Fault::Io, 1);
    let e = world.call::<VmPause>(&request("web")).unwrap_err();
    assert!(e.is(Kind::StoreReadOnly), "{e:?}");
    assert!(!world.vmm.is_paused(&vm.id));
    await_writable(&world);
    assert!(!world.show("web").unwrap().paused);
}

/// The commit of a stop fails. Before its thread learns that, a second stop claims the VM. The
/// second stop must keep its token, by which a kill can shorten it.
#[test]
fn claim_that_was_undone_leaves_the_next_one_alone() {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.guest.on(fcd::testing::image::SHUTDOWN_COMMAND, |_| {
        Answer::status(0).stdout("synced\n")
    });
    let patient = || VmStopRequest {
        timeout_ms: Some(3_600_000),
        ..stop("web")
    };
    let gate = faults(&world).gate();
    let mut first = world.begin::<VmStop>(patient(), vec![]);
    assert!(gate.wait_for_writer(soon()));
    let mut second = while_locked(&world, &vm, || {
        let second = world.begin::<VmStop>(patient(), vec![]);
        world.await_waiters(1);
        faults(&world).fail(Fault::Io, 1);
        drop(gate);
        // The thread of the first stop waits behind the second.
        world.await_waiters(2);
        await_writable(&world);
        second
    });
    let e = first.finish(SOON).unwrap_err();
    assert!(e.is(Kind::StoreReadOnly), "{e:?}");
    let killed = world.run::<VmKill>(request("web")).unwrap().vm;
    assert_eq!(killed.state, VmState::Stopped);
    assert_eq!(second.finish(SOON).unwrap().vm.state, VmState::Stopped);
}

/// A daemon that died now would leave a directory that nothing lists.
#[test]
fn snapshot_begins_once_its_ledger_row_is_durable() {
    /// Two points belong to the commit of the operation, and the third to that of the ledger row.
    const COMMIT_OF_LEDGER_ROW: u64 = 3;
    let world = World::new();
    world.running("web");
    world.await_rest();
    let calls = world.guest.calls().len();
    world.points.arm(Mode::FailCommits, COMMIT_OF_LEDGER_ROW);
    let e = world.run::<SnapshotCreate>(save()).unwrap_err();
    assert!(e.is(Kind::StoreReadOnly), "{e:?}");
    assert_eq!(world.points.hit().as_deref(), Some("before a commit"));
    assert_eq!(world.guest.calls().len(), calls);
    await_writable(&world);
    world.await_rest();
}
