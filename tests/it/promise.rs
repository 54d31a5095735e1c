//! Tests that no lifecycle operation ever waits for a slow one. `scripts/negative-control` runs the
//! tests whose names begin with `stop_` and `delete_` on a build in which an import holds its VM's
//! lock. Each of them must fail there.

use crate::world::*;
use fcd::testing::api::op::{OpCancel, OpRequest, OpState};
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::{ExportKind, ExportRequest, WorkspaceExport};
use fcd::testing::error::Kind;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

/// The side whose inactivity stalls an import.
#[derive(Clone, Copy, Debug)]
enum Stall {
    /// The guest stops reading after some bytes.
    Guest,
    /// The client stops writing after some bytes.
    Client,
}

const BYTES: u64 = 4096;
/// The median of this many rounds must meet the promised bounds, because a busy machine may delay a
/// single round.
const ROUNDS: usize = 5;
/// Limit of the time from sending a stop or delete until the import has ended.
const IMPORT_ENDS: Duration = Duration::from_millis(100);

/// Starts an import and waits until it has stalled.
fn stalled(world: &World, addr: std::net::SocketAddr, stall: Stall) -> Import {
    let written = match stall {
        Stall::Guest => {
            drop(world.guest.stall_reads(addr, BYTES));
            2 * BYTES
        }
        Stall::Client => BYTES,
    };
    let mut import = world.import("web");
    let mut chunk = (written as u32).to_be_bytes().to_vec();
    chunk.resize(4 + written as usize, 7);
    import.stream.write_all(&chunk).unwrap();
    import.call.bytes(BYTES);
    import
}

/// Checks that the import ended with this cause and reported its progress, and that its worker is
/// free. Returns the time from `since` until the import ended.
#[track_caller]
fn ended(world: &World, mut import: Import, cause: &str, since: Instant) -> Duration {
    let (result, at) = import.call.finish_at(PROMPT);
    let e = result.unwrap_err();
    assert!(e.is(Kind::Cancelled), "{e:?}");
    let said = e.fault.message;
    assert!(
        said.contains(cause) && said.contains(&format!("{BYTES} bytes")),
        "{said}"
    );
    world.await_rest();
    assert_eq!(world.daemon().transfers.pool.counts().running, 0);
    assert_eq!(world.guest.live_total(), 0);
    at.saturating_duration_since(since)
}

/// Runs the rounds and checks their median. `round` returns the time from the call until the import
/// ended.
#[track_caller]
fn in_time(round: impl Fn() -> Duration) {
    let took = median((0..ROUNDS).map(|_| round()).collect());
    println!(
        "the import ended {took:?} after the call that ended it was sent (median of {ROUNDS})"
    );
    assert!(took < IMPORT_ENDS, "the import took {took:?} to end");
}

fn show_and_list(stall: Stall) {
    let world = World::new();
    let (_, addr) = world.running("web");
    let mut import = stalled(&world, addr, stall);
    for _ in 0..50 {
        let begun = Instant::now();
        assert_eq!(world.state("web"), VmState::Running);
        assert_eq!(
            world
                .call::<VmList>(&VmListRequest {
                    all: true,
                    ..Default::default()
                })
                .unwrap()
                .vms
                .len(),
            1
        );
        assert!(begun.elapsed() < PROMPT);
    }
    assert!(!import.call.has_ended());
    assert_eq!(
        world.workspace_state("web"),
        Some(WorkspaceState::Incomplete)
    );
}

fn stopped(stall: Stall, force: bool) -> Duration {
    let world = World::new();
    let (_, addr) = world.running("web");
    let import = stalled(&world, addr, stall);
    let begun = Instant::now();
    let vm = world
        .begin::<VmStop>(
            VmStopRequest {
                force,
                ..stop("web")
            },
            vec![],
        )
        .finish(PROMPT)
        .unwrap()
        .vm;
    assert_eq!(vm.state, VmState::Stopped);
    assert_eq!(
        vm.synced,
        Some(if force { Synced::No } else { Synced::Yes })
    );
    let took = ended(&world, import, "the VM was stopped", begun);
    assert_eq!(
        world.workspace_state("web"),
        Some(WorkspaceState::Incomplete)
    );
    assert!(world.vmm.live().is_empty());
    took
}

