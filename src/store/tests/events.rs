use super::super::events::Taker;
use super::faults::Fault;
use super::*;

type Followed = (Subscription, Start);

fn all(store: &Store, since: Option<u64>) -> Followed {
    store.subscribe(since, |_| true).unwrap()
}

/// Returns a snapshot's sequence number, whether it is a resync, and the slots of its VMs.
#[track_caller]
fn snapshot(start: Start) -> (u64, bool, Vec<u32>) {
    match start {
        Start::Snapshot { seq, resync, vms } => {
            (seq, resync, vms.iter().map(|s| s.row.slot).collect())
        }
        Start::Missed(missed) => panic!("not a snapshot: {missed:?}"),
    }
}

#[track_caller]
fn missed(start: Start) -> Vec<u64> {
    match start {
        Start::Missed(missed) => missed.iter().map(|h| h.seq).collect(),
        other => panic!("{other:?}"),
    }
}

/// Takes every queued change. Fails if the listener lags.
#[track_caller]
fn take(listening: &mut Subscription) -> Vec<Arc<StoreChange>> {
    std::iter::from_fn(|| listening.next())
        .map(|next| match next {
            Next::Change(h) => h,
            lagged @ Next::Lagged { .. } => panic!("{lagged:?}"),
        })
        .collect()
}

fn seqs(changes: &[Arc<StoreChange>]) -> Vec<u64> {
    changes.iter().map(|h| h.seq).collect()
}

fn is_readable(listening: &Subscription) -> bool {
    crate::host::wait::is_readable(listening.fd())
}

fn rename(store: &Store, n: u32, reason: u64) -> Ticket {
    store
        .change(|tx| tx.update_vm_unlocked(&vm_id(n), |r| r.reason = Some(reason.to_string())))
        .unwrap()
        .1
}

#[test]
fn change_is_published_once_durable_and_before_its_ticket() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let (mut listening, start) = all(&store, None);
    let (begin, ..) = snapshot(start);
    let gate = store.faults().gate();
    let ticket = put(&store, 1).unwrap();
    ticket.write_soon();
    assert!(gate.wait_for_writer(soon()));
    // The change is in memory, but it is not published, and a snapshot does not contain it.
    assert!(store.read(|s| s.vm(&vm_id(1)).is_some()));
    assert!(listening.next().is_none() && !is_readable(&listening));
    assert_eq!(snapshot(all(&store, None).1), (begin, false, vec![]));
    drop(gate);
    let seq = ticket.wait(soon()).unwrap();
    assert!(is_readable(&listening));
    let published = take(&mut listening);
    assert_eq!(
        (seqs(&published), published[0].vms[0].before.clone()),
        (vec![seq], None)
    );
    assert!(!is_readable(&listening), "all changes were taken");
    assert_eq!(snapshot(all(&store, None).1), (seq, false, vec![1]));
}

#[test]
fn steps_of_one_change_are_published_together() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    store
        .change_durable(|tx| {
            tx.put_vm(row(1))
                .and_then(|()| tx.put_workspace_unlocked(workspace(1)))
        })
        .unwrap();
    let (mut listening, _) = all(&store, None);
    let last = |listening: &mut Subscription| take(listening).pop().expect("a change");
    // A change that is undone in the same transaction is not published, even together with another
    // change.
    store
        .change_durable(|tx| {
            tx.update_vm_unlocked(&vm_id(1), |r| r.shape.vcpus = 9)?;
            tx.put_vm(row(2))?;
            tx.remove_vm_unlocked(&vm_id(2));
            tx.put_vm(row(3))?;
            tx.update_vm_unlocked(&vm_id(1), |r| r.shape.vcpus = 1)
        })
        .unwrap();
    let change = last(&mut listening);
    assert_eq!(
        change
            .vms
            .iter()
            .map(|c| c.after.as_ref().unwrap().row.slot)
            .collect::<Vec<_>>(),
        [3]
    );
    // Changes of two rows of one VM are published as one change.
    store
        .change_durable(|tx| {
            tx.remove_workspace_unlocked(&vm_id(1));
            tx.update_vm_unlocked(&vm_id(1), |r| r.state = VmState::Failed)
        })
        .unwrap();
    let change = last(&mut listening);
    let (before, after) = (
        change.vms[0].before.clone().unwrap(),
        change.vms[0].after.clone().unwrap(),
    );
    assert_eq!(
        (
            change.vms.len(),
            before.workspace.is_some(),
            after.workspace
        ),
        (1, true, None)
    );
    assert_eq!(
        (before.row.state, after.row.state),
        (VmState::Created, VmState::Failed)
    );
    // After a delete, the end of the delete operation still names the VM's owner.
    store
        .change_durable(|tx| {
            tx.put_op(Op {
                vm: Some(vm_id(1)),
                ..op(7, OpState::Ok)
            });
            Ok(tx.remove_vm_unlocked(&vm_id(1)))
        })
        .unwrap();
    let change = last(&mut listening);
    assert!(change.vms[0].after.is_none());
    assert_eq!(change.ended[0].owners().collect::<Vec<_>>(), [0, 1000]);
    // The end of an operation is published once. Its beginning is not published, and neither are
    // changes that do not concern a VM.
    store
        .change_durable(|tx| {
            tx.put_op(op(8, OpState::Running));
            tx.put_op(Op {
                owner_uid: 5,
                ..op(7, OpState::Ok)
            });
            tx.put_meta("a", "b");
            Ok(tx.intend(None, 1, "disk", "d"))
        })
        .unwrap();
    assert_eq!(take(&mut listening), []);
}

