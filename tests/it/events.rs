//! `events.watch`: which events a listener gets, in which order, and how it resumes.

use crate::world::*;
use fcd::api::event::*;
use fcd::api::frame::{Line, Note, Notification};
use fcd::api::op::OpState;
use fcd::api::vm::*;
use fcd::daemon::{Caller, Hangup, WatchLine};
use fcd::error::Kind;
use fcd::store::QUEUE_MAX;
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

/// The VMs as a client knows them that only listens.
#[derive(Debug, Default, PartialEq)]
struct Mirror {
    vms: BTreeMap<String, Members>,
    seq: u64,
    /// How many snapshots arrived.
    snapshots: usize,
    resyncs: usize,
    in_snapshot: bool,
    /// Such as `web vm.created` and `web starting -> running`.
    lines: Vec<String>,
}

fn members(vm: &Vm) -> Members {
    let Value::Object(members) = serde_json::to_value(vm).unwrap() else {
        panic!("{vm:?}")
    };
    members
}

impl Mirror {
    /// Applies a note, which must fit the state so far.
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
                    "made twice: {event:?}"
                );
                "created".to_owned()
            }
            What::Changed { set } => {
                self.vms
                    .get_mut(&id)
                    .expect("it is there")
                    .extend(set.clone());
                format!(
                    "changed {}",
                    set.keys().cloned().collect::<Vec<_>>().join(" ")
                )
            }
            What::State {
                from, to, set, op, ..
            } => {
                let vm = self.vms.get_mut(&id).expect("it is there");
                assert_eq!(vm["state"], from.name(), "{event:?}");
                assert!(op.is_some() || *from == VmState::Running, "{event:?}");
                vm.extend(set.clone());
                assert_eq!(vm["state"], to.name(), "{event:?}");
                format!("{} -> {}", from.name(), to.name())
            }
            What::Deleted { .. } => {
                self.vms.remove(&id).expect("it was there");
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

    /// Listens until this member of the VM has this value.
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
    world
        .vmm
        .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9)));
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
    // Gives every boot a guest that answers.
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
    // One start and one kill of each VM has succeeded.
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
    // Resuming delivers the rest and nothing else.
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
    // A sequence number that was never assigned.
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
    // The VMM died while no daemon ran. Reconciling reports it.
    world
        .vmm
        .die(&vm.id, &fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9)));
    world.daemon().reconciler.reconcile();
    let again = watch(&world, Some(before));
    mirror.follow(&again, "web", "state", "failed");
    set_vcpus(&world, "web", 3);
    mirror.follow(&again, "web", "vcpus", 3);
    mirror.check(&world);
    assert_eq!(
        (mirror.snapshots, mirror.resyncs),
        (1, 0),
        "it had all and missed nothing"
    );
    // A listener that had not seen everything before the restart gets a new snapshot.
    let late = watch(&world, Some(before - 1));
    mirror.follow(&late, "web", "vcpus", 3);
    set_vcpus(&world, "web", 4);
    mirror.follow(&late, "web", "vcpus", 4);
    mirror.check(&world);
    assert_eq!((mirror.snapshots, mirror.resyncs), (2, 1));
}

/// A caller with any uid, at the other end of a socket of its own.
struct Listener {
    mirror: Mirror,
    notes: Receiver<Note>,
    /// Shutting it down hangs up.
    peer: UnixStream,
    ended: std::thread::JoinHandle<fcd::error::Result<EventsWatchReply>>,
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
    let ended = fcd::host::thread::spawn("listener", body).unwrap();
    let mut lines = BufReader::new(peer.try_clone().unwrap());
    let read = move || {
        while let Some(Line::Note(note)) = read_line(&mut lines) {
            if send.send(note).is_err() {
                return;
            }
        }
    };
    fcd::host::thread::spawn("reader", read).unwrap();
    let mut mirror = Mirror::default();
    mirror.apply(&notes.recv_timeout(SOON).expect("a snapshot"));
    Listener {
        mirror,
        notes,
        peer,
        ended,
    }
}