fn deleted(stall: Stall) -> Duration {
    let world = World::new();
    let empty = world.census();
    let (_, addr) = world.running("web");
    let import = stalled(&world, addr, stall);
    let begun = Instant::now();
    world
        .begin::<VmDelete>(delete("web"), vec![])
        .finish(PROMPT)
        .unwrap();
    let took = ended(&world, import, "the VM was deleted", begun);
    assert_eq!(world.census(), empty);
    took
}

#[test]
fn show_and_list_while_the_guest_does_not_read() {
    show_and_list(Stall::Guest);
}
#[test]
fn show_and_list_while_the_client_does_not_write() {
    show_and_list(Stall::Client);
}
#[test]
fn stop_while_the_guest_does_not_read() {
    in_time(|| stopped(Stall::Guest, false));
}
#[test]
fn stop_while_the_client_does_not_write() {
    in_time(|| stopped(Stall::Client, false));
}
#[test]
fn stop_by_force_while_the_guest_does_not_read() {
    in_time(|| stopped(Stall::Guest, true));
}
#[test]
fn delete_while_the_guest_does_not_read() {
    in_time(|| deleted(Stall::Guest));
}
#[test]
fn delete_while_the_client_does_not_write() {
    in_time(|| deleted(Stall::Client));
}

#[test]
fn restart_cancels_import() {
    for stall in [Stall::Guest, Stall::Client] {
        let world = World::new();
        let (vm, addr) = world.running("web");
        let import = stalled(&world, addr, stall);
        world.place(&vm.id);
        let begun = Instant::now();
        let restarted = world.run::<VmRestart>(stop("web")).unwrap().vm;
        assert_eq!(restarted.state, VmState::Running);
        ended(&world, import, "the VM was restarted", begun);
        assert_eq!(
            world.workspace_state("web"),
            Some(WorkspaceState::Incomplete)
        );
    }
}

/// Compares medians: a running import must not slow down calls on the VM measurably.
#[test]
fn import_does_not_slow_calls() {
    let world = World::new();
    let (_, addr) = world.running("web");
    let measure = || {
        let once = || {
            let begun = Instant::now();
            world.show("web").unwrap();
            begun.elapsed()
        };
        median((0..30).map(|_| once()).collect())
    };
    let idle = measure();
    let import = stalled(&world, addr, Stall::Guest);
    let under = measure();
    println!("vm.show, connection included: idle {idle:?}, under a stalled import {under:?}");
    assert!(
        under < 2 * idle + Duration::from_millis(5),
        "idle {idle:?}, under a stalled import {under:?}"
    );
    import.call.hang_up();
    world.await_rest();
}

