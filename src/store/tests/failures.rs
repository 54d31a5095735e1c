use super::faults::Fault;
use super::*;

/// Makes one change before the gate and two after it. Checks that none of them is written, that
/// each fails with this kind, and that the store then recovers.
#[track_caller]
fn check_failed_batch(fault: Fault, kind: Kind) {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().wait(soon()).unwrap();
    let durable = state(&store);

    let gate = store.faults().gate();
    store.faults().fail(fault, 3);
    // This moves a name from one VM to another. The repair on disk must not find the name taken.
    let steal = |tx: &mut Tx| {
        tx.update_vm_unlocked(&vm_id(1), |r| r.name = "other".parse().unwrap())?;
        tx.put_vm(VmRow {
            id: vm_id(2),
            slot: 2,
            ..row(1)
        })
    };
    let before = store.change(steal).unwrap().1;
    before.write_soon();
    assert!(gate.wait_for_writer(soon()));
    let tickets = [
        before,
        store
            .change(|tx| tx.put_workspace_unlocked(workspace(2)))
            .unwrap()
            .1,
    ];
    let behind = store
        .change(|tx| Ok(tx.remove_vm_unlocked(&vm_id(1))))
        .unwrap()
        .1;
    drop(gate);
    for ticket in tickets.iter().chain([&behind]) {
        let e = ticket.wait(soon()).unwrap_err();
        assert_eq!(
            (e.kind(), e.code()),
            (kind, crate::error::Code::Host),
            "{e}"
        );
        assert!(e.hint_text().is_some());
    }
    assert_eq!(state(&store), durable);
    // The disk probe still has to fail twice, so the store accepts nothing until then.
    let refused = put(&store, 3).map(drop).unwrap_err();
    assert_eq!(refused.kind(), kind);
    assert_eq!(store.read_only().map(|e| e.kind()), Some(kind));

    let deadline = soon();
    assert!(store.wait_writable(deadline));
    assert!(Instant::now() < deadline, "the wait missed the probe");
    assert!(store.read_only().is_none());
    assert_eq!(state(&store), durable);
    put(&store, 3).unwrap().wait(soon()).unwrap();
    let store = check_reopened(store, dir.path());
    assert_eq!(
        store.read(|s| s.vms().map(|r| r.name.to_string()).collect::<Vec<_>>()),
        ["vm-1", "vm-3"]
    );
}

#[test]
fn full_disk_makes_store_read_only() {
    check_failed_batch(Fault::DiskFull, Kind::DiskFull);
}

#[test]
fn io_error_makes_store_read_only() {
    check_failed_batch(Fault::Io, Kind::StoreReadOnly);
}

#[test]
fn error_after_commit_is_repaired_on_disk() {
    check_failed_batch(Fault::IoAfterCommit, Kind::StoreReadOnly);
}

#[test]
fn panic_of_writer_makes_store_read_only() {
    check_failed_batch(Fault::Panic, Kind::StoreReadOnly);
}

#[test]
fn unrepaired_failed_batch_leaves_database_that_opens() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().wait(soon()).unwrap();
    store.faults().fail(Fault::Io, u64::MAX);
    put(&store, 2).unwrap().wait(soon()).unwrap_err();
    store.close();
    let store = Store::open(dir.path()).unwrap();
    assert!(store.read(|s| s.vm(&vm_id(1)).is_some()));
}

#[test]
fn failed_log_fold_loses_nothing_and_is_retried() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    store.faults().fail_folds(u64::MAX);
    // Each change writes at least one page and is durable before the log is folded.
    let count = (0..schema::LOG_FRAMES)
        .take_while(|n| store.change_durable(|tx| tx.put_vm(row(*n))).is_ok())
        .count();
    await_fault(&store);
    store.faults().fail_folds(0);
    assert!(store.wait_writable(soon()));
    put(&store, schema::LOG_FRAMES)
        .unwrap()
        .wait(soon())
        .unwrap();
    let store = check_reopened(store, dir.path());
    assert_eq!(store.read(|s| s.vms().count()), count + 1);
}

/// Waits until the writer has reached the fault, which happens after the reply.
fn await_fault(store: &Store) {
    let deadline = soon();
    while store.read_only().is_none() {
        assert!(
            Instant::now() < deadline,
            "the store never became read-only"
        );
        std::thread::yield_now();
    }
}

#[test]
fn essential_change_uses_reserve() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().wait(soon()).unwrap();
    let reserve = dir.path().join("reserve");
    assert_eq!(
        std::os::unix::fs::MetadataExt::blocks(&reserve.metadata().unwrap()) * 512,
        RESERVE_BYTES
    );
    store.faults().fail(Fault::DiskFull, 1);
    let (_, ticket) = store
        .change_essential(|tx| Ok(tx.remove_vm_unlocked(&vm_id(1))))
        .unwrap();
    ticket.wait(soon()).unwrap();
    // The store reserves the space again before the writer's next batch.
    put(&store, 1).unwrap().wait(soon()).unwrap();
    assert_eq!(reserve.metadata().unwrap().len(), RESERVE_BYTES);
    // The store attempts essential changes even while it is read-only, but they may fail.
    store.faults().fail(Fault::Io, u64::MAX);
    put(&store, 2).unwrap().wait(soon()).unwrap_err();
    let (_, ticket) = store.change_essential(|tx| tx.put_vm(row(3))).unwrap();
    assert_eq!(ticket.wait(soon()).unwrap_err().kind(), Kind::StoreReadOnly);
    store.faults().heal();
    let (_, ticket) = store.change_essential(|tx| tx.put_vm(row(4))).unwrap();
    ticket.wait(soon()).unwrap();
    let store = check_reopened(store, dir.path());
    assert_eq!(store.read(|s| s.vms().count()), 2);
}

