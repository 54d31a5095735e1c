#![cfg_attr(feature = "one-lock", allow(unused_imports, dead_code))] // Its reports differ.
//! Tests of the lock checker: its table, its verdicts and its messages.

use super::rank::{self, RankSet};
use super::{Condvar, LockSet, Mutex, Rank, Region, assert_none_held, check, region};
use crate::sched::Instant;
use expect_test::{Expect, expect};
use proptest::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

std::thread_local! {
    static QUIET: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `f`, which should cause a violation. Returns the report, or an empty text if there is no
/// violation.
fn report(f: impl FnOnce()) -> String {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.with(std::cell::Cell::get) {
                usual(info);
            }
        }));
    });
    check::stop_recording();
    QUIET.with(|q| q.set(true));
    let result = catch_unwind(AssertUnwindSafe(f));
    QUIET.with(|q| q.set(false));
    match result {
        Ok(()) => String::new(),
        Err(panic) => panic
            .downcast_ref::<String>()
            .expect("a report is a String")
            .clone(),
    }
}

/// Compares the report of `f` with `expected`. The thread's name and source lines are replaced
/// first.
#[track_caller]
fn check_report(f: impl FnOnce(), expected: Expect) {
    let lines: Vec<_> = report(f)
        .lines()
        .map(|line| match line.find(" at src/locks/tests.rs:") {
            Some(i) => format!(
                "{} at HERE{}",
                &line[..i],
                if line.ends_with("<- conflict") {
                    " <- conflict"
                } else {
                    ""
                }
            ),
            None => line.replace(std::thread::current().name().unwrap_or("?"), "T"),
        })
        .collect();
    assert_eq!(check::held(), 0, "a report must leave nothing held");
    expected.assert_eq(&lines.join("\n"));
}

#[test]
#[cfg(not(feature = "one-lock"))]
fn table_allows_no_more_than_the_design() {
    use Rank::*;
    let leaves = [
        Store,
        Ops,
        Pool,
        Admission,
        Sessions,
        Runtimes,
        Consoles,
        Connections,
        Taps,
    ];
    let allowed = |to: Rank, from: &[Rank]| {
        let beyond: Vec<_> = to.under().iter().filter(|r| !from.contains(r)).collect();
        assert!(
            beyond.is_empty(),
            "{to:?} must not be taken under {beyond:?}"
        );
    };
    for outermost in [Job, Vm, Workspace] {
        allowed(outermost, &[]);
    }
    for inner in [CreateVm, ImageOps] {
        allowed(inner, &[Vm, Workspace]);
    }
    allowed(JobWait, &[Workspace]);
    for blocking in [GuestIo, VmmApi, HostCmd, DurableWait] {
        allowed(blocking, &[Job, Workspace]);
    }
    for blocking in [Blocking, Log] {
        let above = [
            Job,
            Workspace,
            JobWait,
            GuestIo,
            VmmApi,
            HostCmd,
            DurableWait,
        ];
        allowed(blocking, &above);
    }
    for leaf in leaves {
        let above: Vec<_> = Rank::ALL
            .into_iter()
            .filter(|r| !leaves.contains(r) && !matches!(r, CondWait | Blocking | Log))
            .collect();
        allowed(leaf, &above);
    }
    // The guard that the wait releases does not appear in the table.
    allowed(CondWait, &[Job, Workspace, JobWait, DurableWait]);
    assert_eq!(leaves.len() + 13, Rank::ALL.len());
}

#[test]
fn one_lock_feature_allows_vm_lock_during_import() {
    for rank in [
        Rank::Workspace,
        Rank::JobWait,
        Rank::DurableWait,
        Rank::CondWait,
        Rank::Pool,
    ] {
        assert_eq!(
            rank.under().contains(Rank::Vm),
            cfg!(feature = "one-lock"),
            "{rank:?}"
        );
    }
}

