//! Tests of calls on a VM that is booting or stopping. The calls are accepted immediately, and the
//! VM ends in a valid state without leftovers.

use crate::recovery::exec;
use crate::world::*;
use fcd::testing::api::exec::ExecStart;
use fcd::testing::api::op::{OpCancel, OpRequest, OpState};
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::error::Kind;
use fcd::testing::guest::fake::{Answer, Gate, Readiness};
use fcd::testing::vmm::fake::Stage;
use std::time::{Duration, Instant};

/// The step at which a boot is held.
#[derive(Clone, Copy, Debug)]
enum At {
    /// The boot is queued because other VMs are booting.
    Admission,
    BeforeSpawn,
    AfterSpawn,
    Guest,
}
const PLACES: [At; 4] = [At::Admission, At::BeforeSpawn, At::AfterSpawn, At::Guest];

/// The promised limits of the time until a call is accepted and until it is done. The median of the
/// rounds must meet them, because a busy machine may delay a single round.
const ACCEPTED: Duration = Duration::from_millis(50);
const DONE: Duration = Duration::from_secs(1);

#[track_caller]
fn in_time(accepted: Vec<Duration>, done: Vec<Duration>) {
    let (accepted, done) = (median(accepted), median(done));
    println!("accepted within {accepted:?}, done within {done:?}");
    assert!(
        accepted < ACCEPTED && done < DONE,
        "accepted within {accepted:?}, done within {done:?}"
    );
}

struct Booting {
    world: World,
    start: Running<VmReply>,
    vm: Vm,
    /// The boot that occupies the only boot slot.
    _first: Option<Running<VmReply>>,
}

/// Creates a VM whose boot is held at this step.
fn booting(at: At) -> Booting {
    let world =
        World::with(|c| c.limits.boots_max = if matches!(at, At::Admission) { 1 } else { 8 });
    let vm = world.create("web");
    let addr = world.place(&vm.id);
    let mut first = None;
    match at {
        At::Admission => {
            world.create("first");
            world.vmm.hold_starts(Stage::BeforeSpawn);
            first = Some(world.begin::<VmStart>(request("first"), vec![]));
            assert!(world.vmm.await_held(1, soon()));
        }
        At::BeforeSpawn => world.vmm.hold_starts(Stage::BeforeSpawn),
        At::AfterSpawn => world.vmm.hold_starts(Stage::AfterSpawn),
        At::Guest => world
            .guest
            .set_readiness(addr, Readiness::Gated(Gate::closed())),
    }
    let start = world.begin::<VmStart>(request("web"), vec![]);
    match at {
        At::Admission => start.stage("wait for other boots"),
        At::Guest => start.stage("wait for the guest"),
        _ => assert!(world.vmm.await_held(1, soon())),
    }
    assert_eq!(world.state("web"), VmState::Starting);
    Booting {
        world,
        start,
        vm,
        _first: first,
    }
}

impl Booting {
    fn has_vmm(&self) -> bool {
        self.world
            .vmm
            .live()
            .iter()
            .any(|tag| tag.contains(self.vm.id.as_str()))
    }
    /// Releases the held boot and waits until nothing is running.
    fn end(self) {
        self.world.vmm.release_starts();
        self.world.await_rest();
    }
}

#[track_caller]
fn cancelled(result: Result<VmReply, Failure>, cause: &str) {
    let e = result.unwrap_err();
    assert!(
        e.is(Kind::Cancelled) && e.fault.message.contains(cause),
        "{e:?}"
    );
}

#[test]
fn stop_of_booting_vm_is_prompt() {
    let (mut accepted, mut done) = (Vec::new(), Vec::new());
    for at in PLACES {
        for force in [false, true] {
            let mut b = booting(at);
            let begun = Instant::now();
            let mut stop = b.world.begin::<VmStop>(
                VmStopRequest {
                    force,
                    ..stop("web")
                },
                vec![],
            );
            stop.op();
            accepted.push(begun.elapsed());
            assert_eq!(stop.finish(PROMPT).unwrap().vm.state, VmState::Stopped);
            done.push(begun.elapsed());
            cancelled(b.start.finish(PROMPT), "the VM was stopped");
            assert!(!b.has_vmm());
            assert_eq!(b.world.state("web"), VmState::Stopped);
            b.end();
        }
    }
    in_time(accepted, done);
}

