//! Tests of `events.watch`: which events a listener gets, in which order, and how it resumes.

mod listeners;
mod load;

use crate::world::*;
use fcd::testing::api::event::*;
use fcd::testing::api::frame::{Line, Note, Notification};
use fcd::testing::api::op::OpState;
use fcd::testing::api::vm::*;
use fcd::testing::daemon::{Caller, Hangup, WatchLine};
use fcd::testing::error::Kind;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

fn watch(world: &World, since: Option<u64>) -> Running<EventsWatchReply> {
    world.begin::<EventsWatch>(EventsWatchRequest { since }, vec![])
}

/// Starts watching and waits for the first snapshot.
fn watch_from_snapshot(world: &World) -> (Mirror, Running<EventsWatchReply>) {
    let (mut mirror, call) = (Mirror::default(), watch(world, None));
    mirror.apply(&call.note(|note| Some(note.clone())));
    (mirror, call)
}

/// The state of all VMs, built only from the events that a client received.
#[derive(Debug, Default, PartialEq)]
struct Mirror {
    vms: BTreeMap<String, Members>,
    seq: u64,
    /// The number of snapshots that arrived.
    snapshots: usize,
    resyncs: usize,
    in_snapshot: bool,
    /// One line per event, such as `web vm.created` and `web starting -> running`.
    lines: Vec<String>,
}

fn members(vm: &Vm) -> Members {
    let Value::Object(members) = serde_json::to_value(vm).unwrap() else {
        panic!("{vm:?}")
    };
    members
}

