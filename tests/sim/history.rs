//! Plays one history and checks it.

use crate::actor::{Actor, Log, name};
use crate::client::Failure;
use crate::plan::{CALLERS, Name, Plan, Request, VMS};
use crate::points::Points;
use crate::replay;
use crate::watcher::{self, Mirror};
use crate::world::{Counts, Running, World};
use fcd::testing::api::Call;
use fcd::testing::api::daemon::{Leaks, LeaksRequest};
use fcd::testing::api::snapshot::{SnapshotDelete, SnapshotList, SnapshotRequest};
use fcd::testing::api::vm::{VmDelete, VmDeleteRequest, VmState};
use fcd::testing::daemon::Leftovers;
use fcd::testing::error::Kind;
use fcd::testing::locks::check;
use fcd::testing::sched::sim::{self, Figures, Group, Outcome};
use fcd::testing::sched::{Instant, JoinHandle, Mutex as SimMutex};
use fcd::testing::server::drain;
use fcd::testing::store::{State, memory};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long everything may take to come to rest, in virtual time.
const REST: Duration = Duration::from_secs(600);
const PERIOD: Duration = Duration::from_millis(20);

/// The result of a history.
pub struct Played {
    /// Why it failed.
    pub failure: Option<String>,
    pub figures: Figures,
    pub counts: Counts,
    /// The point at which the fault happened.
    pub hit: Option<String>,
}

/// Plays a history in `dir`, which must not exist.
pub fn play(named: &Name, dir: &Path) -> Played {
    let plan = Plan::draw(named);
    let shared: Arc<Mutex<(Counts, Option<String>)>> = Arc::default();
    let (theirs, policy) = (shared.clone(), plan.policy.clone());
    let place = dir.to_owned();
    let body = move || {
        let world = World::new(&place, Points::new(plan.fault));
        let mirror: Arc<SimMutex<Mirror>> = Arc::default();
        let watcher = {
            let (world, mirror) = (world.clone(), mirror.clone());
            let body = move || watcher::watch(&world, &mirror);
            fcd::testing::host::thread::spawn("watcher", body).unwrap()
        };
        let logs = play_requests(&world, &plan.requests);
        check_all(&world, &logs, &mirror);
        watcher.join().expect("the watcher");
        let (mut counts, hit) = (*world.counts.lock(), world.points.hit());
        counts.requests = logs.iter().map(|log| log.requests).sum();
        *theirs.lock().unwrap() = (counts, hit);
        if counts.kills > 0 {
            // Threads of the killed daemon are frozen in it.
            std::mem::forget(world);
        }
    };
    let (outcome, figures) = sim::run(named.schedule, policy, body);
    memory::remove(&dir.join("state"));
    let _ = std::fs::remove_dir_all(dir);
    let (counts, hit) = shared.lock().unwrap().clone();
    Played {
        failure: match outcome {
            Outcome::Passed => None,
            Outcome::Failed(why) => Some(why),
        },
        figures,
        counts,
        hit,
    }
}

fn require(is_so: bool, why: impl FnOnce() -> String) {
    if !is_so {
        sim::fail(&why());
    }
}

/// Makes all requests. Starts another daemon whenever one is killed.
fn play_requests(world: &Arc<World>, requests: &[Request]) -> Vec<Log> {
    let mut group = world.start_daemon();
    let begin = |number| -> JoinHandle<Log> {
        let (world, requests) = (world.clone(), requests.to_owned());
        let body = move || {
            let mut actor = Actor::new(world, number);
            actor.play(&requests);
            actor.log
        };
        fcd::testing::host::thread::spawn(&format!("caller-{number}"), body).unwrap()
    };
    let callers: Vec<_> = (0..CALLERS).map(begin).collect();
    while callers.iter().any(|caller| !caller.is_finished()) {
        revive(world, &mut group, Duration::from_secs(1));
    }
    let logs = callers.into_iter().map(|c| c.join().expect("a caller"));
    let logs: Vec<Log> = logs.collect();
    world.points.disarm();
    let kills = world.points.kills() && world.counts.lock().kills == 0;
    if kills || world.points.hit().is_none() {
        // The requests have ended first, so the daemon is killed now.
        sim::kill(group);
    }
    revive(world, &mut group, Duration::from_millis(1));
    logs
}

/// Waits for a while. If the daemon is killed meanwhile, starts the next one.
fn revive(world: &Arc<World>, group: &mut Group, period: Duration) {
    if sim::wait_dead(*group, period) {
        let dead = world.take_daemon(true);
        check_dead(world, dead.as_deref());
        std::mem::forget(dead);
        *group = world.start_daemon();
    }
}

/// Checks a daemon that was killed: it may know more than the disk, but never less.
fn check_dead(world: &World, dead: Option<&Running>) {
    let Some(dead) = dead else {
        return;
    };
    let durable = memory::read(&world.config.state_dir).unwrap();
    let seq = dead.daemon.core.store.seq();
    require(memory::seq(&world.config.state_dir) <= seq, || {
        format!("the disk is ahead of the killed daemon, which made {seq} changes")
    });
    drop(durable);
}