#[test]
fn delete_of_booting_vm_is_prompt() {
    let (mut accepted, mut done) = (Vec::new(), Vec::new());
    for at in PLACES {
        for force in [false, true] {
            let mut b = booting(at);
            let begun = Instant::now();
            let mut gone = b.world.begin::<VmDelete>(
                VmDeleteRequest {
                    force,
                    ..delete("web")
                },
                vec![],
            );
            gone.op();
            accepted.push(begun.elapsed());
            assert_eq!(gone.finish(PROMPT).unwrap().deleted, Some(b.vm.id.clone()));
            done.push(begun.elapsed());
            cancelled(b.start.finish(PROMPT), "the VM was deleted");
            assert!(!b.has_vmm());
            assert!(
                b.world
                    .census()
                    .iter()
                    .all(|thing| !thing.contains(b.vm.id.as_str())),
                "{:#?}",
                b.world.census()
            );
            b.end();
        }
    }
    in_time(accepted, done);
}

#[test]
fn start_cancelled_leaves_vm_unchanged() {
    for at in PLACES {
        let mut b = booting(at);
        let op = b.world.show("web").unwrap().op.unwrap();
        b.world
            .call::<OpCancel>(&OpRequest { op: op.to_string() })
            .unwrap();
        cancelled(b.start.finish(PROMPT), "op cancel was requested");
        assert_eq!(b.world.op(&op).state, OpState::Cancelled);
        assert_eq!(b.world.state("web"), VmState::Created);
        assert!(!b.has_vmm());
        b.end();
    }
}

#[test]
fn start_hang_up_cancels_unless_joined() {
    let mut b = booting(At::AfterSpawn);
    let joined = b.world.begin::<VmStart>(request("web"), vec![]);
    assert_eq!(Some(joined.op()), b.world.show("web").unwrap().op);
    joined.hang_up();
    drop(joined);
    assert_eq!(b.world.state("web"), VmState::Starting);
    b.start.hang_up();
    b.world.await_state("web", VmState::Created);
    assert!(b.start.finish(SOON).is_err());
    b.end();
}

#[test]
fn stop_hang_up_does_not_cancel() {
    let (world, vm) = lingering();
    let stop = world.begin::<VmStop>(stop("web"), vec![]);
    stop.stage("sync and shut down");
    stop.hang_up();
    world
        .vmm
        .die(&vm.id, &fcd::testing::vmm::End::GuestShutDown);
    assert_eq!(
        world.await_state("web", VmState::Stopped).synced,
        Some(Synced::Yes)
    );
}

/// A delete replaces a stop, force replaces a graceful stop, and the replaced call fails as
/// superseded.
#[test]
fn successor_replaces_weaker_successor() {
    let mut b = booting(At::Guest);
    // The VMM cannot be killed, so the boot's rollback is still running when the other calls
    // arrive.
    b.world.vmm.set_unkillable(true);
    let mut stop_ = b.world.begin::<VmStop>(stop("web"), vec![]);
    let stop_op = stop_.op();
    let again = b.world.begin::<VmStop>(stop("web"), vec![]);
    assert_eq!(again.op(), stop_op, "a second stop joins the first");
    let mut kill = b.world.begin::<VmKill>(request("web"), vec![]);
    assert_ne!(kill.op(), stop_op);
    assert!(
        stop_.finish(PROMPT).unwrap_err().is(Kind::Superseded),
        "force replaces grace"
    );
    let mut gone = b.world.begin::<VmDelete>(delete("web"), vec![]);
    let gone_op = gone.op();
    assert!(
        kill.finish(PROMPT).unwrap_err().is(Kind::Superseded),
        "delete replaces stop"
    );
    let e = b.world.stop("web").unwrap_err();
    assert!(e.is(Kind::WrongState) && e.fault.hint.is_some(), "{e:?}");
    let e = b.world.start("web").unwrap_err();
    assert!(e.is(Kind::WrongState) && e.fault.hint.is_some(), "{e:?}");
    assert_eq!(
        b.world.begin::<VmDelete>(delete("web"), vec![]).op(),
        gone_op
    );
    // Now the process can end.
    b.world.vmm.set_unkillable(false);
    assert!(b.world.vmm.die(
        &b.vm.id,
        &fcd::testing::vmm::End::Vmm(fcd::testing::vmm::Exit::Signal(9))
    ));
    gone.finish(SOON).unwrap();
    assert!(b.start.finish(SOON).is_err());
    b.end();
}