impl Mirror {
    /// Applies a note and checks that it is consistent with the state so far.
    #[track_caller]
    fn apply(&mut self, note: &Note) {
        match note {
            Note::Snapshot(snapshot) => {
                if !std::mem::replace(&mut self.in_snapshot, snapshot.more) {
                    self.vms.clear();
                    self.snapshots += 1;
                    self.resyncs += usize::from(snapshot.resync);
                }
                assert!(snapshot.seq >= self.seq);
                self.seq = snapshot.seq;
                self.vms.extend(
                    snapshot
                        .vms
                        .iter()
                        .map(|vm| (vm.id.to_string(), members(vm))),
                );
            }
            Note::Events(told) => {
                assert!(
                    told.seq > self.seq && !told.events.is_empty(),
                    "after {}: {told:?}",
                    self.seq
                );
                self.seq = told.seq;
                told.events.iter().for_each(|e| self.event(told.seq, e));
            }
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn event(&mut self, seq: u64, event: &Event) {
        assert!(event.seq == seq && event.at > 1_700_000_000, "{event:?}");
        let name = event.name.as_ref().map_or("-", |n| n.as_str());
        let id = event
            .vm
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default();
        let text = match &event.what {
            What::Created { set } => {
                assert!(
                    self.vms.insert(id, set.clone()).is_none(),
                    "created twice: {event:?}"
                );
                "created".to_owned()
            }
            What::Changed { set } => {
                self.vms
                    .get_mut(&id)
                    .expect("the VM is known")
                    .extend(set.clone());
                format!(
                    "changed {}",
                    set.keys().cloned().collect::<Vec<_>>().join(" ")
                )
            }
            What::State {
                from, to, set, op, ..
            } => {
                let vm = self.vms.get_mut(&id).expect("the VM is known");
                assert_eq!(vm["state"], from.name(), "{event:?}");
                assert!(op.is_some() || *from == VmState::Running, "{event:?}");
                vm.extend(set.clone());
                assert_eq!(vm["state"], to.name(), "{event:?}");
                format!("{} -> {}", from.name(), to.name())
            }
            What::Deleted { .. } => {
                self.vms.remove(&id).expect("the VM was known");
                "deleted".to_owned()
            }
            What::OpEnded {
                method,
                state,
                error,
                ..
            } => {
                assert_eq!(error.is_some(), *state != OpState::Ok, "{event:?}");
                format!("{method} {state:?}")
            }
            What::Unknown => panic!("{event:?}"),
        };
        self.lines.push(format!("{name} {text}"));
    }

    /// Applies notes until this field of the VM has this value.
    #[track_caller]
    fn follow(
        &mut self,
        call: &Running<EventsWatchReply>,
        vm: &str,
        member: &str,
        value: impl Into<Value>,
    ) {
        let value = value.into();
        while self.in_snapshot
            || !self
                .vms
                .values()
                .any(|m| m["name"] == vm && m[member] == value)
        {
            self.apply(&call.note(|note| Some(note.clone())));
        }
    }

    /// Checks that the mirror equals what the daemon reports.
    #[track_caller]
    fn check(&self, world: &World) {
        let vms = world
            .call::<VmList>(&VmListRequest {
                all: true,
                ..Default::default()
            })
            .unwrap()
            .vms;
        let truth: BTreeMap<_, _> = vms
            .iter()
            .map(|vm| (vm.id.to_string(), members(vm)))
            .collect();
        assert_eq!(self.vms, truth);
    }
}

fn set_vcpus(world: &World, vm: &str, vcpus: u32) {
    world
        .call::<VmSet>(&VmSetRequest {
            vm: vm.into(),
            vcpus: Some(vcpus),
            ..Default::default()
        })
        .unwrap();
}

#[test]
fn watch_reports_whole_life_of_vm() {
    let world = World::new();
    let (mut mirror, call) = watch_from_snapshot(&world);
    let vm = world.create("web");
    world.place(&vm.id);
    set_vcpus(&world, "web", 2);
    world.start("web").unwrap();
    world.import_all("web");
    world.stop("web").unwrap();
    world.place(&vm.id);
    world.start("web").unwrap();
    world.vmm.die(
        &vm.id,
        &fcd::testing::vmm::End::Vmm(fcd::testing::vmm::Exit::Signal(9)),
    );
    world.await_state("web", VmState::Failed);
    world.delete("web").unwrap();
    world.create("end");
    mirror.follow(&call, "end", "state", "created");
    mirror.check(&world);
    assert_eq!((mirror.snapshots, mirror.resyncs), (1, 0));
    expect_test::expect![[r#"
        web created
        web changed vcpus
        web created -> starting
        web changed disk_driver
        web changed driver pid
        web starting -> running
        web vm.start Ok
        web changed workspace
        web changed workspace
        web workspace.prepare Ok
        web running -> stopping
        web stopping -> stopped
        web vm.stop Ok
        web stopped -> starting
        web changed pid
        web starting -> running
        web vm.start Ok
        web running -> failed
        web failed -> deleting
        web deleted
        web vm.delete Ok
        end created
    "#]]
    .assert_eq(&format!("{}\n", mirror.lines.join("\n")));
}

#[test]
fn watch_through_a_thousand_changes_matches_daemon() {
    const WORKERS: usize = 4;
    const ROUNDS: usize = 25;
    let world = World::new();
    world.create("before");
    let (mut mirror, call) = watch_from_snapshot(&world);
    let worker = |worker: usize| {
        for round in 0..ROUNDS {
            let vm = format!("w{worker}-{round}");
            world.create(&vm);
            set_vcpus(&world, &vm, 3);
            world.start(&vm).unwrap();
            world.run::<VmKill>(request(&vm)).unwrap();
            if round % 5 != 0 {
                world.delete(&vm).unwrap();
            }
        }
    };
    // This places a guest for an ID that no VM has. The workers' VMs share the fake's default
    // guest, which always answers.
    world.place(&"0123456789ab".parse().unwrap());
    std::thread::scope(|scope| {
        (0..WORKERS).for_each(|n| drop(scope.spawn(move || worker(n))));
    });
    world.await_rest();
    world.create("end");
    mirror.follow(&call, "end", "state", "created");
    mirror.check(&world);
    assert!(
        world.daemon().core.store.stats().changes >= 1000,
        "{:?}",
        world.daemon().core.store.stats()
    );
    assert_eq!(
        (mirror.vms.len(), mirror.snapshots),
        (2 + WORKERS * ROUNDS / 5, 1)
    );
    // Each VM was started and killed once.
    let count = |line: &str| mirror.lines.iter().filter(|l| l.ends_with(line)).count();
    let all = WORKERS * ROUNDS;
    assert_eq!(
        (
            count(" vm.start Ok"),
            count(" vm.kill Ok"),
            count(" deleted")
        ),
        (all, all, all * 4 / 5)
    );
}

#[test]
fn watch_since_resumes_without_gap() {
    let world = World::new();
    let (mut first, call) = watch_from_snapshot(&world);
    world.create("a");
    first.follow(&call, "a", "state", "created");
    set_vcpus(&world, "a", 2);
    world.create("b");
    // A resumed watch receives the missed events and nothing else.
    let (mut second, again) = (
        Mirror {
            vms: first.vms.clone(),
            seq: first.seq,
            ..Mirror::default()
        },
        watch(&world, Some(first.seq)),
    );
    second.follow(&again, "b", "state", "created");
    assert_eq!(
        (second.lines.as_slice(), second.snapshots),
        (
            &["a changed vcpus".to_owned(), "b created".to_owned()][..],
            0
        )
    );
    first.follow(&call, "b", "state", "created");
    assert_eq!((&first.vms, first.seq), (&second.vms, second.seq));
    first.check(&world);
    // This sequence number was never assigned.
    let note = watch(&world, Some(u64::MAX)).note(|note| Some(note.clone()));
    let Note::Snapshot(snapshot) = note else {
        panic!("{note:?}")
    };
    assert!(
        snapshot.resync && snapshot.seq == first.seq && snapshot.vms.len() == 2,
        "{snapshot:?}"
    );
}

#[test]
fn watch_resumes_after_daemon_restart() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    world.await_rest();
    let (mut mirror, mut call) = watch_from_snapshot(&world);
    set_vcpus(&world, "web", 2);
    mirror.follow(
        &call,
        "web",
        "pending",
        serde_json::to_value(Pending {
            vcpus: Some(2),
            ..Default::default()
        })
        .unwrap(),
    );
    let before = mirror.seq;
    world.reopen();
    assert!(call.finish(SOON).unwrap_err().is(Kind::ShuttingDown));
    // The VMM dies before the new daemon has reconciled. Reconciling reports the death.
    world.vmm.die(
        &vm.id,
        &fcd::testing::vmm::End::Vmm(fcd::testing::vmm::Exit::Signal(9)),
    );
    world.daemon().reconciler.reconcile();
    let again = watch(&world, Some(before));
    mirror.follow(&again, "web", "state", "failed");
    set_vcpus(&world, "web", 3);
    mirror.follow(&again, "web", "vcpus", 3);
    mirror.check(&world);
    assert_eq!(
        (mirror.snapshots, mirror.resyncs),
        (1, 0),
        "the listener resumed without a new snapshot"
    );
    // A listener that missed events before the restart gets a new snapshot.
    let late = watch(&world, Some(before - 1));
    mirror.follow(&late, "web", "vcpus", 3);
    set_vcpus(&world, "web", 4);
    mirror.follow(&late, "web", "vcpus", 4);
    mirror.check(&world);
    assert_eq!((mirror.snapshots, mirror.resyncs), (2, 1));
}

/// A caller with any uid on its own socket pair.
struct Listener {
    mirror: Mirror,
    notes: Receiver<Note>,
    /// The test's end of the pair. Shutting it down hangs up.
    peer: UnixStream,
    ended: std::thread::JoinHandle<fcd::testing::error::Result<EventsWatchReply>>,
}

struct Ours(Arc<UnixStream>);

impl WatchLine for Ours {
    fn hangup(&self) -> Hangup<'_> {
        Hangup(self.0.as_fd())
    }
    fn send_note(&self, note: Note) -> std::io::Result<()> {
        self.send_bytes(&Notification::line(note)?)
    }
    fn send_bytes(&self, bytes: &[u8]) -> std::io::Result<()> {
        (&*self.0).write_all(bytes)
    }
    fn socket(&self) -> Option<Arc<UnixStream>> {
        Some(self.0.clone())
    }
}

fn listen(world: &World, uid: u32) -> Listener {
    let (daemon, (peer, theirs), (send, notes)) = (
        world.daemon().clone(),
        UnixStream::pair().unwrap(),
        channel(),
    );
    let body = move || {
        let caller = Caller {
            uid,
            gid: uid,
            pid: 0,
        };
        daemon.watchers.watch_events(
            &caller,
            &EventsWatchRequest::default(),
            &Ours(Arc::new(theirs)),
        )
    };
    let ended = fcd::testing::host::thread::spawn("listener", body).unwrap();
    let mut lines = BufReader::new(peer.try_clone().unwrap());
    let read = move || {
        while let Some(Line::Note(note)) = read_line(&mut lines) {
            if send.send(note).is_err() {
                return;
            }
        }
    };
    fcd::testing::host::thread::spawn("reader", read).unwrap();
    let mut mirror = Mirror::default();
    mirror.apply(
        &notes
            .recv_timeout(SOON)
            .expect("the first note is a snapshot"),
    );
    Listener {
        mirror,
        notes,
        peer,
        ended,
    }
}

/// Reads one line. Returns `None` at the end of the connection.
fn read_line(from: &mut impl BufRead) -> Option<Line> {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    let parsed = || Line::<Box<serde_json::value::RawValue>>::parse(line.as_bytes());
    (!line.is_empty()).then(|| {
        parsed()
            .unwrap_or_else(|e| panic!("{line:?}: {e}"))
            .expect("a known kind of line")
    })
}

impl Listener {
    /// Listens until the VM has this number of vCPUs, then hangs up. Returns one line per event.
    #[track_caller]
    fn lines_until(self, vm: &str, vcpus: u32) -> Vec<String> {
        let mut mirror = self.mirror;
        while !mirror
            .vms
            .values()
            .any(|m| m["name"] == vm && m["vcpus"] == vcpus)
        {
            mirror.apply(
                &self
                    .notes
                    .recv_timeout(SOON)
                    .expect("another event arrives"),
            );
        }
        assert!(
            mirror
                .vms
                .values()
                .all(|m| m["name"] == vm || vm == "common"),
            "{mirror:?}"
        );
        self.peer.shutdown(std::net::Shutdown::Both).unwrap();
        // The daemon must notice the hang-up.
        await_that("the call ends", || self.ended.is_finished());
        assert_eq!(
            self.ended.join().unwrap().unwrap_err().kind(),
            Kind::Cancelled
        );
        mirror.lines
    }
}
