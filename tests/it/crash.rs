//! Kills the daemon, or makes an effect fail, at every point of every sequence of operations on one
//! VM. After a restart the invariants must hold: rows and host agree (I1), nothing is left over
//! (I2), no healthy VMM was killed (I3), acknowledged changes exist (I5), the next operation works
//! (I6), and a second recovery changes nothing (I7).

use crate::points::Mode;
use crate::world::*;
use fcd::testing::api::daemon::{Leaks, LeaksRequest};
use fcd::testing::api::port::{Port, Protocol, loopback};
use fcd::testing::api::snapshot::*;
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::WorkspacePrepare;
use fcd::testing::client::Failure;
use fcd::testing::error::Kind;
use std::collections::BTreeSet;

/// The highest number of points to try. Every operation has fewer, unless it never ends.
const POINTS_MAX: u64 = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Create,
    Start,
    Stop,
    Kill,
    Restart,
    Delete,
    Set,
    /// A `set` with `now`.
    Adjust,
    Balloon,
    /// Adds a port.
    Publish,
    /// Removes the port.
    Unpublish,
    Prepare,
    Snapshot,
    /// Restores the same VM.
    Restore,
    /// Restores into a new VM.
    RestoreAs,
    Fork,
    Forget,
}
use Verb::{
    Adjust, Balloon, Create, Delete, Forget, Fork, Kill, Prepare, Publish, Restart, Restore,
    RestoreAs, Set, Snapshot, Start, Stop, Unpublish,
};
const VERBS: [Verb; 9] = [
    Start, Stop, Kill, Restart, Delete, Set, Adjust, Balloon, Prepare,
];

/// Sequences that end with an operation on snapshots. The operations before the last one prepare
/// it.
const SNAPSHOT_SEQUENCES: [&[Verb]; 9] = [
    &[Start, Snapshot],
    &[Snapshot],
    &[Start, Snapshot, Snapshot],
    &[Start, Snapshot, Stop, Restore],
    &[Start, Snapshot, Kill, Restore],
    &[Start, Snapshot, Restore],
    &[Start, Snapshot, RestoreAs],
    &[Start, Fork],
    &[Start, Snapshot, Forget],
];

/// Sequences with a change of ports.
const PORT_SEQUENCES: [&[Verb]; 6] = [
    &[Publish],
    &[Publish, Unpublish],
    &[Start, Publish],
    &[Start, Publish, Unpublish],
    &[Start, Publish, Stop],
    &[Publish, Start],
];

/// Returns a port below the range from which the kernel picks ports for other sockets.
fn a_port() -> Port {
    Port {
        host_addr: loopback(),
        host_port: 31_000 + u16::try_from(std::process::id() % 1_000).unwrap(),
        guest_port: 80,
        protocol: Protocol::Tcp,
    }
}

/// A call in progress, of any kind.
enum Call {
    Vm(Running<VmReply>),
    Delete(Running<VmDeleteReply>),
    Balloon(Running<VmBalloonReply>),
    Ports(Running<VmPortsReply>),
    Prepare(Running<fcd::testing::api::workspace::PrepareReply>),
    Snapshot(Running<SnapshotReply>),
    Forget(Running<SnapshotDeleteReply>),
}

