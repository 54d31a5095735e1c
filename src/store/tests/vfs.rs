use super::super::vfs;
use super::*;
use rusqlite::{Connection, OpenFlags, TransactionBehavior};

fn connect(path: &Path) -> Connection {
    vfs::register();
    let c = Connection::open_with_flags_and_vfs(path, OpenFlags::default(), vfs::NAME).unwrap();
    c.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))
        .unwrap();
    c.execute_batch(
        "PRAGMA synchronous = FULL; CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT) STRICT",
    )
    .unwrap();
    c
}

fn insert(c: &Connection, rows: std::ops::Range<u32>) {
    for n in rows {
        c.execute("INSERT INTO t VALUES (?1, ?2)", (n, "x".repeat(3000)))
            .unwrap();
    }
}

fn rows(c: &Connection) -> Vec<u32> {
    assert_eq!(
        c.query_row("PRAGMA integrity_check", [], |r| r.get::<_, String>(0))
            .unwrap(),
        "ok"
    );
    c.prepare("SELECT n FROM t ORDER BY n")
        .unwrap()
        .query_map([], |r| r.get(0))
        .unwrap()
        .collect::<rusqlite::Result<_>>()
        .unwrap()
}

/// Returns the rows that would remain after a kill at this moment, as SQLite's own VFS reads them.
fn rows_after_kill(path: &Path) -> Vec<u32> {
    let copies = dir();
    let copy = copies.path().join("copy.db");
    std::fs::copy(path, &copy).unwrap();
    std::fs::copy(path.with_extension("db-wal"), copy.with_extension("db-wal")).unwrap();
    rows(&Connection::open(copy).unwrap())
}

#[test]
fn transaction_longer_than_a_piece_is_complete_in_log() {
    let dir = dir();
    let path = dir.path().join("a.db");
    let mut c = connect(&path);
    let count = 2 * (vfs::PIECE_BYTES_MAX / 4096) as u32;
    let tx = c
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .unwrap();
    insert(&tx, 0..count);
    tx.commit().unwrap();
    assert_eq!(rows_after_kill(&path), (0..count).collect::<Vec<_>>());
    assert_eq!(rows(&c).len(), count as usize);
}

/// With a small cache, SQLite writes pages to the log before the commit and reads them back.
#[test]
fn pages_read_before_sync_are_correct() {
    let dir = dir();
    let path = dir.path().join("a.db");
    let mut c = connect(&path);
    c.pragma_update(None, "cache_size", 10).unwrap();
    insert(&c, 0..3);
    let tx = c
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .unwrap();
    insert(&tx, 3..50);
    assert_eq!(rows(&tx).len(), 50);
    tx.rollback().unwrap();
    assert_eq!(rows(&c), [0, 1, 2]);
    let tx = c
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .unwrap();
    insert(&tx, 10..60);
    tx.execute("UPDATE t SET text = text || 'y'", []).unwrap();
    assert_eq!(rows(&tx).len(), 53);
    tx.commit().unwrap();
    let expected: Vec<u32> = (0..3).chain(10..60).collect();
    assert_eq!(rows_after_kill(&path), expected);
    // The log restarts after it was folded.
    c.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(()))
        .unwrap();
    insert(&c, 90..91);
    assert_eq!(rows_after_kill(&path).last(), Some(&90));
    c.close().unwrap();
    assert_eq!(
        rows(&Connection::open(&path).unwrap()).len(),
        expected.len() + 1
    );
}

#[test]
fn torn_write_loses_its_own_change_only() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    (0..5).for_each(|n| store.change_durable(|tx| tx.put_vm(row(n))).unwrap());
    let log = dir.path().join("fcd.db-wal");
    let before = std::fs::read(&log).unwrap();
    store.change_durable(|tx| tx.put_vm(row(5))).unwrap();
    let after = std::fs::read(&log).unwrap();
    let changed: Vec<usize> = (0..after.len())
        .filter(|i| before[*i] != after[*i])
        .collect();
    let (first, last) = (changed[0], changed[changed.len() - 1]);
    for cut in (first..=last)
        .step_by(509)
        .chain([first + 1, last, last + 1])
    {
        let torn = self::dir();
        std::fs::copy(dir.path().join("fcd.db"), torn.path().join("fcd.db")).unwrap();
        std::fs::write(
            torn.path().join("fcd.db-wal"),
            [&after[..cut], &before[cut..]].concat(),
        )
        .unwrap();
        let count = Store::open(torn.path()).unwrap().read(|s| s.vms().count());
        assert_eq!(
            count,
            if cut > last { 6 } else { 5 },
            "cut at {cut} of {first} to {last}"
        );
    }
}