#[test]
fn failed_batch_is_never_published() {
    for fault in [
        Fault::Io,
        Fault::IoAfterCommit,
        Fault::DiskFull,
        Fault::Panic,
    ] {
        let dir = dir();
        let store = Store::open(dir.path()).unwrap();
        put(&store, 1).unwrap().wait(soon()).unwrap();
        let (mut listening, start) = all(&store, None);
        let (begin, ..) = snapshot(start);
        let gate = store.faults().gate();
        store.faults().fail(fault, 1);
        let doomed = [rename(&store, 1, 7), put(&store, 2).unwrap()];
        doomed[0].write_soon();
        assert!(gate.wait_for_writer(soon()));
        let behind = put(&store, 3).unwrap();
        drop(gate);
        for ticket in doomed.iter().chain([&behind]) {
            ticket.wait(soon()).unwrap_err();
        }
        assert!(store.wait_writable(soon()));
        assert_eq!(take(&mut listening), []);
        assert_eq!(snapshot(all(&store, None).1), (begin, false, vec![1]));
        // The next change gets an unused number and is based on the durable state.
        let seq = rename(&store, 1, 8).wait(soon()).unwrap();
        let published = take(&mut listening);
        assert!(seqs(&published) == [seq] && seq > behind.seq(), "{fault:?}");
        assert_eq!(
            published[0].vms[0].before.as_ref().unwrap().row.reason,
            None
        );
        assert_eq!(missed(all(&store, Some(begin)).1), [seq]);
    }
}

#[test]
fn events_are_in_order_of_commits() {
    const WORKERS: u32 = 8;
    const EACH: u32 = 125;
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let (mut listening, start) = all(&store, None);
    let (begin, ..) = snapshot(start);
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let store = store.clone();
            let work = move || -> Vec<(u64, u32)> {
                (0..EACH)
                    .map(|i| worker * EACH + i)
                    .map(|n| (put(&store, n).unwrap().wait(soon()).unwrap(), n))
                    .collect()
            };
            thread::spawn("worker", work).unwrap()
        })
        .collect();
    let mut made: Vec<_> = workers
        .into_iter()
        .flat_map(|w| w.join().unwrap())
        .collect();
    made.sort_unstable();
    // All 1,000 changes are in the queue, because each is published before its ticket is ready.
    let published = take(&mut listening);
    let slots = |h: &StoreChange| {
        h.vms
            .iter()
            .map(|c| c.after.as_ref().unwrap().row.slot)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        published
            .iter()
            .map(|h| (h.seq, slots(h)))
            .collect::<Vec<_>>(),
        made.iter().map(|(s, n)| (*s, vec![*n])).collect::<Vec<_>>()
    );
    assert_eq!(
        missed(all(&store, Some(begin)).1),
        seqs(&published),
        "the store keeps the changes"
    );
}

#[test]
fn full_queue_lags_once_and_changes_are_kept() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().wait(soon()).unwrap();
    let ((mut slow, _), (mut fast, _)) = (all(&store, None), all(&store, None));
    let mut all_seqs = Vec::new();
    let more = QUEUE_MAX as u64 + 100;
    for n in 0..more {
        let ticket = rename(&store, 1, n);
        all_seqs.push(ticket.seq());
        if n % 100 == 0 || n + 1 == more {
            ticket.wait(soon()).unwrap();
            take(&mut fast);
        }
    }
    let mut got = Vec::new();
    let (dropped, resume_seq) = loop {
        match slow
            .next()
            .expect("the listener lags before its queue is empty")
        {
            Next::Change(h) => got.push(h.seq),
            Next::Lagged {
                dropped,
                resume_seq,
            } => break (dropped, resume_seq),
        }
    };
    assert_eq!((got.as_slice(), dropped), (&all_seqs[..QUEUE_MAX], 100));
    rename(&store, 1, more).wait(soon()).unwrap();
    assert_eq!(
        slow.next(),
        None,
        "the lag is reported once, and no change follows it"
    );
    got.extend(missed(all(&store, Some(resume_seq)).1));
    assert_eq!(
        (&got[..got.len() - 1], got.len()),
        (&all_seqs[..], all_seqs.len() + 1)
    );
    assert_eq!(take(&mut fast).len(), 1);
}

