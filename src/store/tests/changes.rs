use super::*;
use crate::locks::LockSet;
use proptest::prelude::*;

#[test]
fn change_that_fails_or_panics_leaves_nothing() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    store
        .change_durable(|tx| {
            tx.put_vm(row(1))
                .and_then(|()| tx.put_workspace_unlocked(workspace(1)))
        })
        .unwrap();
    let before = state(&store);
    let mess = |tx: &mut Tx| {
        tx.remove_vm_unlocked(&vm_id(1));
        tx.put_vm(VmRow {
            id: vm_id(2),
            ..row(1)
        })
        .unwrap();
        tx.put_op(op(1, OpState::Ok));
        tx.intend(None, 0, "process", "x");
        tx.put_meta("a", "b");
        assert_ne!(**tx, before);
    };
    let failed = store.change(|tx| {
        mess(tx);
        Err::<(), _>(Error::invalid("no"))
    });
    assert_eq!(
        failed.map(|_| ()).unwrap_err().kind(),
        Kind::InvalidArgument
    );
    assert_eq!(state(&store), before);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = store.change(|tx| -> Result<()> {
            mess(tx);
            panic!("boom")
        });
    }));
    assert!(panicked.is_err());
    assert_eq!(state(&store), before);
    put(&store, 5).unwrap().wait(soon()).unwrap();
    check_reopened(store, dir.path());
}

#[test]
fn change_is_visible_immediately_and_durable_after_ticket() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let gate = store.faults().gate();
    let ticket = put(&store, 1).unwrap();
    assert!(store.read(|s| s.vm(&vm_id(1)).is_some()));
    let e = ticket
        .wait(Instant::now() + Duration::from_millis(20))
        .unwrap_err();
    assert_eq!(e.kind(), Kind::Timeout);
    // An empty change is durable when all earlier changes are.
    let empty = store.barrier().unwrap();
    assert_eq!(
        empty
            .wait(Instant::now() + Duration::from_millis(20))
            .unwrap_err()
            .kind(),
        Kind::Timeout
    );
    drop(gate);
    assert_eq!(ticket.wait(soon()).unwrap(), ticket.seq());
    empty.wait(soon()).unwrap();
    assert!(put(&store, 2).unwrap().seq() > ticket.seq());
    let seq = store.barrier().unwrap().wait(soon()).unwrap();
    let store = check_reopened(store, dir.path());
    assert!(
        put(&store, 3).unwrap().seq() > seq,
        "numbers continue after a restart"
    );
}

#[test]
fn queued_changes_are_committed_together() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let gate = store.faults().gate();
    let first = put(&store, 1).unwrap();
    first.write_soon();
    assert!(gate.wait_for_writer(soon()));
    let tickets: Vec<_> = (2..102).map(|n| put(&store, n).unwrap()).collect();
    drop(gate);
    first.wait(soon()).unwrap();
    tickets
        .iter()
        .for_each(|t| assert_eq!(t.wait(soon()).unwrap(), t.seq()));
    let stats = store.stats();
    assert_eq!((stats.batches, stats.changes, stats.queued), (2, 101, 0));
    check_reopened(store, dir.path());
}

/// A change that changes nothing may depend on changes that are not durable yet.
#[test]
fn empty_change_waits_for_those_before_it() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let same = || store.change(|tx| tx.put_vm(row(1))).unwrap().1;
    // The first is behind a change in the queue, and the second behind one that is being written.
    for is_written in [false, true] {
        let gate = store.faults().gate();
        store.faults().fail(faults::Fault::Io, 1);
        let first = put(&store, 1).unwrap();
        if is_written {
            first.write_soon();
            assert!(gate.wait_for_writer(soon()));
        }
        let empty = same();
        drop(gate);
        assert!(first.wait(soon()).is_err());
        assert!(empty.wait(soon()).is_err());
        assert!(store.wait_writable(soon()));
    }
    put(&store, 1).unwrap().wait(soon()).unwrap();
    same().wait(soon()).unwrap();
}