#[test]
fn closed_store_has_written_everything_and_refuses_changes() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let tickets: Vec<_> = (0..50).map(|n| put(&store, n).unwrap()).collect();
    store.close();
    tickets
        .iter()
        .for_each(|t| assert_eq!(t.wait(Instant::now()).unwrap(), t.seq()));
    assert_eq!(
        put(&store, 99).map(drop).unwrap_err().kind(),
        Kind::ShuttingDown
    );
    assert_eq!(store.read(|s| s.vms().count()), 50);
    store.close();
    assert_eq!(state(&Store::open(dir.path()).unwrap()), state(&store));
}

#[test]
fn changes_of_many_threads_survive_failing_commits() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let workers: Vec<_> = (0..8u32)
        .map(|worker| {
            let store = store.clone();
            let work = move || {
                let mut acknowledged = Vec::new();
                for n in (0..60).map(|i| worker * 100 + i) {
                    if worker == 0 && n % 10 == 5 {
                        store.faults().fail(
                            [Fault::Io, Fault::IoAfterCommit, Fault::DiskFull][n as usize / 10 % 3],
                            1,
                        );
                    }
                    if store.change_durable(|tx| tx.put_vm(row(n))).is_ok() {
                        acknowledged.push(n);
                    }
                    assert!(store.wait_writable(soon()));
                }
                acknowledged
            };
            thread::spawn("worker", work).unwrap()
        })
        .collect();
    let mut acknowledged: Vec<u32> = workers
        .into_iter()
        .flat_map(|w| w.join().unwrap())
        .collect();
    acknowledged.sort_unstable();
    assert!(
        (1..480).contains(&acknowledged.len()),
        "some changes fail, and some do not"
    );
    let store = check_reopened(store, dir.path());
    assert_eq!(
        store.read(|s| s.vms().map(|r| r.slot).collect::<Vec<_>>()),
        acknowledged
    );
}

/// A tmpfs that is unmounted when the value is dropped.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn new(mib: u64) -> Self {
        let at = dir();
        let path = at.path().to_str().unwrap();
        run(&[
            "mount",
            "-t",
            "tmpfs",
            "-o",
            &format!("size={mib}m,mode=755"),
            "tmpfs",
            path,
        ]);
        Self(at)
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
    /// Writes a file that leaves `free` bytes on the file system.
    fn fill(&self, free: u64) {
        let stat = rustix::fs::statvfs(self.path()).unwrap();
        let bytes = stat.f_bfree * stat.f_frsize - free;
        std::fs::write(self.path().join("filler"), vec![1; bytes as usize]).unwrap();
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        run(&["umount", "-l", self.path().to_str().unwrap()]);
    }
}

fn run(argv: &[&str]) {
    let command = crate::host::Command::new(argv[0]).args(&argv[1..]);
    let cancel = crate::locks::Cancel::try_new().unwrap();
    let out = crate::host::command::run_any_status(&command, &cancel, &mut |_| {}).unwrap();
    assert_eq!(
        out.status,
        0,
        "{argv:?} (these tests run as root): {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn store_works_on_full_tmpfs() {
    let fs = Tmpfs::new(8);
    let store = Store::open(fs.path()).unwrap();
    put(&store, 1).unwrap().wait(soon()).unwrap();
    fs.fill(0);
    let big = |n: u32| VmRow {
        reason: Some("x".repeat(300_000)),
        ..row(n)
    };
    let e = (2..9)
        .find_map(|n| store.change_durable(|tx| tx.put_vm(big(n))).err())
        .expect("the disk is full");
    assert_eq!(e.kind(), Kind::DiskFull, "{e}");
    assert_eq!(
        put(&store, 50).map(drop).unwrap_err().kind(),
        Kind::DiskFull
    );
    let name = store.read(|s| s.vms().map(|r| r.name.to_string()).collect::<Vec<_>>());
    // A delete can still be written, and another daemon can open the store on the full disk.
    let (_, ticket) = store
        .change_essential(|tx| Ok(tx.remove_vm_unlocked(&vm_id(1))))
        .unwrap();
    ticket.wait(soon()).unwrap();
    assert_eq!(store.read(|s| s.vms().count()), name.len() - 1);
    // Fills the space of the reserve. The write fails if the store has taken the space first.
    let _ = std::fs::write(fs.path().join("filler2"), vec![1; RESERVE_BYTES as usize]);
    let store = check_reopened(store, fs.path());
    assert_eq!(store.read_only().map(|e| e.kind()), Some(Kind::DiskFull));
    // Once there is space again, the store recovers automatically.
    std::fs::remove_file(fs.path().join("filler")).unwrap();
    std::fs::remove_file(fs.path().join("filler2")).unwrap();
    assert!(store.wait_writable(soon()));
    put(&store, 60).unwrap().wait(soon()).unwrap();
    check_reopened(store, fs.path());
}
