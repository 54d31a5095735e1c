use super::{Change, EndedOp, Filter, Limits, OpHandle, Ops, Watcher};
use crate::api::op::{Op, OpState, Progress};
use crate::error::{Code, Error, Kind};
use crate::ids::{OpId, VmId};
use crate::locks::{Cancel, CancelCause};
use crate::sched::Instant;
use crate::uids::Retention;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use std::sync::mpsc;
use std::time::Duration;

const LIMITS: Limits = Limits { per_uid_max: 2 };
const MANY: Limits = Limits {
    per_uid_max: usize::MAX,
};
const RETENTION: Retention = Retention {
    per_uid_max: 20,
    total_max: 50,
};
const LATE: Duration = Duration::from_secs(20);

fn ops() -> Ops {
    Ops::new(RETENTION, |ended| panic!("dropped unfinished: {ended:?}"))
}
fn late() -> Instant {
    Instant::now() + LATE
}
fn begin(ops: &Ops, uid: u32) -> OpHandle {
    ops.begin("vm.start", None, uid, true, MANY).unwrap()
}
fn cancelled(cause: &str) -> Error {
    Error::new(Kind::Cancelled, format!("start VM web: cancelled: {cause}"))
}
fn is_readable(watcher: &Watcher, within: Duration) -> bool {
    poll(
        &mut [PollFd::new(watcher.fd(), PollFlags::POLLIN)],
        PollTimeout::try_from(within).unwrap(),
    )
    .unwrap()
        == 1
}

impl Watcher {
    /// Waits for a change. Returns `None` at the deadline.
    fn next_before(&mut self, deadline: Instant) -> Option<Change> {
        loop {
            let left = deadline.checked_duration_since(Instant::now())?;
            if is_readable(self, left)
                && let Some(change) = self.next()
            {
                return Some(change);
            }
        }
    }
}

#[test]
fn parts_of_progress_are_gone_when_operation_has_ended() {
    use crate::api::op::{Part, PartState};
    let ops = ops();
    let handle = begin(&ops, 1000);
    let parts = vec![Part {
        name: "layer".into(),
        state: PartState::Waiting,
        done: 0,
        total: 9,
    }];
    let progress = Progress {
        stage: "fetch".into(),
        parts,
        parts_total: Some(1),
        ..Progress::default()
    };
    handle.reporter().replace(progress.clone());
    assert_eq!(handle.op().progress, progress);
    let ended = handle.finish(Ok(json!({}))).op;
    assert_eq!(ended.progress.stage, "fetch");
    assert_eq!(
        (ended.progress.parts.len(), ended.progress.parts_total),
        (0, None)
    );
}

#[test]
fn operation_reports_progress_until_it_ends() {
    let ops = ops();
    let vm = VmId::random();
    let handle = ops
        .begin("vm.start", Some(vm.clone()), 7, true, LIMITS)
        .unwrap();
    let row = handle.op();
    assert_eq!(
        (row.state, row.owner_uid, row.vm.as_ref(), row.ended_at),
        (OpState::Running, 7, Some(&vm), None)
    );
    assert_eq!((ops.running(), ops.get(&row.id).unwrap()), (1, row.clone()));
    handle.progress("wait for ssh");
    let reporter = handle.reporter();
    reporter.progress_bytes(10, Some(100));
    let seen = ops.get(&row.id).unwrap().progress;
    let expected = Progress {
        stage: "wait for ssh".into(),
        done: Some(10),
        total: Some(100),
        unit: Some("bytes".into()),
        ..Progress::default()
    };
    assert_eq!(seen, expected);
    handle.progress("mount");
    assert_eq!(
        ops.get(&row.id).unwrap().progress,
        Progress {
            stage: "mount".into(),
            ..Progress::default()
        }
    );
    let EndedOp { op, pruned } = handle.finish(Ok(json!({"pid": 1})));
    assert_eq!(
        (op.state, op.result.as_ref(), op.error.as_ref()),
        (OpState::Ok, Some(&json!({"pid": 1})), None)
    );
    assert!(op.ended_at >= Some(op.started_at) && pruned.is_empty());
    reporter.progress("too late");
    assert_eq!(
        ops.get(&op.id).unwrap(),
        op,
        "progress after the end changes nothing"
    );
    assert_eq!(ops.running(), 0);
}