#[test]
fn names_and_slots_are_unique_and_reusable() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    store
        .change_durable(|tx| tx.put_vm(row(0)).and_then(|()| tx.put_vm(row(1))))
        .unwrap();
    let change = |f: &dyn Fn(&mut VmRow)| {
        store
            .change(|tx| tx.update_vm_unlocked(&vm_id(0), f))
            .map(|_| ())
            .unwrap_err()
            .kind()
    };
    assert_eq!(
        change(&|r| r.name = "vm-1".parse().unwrap()),
        Kind::NameTaken
    );
    assert_eq!(change(&|r| r.slot = 1), Kind::Internal);
    assert_eq!(change(&|r| r.id = vm_id(7)), Kind::Internal);
    assert_eq!(store.read(|s| s.free_slot(3)).unwrap(), 2);
    assert_eq!(
        store.read(|s| s.free_slot(2)).unwrap_err().kind(),
        Kind::VmLimit
    );
    store
        .change_durable(|tx| Ok(tx.remove_vm_unlocked(&vm_id(0))))
        .unwrap()
        .unwrap();
    assert_eq!(store.read(|s| s.free_slot(2)).unwrap(), 0);
    let name = "vm-0".parse().unwrap();
    assert!(store.read(|s| s.vm_by_name(&name).is_none()));
    store
        .change_durable(|tx| {
            tx.put_vm(VmRow {
                id: vm_id(9),
                ..row(0)
            })
        })
        .unwrap();
    assert_eq!(
        store.read(|s| s.vm_by_name(&name).unwrap().id.clone()),
        vm_id(9)
    );
    let missing = store
        .change(|tx| tx.update_vm_unlocked(&vm_id(77), |_| ()))
        .map(|_| ())
        .unwrap_err();
    assert_eq!(missing.kind(), Kind::VmNotFound);
    assert_eq!(
        store
            .change(|tx| tx.put_workspace_unlocked(workspace(77)))
            .map(|_| ())
            .unwrap_err()
            .kind(),
        Kind::VmNotFound
    );
}

/// An import that has outlived its VM's boot writes last. Its row used to replace the one that a
/// restore had written.
#[test]
fn workspace_of_earlier_generation_is_refused() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let vms = LockSet::<VmId>::default();
    let workspaces = LockSet::<WorkspaceOf>::default();
    store.change_durable(|tx| tx.put_vm(row(1))).unwrap();
    let restored = WorkspaceRow {
        generation: 1,
        ..workspace(1)
    };
    {
        let vm = vms.lock(&vm_id(1));
        let changed = store.change(|tx| {
            tx.update_vm_unlocked(vm.key(), |row| row.generation = 1)?;
            tx.reset_workspace(&vm, Some(restored.clone()))
        });
        changed.unwrap().1.detach();
    }
    let importing = workspaces.lock(&WorkspaceOf(vm_id(1)));
    let late = store
        .change(|tx| tx.put_workspace(&importing, workspace(1)))
        .map(drop)
        .unwrap_err();
    assert_eq!(late.kind(), Kind::Conflict);
    store.read(|s| assert_eq!(**s.workspace(&vm_id(1)).unwrap(), restored));
    let other = store
        .change(|tx| tx.put_workspace(&importing, workspace(2)))
        .map(drop)
        .unwrap_err();
    assert_eq!(other.kind(), Kind::Internal, "the guard is that of VM 1");
}

#[test]
fn rows_are_found_by_name_id_and_prefix() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let other = VmRow {
        owner_uid: 7,
        ..row(0xab1)
    };
    store
        .change_durable(|tx| {
            [row(0xab2), other, row(3)]
                .into_iter()
                .try_for_each(|r| tx.put_vm(r))
        })
        .unwrap();
    store.read(|s| {
        let found = |prefix: &str| {
            s.vms_by_id_prefix(prefix)
                .map(|r| r.slot)
                .collect::<Vec<_>>()
        };
        assert_eq!(found("000000000ab"), [0xab1, 0xab2]);
        assert_eq!(found("000000000ab2"), [0xab2]);
        assert_eq!((found("f").len(), found("").len()), (0, 3));
        let exact = |text: &str| s.vm_by_name_or_id(text).map(|r| r.slot);
        assert_eq!(exact(row(3).name.as_str()), Some(3));
        assert_eq!(exact("000000000ab2"), Some(0xab2));
        assert_eq!((exact("000000000ab"), exact("")), (None, None));
    });
}