/// Reads one line, or `None` at the end of the connection.
fn read_line(from: &mut impl BufRead) -> Option<Line> {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    let parsed = || Line::<Box<serde_json::value::RawValue>>::parse(line.as_bytes());
    (!line.is_empty()).then(|| {
        parsed()
            .unwrap_or_else(|e| panic!("{line:?}: {e}"))
            .expect("known")
    })
}

impl Listener {
    /// Listens until this VM has this number of vCPUs, then hangs up.
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
                    .expect("there is another event"),
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
        await_that("it ends", || self.ended.is_finished());
        assert_eq!(
            self.ended.join().unwrap().unwrap_err().kind(),
            Kind::Cancelled
        );
        mirror.lines
    }
}

#[test]
fn watch_shows_owner_own_vms_and_root_all() {
    let world = World::new();
    let create = |name: &str, uid| {
        let request = VmCreateRequest {
            name: Some(name.parse().unwrap()),
            ..Default::default()
        };
        world
            .daemon()
            .creator
            .create(
                &Caller {
                    uid,
                    gid: uid,
                    pid: 0,
                },
                &request,
            )
            .unwrap()
    };
    let mine = create("mine", 1000);
    let listeners = [1000, 2000, 0].map(|uid| listen(&world, uid));
    create("theirs", 2000);
    world.place(&mine.id);
    // Root acts on another user's VM, and the owner sees the result.
    world.start("mine").unwrap();
    for name in ["mine", "theirs"] {
        set_vcpus(&world, name, 4);
        world.run::<VmKill>(request("mine")).unwrap();
        world.start("mine").unwrap();
    }
    create("common", 0);
    set_vcpus(&world, "common", 5);
    set_vcpus(&world, "theirs", 6);
    world.stop("mine").unwrap();
    set_vcpus(&world, "mine", 6);
    let [mine, theirs, root] = listeners;
    let mine = mine.lines_until("mine", 6);
    assert!(
        mine.iter().all(|l| l.starts_with("mine "))
            && mine.contains(&"mine vm.start Ok".to_owned()),
        "{mine:?}"
    );
    let theirs = theirs.lines_until("theirs", 6);
    assert_eq!(
        theirs,
        [
            "theirs created",
            "theirs changed vcpus",
            "theirs changed vcpus"
        ]
    );
    let root = root.lines_until("common", 5);
    assert!(
        theirs[..2].iter().all(|l| root.contains(l))
            && root.contains(&"mine vm.kill Ok".to_owned()),
        "{root:?}"
    );
}

/// A client that works on lines and reads only when the test does.
struct Plain(BufReader<UnixStream>);

impl Plain {
    fn watch(world: &World, params: &str) -> Self {
        let stream = UnixStream::connect(&world.config.socket).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut plain = Self(BufReader::new(stream));
        plain.ask(params, true);
        plain
    }

    fn ask(&mut self, params: &str, more: bool) {
        let call = format!(
            r#"{{"jsonrpc":"2.0","id":1,"method":"events.watch","params":{params},"more":{more}}}"#
        );
        writeln!(self.0.get_mut(), "{call}").unwrap();
    }

    fn next(&mut self) -> Line {
        read_line(&mut self.0).expect("the daemon is on the line")
    }
}