#[test]
fn error_kind_decides_operation_state() {
    let ops = ops();
    let failed = begin(&ops, 1)
        .finish(Err(
            Error::new(Kind::BootTimeout, "boot VM web").hint("fcctl logs web")
        ))
        .op;
    let fault = failed.error.unwrap();
    assert_eq!(
        (failed.state, fault.code, fault.kind.as_str()),
        (OpState::Failed, Code::Timeout, "boot_timeout")
    );
    assert_eq!(
        (fault.op, fault.hint.as_deref()),
        (Some(failed.id), Some("fcctl logs web"))
    );
    assert_eq!(
        begin(&ops, 1).finish(Err(cancelled("x"))).op.state,
        OpState::Cancelled
    );
}

#[test]
fn limit_counts_operations_in_progress_per_uid() {
    let ops = ops();
    let begin = |uid| ops.begin("vm.stop", None, uid, false, LIMITS);
    let (first, _second) = (begin(1).unwrap(), begin(1).unwrap());
    let error = begin(1).map(drop).unwrap_err();
    assert_eq!((error.kind(), ops.running()), (Kind::OperationLimit, 2));
    let _other = begin(2).unwrap();
    first.finish(Ok(json!(null)));
    let _third = begin(1).unwrap();
    std::mem::forget((_second, _other, _third));
}

#[test]
fn dropped_handle_ends_as_internal_and_is_reported() {
    let (reported, heard) = mpsc::channel();
    let ops = Ops::new(RETENTION, {
        let reported = std::sync::Arc::new(crate::locks::Mutex::new(
            crate::locks::Rank::Store,
            reported,
        ));
        move |ended| reported.lock().send(ended).unwrap()
    });
    let id = begin(&ops, 1).id().clone();
    let ended = heard.try_recv().unwrap().op;
    assert_eq!(
        (ended.id.clone(), ended.state, ended.error.unwrap().code),
        (id, OpState::Failed, Code::Internal)
    );
    let thread = std::thread::scope(|s| {
        s.spawn(|| {
            let _handle = begin(&ops, 1);
            panic!("a panic of the test");
        })
        .join()
    });
    assert!(thread.is_err());
    let ended = heard.try_recv().unwrap().op;
    assert_eq!(ended.error.unwrap().message, "the operation panicked");
    assert_eq!(ops.running(), 0);
}

#[test]
fn cancel_fires_the_token_once_if_allowed() {
    let ops = ops();
    let handle = begin(&ops, 1);
    assert_eq!(
        ops.cancel(handle.id(), CancelCause::Requested)
            .unwrap()
            .state,
        OpState::Cancelling
    );
    assert_eq!(handle.cancel().cause(), Some(&CancelCause::Requested));
    assert_eq!(
        ops.cancel(handle.id(), CancelCause::Interrupted)
            .unwrap()
            .state,
        OpState::Cancelling
    );
    assert_eq!(handle.cancel().cause(), Some(&CancelCause::Requested));
    let id = handle.id().clone();
    assert_eq!(
        handle.finish(Err(cancelled("ctrl-c"))).op.state,
        OpState::Cancelled
    );
    assert_eq!(
        ops.cancel(&id, CancelCause::Requested).unwrap_err().kind(),
        Kind::WrongState
    );
    let stop = ops.begin("vm.stop", None, 1, false, LIMITS).unwrap();
    let error = ops.cancel(stop.id(), CancelCause::Requested).unwrap_err();
    assert!(
        error
            .message()
            .ends_with("(vm.stop): it cannot be cancelled"),
        "{error}"
    );
    assert!(!stop.cancel().is_cancelled());
    // A stop of the VM, for example, may also fire the token.
    let started = begin(&ops, 1);
    started.cancel().cancel(CancelCause::VmStopped);
    assert_eq!(ops.get(started.id()).unwrap().state, OpState::Cancelling);
    assert_eq!(
        ops.cancel(&OpId::random(), CancelCause::Requested)
            .unwrap_err()
            .kind(),
        Kind::OperationNotFound
    );
    stop.finish(Ok(json!(null)));
    assert_eq!(
        started.finish(Ok(json!(null))).op.state,
        OpState::Ok,
        "the operation succeeded before the cancellation took effect"
    );
}