#[test]
fn listener_gets_snapshot_for_changes_no_longer_kept() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let first = put(&store, 1).unwrap().wait(soon()).unwrap();
    let mut last = first;
    for n in 0..KEPT_MAX as u64 {
        last = rename(&store, 1, n).seq();
    }
    store.barrier().unwrap().wait(soon()).unwrap();
    // Exactly this many changes are kept.
    assert_eq!(missed(all(&store, Some(first)).1).len(), KEPT_MAX);
    assert_eq!(
        snapshot(all(&store, Some(first - 1)).1),
        (last, true, vec![1])
    );
    // A number that this store has not assigned belongs to another database.
    assert_eq!(
        snapshot(all(&store, Some(last + 1)).1),
        (last, true, vec![1])
    );
    assert!(missed(all(&store, Some(last)).1).is_empty());
    let store = check_reopened(store, dir.path());
    assert!(
        missed(all(&store, Some(last)).1).is_empty(),
        "an up-to-date listener resumes after a restart"
    );
    assert_eq!(
        snapshot(all(&store, Some(last - 1)).1),
        (last, true, vec![1])
    );
    let next = rename(&store, 1, 0).wait(soon()).unwrap();
    assert!(next > last);
    assert_eq!(missed(all(&store, Some(last)).1), [next]);
}

#[test]
fn listener_gets_only_visible_changes() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let other = VmRow {
        owner_uid: 7,
        ..row(2)
    };
    let begin = store
        .change_durable(|tx| tx.put_vm(row(1)).and_then(|()| tx.put_vm(other)))
        .map(|()| store.barrier().unwrap().seq());
    let (mut theirs, start) = store.subscribe(None, |uid| uid == 7).unwrap();
    assert_eq!(snapshot(start).2, [2]);
    let noise = QUEUE_MAX as u64 * 2;
    (0..noise).for_each(|n| rename(&store, 1, n).detach());
    let seq = rename(&store, 2, 0).wait(soon()).unwrap();
    assert_eq!(
        seqs(&take(&mut theirs)),
        [seq],
        "changes of other users neither appear nor cause a lag"
    );
    assert_eq!(
        missed(
            store
                .subscribe(Some(begin.unwrap()), |uid| uid == 7)
                .unwrap()
                .1
        ),
        [seq]
    );
    // Root starts an operation on the user's VM.
    let ended = Op {
        vm: Some(vm_id(2)),
        ..op(1, OpState::Failed)
    };
    let end = |tx: &mut Tx| {
        tx.put_op(ended);
        Ok(())
    };
    store.change_durable(end).unwrap();
    assert_eq!(take(&mut theirs)[0].ended.len(), 1);
    drop(theirs);
    assert_eq!(store.0.inner.events.listeners(), 0);
}

/// Takes and returns everything that the feed has for its subscriptions.
fn pass_on(feed: &mut Feed) -> Vec<(u64, Vec<u64>)> {
    let mut due = feed.take();
    let sent = due
        .iter_mut()
        .map(|due| (due.id, due.changes.drain(..).map(|h| h.seq).collect()))
        .collect();
    feed.finish(due);
    sent
}

#[test]
fn lent_subscription_is_served_by_feed_until_taken_back() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().wait(soon()).unwrap();
    let mut feed = store.feed().unwrap();
    assert!(store.feed().is_err(), "only one feed can exist");
    let ((mut lent, _), (mut own, _)) = (all(&store, None), all(&store, None));
    lent.lend();
    // The feed takes over only after all earlier changes were taken.
    let first = rename(&store, 1, 1).wait(soon()).unwrap();
    assert!(feed.take().is_empty());
    assert_eq!(seqs(&take(&mut lent)), [first]);
    let second = rename(&store, 1, 2).wait(soon()).unwrap();
    assert!(crate::host::wait::is_readable(feed.fd()) && !is_readable(&lent) && is_readable(&own));
    assert_eq!(lent.next(), None, "the feed serves the subscription");
    assert_eq!(pass_on(&mut feed), [(lent.id(), vec![second])]);
    assert!(!crate::host::wait::is_readable(feed.fd()) || feed.take().is_empty());
    // Changes that the feed has not taken return to the subscription.
    let third = rename(&store, 1, 3).wait(soon()).unwrap();
    lent.take_back();
    assert!(feed.take().is_empty());
    assert_eq!(seqs(&take(&mut lent)), [third]);
    assert!(lent.keep() && !lent.keep());
    let fourth = rename(&store, 1, 4).wait(soon()).unwrap();
    assert!(feed.take().is_empty() && is_readable(&lent));
    assert_eq!(seqs(&take(&mut lent)), [fourth]);
    assert_eq!(seqs(&take(&mut own)), [first, second, third, fourth]);
}