#[test]
fn vms_by_age_resume_behind_removed_row() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let aged = |n: u32, created_at| VmRow {
        created_at,
        ..row(n)
    };
    let rows = [
        aged(1, 30),
        aged(2, 10),
        aged(3, 20),
        VmRow {
            owner_uid: 7,
            ..aged(4, 10)
        },
    ];
    store
        .change_durable(|tx| rows.into_iter().try_for_each(|r| tx.put_vm(r)))
        .unwrap();
    let slots = |owner, after: Option<Age>| {
        store.read(|s| {
            s.vms_by_age(owner, after.as_ref())
                .map(|r| r.slot)
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(slots(None, None), [2, 4, 3, 1]);
    assert_eq!(slots(Some(1000), None), [2, 3, 1]);
    assert_eq!(slots(Some(7), None), [4]);
    store
        .change_durable(|tx| Ok(tx.remove_vm_unlocked(&vm_id(3))))
        .unwrap();
    assert_eq!(slots(None, Some((20, vm_id(3)))), [1]);
    assert_eq!(slots(None, Some((30, vm_id(1)))), [0u32; 0]);
}

#[test]
fn removed_vm_loses_workspace_and_keeps_ledger() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let id = store
        .change_durable(|tx| {
            tx.put_vm(row(1))?;
            tx.put_workspace_unlocked(workspace(1))?;
            Ok(tx.intend(Some(&vm_id(1)), 1, "process", "fc-x"))
        })
        .unwrap();
    store
        .change_durable(|tx| Ok(tx.remove_vm_unlocked(&vm_id(1))))
        .unwrap();
    let store = check_reopened(store, dir.path());
    store.read(|s| {
        assert!(s.workspace(&vm_id(1)).is_none());
        assert_eq!(s.ledger_of(&vm_id(1)).next().unwrap().id, id);
    });
    assert!(store.change_durable(|tx| Ok(tx.strike(id))).unwrap());
    assert!(!store.change_durable(|tx| Ok(tx.strike(id))).unwrap());
    let again = store
        .change_durable(|tx| Ok(tx.intend(None, 1, "disk", "x")))
        .unwrap();
    store.change_durable(|tx| Ok(tx.strike(again))).unwrap();
    assert!(
        store
            .change_durable(|tx| Ok(tx.intend(None, 1, "disk", "x")))
            .unwrap()
            > again
    );
}

fn of_uid(uid: u32, n: u32) -> OpRow {
    OpRow {
        owner_uid: uid,
        ..op(n, OpState::Failed)
    }
}

fn put_ops(store: &Store, ops: impl Iterator<Item = OpRow>) {
    let put_all = |tx: &mut Tx| {
        ops.for_each(|op| tx.put_op(op));
        Ok(())
    };
    store.change_durable(put_all).unwrap();
}

fn kept(store: &Store, uid: u32) -> Vec<u32> {
    let number = |op: &Arc<OpRow>| u32::from_str_radix(op.id.as_str(), 16).unwrap();
    store.read(|s| {
        s.ops()
            .filter(|op| op.owner_uid == uid)
            .map(number)
            .collect()
    })
}

#[test]
fn ended_operations_are_kept_per_uid() {
    let dir = dir();
    let retention = Retention {
        per_uid_max: 200,
        total_max: 1000,
    };
    let store = Store::open_keeping(dir.path(), retention).unwrap();
    let running = op(0, OpState::Running);
    put_ops(&store, [running.clone(), of_uid(7, 1000)].into_iter());
    put_ops(&store, (1..300).map(|n| of_uid(0, n)));
    let store = check_reopened(store, dir.path());
    assert_eq!(
        kept(&store, 0),
        [0].into_iter().chain(100..300).collect::<Vec<_>>(),
        "the running operation and the last 200 are kept"
    );
    assert_eq!(
        kept(&store, 7),
        [1000],
        "another user's operations are kept"
    );
    store.read(|s| assert_eq!(**s.op(&running.id).unwrap(), running));
}

#[test]
fn excess_operations_are_removed_from_user_with_most() {
    let dir = dir();
    let store = Store::open_keeping(
        dir.path(),
        Retention {
            per_uid_max: 10,
            total_max: 20,
        },
    )
    .unwrap();
    put_ops(&store, (1..9).map(|n| of_uid(0, n)));
    put_ops(&store, (10..20).map(|n| of_uid(7, n)));
    put_ops(&store, (20..25).map(|n| of_uid(8, n)));
    assert_eq!(
        (
            kept(&store, 0).len(),
            kept(&store, 7),
            kept(&store, 8).len()
        ),
        (8, (13..20).collect(), 5)
    );
    // Operations of root are removed when no other user has any.
    let alone = self::dir();
    let store = Store::open_keeping(
        alone.path(),
        Retention {
            per_uid_max: 10,
            total_max: 3,
        },
    )
    .unwrap();
    put_ops(&store, (1..6).map(|n| of_uid(0, n)));
    assert_eq!(kept(&store, 0), [3, 4, 5]);
}

#[test]
fn operation_is_kept_until_its_last_key_is_removed() {
    let dir = dir();
    let store = Store::open_keeping(
        dir.path(),
        Retention {
            per_uid_max: 2,
            total_max: 100,
        },
    )
    .unwrap();
    let key = |name: &str, expires_at| KeyRow {
        uid: 0,
        key: name.into(),
        params_hash: "h".into(),
        op: op_id(1),
        expires_at,
    };
    // The key may be added before its operation, or while the operation runs.
    store
        .change_durable(|tx| {
            tx.put_key(key("a", 10))
                .and_then(|()| tx.put_key(key("b", 20)))
        })
        .unwrap();
    put_ops(
        &store,
        [op(1, OpState::Running)]
            .into_iter()
            .chain((1..6).map(|n| of_uid(0, n))),
    );
    assert_eq!(kept(&store, 0), [1, 4, 5]);
    // A failed change does not change the number of keys.
    let failed = store.change(|tx| {
        assert_eq!(tx.expire_keys(u64::MAX), 2);
        assert!(
            tx.op(&op_id(1)).is_none(),
            "the oldest of three operations is removed"
        );
        Err::<(), _>(Error::invalid("no"))
    });
    assert!(failed.is_err() && kept(&store, 0) == [1, 4, 5]);
    assert_eq!(
        store.change_durable(|tx| Ok(tx.expire_keys(10))).unwrap(),
        1
    );
    assert_eq!(kept(&store, 0), [1, 4, 5]);
    let store = check_reopened(store, dir.path());
    store.close();
    let store = Store::open_keeping(
        dir.path(),
        Retention {
            per_uid_max: 2,
            total_max: 100,
        },
    )
    .unwrap();
    assert_eq!(
        store.change_durable(|tx| Ok(tx.expire_keys(20))).unwrap(),
        1
    );
    assert_eq!(kept(&store, 0), [4, 5]);
    check_reopened(store, dir.path());
}

#[test]
fn idempotency_keys_are_limited_and_expire() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let key = |uid, n: usize| KeyRow {
        uid,
        key: n.to_string(),
        params_hash: "h".into(),
        op: op_id(1),
        expires_at: n as u64,
    };
    store
        .change_durable(|tx| (0..KEYS_PER_UID_MAX).try_for_each(|n| tx.put_key(key(5, n))))
        .unwrap();
    let full = store
        .change(|tx| tx.put_key(key(5, 9999)))
        .map(|_| ())
        .unwrap_err();
    assert_eq!(full.kind(), Kind::OperationLimit);
    store
        .change_durable(|tx| tx.put_key(key(5, 3)).and_then(|()| tx.put_key(key(6, 3))))
        .unwrap();
    assert_eq!(store.change_durable(|tx| Ok(tx.expire_keys(3))).unwrap(), 5);
    let store = check_reopened(store, dir.path());
    assert!(store.read(|s| s.key(5, "3").is_none() && s.key(5, "4").is_some()));
}

