use super::super::turn::OWN_WRITE_TIME_MIN;
use super::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;

/// Returns the number of this thread's write calls so far, and their bytes (proc(5), `io`).
fn written() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    let value = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name))
            .unwrap()
            .trim()
            .parse::<u64>()
            .unwrap()
    };
    (value("syscw:"), value("wchar:"))
}

fn begin_op(store: &Store, n: u32) {
    let change = |tx: &mut Tx| {
        tx.put_op(op(n, OpState::Running));
        tx.update_vm_unlocked(&vm_id(1), |row| row.generation = u64::from(n))
    };
    store.change_durable(change).unwrap();
}

#[test]
fn waiting_caller_writes_four_pages_in_one_call() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    store.change_durable(|tx| tx.put_vm(row(1))).unwrap();
    for n in 1..=5 {
        let before = written();
        begin_op(&store, n);
        let now = written();
        // These are the pages of the VM's row, the operation's row, the index of its ID, and the
        // change number.
        assert_eq!((now.0 - before.0, now.1 - before.1), (1, 4 * (4096 + 24)));
    }
}

#[test]
fn change_whose_ticket_is_dropped_is_written() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    drop(put(&store, 1).unwrap());
    let deadline = soon();
    while store.stats().changes < 1 {
        assert!(Instant::now() < deadline, "the change was not written");
        std::thread::yield_now();
    }
}

#[test]
fn changes_made_while_a_caller_writes_are_written_after_it() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let gate = store.faults().gate();
    let caller = store.clone();
    let caller = thread::spawn("caller", move || {
        caller.change_durable(|tx| tx.put_vm(row(1)))
    })
    .unwrap();
    assert!(gate.wait_for_writer(soon()));
    let (second, third) = (put(&store, 2).unwrap(), put(&store, 3).unwrap());
    // This write is requested while another thread writes.
    third.write_soon();
    drop(gate);
    second.wait(soon()).unwrap();
    third.wait(soon()).unwrap();
    caller.join().unwrap().unwrap();
    assert_eq!((store.stats().batches, store.stats().changes), (2, 3));
    check_reopened(store, dir.path());
}

#[test]
fn close_waits_for_writing_caller() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let gate = store.faults().gate();
    let caller = store.clone();
    let caller = thread::spawn("caller", move || {
        caller.change_durable(|tx| tx.put_vm(row(1)))
    })
    .unwrap();
    assert!(gate.wait_for_writer(soon()));
    let closing = store.clone();
    let closing = thread::spawn("closing", move || closing.close()).unwrap();
    let deadline = soon();
    while store.barrier().is_ok() {
        assert!(Instant::now() < deadline, "the store never began to close");
        std::thread::yield_now();
    }
    assert!(!closing.is_finished());
    drop(gate);
    caller.join().unwrap().unwrap();
    closing.join().unwrap();
    assert_eq!(
        Store::open(dir.path()).unwrap().read(|s| s.vms().count()),
        1
    );
}

#[test]
fn panic_of_writing_caller_closes_store() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let fails = Arc::new(AtomicBool::new(false));
    let failing = fails.clone();
    let sees = move |_| {
        assert!(!failing.load(Ordering::Relaxed), "a fault of the test");
        true
    };
    let _listener = store.subscribe(None, sees).unwrap();
    fails.store(true, Ordering::Relaxed);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        store.change_durable(|tx| tx.put_vm(row(1)))
    }));
    assert!(panicked.is_err());
    fails.store(false, Ordering::Relaxed);
    assert_eq!(
        put(&store, 2).map(drop).unwrap_err().kind(),
        Kind::ShuttingDown
    );
    store.close();
    assert_eq!(
        Store::open(dir.path()).unwrap().read(|s| s.vms().count()),
        1,
        "the first change was durable"
    );
}

#[test]
fn wait_for_thread_ends_at_deadline_while_disk_hangs() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let gate = store.faults().gate();
    let ticket = put(&store, 1).unwrap();
    // With more time left than this, `wait` would write on this thread and block at the gate.
    let deadline = Instant::now() + OWN_WRITE_TIME_MIN + Duration::from_millis(100);
    let e = ticket.wait_for_thread(deadline).unwrap_err();
    assert_eq!(e.kind(), Kind::Timeout);
    drop(gate);
    ticket.wait_for_thread(soon()).unwrap();
}

#[test]
fn store_stays_open_if_a_destructor_waits_during_a_panic() {
    struct Guard(Store);
    impl Drop for Guard {
        fn drop(&mut self) {
            put(&self.0, 1).unwrap().wait(soon()).unwrap();
        }
    }
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let guard = Guard(store.clone());
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        let _guard = guard;
        panic!("not in the writer");
    }));
    assert!(panicked.is_err());
    put(&store, 2).unwrap().wait(soon()).unwrap();
}