#[test]
fn changes_that_feed_cannot_send_are_returned_in_order() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().wait(soon()).unwrap();
    let mut feed = store.feed().unwrap();
    let (mut lent, _) = all(&store, None);
    lent.lend();
    assert_eq!(take(&mut lent), []);
    let early: Vec<_> = (0..3)
        .map(|n| rename(&store, 1, n).wait(soon()).unwrap())
        .collect();
    let mut due = feed.take();
    let passed = due[0].changes.pop_front().unwrap().seq;
    // This change arrives while the feed is sending.
    let late = rename(&store, 1, 3).wait(soon()).unwrap();
    assert!(feed.take().is_empty() && lent.next().is_none() && !is_readable(&lent));
    feed.finish(due);
    assert!(is_readable(&lent));
    assert_eq!(
        [vec![passed], seqs(&take(&mut lent))].concat(),
        [early, vec![late]].concat()
    );
    // The feed can also return a subscription without changes.
    let next = rename(&store, 1, 4).wait(soon()).unwrap();
    let mut due = feed.take();
    assert_eq!(
        due[0].changes.drain(..).map(|h| h.seq).collect::<Vec<_>>(),
        [next]
    );
    due[0].is_returned = true;
    feed.finish(due);
    assert!(is_readable(&lent));
    assert_eq!(take(&mut lent), []);
}

#[test]
fn subscription_is_taken_back_once_feed_is_done() {
    for is_sent in [false, true] {
        check_taken_back(is_sent);
    }
}

/// `is_sent` is true if the feed sends all changes of the subscription before it returns it.
fn check_taken_back(is_sent: bool) {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().wait(soon()).unwrap();
    let mut feed = store.feed().unwrap();
    let (mut lent, _) = all(&store, None);
    lent.lend();
    assert_eq!(take(&mut lent), []);
    rename(&store, 1, 0).wait(soon()).unwrap();
    let mut due = feed.take();
    let is_back = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (flag, id) = (is_back.clone(), lent.id());
    let taker = thread::spawn("taker", move || {
        lent.take_back();
        flag.store(true, std::sync::atomic::Ordering::SeqCst);
        // The subscription lives on, because its listener is looked at below.
        (take(&mut lent).len(), lent)
    })
    .unwrap();
    let is_taken_by = |taker| {
        let published = store.0.inner.events.published.lock();
        published.listeners[&id].taker == taker
    };
    while !is_taken_by(Taker::FeedAtWork { is_claimed: true }) {
        std::thread::yield_now();
    }
    assert!(!is_back.load(std::sync::atomic::Ordering::SeqCst));
    if is_sent {
        due[0].changes.clear();
    }
    feed.finish(due);
    assert!(is_taken_by(Taker::Own));
    let (taken, _lent) = taker.join().unwrap();
    assert_eq!(taken, usize::from(!is_sent));
}

#[test]
fn lag_while_lent_is_reported_by_subscription() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().wait(soon()).unwrap();
    let mut feed = store.feed().unwrap();
    let (mut lent, _) = all(&store, None);
    lent.lend();
    assert_eq!(take(&mut lent), []);
    let all_seqs: Vec<_> = (0..QUEUE_MAX as u64 + 7)
        .map(|n| rename(&store, 1, n).seq())
        .collect();
    store.barrier().unwrap().wait(soon()).unwrap();
    assert_eq!(
        pass_on(&mut feed),
        [(lent.id(), all_seqs[..QUEUE_MAX].to_vec())]
    );
    assert!(is_readable(&lent));
    assert_eq!(
        lent.next(),
        Some(Next::Lagged {
            dropped: 7,
            resume_seq: all_seqs[QUEUE_MAX - 1]
        })
    );
    assert!(lent.next().is_none() && feed.take().is_empty());
}

#[test]
fn dropped_feed_returns_everything() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().wait(soon()).unwrap();
    let mut feed = store.feed().unwrap();
    let (mut lent, _) = all(&store, None);
    lent.lend();
    assert_eq!(take(&mut lent), []);
    assert!(feed.take().is_empty());
    let seq = rename(&store, 1, 0).wait(soon()).unwrap();
    drop(feed);
    assert!(is_readable(&lent));
    assert_eq!(seqs(&take(&mut lent)), [seq]);
    let seq = rename(&store, 1, 1).wait(soon()).unwrap();
    assert!(is_readable(&lent), "no feed serves the subscription");
    assert_eq!(seqs(&take(&mut lent)), [seq]);
    store.feed().unwrap();
}