/// Creates a running VM whose guest syncs when it is asked to shut down, but does not end on its
/// own.
fn lingering() -> (World, Vm) {
    let world = World::new();
    let (vm, _) = world.running("web");
    world.guest.on(fcd::testing::image::SHUTDOWN_COMMAND, |_| {
        Answer::status(0).stdout("synced\n")
    });
    (world, vm)
}

#[test]
fn stop_joins_running_stop() {
    let (world, vm) = lingering();
    let mut one = world.begin::<VmStop>(stop("web"), vec![]);
    let mut two = world.begin::<VmStop>(stop("web"), vec![]);
    assert_eq!(one.op(), two.op());
    let e = world.start("web").unwrap_err();
    assert!(e.is(Kind::WrongState) && e.fault.hint.is_some(), "{e:?}");
    one.stage("sync and shut down");
    assert!(
        world
            .vmm
            .die(&vm.id, &fcd::testing::vmm::End::GuestShutDown)
    );
    for stop in [&mut one, &mut two] {
        let vm = stop.finish(SOON).unwrap().vm;
        assert_eq!((vm.state, vm.synced), (VmState::Stopped, Some(Synced::Yes)));
    }
    assert_eq!(
        world.stop("web").unwrap().state,
        VmState::Stopped,
        "a stop of a stopped VM succeeds"
    );
}

#[test]
fn kill_shortens_stop() {
    for by_stop in [false, true] {
        let (world, _) = lingering();
        let mut graceful = world.begin::<VmStop>(stop("web"), vec![]);
        let op = graceful.op();
        let mut kill = match by_stop {
            true => world.begin::<VmStop>(
                VmStopRequest {
                    force: true,
                    ..stop("web")
                },
                vec![],
            ),
            false => world.begin::<VmKill>(request("web"), vec![]),
        };
        assert_eq!(kill.op(), op);
        assert_eq!(kill.finish(PROMPT).unwrap().vm.state, VmState::Stopped);
        assert_eq!(graceful.finish(PROMPT).unwrap().vm.state, VmState::Stopped);
        assert!(world.vmm.live().is_empty());
    }
}

#[test]
fn delete_waits_for_stop_unless_forced() {
    for force in [false, true] {
        let (world, vm) = lingering();
        let mut graceful = world.begin::<VmStop>(stop("web"), vec![]);
        graceful.stage("sync and shut down");
        let mut gone = world.begin::<VmDelete>(
            VmDeleteRequest {
                force,
                ..delete("web")
            },
            vec![],
        );
        gone.op();
        if !force {
            assert!(!gone.has_ended());
            assert!(
                world
                    .vmm
                    .die(&vm.id, &fcd::testing::vmm::End::GuestShutDown)
            );
        }
        assert_eq!(gone.finish(PROMPT).unwrap().deleted, Some(vm.id));
        assert_eq!(graceful.finish(PROMPT).unwrap().vm.state, VmState::Deleting);
        assert!(world.show("web").unwrap_err().is(Kind::VmNotFound));
    }
}

/// The second delete joins the first and makes it forced.
#[test]
fn forced_delete_shortens_stop_before_delete() {
    let (world, _) = lingering();
    let graceful = world.begin::<VmStop>(stop("web"), vec![]);
    graceful.stage("sync and shut down");
    let mut patient = world.begin::<VmDelete>(
        VmDeleteRequest {
            force: false,
            ..delete("web")
        },
        vec![],
    );
    let op = patient.op();
    let mut forced = world.begin::<VmDelete>(delete("web"), vec![]);
    assert_eq!(forced.op(), op);
    forced.finish(PROMPT).unwrap();
    patient.finish(PROMPT).unwrap();
}