fn begin(world: &World, verb: Verb) -> Call {
    let create = VmCreateRequest {
        name: Some("web".parse().unwrap()),
        ..Default::default()
    };
    let set = VmSetRequest {
        vm: "web".into(),
        vcpus: Some(2),
        ..Default::default()
    };
    match verb {
        Create => Call::Vm(world.begin::<VmCreate>(create, vec![])),
        Start => Call::Vm(world.begin::<VmStart>(request("web"), vec![])),
        Stop => Call::Vm(world.begin::<VmStop>(stop("web"), vec![])),
        Kill => Call::Vm(world.begin::<VmKill>(request("web"), vec![])),
        Restart => Call::Vm(world.begin::<VmRestart>(stop("web"), vec![])),
        Delete => Call::Delete(world.begin::<VmDelete>(delete("web"), vec![])),
        Set => Call::Vm(world.begin::<VmSet>(set, vec![])),
        Adjust => {
            let (vm, disk_bytes_per_s) = ("web".into(), Some(1 << 20));
            let adjust = VmSetRequest {
                vm,
                disk_bytes_per_s,
                now: true,
                ..Default::default()
            };
            Call::Vm(world.begin::<VmSet>(adjust, vec![]))
        }
        Balloon => Call::Balloon(world.begin::<VmBalloon>(
            VmBalloonRequest {
                vm: "web".into(),
                keep_mib: Some(512),
            },
            vec![],
        )),
        Publish | Unpublish => {
            let request = VmPortsRequest {
                vm: "web".into(),
                ports: vec![a_port()],
                auto: false,
            };
            Call::Ports(if verb == Publish {
                world.begin::<VmPortAdd>(request, vec![])
            } else {
                world.begin::<VmPortRemove>(request, vec![])
            })
        }
        Prepare => {
            let (read, write) = pipe();
            // The payload fits into the pipe.
            write_payload(std::fs::File::from(write), b"some payload");
            Call::Prepare(world.begin::<WorkspacePrepare>(prepare("web"), vec![read]))
        }
        Snapshot => {
            let request = SnapshotCreateRequest {
                vm: "web".into(),
                name: Some("one".parse().unwrap()),
            };
            Call::Snapshot(world.begin::<SnapshotCreate>(request, vec![]))
        }
        Restore | RestoreAs => {
            let new_vm = (verb == RestoreAs).then(|| "twin".parse().unwrap());
            Call::Vm(world.begin::<SnapshotRestore>(
                SnapshotRestoreRequest {
                    snapshot: "one".into(),
                    new_vm,
                },
                vec![],
            ))
        }
        Fork => {
            let request = VmForkRequest {
                vm: "web".into(),
                name: Some("twin".parse().unwrap()),
                ..Default::default()
            };
            Call::Vm(world.begin::<VmFork>(request, vec![]))
        }
        Forget => Call::Forget(world.begin::<SnapshotDelete>(
            SnapshotRequest {
                snapshot: "one".into(),
            },
            vec![],
        )),
    }
}

/// Waits for the result. Returns `None` if the daemon dies first.
fn end(world: &World, call: Call) -> Option<Result<(), Failure>> {
    let is_dead = || world.points.is_dead();
    match call {
        Call::Vm(mut call) => call.finish_unless(is_dead).map(|r| r.map(drop)),
        Call::Balloon(mut call) => call.finish_unless(is_dead).map(|r| r.map(drop)),
        Call::Ports(mut call) => call.finish_unless(is_dead).map(|r| r.map(drop)),
        Call::Delete(mut call) => call.finish_unless(is_dead).map(|r| r.map(drop)),
        Call::Prepare(mut call) => call.finish_unless(is_dead).map(|r| r.map(drop)),
        Call::Snapshot(mut call) => call.finish_unless(is_dead).map(|r| r.map(drop)),
        Call::Forget(mut call) => call.finish_unless(is_dead).map(|r| r.map(drop)),
    }
}

fn row_of(world: &World, name: &str) -> Option<fcd::testing::store::VmRow> {
    world.daemon().core.store.read(|s| {
        s.vms()
            .find(|r| r.name.as_str() == name)
            .map(|r| (**r).clone())
    })
}

fn now(world: &World) -> Option<VmState> {
    row_of(world, "web").map(|r| r.state)
}

/// Returns the states in which the VM may be found after `verb` was cut off, given the state
/// before. Except for `Restart`, the last one is the state after a complete `verb`.
fn may_be(verb: Verb, before: Option<VmState>) -> Vec<Option<VmState>> {
    use VmState::{Created, Running, Stopped};
    let mut may = vec![before];
    match (verb, before) {
        (Create, None) => may.push(Some(Created)),
        (Start, Some(_)) => may.push(Some(Running)),
        (Stop | Kill, Some(Running)) => may.push(Some(Stopped)),
        (Restart, Some(Running)) => may.push(Some(Stopped)),
        (Restart, Some(_)) => may.push(Some(Running)),
        (Restore, Some(Created | Stopped)) => may.extend([Some(Stopped), Some(Running)]),
        (Delete, Some(_)) => may.push(None),
        _ => {}
    }
    may
}