fn check_all(world: &Arc<World>, logs: &[Log], mirror: &SimMutex<Mirror>) {
    let running = world.running();
    await_rest(world, &running, "the requests");
    check_events(&running, mirror);
    // A commit that fails undoes claims, which the history does not tell.
    if world.counts.lock().kills == 0 && !world.points.has_failed_commit() {
        let seen: Vec<_> = logs
            .iter()
            .flat_map(|log| log.seen.iter().map(|(_, seen)| seen.clone()))
            .collect();
        let events = running.daemon.core.history.take();
        match replay::check(&events, &seen) {
            Ok(explained) => world.counts.lock().checked += explained.explained,
            Err(why) => sim::fail(&why),
        }
    }
    check_acknowledged(&running, logs);
    if world.points.refuses() {
        // The sweep would release what could not be released.
        call::<Leaks>(world, &LeaksRequest { fix: true });
    }
    let leaks = call::<Leaks>(world, &LeaksRequest { fix: false }).leaks;
    require(leaks.is_empty(), || format!("left over: {leaks:?}"));
    delete_all(world);
    await_rest(world, &running, "the deletion of everything");
    let live = world.vmm.live();
    require(live.is_empty(), || format!("VMMs without a VM: {live:?}"));
    running.daemon.core.store.read(|s| {
        let left = (s.vms().count(), s.ledger().count(), s.workspaces().count());
        require(left == (0, 0, 0), || {
            format!(
                "rows are left: {left:?} {:?}",
                s.ledger().collect::<Vec<_>>()
            )
        });
    });
    watcher::end(mirror);
    shut(world, running);
    require(world.vmm.clashes() == 0, || "two VMMs on one disk".into());
    require(check::violations() == 0, || "a lock was misused".into());
}

/// Checks that the events describe everything.
fn check_events(running: &Running, mirror: &SimMutex<Mirror>) {
    let deadline = Instant::now() + REST;
    loop {
        let vms = running.daemon.core.store.read(|s| {
            let of = |row: &Arc<fcd::testing::store::VmRow>| (row.id.to_string(), row.state);
            s.vms().map(of).collect()
        });
        let checked = mirror.lock().check(&vms);
        match checked {
            Ok(()) => return,
            Err(why) if Instant::now() >= deadline => return sim::fail(&why),
            Err(_) => sim::sleep(PERIOD),
        }
    }
}

/// Checks that every acknowledged VM has survived.
fn check_acknowledged(running: &Running, logs: &[Log]) {
    let is_deleted = |vm: usize| logs.iter().any(|log| log.deletes[vm]);
    running.daemon.core.store.read(|s| {
        for made in logs.iter().flat_map(|log| &log.acknowledged) {
            let exists = s.vm(&made.vm).is_some();
            let may_be_gone = (0..VMS as usize).any(is_deleted);
            require(exists || may_be_gone, || {
                format!("VM {} was acknowledged and is gone", made.vm)
            });
        }
    });
}

fn call<C: Call>(world: &World, request: &C::Request) -> C::Reply {
    match world.client(0).call::<C>(request) {
        Ok(reply) => reply,
        Err(e) => {
            sim::fail(&format!("{}: {e:?}", C::METHOD));
            unreachable!("a failed simulation does not go on")
        }
    }
}

fn await_rest(world: &World, running: &Running, after: &str) {
    let deadline = Instant::now() + REST;
    loop {
        let left = running.daemon.leftovers();
        let live = world.vmm.live();
        let is_recorded = running.daemon.core.store.read(|s| {
            let mut runs = s.vms().filter(|row| row.state == VmState::Running);
            runs.all(|row| {
                let end = format!("-{}-{}", row.id, row.generation);
                live.iter().any(|tag| tag.ends_with(&end))
            })
        });
        if left == Leftovers::default()
            && is_recorded
            && running.daemon.core.store.read_only().is_none()
        {
            return;
        }
        require(Instant::now() < deadline, || {
            let ops = running.daemon.core.ops.list(&Default::default());
            format!(
                "no rest after {after}: {left:?}, every death is recorded: {is_recorded}, {ops:?}"
            )
        });
        sim::sleep(PERIOD);
    }
}

fn delete_all(world: &World) {
    for snapshot in call::<SnapshotList>(world, &Default::default()).snapshots {
        call::<SnapshotDelete>(
            world,
            &SnapshotRequest {
                snapshot: snapshot.id.to_string(),
            },
        );
    }
    for vm in (0..VMS).map(name) {
        let mut client = world.client(0);
        let request = VmDeleteRequest {
            vm,
            force: true,
            if_exists: false,
        };
        let sent = client.send::<VmDelete>(&request, true, None, &[]);
        match sent.and_then(|()| client.reply::<VmDelete>(&mut |_| {})) {
            Err(e) if !e.is(Kind::VmNotFound) => sim::fail(&format!("delete everything: {e:?}")),
            _ => {}
        }
    }
}

/// Shuts the daemon down in order, and compares its memory with the disk.
fn shut(world: &World, running: Arc<Running>) {
    drop(world.take_daemon(false));
    let deadline = Instant::now() + REST;
    let left = drain(&running.server, &running.daemon, Instant::now(), deadline);
    require(left == 0, || format!("{left} connections are left"));
    let inside = running.daemon.core.store.read(State::clone);
    let durable = memory::read(&world.config.state_dir).unwrap();
    require(inside == durable, || {
        format!("on disk:\n{durable:#?}\nin memory:\n{inside:#?}")
    });
    drop(running);
    world.vmm.forget_watchers();
}

impl From<Failure> for String {
    fn from(e: Failure) -> Self {
        format!("{e:?}")
    }
}