#[test]
fn every_pair_and_triple_of_ranks_is_judged_by_the_table() {
    for a in Rank::ALL {
        for b in Rank::ALL {
            let said = report(|| drop((region(a), region(b))));
            assert_eq!(
                said.is_empty(),
                b.under().contains(a),
                "{a:?} then {b:?}: {said}"
            );
            for c in Rank::ALL {
                let may = b.under().contains(a) && c.under().contains(a) && c.under().contains(b);
                // The outermost region is dropped first, because any order must be possible.
                let said = report(|| drop((region(a), region(b), region(c))));
                assert_eq!(said.is_empty(), may, "{a:?} then {b:?} then {c:?}: {said}");
                assert_eq!(check::held(), 0);
            }
        }
    }
}

proptest! {
    /// Takes and drops regions at random and compares the checker with a model: the set of held
    /// ranks.
    #[test]
    fn checker_agrees_with_model(steps in proptest::collection::vec((any::<bool>(), 0..Rank::ALL.len(), any::<prop::sample::Index>()), 0..60)) {
        let mut held: Vec<(Rank, Region)> = Vec::new();
        for (takes, rank, which) in steps {
            let rank = Rank::ALL[rank];
            if takes {
                let may = RankSet::of(&held.iter().map(|h| h.0).collect::<Vec<_>>()).iter().all(|h| rank.under().contains(h));
                let mut got = None;
                let said = report(|| got = Some(region(rank)));
                prop_assert_eq!(got.is_some(), may, "{:?} under {} held: {}", rank, held.len(), said);
                held.extend(got.map(|region| (rank, region)));
            } else if !held.is_empty() {
                drop(held.swap_remove(which.index(held.len())));
            }
            prop_assert_eq!(check::held(), held.len());
        }
    }
}