/// Checks I1 and I2: rows, ledger and host agree.
#[track_caller]
fn agrees(world: &World, at: &str) {
    let live: BTreeSet<String> = world.vmm.live().into_iter().collect();
    let install = world.daemon().core.store.install_id().to_owned();
    let tag = |r: &fcd::testing::store::VmRow| {
        fcd::testing::ids::Tag::new(&install, &r.id, r.generation).to_string()
    };
    let (running, ids, processes, directories) = world.daemon().core.store.read(|s| {
        let of = |kind: &'static str| {
            s.ledger()
                .filter(move |l| l.kind == kind)
                .map(|l| l.name.clone())
                .collect::<BTreeSet<_>>()
        };
        let running: BTreeSet<String> = s
            .vms()
            .filter(|r| r.state == VmState::Running)
            .map(|r| tag(r))
            .collect();
        for row in s.vms() {
            let rests = matches!(
                row.state,
                VmState::Created | VmState::Stopped | VmState::Running | VmState::Failed
            );
            assert!(rests && row.op.is_none(), "{at}: {row:?}");
        }
        (
            running,
            s.vms().map(|r| r.id.to_string()).collect::<BTreeSet<_>>(),
            of("process"),
            of("directory"),
        )
    });
    let rows = world
        .daemon()
        .core
        .store
        .read(|s| s.vms().map(|r| (**r).clone()).collect::<Vec<_>>());
    for row in rows.iter().filter(|row| row.state == VmState::Running) {
        let wanted = (
            row.shape.rates,
            row.balloon_mib.unwrap_or(row.shape.mem_mib),
        );
        assert_eq!(
            world.vmm.adjusted(&row.id),
            Some(wanted),
            "{at}: the rates and memory of the guest (left) differ from those of the row"
        );
        assert_eq!(
            world.vmm.ports(&row.id).as_ref(),
            Some(&row.ports),
            "{at}: the ports that the VMM forwards (left) differ from those of the row"
        );
    }
    assert_eq!(
        live, running,
        "{at}: the live VMMs (left) differ from the rows of running VMs"
    );
    assert_eq!(
        processes, running,
        "{at}: the processes in the ledger (left) differ from the rows of running VMs"
    );
    if std::env::var_os(REAL_DISKS).is_some() {
        let devices: BTreeSet<String> = world
            .devices()
            .into_iter()
            .filter(|d| d.starts_with("fc-"))
            .collect();
        assert_eq!(
            devices, running,
            "{at}: the snapshot devices (left) differ from the rows of running VMs"
        );
    }
    // A new VM either runs or does not exist. No guest stays paused, and every snapshot is
    // complete.
    if let Some(twin) = row_of(world, "twin") {
        assert!(twin.state == VmState::Running && !twin.rm, "{at}: {twin:?}");
    }
    let (rows, snapshots) = world.daemon().core.store.read(|s| {
        let rows: Vec<_> = s.vms().cloned().collect();
        (
            rows,
            s.snapshots()
                .map(|r| r.id.to_string())
                .collect::<BTreeSet<_>>(),
        )
    });
    assert!(rows.iter().all(|row| !world.vmm.is_paused(&row.id)), "{at}");
    let dir = world.config.state_dir.join("snapshots");
    let on_host: BTreeSet<String> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(
        on_host, snapshots,
        "{at}: the snapshots on the host (left) differ from those in the store"
    );
    let vms = world.config.state_dir.join("vms");
    let on_host: BTreeSet<String> = std::fs::read_dir(&vms)
        .unwrap()
        .map(|e| e.unwrap().path().display().to_string())
        .collect();
    assert!(
        on_host.is_subset(&directories),
        "{at}: {on_host:?} on the host, {directories:?} in the ledger"
    );
    let owned: BTreeSet<String> = ids
        .iter()
        .map(|id| vms.join(id).display().to_string())
        .collect();
    assert!(
        on_host.is_subset(&owned) && directories.is_subset(&owned),
        "{at}: {on_host:?} {directories:?} {owned:?}"
    );
}

/// Checks I6: the next operations, which delete all VMs and snapshots, work and leave the host as
/// it was at the beginning.
#[track_caller]
fn next_operation_works(world: &World, empty: &BTreeSet<String>, at: &str) {
    for vm in ["web", "twin"] {
        match world.delete(vm) {
            Ok(_) => {}
            Err(e) => assert!(e.is(Kind::VmNotFound), "{at}: {e:?}"),
        }
    }
    for snapshot in world
        .call::<SnapshotList>(&SnapshotListRequest::default())
        .unwrap()
        .snapshots
    {
        world
            .call::<SnapshotDelete>(&SnapshotRequest {
                snapshot: snapshot.id.to_string(),
            })
            .unwrap();
    }
    world.await_rest();
    assert_eq!(world.census(), *empty, "{at}");
}