#[test]
fn watch_sees_only_its_vm() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let ready = |watch: &Watch| {
        let mut fds = [nix::poll::PollFd::new(
            watch.fd(),
            nix::poll::PollFlags::POLLIN,
        )];
        nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO).unwrap() == 1
    };
    let (all, one) = (
        store.watch(None).unwrap(),
        store.watch(Some(vm_id(1))).unwrap(),
    );
    put(&store, 2).unwrap().wait(soon()).unwrap();
    assert_eq!((ready(&all), ready(&one)), (true, false));
    all.clear();
    assert!(!ready(&all));
    store.faults().fail(faults::Fault::Io, 1);
    let ticket = put(&store, 1).unwrap();
    assert!(ready(&one) && ready(&all));
    one.clear();
    all.clear();
    let gone = ticket.wait(soon());
    assert!(
        gone.is_err() && ready(&one) && ready(&all),
        "undoing a change also wakes the watchers"
    );
}

#[derive(Clone, Debug)]
enum Act {
    Put {
        n: u32,
        name: u32,
        slot: u32,
        owner: u32,
    },
    Remove(u32),
    Workspace(u32),
    Op {
        n: u32,
        ended: bool,
    },
    Intend(u32),
    Strike(u64),
    Key {
        uid: u32,
        n: u32,
        expires_at: u64,
    },
    Expire(u64),
    Meta(u32),
    Fail,
}