#[test]
fn wait_ends_with_operation_deadline_or_own_token() {
    let ops = ops();
    let handle = begin(&ops, 1);
    let (id, mine) = (handle.id().clone(), Cancel::try_new().unwrap());
    let begun = Instant::now();
    let soon = begun + Duration::from_millis(5);
    assert_eq!(
        ops.wait(&id, soon, &mine).unwrap_err().kind(),
        Kind::Timeout
    );
    std::thread::scope(|s| {
        let given_up = s.spawn(|| ops.wait(&id, late(), &mine));
        mine.cancel(CancelCause::CallerHungUp);
        assert_eq!(
            given_up.join().unwrap().unwrap_err().kind(),
            Kind::Cancelled
        );
        let other = Cancel::try_new().unwrap();
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                s.spawn({
                    let (ops, id, other) = (&ops, &id, other.clone());
                    move || ops.wait(id, late(), &other)
                })
            })
            .collect();
        let waiting = || ops.shared.state.lock().entry(&id).unwrap().waiting;
        while waiting() < waiters.len() {
            std::thread::yield_now();
        }
        handle.finish(Ok(json!(1)));
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap().unwrap().state, OpState::Ok);
        }
    });
    assert!(begun.elapsed() < LATE, "a waiter waited for its deadline");
    assert_eq!(
        ops.wait(&id, Instant::now(), &mine).unwrap().state,
        OpState::Ok,
        "a wait for an ended operation returns at once"
    );
    assert_eq!(ops.shared.state.lock().entry(&id).unwrap().waiting, 0);
}

#[test]
fn list_and_find_show_visible_operations() {
    let ops = ops();
    let vm = VmId::random();
    let mut all: Vec<_> = (0..3)
        .map(|i| {
            ops.begin("vm.start", (i == 1).then(|| vm.clone()), i % 2, true, MANY)
                .unwrap()
        })
        .collect();
    let ids: Vec<_> = all.iter().map(|h| h.id().clone()).collect();
    all.remove(2).finish(Ok(json!(null)));
    let list = |filter: Filter| {
        ops.list(&filter)
            .into_iter()
            .map(|(_, op)| op.id)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        list(Filter {
            all: true,
            ..Filter::default()
        }),
        ids
    );
    assert_eq!(list(Filter::default()), ids[..2]);
    assert_eq!(
        list(Filter {
            owner: Some(1),
            ..Filter::default()
        }),
        ids[1..2]
    );
    assert_eq!(
        list(Filter {
            owner: Some(0),
            all: true,
            ..Filter::default()
        }),
        [ids[0].clone(), ids[2].clone()]
    );
    assert_eq!(
        list(Filter {
            vm: Some(vm),
            ..Filter::default()
        }),
        ids[1..2]
    );
    for id in &ids {
        assert_eq!(&ops.find(id.as_str(), None).unwrap().id, id);
    }
    assert_eq!(
        ops.find(ids[0].as_str(), Some(1)).unwrap_err().kind(),
        Kind::OperationNotFound,
        "another user's operation is not found"
    );
    assert_eq!(
        ops.find("", None).unwrap_err().kind(),
        Kind::OperationNotFound
    );
    all.into_iter()
        .for_each(|h| drop(h.finish(Ok(json!(null)))));
}

