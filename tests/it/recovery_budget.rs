//! Tests with a guest or VMM that kills the daemon each time the daemon resumes the stop or delete
//! of its VM, or adopts the VMM.

use crate::world::*;
use fcd::testing::api::Empty;
use fcd::testing::api::daemon::{Doctor, Severity};
use fcd::testing::api::event::{EventsWatch, EventsWatchRequest, What};
use fcd::testing::api::frame::Note;
use fcd::testing::api::vm::*;
use fcd::testing::guest::fake::Answer;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A VM whose guest kills each daemon that asks the guest to shut down.
struct Hostile {
    world: World,
    asked: Arc<AtomicU32>,
}

impl Hostile {
    fn in_state(state: VmState) -> Self {
        let mut world = World::new();
        let (vm, _) = world.running("evil");
        world.edit_rows(|tx| tx.update_vm_unlocked(&vm.id, |r| r.state = state).unwrap());
        world.reopen();
        Self {
            world,
            asked: Arc::default(),
        }
    }

    /// Makes the current daemon die when it asks the guest to shut down.
    fn guest_kills_asking_daemon(&self) {
        let (points, asked) = (self.world.points.clone(), self.asked.clone());
        self.world
            .guest
            .on(fcd::testing::image::SHUTDOWN_COMMAND, move |_| {
                asked.fetch_add(1, Ordering::SeqCst);
                points.die();
                Answer::status(1)
            });
    }

    fn asked(&self) -> u32 {
        self.asked.load(Ordering::SeqCst)
    }

    /// Opens the next daemon without reconciling. This daemon also dies when it asks the guest to
    /// shut down.
    fn next_daemon(&mut self) {
        if self.world.points.is_dead() {
            self.world.crash();
        }
        self.world.reopen();
        self.guest_kills_asking_daemon();
    }

    /// Reconciles, and waits until the daemon has died while it asks the guest to shut down.
    fn dies_asking(&mut self) {
        self.guest_kills_asking_daemon();
        self.world.daemon().reconciler.reconcile();
        let points = self.world.points.clone();
        await_that("the daemon dies while it asks the guest", || {
            points.is_dead()
        });
    }

    /// Reconciles, and waits until the daemon has died while it kills the VMM.
    fn dies_killing(&mut self) {
        self.world.points.die_at("kill the VMM");
        self.world.daemon().reconciler.reconcile();
        let points = self.world.points.clone();
        await_that("the daemon dies while it kills the VMM", || {
            points.is_dead()
        });
    }

    fn shown(&self) -> Vm {
        self.world.show("evil").unwrap()
    }

    fn doctor_says(&self) -> (Severity, String) {
        let checks = self.world.call::<Doctor>(&Empty {}).unwrap().checks;
        let check = checks
            .into_iter()
            .find(|c| c.id == "recovery")
            .expect("doctor has no recovery check");
        (check.severity, check.found)
    }
}

#[test]
fn stop_that_killed_daemon_is_resumed_without_asking_guest() {
    let mut hostile = Hostile::in_state(VmState::Stopping);
    assert_eq!(hostile.doctor_says().0, Severity::Ok);
    hostile.dies_asking();
    hostile.next_daemon();
    hostile.world.daemon().reconciler.reconcile();
    hostile.world.await_rest();
    let vm = hostile.shown();
    assert_eq!(
        (hostile.asked(), vm.state, vm.synced),
        (1, VmState::Stopped, Some(Synced::No))
    );
    assert!(vm.reason.unwrap().contains("without asking the guest"));
    assert!(hostile.world.vmm.live().is_empty());
    let (severity, found) = hostile.doctor_says();
    assert!(
        severity == Severity::Warn && found.contains("VM evil (1)"),
        "{found}"
    );
    // A new start resets the count of deaths.
    hostile.world.place(&vm.id);
    hostile.world.start("evil").unwrap();
    assert_eq!(hostile.doctor_says().0, Severity::Ok);
}