/// Creates the VM `web` if it does not exist and `verbs` is not empty, and runs all of `verbs`.
fn run_all_but_last(world: &World, verbs: &[Verb]) {
    if !verbs.is_empty() && now(world).is_none() {
        let vm = world.create("web");
        world.place(&vm.id);
    }
    for verb in verbs {
        end(world, begin(world, *verb));
    }
    world.await_rest();
}

#[derive(Default, Debug)]
struct Figures {
    sequences: u64,
    points: u64,
}

const MARK: &[u8] = b"mine";

/// Before a restore of a VM that does not run, appends a mark to its disk. No snapshot contains the
/// mark. Returns the disk's path and its content, or `None` if there is nothing to mark.
fn mark_disk(world: &World, verb: Verb) -> Option<(std::path::PathBuf, Vec<u8>)> {
    let row = row_of(world, "web").filter(|r| verb == Restore && r.state != VmState::Running)?;
    let path = world
        .config
        .state_dir
        .join("vms")
        .join(row.id.as_str())
        .join("disk");
    let mut mine = std::fs::read(&path).ok()?;
    mine.extend(MARK);
    std::fs::write(&path, &mine).unwrap();
    Some((path, mine))
}

/// Kills the daemon at every point of the last of `verbs`, and checks the invariants after each
/// kill.
fn crash_everywhere(world: &mut World, verbs: &[Verb], figures: &mut Figures) {
    let empty = world.census();
    let (last, scene) = verbs.split_last().unwrap();
    figures.sequences += 1;
    for n in 1..POINTS_MAX {
        if *last == Create {
            run_all_but_last(world, &[])
        } else {
            run_all_but_last(world, &[&[Set], scene].concat())
        }
        let (before, vmms) = (now(world), world.vmm.live());
        let mine = mark_disk(world, *last);
        world.points.arm(Mode::Crash, n);
        let ended = end(world, begin(world, *last));
        let Some(hit) = world.points.hit() else {
            // The operation has fewer points than `n`.
            world.points.disarm();
            return next_operation_works(world, &empty, &format!("{verbs:?}"));
        };
        figures.points += 1;
        let at = format!("{verbs:?}, killed at point {n} ({hit})");
        world.crash();
        world.reopen();
        world.daemon().reconciler.reconcile();
        world.await_rest();
        let after = now(world);
        if matches!(ended, Some(Ok(()))) {
            // I5: an acknowledged operation must have happened.
            let done = may_be(*last, before).pop().unwrap();
            assert!(
                after == done || *last == Restart,
                "{at}: acknowledged, yet {after:?}"
            );
        }
        let reason = row_of(world, "web").and_then(|r| r.reason);
        assert!(
            may_be(*last, before).contains(&after),
            "{at}: was {before:?}, is {after:?} ({reason:?})"
        );
        agrees(world, &at);
        if let Some((path, mine)) = mine {
            // The disk is entirely the VM's old disk or entirely the snapshot's. If the guest runs,
            // it has the snapshot's disk.
            let mut saved = mine.clone();
            saved.truncate(mine.len() - MARK.len());
            let is = std::fs::read(&path).unwrap();
            assert!(
                is == saved || is == mine && after != Some(VmState::Running),
                "{at}: the disk is neither the VM's nor the snapshot's"
            );
            assert!(
                !path.with_file_name("former").exists()
                    && !path.with_file_name(".disk.new").exists(),
                "{at}"
            );
        }
        if before == Some(VmState::Running)
            && matches!(
                last,
                Set | Adjust
                    | Balloon
                    | Publish
                    | Unpublish
                    | Prepare
                    | Start
                    | Snapshot
                    | Fork
                    | RestoreAs
            )
        {
            let lives = |tag: &String| world.vmm.live().contains(tag);
            assert!(
                vmms.iter().all(lives),
                "{at}: a healthy VMM was killed (I3)"
            );
        }
        let census = world.census();
        world.reopen();
        world.daemon().reconciler.reconcile();
        world.await_rest();
        assert_eq!(
            world.census(),
            census,
            "{at}: a second recovery changed something (I7)"
        );
        next_operation_works(world, &empty, &at);
    }
    panic!("{verbs:?} has more than {POINTS_MAX} points");
}