#[test]
#[cfg(not(feature = "one-lock"))]
fn order_violation_report_names_both_locks() {
    let vm = LockSet::of_rank(Rank::Vm);
    let workspace = LockSet::of_rank(Rank::Workspace);
    let (store, store2) = (Mutex::new(Rank::Store, ()), Mutex::new(Rank::Store, ()));
    check_report(
        || drop((vm.lock(&"vm-3"), store.lock(), vm.lock(&"vm-4"))),
        expect![[r#"
            two locks of one rank in thread 'T'
              wanted  vm_locks["vm-4"]             at HERE
              holding store                        at HERE
              holding vm_locks["vm-3"]             at HERE <- conflict
              rule    vm_locks may be taken only under: nothing (src/locks/rank.rs)"#]],
    );
    check_report(
        || drop((store.lock(), vm.lock(&"vm-3"))),
        expect![[r#"
            lock order violation in thread 'T'
              wanted  vm_locks["vm-3"]             at HERE
              holding store                        at HERE <- conflict
              rule    vm_locks may be taken only under: nothing (src/locks/rank.rs)"#]],
    );
    check_report(
        || drop((workspace.lock(&"ws-9"), vm.lock(&"vm-3"))),
        expect![[r#"
            locks that exclude each other in thread 'T'
              wanted  vm_locks["vm-3"]             at HERE
              holding workspace_locks["ws-9"]      at HERE <- conflict
              rule    vm_locks may be taken only under: nothing (src/locks/rank.rs)"#]],
    );
    check_report(
        || drop((vm.lock(&"vm-3"), vm.lock(&"vm-3"))),
        expect![[r#"
            lock taken twice in thread 'T'
              wanted  vm_locks["vm-3"]             at HERE
              holding vm_locks["vm-3"]             at HERE <- conflict
              rule    vm_locks may be taken only under: nothing (src/locks/rank.rs)"#]],
    );
    let twice = report(|| drop((store.lock(), store.lock())));
    assert!(twice.starts_with("lock taken twice"), "{twice}");
    let two = report(|| drop((store.lock(), store2.lock())));
    assert!(
        two.starts_with("two locks of one rank"),
        "locks of two instances do not hang: {two}"
    );
    let tried = report(|| drop((vm.lock(&"vm-3"), vm.try_lock(&"vm-4"))));
    assert!(
        tried.starts_with("two locks of one rank"),
        "try_lock is checked like lock: {tried}"
    );
    let under_a_tried = report(|| drop((vm.try_lock(&"vm-3"), vm.lock(&"vm-4"))));
    assert!(
        under_a_tried.starts_with("two locks of one rank"),
        "a lock taken with try_lock is recorded: {under_a_tried}"
    );
}

#[test]
#[cfg(not(feature = "one-lock"))]
fn wait_with_lock_held_is_reported() {
    let vm = LockSet::of_rank(Rank::Vm);
    let (store, condvar) = (Mutex::new(Rank::Store, 0), Condvar::new());
    check_report(
        || drop((vm.lock(&"vm-3"), region(Rank::GuestIo))),
        expect![[r#"
            blocking with locks held in thread 'T'
              wanted  guest I/O                    at HERE
              holding vm_locks["vm-3"]             at HERE <- conflict
              rule    guest I/O may be taken only under: pool job (src/locks/rank.rs)"#]],
    );
    check_report(
        || drop((region(Rank::GuestIo), vm.lock(&"vm-3"))),
        expect![[r#"
            locks that exclude each other in thread 'T'
              wanted  vm_locks["vm-3"]             at HERE
              holding guest I/O                    at HERE <- conflict
              rule    vm_locks may be taken only under: nothing (src/locks/rank.rs)"#]],
    );
    let waits = |_outer| {
        let mut guard = store.lock();
        condvar.wait_while(&mut guard, Instant::now(), |_| false);
    };
    check_report(
        || waits(vm.lock(&"vm-3")),
        expect![[r#"
            blocking with locks held in thread 'T'
              wanted  condition wait               at HERE
              holding store                        at HERE
              holding vm_locks["vm-3"]             at HERE <- conflict
              rule    condition wait may be taken only under: workspace_locks, wait for a pool job, durable wait (src/locks/rank.rs)"#]],
    );
    check_report(
        || {
            let _guard = store.lock();
            assert_none_held("the end of a request");
        },
        expect![[r#"
            locks still held in thread 'T' at: the end of a request
              holding store                        at HERE"#]],
    );
}

#[test]
#[cfg(not(feature = "one-lock"))]
fn allowed_nesting_passes() {
    check::stop_recording();
    let vm = LockSet::of_rank(Rank::Vm);
    let workspace = LockSet::of_rank(Rank::Workspace);
    let (store, condvar) = (Mutex::new(Rank::Store, 0), Condvar::new());
    drop((vm.lock(&1), store.lock()));
    drop((LockSet::of_rank(Rank::CreateVm).lock(&()), store.lock()));
    let held = (workspace.lock(&1), region(Rank::JobWait));
    let queue = Mutex::new(Rank::Pool, 0);
    let mut guard = queue.lock();
    assert!(condvar.wait_while(&mut guard, Instant::now(), |_| false));
    drop((guard, held));
    let second = report(|| drop((vm.lock(&9), vm.lock(&3))));
    assert!(second.starts_with("two locks of one rank"), "{second}");
    assert_eq!(check::held(), 0);
}

#[test]
fn violation_is_counted_before_it_blocks() {
    let set = LockSet::of_rank(Rank::Workspace);
    let before = check::violations_expected();
    let said = report(|| {
        let _mine = set.lock(&1);
        // If the check came after the acquisition, this would hang.
        let _again = set.lock(&1);
    });
    assert!(said.starts_with("lock taken twice"), "{said}");
    assert!(check::violations_expected() > before);
    assert!(set.is_empty());
}

/// Runs one test of this file in a child process that must abort. Returns its stderr.
#[allow(clippy::disallowed_methods)] // `locks` must not import `host`.
fn aborts(test: &str, env: &[(&str, &str)]) -> String {
    use std::os::unix::process::ExitStatusExt;
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture", &format!("locks::tests::{test}")])
        .env("FCD_TEST_CHILD", "1");
    let output = command.envs(env.iter().copied()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{stderr}");
    stderr
}

fn is_child() -> bool {
    std::env::var_os("FCD_TEST_CHILD").is_some()
}

/// A value that takes a lock when it is dropped.
struct LocksOnDrop<'a>(&'a LockSet<u32>, u32);
impl Drop for LocksOnDrop<'_> {
    fn drop(&mut self) {
        drop(self.0.lock(&self.1));
    }
}

#[test]
fn violation_while_unwinding_is_only_printed() {
    let (vm, before) = (LockSet::of_rank(Rank::Vm), check::violations_expected());
    let said = report(|| {
        let _held = vm.lock(&1);
        let _locks = LocksOnDrop(&vm, 2);
        panic!("{}", String::from("the first panic"));
    });
    assert_eq!(said, "the first panic");
    assert!(check::violations_expected() > before);
    assert!(vm.is_empty() && check::held() == 0);
}

#[test]
fn lock_taken_twice_while_unwinding_aborts() {
    if !is_child() {
        let stderr = aborts("lock_taken_twice_while_unwinding_aborts", &[]);
        assert!(stderr.contains("lock taken twice"), "{stderr}");
        return;
    }
    let vm = LockSet::of_rank(Rank::Vm);
    report(|| {
        let _held = vm.lock(&1);
        let _locks = LocksOnDrop(&vm, 1);
        panic!("{}", String::from("the first panic"));
    });
}

#[test]
fn abort_variable_aborts_on_first_violation() {
    if !is_child() {
        let stderr = aborts(
            "abort_variable_aborts_on_first_violation",
            &[("FCD_LOCK_ABORT", "1")],
        );
        assert!(stderr.contains("two locks of one rank"), "{stderr}");
        return;
    }
    let vm = LockSet::of_rank(Rank::Vm);
    let _ = catch_unwind(AssertUnwindSafe(|| drop((vm.lock(&1), vm.lock(&2)))));
}

#[test]
fn dump_shows_holders_and_waiters() {
    check::stop_recording();
    let set = LockSet::of_rank(Rank::Workspace);
    let held = set.lock(&"dumped");
    std::thread::scope(|s| {
        let waiter = std::thread::Builder::new().name("the-waiter".into());
        #[allow(clippy::disallowed_methods)]
        waiter
            .spawn_scoped(s, || drop(set.lock(&"dumped")))
            .unwrap();
        super::tests_set::wait_for(|| set.records().iter().any(|r| r.waiters.len() == 1));
        let dump = check::dump();
        assert!(
            dump.contains("'the-waiter' awaits workspace_locks[\"dumped\"] at src/locks/tests.rs"),
            "{dump}"
        );
        assert!(
            dump.contains("holds workspace_locks[\"dumped\"] at src/locks/tests.rs"),
            "{dump}"
        );
        drop(held);
    });
}

#[test]
fn observed_edge_has_its_first_sites_in_the_graph() {
    // A new thread records its edges. The test's own thread may have stopped recording.
    std::thread::scope(|s| {
        s.spawn(|| {
            drop((
                LockSet::of_rank(Rank::ImageOps).lock(&1),
                Mutex::new(Rank::Runtimes, ()).lock(),
            ))
        });
    });
    let edge = check::observed()
        .into_iter()
        .find(|e| (e.from, e.to) == (Rank::ImageOps, Rank::Runtimes))
        .unwrap();
    assert!(edge.first.1.contains("tests.rs:"), "{edge:?}");
    let dot = check::dot();
    assert!(
        dot.contains("ImageOps -> Runtimes [style=bold, tooltip=\"src/locks/tests.rs"),
        "{dot}"
    );
    assert!(dot.starts_with("digraph locks {\n") && dot.ends_with("}\n"));
    assert!(rank::dot(Some(&[])).contains("Vm -> Ops [style=dotted];"));
    assert_eq!(
        rank::declared().count(),
        rank::dot(Some(&[])).matches(" -> ").count()
    );
}

#[test]
fn markdown_table_names_every_rank_once() {
    let table = rank::markdown_table();
    for rank in Rank::ALL {
        let lines = table.lines().filter(|l| {
            l.split('|')
                .nth(1)
                .is_some_and(|c| c.split(',').any(|n| n.trim() == rank.name()))
        });
        assert_eq!(lines.count(), 1, "{rank:?} in {table}");
    }
    assert!(
        table.contains("| pool job | virtual | nothing |"),
        "{table}"
    );
}

#[test]
fn chaos_hook_runs_before_each_acquisition() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    static MARKED: Mutex<()> = Mutex::new(Rank::Consoles, ());
    check::set_chaos(Some(|rank| {
        if rank == Rank::Consoles {
            drop(std::thread::current());
            CALLS.fetch_add(1, Ordering::SeqCst);
        }
    }));
    drop(MARKED.lock());
    check::set_chaos(None);
    let calls = CALLS.load(Ordering::SeqCst);
    assert!(calls >= 1);
}