fn act() -> impl Strategy<Value = Act> {
    let n = 0..6u32;
    prop_oneof![
        4 => (n.clone(), n.clone(), n.clone(), 0..3u32).prop_map(|(n, name, slot, owner)| Act::Put { n, name, slot, owner }),
        2 => n.clone().prop_map(Act::Remove),
        1 => n.clone().prop_map(Act::Workspace),
        1 => (n.clone(), any::<bool>()).prop_map(|(n, ended)| Act::Op { n, ended }),
        1 => n.clone().prop_map(Act::Intend),
        1 => (1..10u64).prop_map(Act::Strike),
        1 => (0..2u32, n.clone(), 0..9u64).prop_map(|(uid, n, expires_at)| Act::Key { uid, n, expires_at }),
        1 => (0..9u64).prop_map(Act::Expire),
        1 => n.prop_map(Act::Meta),
        1 => Just(Act::Fail),
    ]
}

fn perform(tx: &mut Tx, act: &Act) -> Result<()> {
    match act.clone() {
        Act::Put {
            n,
            name,
            slot,
            owner,
        } => {
            let name = format!("n{name}").parse().unwrap();
            tx.put_vm(VmRow {
                name,
                slot,
                owner_uid: owner,
                ..row(n)
            })?;
        }
        Act::Remove(n) => drop(tx.remove_vm_unlocked(&vm_id(n))),
        Act::Workspace(n) => tx.put_workspace_unlocked(workspace(n))?,
        Act::Op { n, ended } => tx.put_op(op(
            n,
            if ended {
                OpState::Cancelled
            } else {
                OpState::Running
            },
        )),
        Act::Intend(n) => _ = tx.intend(Some(&vm_id(n)), 1, "disk", "d"),
        Act::Strike(id) => _ = tx.strike(id),
        Act::Key { uid, n, expires_at } => {
            tx.put_key(KeyRow {
                uid,
                key: format!("k{n}"),
                params_hash: "h".into(),
                op: op_id(n),
                expires_at,
            })?;
        }
        Act::Expire(now) => _ = tx.expire_keys(now),
        Act::Meta(n) => tx.put_meta("m", &n.to_string()),
        Act::Fail => return Err(Error::invalid("no")),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// After any changes and failed commits, memory equals the disk, and failed changes have left
    /// no trace in either.
    #[test]
    fn memory_equals_disk(
        changes in proptest::collection::vec(proptest::collection::vec(act(), 1..6), 1..12),
        fail_at in 0..12usize,
        how in prop_oneof![Just(faults::Fault::Io), Just(faults::Fault::IoAfterCommit), Just(faults::Fault::DiskFull)],
    ) {
        let dir = dir();
        let store = Store::open(dir.path()).unwrap();
        for (i, acts) in changes.iter().enumerate() {
            let before = state(&store);
            let gate = (i == fail_at).then(|| {
                store.faults().fail(how, 1);
                store.faults().gate()
            });
            let made = store.change(|tx| {
                // Every change has at least one row, because a change without rows is durable
                // immediately.
                tx.put_meta("round", &i.to_string());
                acts.iter().try_for_each(|a| perform(tx, a))
            });
            let put_more = |tx: &mut Tx| {
                tx.put_meta("more", "x");
                Ok(())
            };
            let more = gate.as_ref().map(|_| store.change(put_more).unwrap());
            drop(gate);
            match (made, more) {
                (Err(_), None) => prop_assert_eq!(state(&store), before),
                (Ok((_, ticket)), None) => prop_assert_eq!(ticket.wait(soon()).unwrap(), ticket.seq()),
                (made, Some((_, more))) => {
                    prop_assert!(more.wait(soon()).is_err());
                    prop_assert!(made.is_err() || made.unwrap().1.wait(soon()).is_err());
                    prop_assert!(store.wait_writable(soon()));
                    store.faults().heal();
                    prop_assert_eq!(state(&store), before);
                }
            }
        }
        check_reopened(store, dir.path());
    }
}