/// Makes every effect of the last operation fail, one at a time. `mode` decides whether commits
/// fail too. The daemon keeps running.
fn fail_everywhere(world: &World, verbs: &[Verb], mode: Mode, figures: &mut Figures) {
    let empty = world.census();
    let (last, scene) = verbs.split_last().unwrap();
    figures.sequences += 1;
    for n in 1..POINTS_MAX {
        if *last == Create {
            run_all_but_last(world, &[])
        } else {
            run_all_but_last(world, &[&[Set], scene].concat())
        }
        world.points.arm(mode, n);
        let ended = end(world, begin(world, *last)).expect("the daemon died");
        world.await_rest();
        // This also waits for commits that no call waits for, because the injected failure may hit
        // one of them.
        let _ = world
            .daemon()
            .core
            .store
            .barrier()
            .and_then(|ticket| ticket.wait(soon()));
        let hit = world.points.hit();
        world.points.disarm();
        let Some(hit) = hit else {
            return next_operation_works(world, &empty, &format!("{verbs:?}"));
        };
        figures.points += 1;
        let at = format!("{verbs:?}, point {n} ({hit}) failed: {ended:?}");
        assert!(world.daemon().core.store.wait_writable(soon()), "{at}");
        let leaks = world
            .call::<Leaks>(&LeaksRequest { fix: true })
            .unwrap()
            .leaks;
        assert!(leaks.iter().all(|l| l.removed), "{at}: {leaks:?}");
        agrees(world, &at);
        next_operation_works(world, &empty, &at);
    }
    panic!("{verbs:?} has more than {POINTS_MAX} points");
}

fn sequences(length: usize) -> Vec<Vec<Verb>> {
    (0..length).fold(vec![vec![]], |all, _| {
        all.iter()
            .flat_map(|s| VERBS.map(|v| [&s[..], &[v]].concat()))
            .collect()
    })
}

#[test]
fn crash_at_any_point_of_operation_recovers() {
    let (mut world, mut figures) = (World::new(), Figures::default());
    crash_everywhere(&mut world, &[Create], &mut figures);
    for verbs in sequences(1) {
        crash_everywhere(&mut world, &verbs, &mut figures);
    }
    println!("{figures:?}");
}

#[test]
fn crash_at_any_point_of_second_operation_recovers() {
    let (mut world, mut figures) = (World::new(), Figures::default());
    sequences(2)
        .iter()
        .for_each(|verbs| crash_everywhere(&mut world, verbs, &mut figures));
    println!("{figures:?}");
}

#[test]
fn crash_at_any_point_of_snapshot_recovers() {
    let (mut world, mut figures) = (World::new(), Figures::default());
    SNAPSHOT_SEQUENCES
        .iter()
        .for_each(|verbs| crash_everywhere(&mut world, verbs, &mut figures));
    println!("{figures:?}");
}

#[test]
fn crash_at_any_point_of_port_change_recovers() {
    let (mut world, mut figures) = (World::new(), Figures::default());
    PORT_SEQUENCES
        .iter()
        .for_each(|verbs| crash_everywhere(&mut world, verbs, &mut figures));
    println!("{figures:?}");
}

#[test]
#[ignore = "minutes: scripts/test --long"]
fn crash_at_any_point_of_third_operation_recovers() {
    let (mut world, mut figures) = (World::new(), Figures::default());
    sequences(3)
        .iter()
        .for_each(|verbs| crash_everywhere(&mut world, verbs, &mut figures));
    println!("{figures:?}");
}

#[test]
fn failure_of_any_effect_is_undone() {
    let (world, mut figures) = (World::new(), Figures::default());
    fail_everywhere(&world, &[Create], Mode::FailCommits, &mut figures);
    for verbs in sequences(1) {
        fail_everywhere(&world, &verbs, Mode::FailCommits, &mut figures);
    }
    for verbs in sequences(2) {
        fail_everywhere(&world, &verbs, Mode::Fail, &mut figures);
    }
    for verbs in [&SNAPSHOT_SEQUENCES[..], &PORT_SEQUENCES].concat() {
        fail_everywhere(&world, verbs, Mode::FailCommits, &mut figures);
    }
    println!("{figures:?}");
}