#[test]
fn ambiguous_prefix_is_refused() {
    let ops = ops();
    let known = |id: &str| {
        let json = json!({"id": id, "method": "vm.stop", "vm": null, "owner_uid": 1, "state": "ok", "may_cancel": false,
            "progress": {"stage": ""}, "started_at": 1, "ended_at": 2});
        serde_json::from_value::<Op>(json).unwrap()
    };
    let mut foreign = known("ab0000000003");
    foreign.owner_uid = 2;
    ops.restore(vec![known("ab0000000001"), known("ac0000000002"), foreign])
        .unwrap();
    assert_eq!(
        ops.find("ab", Some(1)).unwrap().id.as_str(),
        "ab0000000001",
        "another user's operation does not make the prefix ambiguous"
    );
    assert_eq!(
        ops.find("ab", None).unwrap_err().kind(),
        Kind::AmbiguousPrefix
    );
    assert_eq!(
        ops.find("a", Some(1)).unwrap_err().kind(),
        Kind::AmbiguousPrefix
    );
    assert_eq!(ops.find("ac", Some(1)).unwrap().id.as_str(), "ac0000000002");
    assert_eq!(
        ops.find("x", Some(1)).unwrap_err().kind(),
        Kind::OperationNotFound
    );
}

#[test]
fn watcher_reports_progress_and_the_end() {
    let ops = ops();
    let handle = begin(&ops, 1);
    let mut watcher = ops.watch(handle.id()).unwrap();
    assert!(
        is_readable(&watcher, LATE),
        "a watcher first reports the current progress"
    );
    assert_eq!(watcher.next(), Some(Change::Progress(Progress::default())));
    assert!(!is_readable(&watcher, Duration::ZERO) && watcher.next().is_none());
    handle.progress("boot");
    assert!(is_readable(&watcher, LATE));
    let Some(Change::Progress(p)) = watcher.next() else {
        panic!("no progress")
    };
    assert_eq!(p.stage, "boot");
    let ended = handle.finish(Ok(json!(null))).op;
    assert!(
        is_readable(&watcher, Duration::from_millis(50)),
        "the end is reported without delay"
    );
    assert_eq!(watcher.next(), Some(Change::Ended(Box::new(ended.clone()))));
    assert!(
        is_readable(&watcher, Duration::ZERO),
        "the end can be read again"
    );
    assert_eq!(watcher.next(), Some(Change::Ended(Box::new(ended.clone()))));
    assert_eq!(
        ops.watch(&ended.id).unwrap().next_before(late()),
        Some(Change::Ended(Box::new(ended)))
    );
    assert!(ops.watch(&OpId::random()).is_err());
}

#[test]
fn progress_is_rate_limited_and_the_last_is_reported() {
    let ops = ops();
    let handle = begin(&ops, 1);
    let mut watcher = ops.watch(handle.id()).unwrap();
    let (started, mut last, mut reported) = (Instant::now(), 0, 0u32);
    std::thread::scope(|s| {
        s.spawn(|| {
            let (reporter, mut done) = (handle.reporter(), 0);
            while started.elapsed() < Duration::from_millis(350) {
                done += 1;
                reporter.progress_bytes(done, None);
                std::thread::yield_now();
            }
            reporter.progress_bytes(u64::MAX, None);
        });
        // The last change of the burst is reported although no change follows it.
        while last != u64::MAX {
            match watcher.next_before(late()) {
                Some(Change::Progress(p)) => (reported, last) = (reported + 1, p.done.unwrap_or(0)),
                other => panic!("{other:?}"),
            }
        }
    });
    let most = started.elapsed().as_millis() / 100 + 2;
    assert!(
        u128::from(reported) <= most,
        "{reported} times in {:?}",
        started.elapsed()
    );
    assert!(reported >= 2, "{reported}");
    handle.finish(Ok(json!(null)));
}