#[test]
fn stop_that_killed_three_daemons_is_not_resumed() {
    let mut hostile = Hostile::in_state(VmState::Stopping);
    hostile.dies_asking();
    hostile.next_daemon();
    hostile.dies_killing();
    hostile.next_daemon();
    let watch = EventsWatchRequest { since: None };
    let events = hostile.world.begin::<EventsWatch>(watch, vec![]);
    events.note(|note| matches!(note, Note::Snapshot(_)).then_some(()));
    hostile.dies_killing();
    let why = events.note(|note| match note {
        Note::Events(told) => told.events.iter().find_map(|event| match &event.what {
            What::State {
                to: VmState::Failed,
                reason,
                ..
            } => reason.clone(),
            _ => None,
        }),
        _ => None,
    });
    assert!(why.contains("died 2 times"), "{why}");
    events.hang_up();

    hostile.next_daemon();
    hostile.world.daemon().reconciler.reconcile();
    hostile.world.await_rest();
    let vm = hostile.shown();
    assert_eq!((hostile.asked(), vm.state), (1, VmState::Failed));
    assert!(vm.reason.unwrap().contains("died 3 times"));
    assert_eq!(
        hostile.world.vmm.live().len(),
        1,
        "the daemon does not kill the VMM on its own"
    );
    let (severity, found) = hostile.doctor_says();
    assert!(
        severity == Severity::Warn && found.contains("VM evil (3)"),
        "{found}"
    );
    // Other VMs are not affected. The next daemon does not touch this VM either.
    hostile.world.running("well");
    hostile.next_daemon();
    hostile.world.daemon().reconciler.reconcile();
    assert_eq!(
        (hostile.world.state("well"), hostile.world.state("evil")),
        (VmState::Running, VmState::Failed)
    );
    // The VM's owner can delete it.
    hostile.world.delete("evil").unwrap();
    assert_eq!(hostile.world.vmm.live().len(), 1);
    assert_eq!(hostile.doctor_says().0, Severity::Ok);
}

#[test]
fn delete_that_killed_daemon_is_not_resumed_as_delete() {
    let mut hostile = Hostile::in_state(VmState::Deleting);
    hostile.dies_killing();
    hostile.next_daemon();
    hostile.dies_killing();
    hostile.next_daemon();
    hostile.world.daemon().reconciler.reconcile();
    let vm = hostile.shown();
    assert!(vm.state == VmState::Failed && vm.reason.unwrap().contains("died 2 times"));
    hostile.world.delete("evil").unwrap();
    assert!(hostile.world.vmm.live().is_empty());
}

#[test]
fn record_survives_daemon_that_never_reached_vm() {
    let mut hostile = Hostile::in_state(VmState::Stopping);
    hostile.dies_asking();
    hostile.next_daemon();
    hostile.next_daemon();
    hostile.world.daemon().reconciler.reconcile();
    hostile.world.await_rest();
    assert_eq!(
        (hostile.asked(), hostile.shown().state),
        (1, VmState::Stopped)
    );
}

#[test]
fn orderly_exit_during_resumed_stop_is_not_counted() {
    let mut hostile = Hostile::in_state(VmState::Stopping);
    let gate = fcd::testing::guest::fake::Gate::closed();
    let held = gate.clone();
    hostile
        .world
        .guest
        .on(fcd::testing::image::SHUTDOWN_COMMAND, move |_| {
            Answer::status(0).stdout("synced\n").hold(&held)
        });
    hostile.world.daemon().reconciler.reconcile();
    await_that("the stop is resumed", || {
        hostile.world.daemon().leftovers().threads == 1
    });
    // A drain ends like this if the stop takes longer than the drain's deadline.
    let daemon = hostile.world.daemon().clone();
    let id = hostile.shown().id;
    let record = format!("recovery/{id}");
    daemon.close(std::time::Instant::now(), std::time::Instant::now());
    assert_eq!(
        daemon
            .core
            .store
            .read(|s| s.meta(&record).map(str::to_owned)),
        None
    );
    gate.open();
    hostile.world.points.die();
    hostile.world.crash();
    hostile.world.reopen();
    let vmm = hostile.world.vmm.clone();
    hostile
        .world
        .guest
        .on(fcd::testing::image::SHUTDOWN_COMMAND, move |_| {
            vmm.die(&id, &fcd::testing::vmm::End::GuestShutDown);
            Answer::status(0).stdout("synced\n")
        });
    hostile.world.daemon().reconciler.reconcile();
    hostile.world.await_rest();
    let vm = hostile.shown();
    assert_eq!(
        (vm.state, vm.synced, hostile.doctor_says().0),
        (VmState::Stopped, Some(Synced::Yes), Severity::Ok)
    );
}

/// A running VM whose VMM kills each daemon that adopts it, and a second, healthy VM.
struct HostileVmm {
    world: World,
    point: &'static str,
}

impl HostileVmm {
    fn new() -> Self {
        Self::that_kills_at("adopt the VMM of ")
    }

    /// Creates the VMs. The VMM kills the daemon at the point named `what` followed by the VM's ID.
    /// `DIR` in `what` stands for the directory of all VMs.
    fn that_kills_at(what: &str) -> Self {
        let world = World::new();
        let (evil, _) = world.running("evil");
        world.running("well");
        let what = what.replace("DIR", world.config.state_dir.join("vms").to_str().unwrap());
        let point = Box::leak(format!("{what}{}", evil.id).into_boxed_str());
        let mut hostile = Self { world, point };
        hostile.world.reopen();
        hostile
    }