#[test]
fn watch_slow_reader_delays_nobody_and_loses_nothing() {
    const CHANGES: u32 = 3000;
    let world = World::new();
    world.create("web");
    let mut slow = Plain::watch(&world, "{}");
    let Line::Note(Note::Snapshot(_)) = slow.next() else {
        panic!("no snapshot")
    };
    let (mut fast, call) = watch_from_snapshot(&world);
    let id = world.show("web").unwrap().id;
    for n in 1..=CHANGES {
        let change = world
            .daemon()
            .core
            .store
            .change(|tx| tx.update_vm_unlocked(&id, |r| r.mem_mib = u64::from(n)));
        change.unwrap().1.detach();
        if n % 250 == 0 {
            // One listener reads nothing and the other gets every event, while calls are answered.
            fast.follow(&call, "web", "mem_mib", n);
            assert_eq!(world.show("web").unwrap().mem_mib, u64::from(n));
        }
    }
    assert_eq!(fast.lines.len(), CHANGES as usize);
    let (mut heard, mut lags) = (Vec::new(), 0);
    while heard.len() < CHANGES as usize {
        match slow.next() {
            Line::Note(Note::Events(told)) => match &told.events[0].what {
                What::Changed { set } => heard.push(set["mem_mib"].as_u64().unwrap()),
                other => panic!("{other:?}"),
            },
            Line::Note(Note::Lagged(lagged)) => {
                lags += 1;
                assert_eq!(lagged.dropped, u64::from(CHANGES) - heard.len() as u64);
                let Line::Response(response) = slow.next() else {
                    panic!("a lag ends it")
                };
                let reply: EventsWatchReply =
                    serde_json::from_str(response.result.unwrap().get()).unwrap();
                assert_eq!(reply.resume_seq, lagged.resume_seq);
                slow.ask(&format!(r#"{{"since":{}}}"#, lagged.resume_seq), true);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        heard,
        (1..=u64::from(CHANGES)).collect::<Vec<_>>(),
        "each once and in order"
    );
    assert!(lags == 1 && CHANGES as usize > QUEUE_MAX, "{lags}");
}

#[test]
fn watch_on_half_closed_connection_continues() {
    let world = World::new();
    let mut plain = Plain::watch(&world, "{}");
    plain
        .0
        .get_mut()
        .shutdown(std::net::Shutdown::Write)
        .unwrap();
    let Line::Note(Note::Snapshot(_)) = plain.next() else {
        panic!("no snapshot")
    };
    world.create("web");
    let Line::Note(Note::Events(told)) = plain.next() else {
        panic!("no events")
    };
    assert_eq!(told.events[0].name.as_ref().unwrap().as_str(), "web");
}

#[test]
fn watch_with_invalid_parameters_keeps_connection_open() {
    let world = World::new();
    let mut plain = Plain::watch(&world, r#"{"sinse":1}"#);
    for _ in 0..2 {
        let Line::Response(response) = plain.next() else {
            panic!("no answer")
        };
        assert_eq!(
            response.error.unwrap().data.unwrap().kind,
            Kind::InvalidArgument.name()
        );
        plain.ask("{}", false);
    }
}

/// A watcher of `uid` that reads a line for each permit, and any number once nobody gives permits
/// any more.
struct Tail {
    daemon: fcd::daemon::Daemon,
    uid: u32,
    since: Option<u64>,
    permits: Receiver<()>,
}

/// The changes that it received, by number and memory, after the one that it began with.
#[derive(Debug, PartialEq)]
struct Tailed {
    after: u64,
    changes: Vec<(u64, u64)>,
    lags: usize,
}

impl Tail {
    /// Watches until it receives this change, and watches again after every lag.
    fn until(self, last: &[(u32, u64)]) -> Tailed {
        let is_seen = |owner: u32| self.uid == 0 || self.uid == owner;
        let last = last
            .iter()
            .filter(|(owner, _)| is_seen(*owner))
            .map(|(_, mem)| *mem)
            .max()
            .unwrap();
        let mut tailed = Tailed {
            after: self.since.unwrap_or_default(),
            changes: vec![],
            lags: 0,
        };
        let (mut since, mut is_over) = (self.since, false);
        loop {
            let (peer, ours) = UnixStream::pair().unwrap();
            peer.set_read_timeout(Some(SOON)).unwrap();
            let (daemon, caller) = (
                self.daemon.clone(),
                Caller {
                    uid: self.uid,
                    gid: self.uid,
                    pid: 0,
                },
            );
            let watch = fcd::host::thread::spawn("watch", move || {
                let ours = Ours(Arc::new(ours));
                daemon
                    .watchers
                    .watch_events(&caller, &EventsWatchRequest { since }, &ours)
            });
            let mut lines = BufReader::new(peer.try_clone().unwrap());
            since = loop {
                self.permit();
                match read_line(&mut lines).expect("the daemon is on the line") {
                    Line::Note(Note::Events(told)) => tailed.take(&told),
                    Line::Note(Note::Snapshot(snapshot)) => {
                        assert!(!snapshot.resync);
                        tailed.after = snapshot.seq;
                        is_over = snapshot.vms.iter().any(|vm| vm.mem_mib == last);
                    }
                    Line::Note(Note::Lagged(lagged)) => break Some(lagged.resume_seq),
                    other => panic!("{other:?}"),
                }
                if is_over || tailed.changes.last().is_some_and(|(_, mem)| *mem == last) {
                    peer.shutdown(std::net::Shutdown::Both).unwrap();
                    assert_eq!(
                        watch.unwrap().join().unwrap().unwrap_err().kind(),
                        Kind::Cancelled
                    );
                    return tailed;
                }
            };
            tailed.lags += 1;
            assert_eq!(
                watch.unwrap().join().unwrap().unwrap().resume_seq,
                since.unwrap()
            );
        }
    }

    fn permit(&self) {
        let _ = self.permits.recv();
    }
}

impl Tailed {
    #[track_caller]
    fn take(&mut self, told: &Events) {
        let [event] = told.events.as_slice() else {
            panic!("{told:?}")
        };
        let What::Changed { set } = &event.what else {
            panic!("{event:?}")
        };
        self.changes
            .push((told.seq, set["mem_mib"].as_u64().unwrap()));
    }
}

#[test]
fn watchers_that_join_and_lag_under_load_see_what_store_has() {
    // Fewer than the store keeps, so that no watcher has to begin again.
    const CHANGES: u64 = 3600;
    const JOIN_EVERY: u64 = 900;
    let world = World::new();
    let vms = [1000, 2000].map(|uid| {
        let request = VmCreateRequest {
            name: Some(format!("of-{uid}").parse().unwrap()),
            ..Default::default()
        };
        (
            uid,
            world
                .daemon()
                .creator
                .create(
                    &Caller {
                        uid,
                        gid: uid,
                        pid: 0,
                    },
                    &request,
                )
                .unwrap()
                .id,
        )
    });
    let last = vms.each_ref().map(|(uid, _)| {
        (
            *uid,
            if *uid == 1000 {
                10_000 + CHANGES
            } else {
                9_999 + CHANGES
            },
        )
    });
    let (mut truth, mut tails, mut stutterers, mut sleepers) = (vec![], vec![], vec![], vec![]);
    for n in 1..=CHANGES {
        if n % JOIN_EVERY == 1 {
            let now = world
                .daemon()
                .core
                .store
                .barrier()
                .unwrap()
                .wait(soon())
                .unwrap();
            for (uid, since) in [
                (0, None),
                (1000, None),
                (2000, None),
                (0, Some(now)),
                (2000, Some(now)),
            ] {
                for kind in 0..3 {
                    let (permit, permits) = channel();
                    match kind {
                        0 => drop(permit),
                        1 => stutterers.push(permit),
                        _ => sleepers.push(permit),
                    }
                    let tail = Tail {
                        daemon: world.daemon().clone(),
                        uid,
                        since,
                        permits,
                    };
                    let body = move || (uid, tail.until(&last));
                    tails.push(fcd::host::thread::spawn("tail", body).unwrap());
                }
            }
        }
        let (owner, id) = &vms[usize::from(n % 2 == 1)];
        let mem = 10_000 + n;
        let ((), ticket) = world
            .daemon()
            .core
            .store
            .change(|tx| tx.update_vm_unlocked(id, |r| r.mem_mib = mem))
            .unwrap();
        truth.push((*owner, ticket.seq(), mem));
        if n % 50 == 0 {
            ticket.wait(soon()).unwrap();
            // Some read a little now and then.
            for permit in &stutterers {
                (0..n % 150 / 50 * 40).for_each(|_| permit.send(()).unwrap_or_default());
            }
        }
    }
    drop((stutterers, sleepers));
    let mut lags = 0;
    for tail in tails {
        let (uid, tailed) = tail.join().unwrap();
        let theirs = truth
            .iter()
            .filter(|(owner, seq, _)| (uid == 0 || *owner == uid) && *seq > tailed.after);
        assert_eq!(
            tailed.changes,
            theirs.map(|(_, seq, mem)| (*seq, *mem)).collect::<Vec<_>>(),
            "of uid {uid}"
        );
        lags += tailed.lags;
    }
    assert!(lags > 0, "nobody was slow enough");
}