#[test]
fn restart_is_one_operation() {
    let (world, vm) = lingering();
    let mut restart = world.begin::<VmRestart>(stop("web"), vec![]);
    let op = restart.op();
    restart.stage("sync and shut down");
    for mut joined in [
        world.begin::<VmStart>(request("web"), vec![]),
        world.begin::<VmRestart>(stop("web"), vec![]),
    ] {
        assert_eq!(joined.op(), op);
        assert!(!joined.has_ended());
    }
    assert!(
        world
            .vmm
            .die(&vm.id, &fcd::testing::vmm::End::GuestShutDown)
    );
    let after = restart.finish(SOON).unwrap().vm;
    assert_eq!((after.state, after.synced), (VmState::Running, None));
    assert_eq!(world.vmm.starts(), 2);
    assert_ne!(after.pid, vm.pid);
}

/// A stop during a restart leaves the VM stopped. The guest is still synced.
#[test]
fn stop_during_restart_leaves_vm_stopped() {
    for kill in [false, true] {
        let (world, vm) = lingering();
        let mut restart = world.begin::<VmRestart>(stop("web"), vec![]);
        restart.stage("sync and shut down");
        await_that("the guest has synced", || {
            let calls = world.guest.calls();
            let is_asked = calls
                .iter()
                .any(|call| call.command == fcd::testing::image::SHUTDOWN_COMMAND);
            is_asked && world.guest.live_total() == 0
        });
        let mut end = world.begin::<VmStop>(
            VmStopRequest {
                force: kill,
                ..stop("web")
            },
            vec![],
        );
        end.op();
        if !kill {
            assert!(
                world
                    .vmm
                    .die(&vm.id, &fcd::testing::vmm::End::GuestShutDown)
            );
        }
        let after = end.finish(PROMPT).unwrap().vm;
        assert_eq!(
            (after.state, after.synced),
            (VmState::Stopped, Some(Synced::Yes))
        );
        assert!(restart.finish(PROMPT).unwrap_err().is(Kind::Superseded));
        assert_eq!(world.vmm.starts(), 1);
    }
}

#[test]
fn boot_with_dying_vmm_fails() {
    let mut b = booting(At::Guest);
    assert!(b.world.vmm.die(
        &b.vm.id,
        &fcd::testing::vmm::End::Vmm(fcd::testing::vmm::Exit::Signal(11))
    ));
    let e = b.start.finish(PROMPT).unwrap_err();
    assert!(
        e.is(Kind::VmmFailed) && e.fault.message.contains("SIGSEGV"),
        "{e:?}"
    );
    assert!(e.fault.hint.is_some_and(|h| h.contains("logs")));
    let vm = b.world.show("web").unwrap();
    assert_eq!(vm.state, VmState::Failed);
    assert!(vm.reason.unwrap().contains("SIGSEGV"));
    b.end();
}

#[test]
fn failed_start_reports_cause_and_can_be_retried() {
    let world = World::new();
    world.create("web");
    world.vmm.fail_next_start("no such machine");
    let e = world.start("web").unwrap_err();
    assert!(
        e.is(Kind::VmmFailed)
            && e.fault.message.contains("no such machine")
            && e.fault.op.is_some(),
        "{e:?}"
    );
    let vm = world.show("web").unwrap();
    assert_eq!(vm.state, VmState::Failed);
    assert!(vm.reason.unwrap().contains("no such machine"));
    assert!(world.vmm.live().is_empty());
    assert_eq!(world.start("web").unwrap().state, VmState::Running);
}

#[test]
fn boot_of_silent_guest_times_out() {
    let world = World::with(|c| c.limits.boot_timeout_s = 1);
    let vm = world.create("web");
    world
        .guest
        .set_readiness(world.place(&vm.id), Readiness::Gated(Gate::closed()));
    let e = world.start("web").unwrap_err();
    assert!(e.is(Kind::BootTimeout) && e.fault.hint.is_some(), "{e:?}");
    assert!(world.vmm.live().is_empty());
}

#[test]
fn vmm_death_ends_calls_that_use_guest() {
    for (how, state) in [
        (
            fcd::testing::vmm::End::Vmm(fcd::testing::vmm::Exit::Signal(9)),
            VmState::Failed,
        ),
        (fcd::testing::vmm::End::GuestShutDown, VmState::Stopped),
    ] {
        let world = World::new();
        let (vm, _) = world.running("web");
        let mut import = world.import("web");
        assert!(world.vmm.die(&vm.id, &how));
        let e = import.call.finish(PROMPT).unwrap_err();
        assert!(e.is(Kind::Cancelled), "{e:?}");
        let vm = world.await_state("web", state);
        assert!(vm.reason.is_some() && vm.pid.is_none());
        assert_eq!(world.start("web").unwrap().state, VmState::Running);
    }
}