#[test]
fn imports_and_exports_of_one_vm_run_one_at_a_time() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let first = world.import("web");
    let mut second = world.queue_import("web");
    second.call.stage("wait for another import");
    let third = world.queue_import("web");
    third.call.stage("wait for another import");
    let (out, into) = pipe();
    let request = ExportRequest {
        vm: "web".into(),
        kind: ExportKind::Patch,
        no_wait: false,
    };
    let mut export = world.begin::<WorkspaceExport>(request.clone(), vec![into]);
    export.stage("wait for another import");
    assert_eq!(
        world.guest.live_total(),
        1,
        "only the first transfer runs a command in the guest"
    );
    assert_eq!(
        world.daemon().transfers.pool.counts().running,
        1,
        "a waiting transfer does not occupy a worker"
    );
    assert_eq!(world.daemon().core.locks.workspace.len(), 1);
    // With `no_wait` a transfer fails instead of waiting.
    let (_out, into) = pipe();
    let mut hasty = world.begin::<WorkspaceExport>(
        ExportRequest {
            no_wait: true,
            ..request
        },
        vec![into],
    );
    assert!(hasty.finish(SOON).unwrap_err().is(Kind::Busy));
    // Cancelling a queued transfer removes it from the queue immediately. The other transfers stay.
    let queued = world
        .call::<fcd::testing::api::op::OpList>(&Default::default())
        .unwrap()
        .ops;
    let prepares: Vec<_> = queued
        .iter()
        .filter(|op| op.method == "workspace.prepare")
        .collect();
    assert_eq!(prepares.len(), 3, "{queued:?}");
    world
        .call::<OpCancel>(&OpRequest {
            op: prepares[1].id.to_string(),
        })
        .unwrap();
    let e = second.call.finish(PROMPT).unwrap_err();
    assert!(
        e.is(Kind::Cancelled) && e.fault.message.contains("op cancel was requested"),
        "{e}"
    );
    assert_eq!(world.op(&prepares[1].id).state, OpState::Cancelled);
    // Each transfer starts when the previous one has ended.
    let Import { mut call, stream } = first;
    write_payload(stream, b"one");
    call.finish(SOON).unwrap();
    let Import { mut call, stream } = third;
    call.ready();
    assert!(!export.has_ended(), "the export waits for the import");
    write_payload(stream, b"three");
    call.finish(SOON).unwrap();
    let reply = export.finish(SOON).unwrap();
    assert_eq!(reply.bytes, 7);
    let mut patch = Vec::new();
    fcd::testing::api::stream::ChunkReader::new(std::fs::File::from(out))
        .read_to_end(&mut patch)
        .unwrap();
    assert_eq!(patch, b"a patch");
    assert_eq!(world.workspace_state("web"), Some(WorkspaceState::Complete));
    assert_eq!(world.show("web").unwrap().id, vm.id);
}

#[test]
fn import_of_killed_client_is_incomplete() {
    let world = World::new();
    let (_, addr) = world.running("web");
    world.import_all("web");
    assert_eq!(world.workspace_state("web"), Some(WorkspaceState::Complete));
    let import = stalled(&world, addr, Stall::Client);
    import.call.hang_up();
    drop(import);
    world.await_rest();
    assert_eq!(
        world.workspace_state("web"),
        Some(WorkspaceState::Incomplete)
    );
    // An export must not accept the incomplete workspace as complete.
    let (_out, into) = pipe();
    let request = ExportRequest {
        vm: "web".into(),
        kind: ExportKind::Patch,
        no_wait: false,
    };
    let e = world
        .begin::<WorkspaceExport>(request, vec![into])
        .finish(SOON)
        .unwrap_err();
    assert!(
        e.is(Kind::WorkspaceIncomplete) && e.fault.hint.is_some(),
        "{e:?}"
    );
    world.import_all("web");
    assert_eq!(world.workspace_state("web"), Some(WorkspaceState::Complete));
}

/// The stream ends at the end of a tar block. Only the missing trailer shows that it is incomplete.
#[test]
fn import_cut_at_block_boundary_is_incomplete() {
    let world = World::new();
    world.running("web");
    let Import {
        mut call,
        mut stream,
    } = world.import("web");
    let mut chunk = 1024u32.to_be_bytes().to_vec();
    chunk.resize(4 + 1024, 0);
    stream.write_all(&chunk).unwrap();
    drop(stream);
    let e = call.finish(SOON).unwrap_err();
    assert!(
        e.is(Kind::StreamIncomplete) && e.fault.message.contains("1024 bytes"),
        "{e:?}"
    );
    assert_eq!(
        world.workspace_state("web"),
        Some(WorkspaceState::Incomplete)
    );
}

#[test]
fn import_of_silent_client_frees_worker() {
    let world = World::with(|c| c.limits.transfer_idle_s = 1);
    world.running("web");
    let mut import = world.import("web");
    let e = import.call.finish(SOON).unwrap_err();
    assert!(e.is(Kind::TransferIdle), "{e:?}");
    world.await_rest();
}