    /// Reconciles, checks that the daemon has died during the adoption, and opens the next daemon.
    fn dies_adopting(&mut self) {
        self.world.points.die_at(self.point);
        self.world.daemon().reconciler.reconcile();
        assert!(
            self.world.points.is_dead(),
            "the daemon did not adopt the VM"
        );
        self.world.crash();
        self.world.reopen();
    }
}

#[test]
fn adoption_that_killed_three_daemons_is_not_retried() {
    let mut hostile = HostileVmm::new();
    for _ in 0..3 {
        hostile.dies_adopting();
    }
    let adopted_before = hostile.world.vmm.adoptions().len();
    for _ in 0..2 {
        hostile.world.points.die_at(hostile.point);
        hostile.world.daemon().reconciler.reconcile();
        assert!(
            !hostile.world.points.is_dead(),
            "the daemon adopted the VM again"
        );
        let evil = hostile.world.show("evil").unwrap();
        let reason = evil.reason.clone().unwrap_or_default();
        assert!(
            evil.state == VmState::Running
                && evil.unresponsive
                && reason.contains("died 2 times while it adopted"),
            "{evil:?}"
        );
        let well = hostile.world.show("well").unwrap();
        assert_eq!(
            (well.state, well.reason, well.unresponsive),
            (VmState::Running, None, false)
        );
        let checks = hostile.world.call::<Doctor>(&Empty {}).unwrap().checks;
        let check = checks.into_iter().find(|c| c.id == "recovery").unwrap();
        assert!(
            check.severity == Severity::Warn
                && check.found.contains("while they adopted VM evil (2)"),
            "{}",
            check.found
        );
        // Neither the periodic check nor the next daemon tries again.
        hostile.world.daemon().reconciler.sweep_once();
        assert!(!hostile.world.points.is_dead());
        hostile.world.reopen();
    }
    assert_eq!(
        hostile.world.vmm.adoptions().len(),
        adopted_before + 2,
        "the other VM was adopted by each daemon"
    );
    hostile.world.daemon().reconciler.reconcile();
    let asked: Arc<AtomicU32> = Arc::default();
    let asks = asked.clone();
    hostile
        .world
        .guest
        .on(fcd::testing::image::SHUTDOWN_COMMAND, move |_| {
            asks.fetch_add(1, Ordering::SeqCst);
            Answer::status(0).stdout("synced\n")
        });
    let stopped = hostile.world.stop("evil").unwrap();
    assert_eq!(
        (stopped.state, stopped.synced, asked.load(Ordering::SeqCst)),
        (VmState::Stopped, Some(Synced::No), 0)
    );
    assert_eq!(hostile.world.vmm.live().len(), 1);
    // A new start resets the count of deaths.
    hostile.world.place(&stopped.id);
    let started = hostile.world.start("evil").unwrap();
    assert_eq!(
        (started.state, started.unresponsive),
        (VmState::Running, false)
    );
    hostile.world.reopen();
    hostile.world.daemon().reconciler.reconcile();
    let evil = hostile.world.show("evil").unwrap();
    assert_eq!(
        (evil.state, evil.reason, evil.unresponsive),
        (VmState::Running, None, false)
    );
}

/// The VMM answers while the daemon adopts it, and kills the daemon when the daemon subscribes to
/// the VMM's events.
#[test]
fn vmm_that_kills_daemon_on_subscribe_is_left_alone() {
    let mut hostile = HostileVmm::that_kills_at("listen to the VMM in DIR/");
    for _ in 0..3 {
        hostile.dies_adopting();
    }
    hostile.world.points.die_at(hostile.point);
    hostile.world.daemon().reconciler.reconcile();
    assert!(
        !hostile.world.points.is_dead(),
        "the daemon subscribed to the VMM's events again"
    );
    assert!(hostile.world.show("evil").unwrap().unresponsive);
    let well = hostile.world.show("well").unwrap();
    assert_eq!(
        (well.state, well.reason, well.unresponsive),
        (VmState::Running, None, false)
    );
}

#[test]
fn record_is_cleared_by_successful_adoption() {
    let mut hostile = HostileVmm::new();
    for _ in 0..2 {
        hostile.dies_adopting();
    }
    hostile.world.daemon().reconciler.reconcile();
    let evil = hostile.world.show("evil").unwrap();
    assert_eq!(
        (evil.state, evil.reason, evil.unresponsive),
        (VmState::Running, None, false)
    );
    hostile.world.reopen();
    // The daemon makes the full number of attempts again.
    for _ in 0..3 {
        hostile.dies_adopting();
    }
}

#[test]
fn orderly_exit_during_adoption_is_not_counted() {
    let mut hostile = HostileVmm::new();
    for _ in 0..2 {
        hostile.dies_adopting();
    }
    for _ in 0..3 {
        hostile.world.reopen();
    }
    hostile.dies_adopting();
    hostile.world.daemon().reconciler.reconcile();
    assert!(hostile.world.show("evil").unwrap().unresponsive);
}