/// A call must not use a guest because of a state that it read before it got the VM's lock.
#[test]
fn exec_behind_stop_is_refused() {
    let (world, vm) = lingering();
    let (mut stop, mut exec) = while_locked(&world, &vm, || {
        let stop = world.begin::<VmStop>(stop("web"), vec![]);
        world.await_waiters(1);
        let exec = world.begin::<ExecStart>(exec("web", "true"), vec![]);
        world.await_waiters(2);
        (stop, exec)
    });
    let e = exec.finish(SOON).unwrap_err();
    assert!(e.is(Kind::WrongState), "{e:?}");
    world.run::<VmKill>(request("web")).unwrap();
    stop.finish(SOON).unwrap();
}

/// Makes calls from many threads at once. Each call is answered, and the VM ends in one valid
/// state.
#[test]
fn concurrent_calls_end_in_valid_state() {
    const THREADS: u64 = 6;
    const CALLS: u64 = 12;
    for seed in 0..4 {
        let world = World::new();
        let vm = world.create("web");
        world.place(&vm.id);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let world = &world;
                scope.spawn(move || {
                    let mut random =
                        (seed * THREADS + thread + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    for _ in 0..CALLS {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        check_answer(any_verb(world, random >> 33));
                    }
                });
            }
        });
        world.await_rest();
        let vm = world.show("web").unwrap();
        let settled = [VmState::Created, VmState::Running, VmState::Stopped];
        assert!(settled.contains(&vm.state) && vm.op.is_none(), "{vm:?}");
        assert_eq!(
            world.vmm.live().len(),
            usize::from(vm.state == VmState::Running)
        );
        let mut last = world.begin::<VmDelete>(delete("web"), vec![]);
        let start = world.begin::<VmStart>(request("web"), vec![]);
        last.finish(SOON).unwrap();
        drop(start);
        world.await_rest();
        assert!(world.vmm.live().is_empty());
        assert!(
            world
                .census()
                .iter()
                .all(|thing| !thing.contains(vm.id.as_str())),
            "{:#?}",
            world.census()
        );
    }
}

fn any_verb(world: &World, random: u64) -> Result<VmReply, Failure> {
    let mut call = match random % 6 {
        0 | 1 => world.begin::<VmStart>(request("web"), vec![]),
        2 => world.begin::<VmStop>(stop("web"), vec![]),
        3 => world.begin::<VmStop>(
            VmStopRequest {
                force: true,
                ..stop("web")
            },
            vec![],
        ),
        4 => world.begin::<VmKill>(request("web"), vec![]),
        _ => world.begin::<VmRestart>(stop("web"), vec![]),
    };
    if random.is_multiple_of(7) {
        call.hang_up();
    }
    call.finish(SOON)
}

#[track_caller]
fn check_answer(answer: Result<VmReply, Failure>) {
    if let Err(e) = answer {
        let expected = [Kind::WrongState, Kind::Superseded, Kind::Cancelled];
        assert!(expected.iter().any(|k| e.is(*k)) || e.unreachable, "{e:?}");
    }
}

#[test]
fn concurrent_delete_and_start_leave_no_vm() {
    for _ in 0..20 {
        let world = World::new();
        let vm = world.create("web");
        let mut start = world.begin::<VmStart>(request("web"), vec![]);
        let mut gone = world.begin::<VmDelete>(delete("web"), vec![]);
        gone.finish(SOON).unwrap();
        if let Err(e) = start.finish(SOON) {
            let expected = [
                Kind::VmNotFound,
                Kind::Superseded,
                Kind::Cancelled,
                Kind::WrongState,
            ];
            assert!(expected.iter().any(|k| e.is(*k)), "{e:?}");
        }
        assert!(world.vmm.live().is_empty());
        assert!(
            world
                .census()
                .iter()
                .all(|thing| !thing.contains(vm.id.as_str()))
        );
    }
}