#[test]
fn old_operations_are_pruned_unless_watched() {
    let ops = ops();
    let first = begin(&ops, 1);
    let watched = begin(&ops, 1);
    let (first_id, watched_id) = (first.id().clone(), watched.id().clone());
    let mut watcher = ops.watch(&watched_id).unwrap();
    let running = begin(&ops, 1);
    watched.finish(Ok(json!("w")));
    first.finish(Ok(json!("f")));
    let mut pruned: Vec<OpId> = Vec::new();
    for _ in 0..RETENTION.per_uid_max {
        pruned.extend(begin(&ops, 1).finish(Ok(json!(null))).pruned);
    }
    assert_eq!(
        pruned[0], first_id,
        "the oldest operation is pruned first, except for the watched one"
    );
    assert_eq!(
        (
            pruned.len(),
            ops.list(&Filter {
                all: true,
                ..Filter::default()
            })
            .len()
        ),
        (2, RETENTION.per_uid_max + 1)
    );
    assert!(matches!(watcher.next(), Some(Change::Ended(_))));
    drop(watcher);
    let pruned = begin(&ops, 1).finish(Ok(json!(null))).pruned;
    assert_eq!(pruned, [watched_id]);
    assert!(ops.get(&first_id).is_err() && ops.get(running.id()).is_ok());
    running.finish(Ok(json!(null)));
}

#[test]
fn restored_operations_in_progress_fail() {
    let before = ops();
    let (ended, cut) = (begin(&before, 1), begin(&before, 1));
    let rows = vec![ended.finish(Ok(json!(null))).op, cut.op()];
    let ops = ops();
    let broken = ops.restore(rows.clone()).unwrap();
    assert_eq!(broken.len(), 1);
    assert_eq!(
        (&broken[0].op.id, broken[0].op.state),
        (&rows[1].id, OpState::Failed)
    );
    assert_eq!(
        broken[0].op.error.as_ref().unwrap().message,
        "the daemon was restarted"
    );
    assert_eq!(ops.get(&rows[0].id).unwrap(), rows[0]);
    std::mem::forget(cut);
}

#[test]
fn ended_operations_are_limited_per_uid_and_in_total() {
    let ops = ops();
    let count = |uid| {
        ops.list(&Filter {
            owner: Some(uid),
            all: true,
            ..Filter::default()
        })
        .len()
    };
    let end = |uid| begin(&ops, uid).finish(Ok(json!(null))).pruned;
    (0..3).for_each(|_| drop(end(2)));
    (0..100).for_each(|_| drop(end(1)));
    assert_eq!(
        (count(1), count(2)),
        (20, 3),
        "operations of another user are not evicted"
    );
    (0..20).for_each(|_| drop(end(0)));
    // 43 of 50 are used, so seven more fit. After that the uids with the most operations lose some,
    // except root.
    for uid in 3..13 {
        end(uid);
    }
    assert_eq!((count(0), count(1), count(2), count(12)), (20, 17, 3, 1));
}

#[test]
fn refused_operation_leaves_no_trace_unless_watched() {
    let ops = ops();
    let refusal = Error::new(Kind::WrongState, "it does not run");
    begin(&ops, 1).refuse(&refusal);
    assert_eq!(
        ops.list(&Filter {
            all: true,
            ..Filter::default()
        }),
        []
    );
    let handle = begin(&ops, 1);
    let mut watcher = ops.watch(handle.id()).unwrap();
    handle.refuse(&refusal);
    let Some(Change::Ended(op)) = watcher.next() else {
        panic!("no end was reported")
    };
    assert_eq!(
        (op.state, op.error.unwrap().kind.as_str()),
        (OpState::Failed, "wrong_state")
    );
    assert_eq!(ops.running(), 0);
}

#[cfg(any(debug_assertions, feature = "lock-check"))]
#[test]
fn cancel_fires_the_token_without_a_lock() {
    let ops = ops();
    let op = begin(&ops, 1);
    let (send, held) = mpsc::channel();
    let _waker = op.cancel().on_cancel(move || {
        send.send(crate::locks::check::held()).unwrap();
    });
    ops.cancel(op.id(), CancelCause::Requested).unwrap();
    assert_eq!(held.recv().unwrap(), 0);
    op.finish(Err(cancelled("op cancel was requested")));
}
