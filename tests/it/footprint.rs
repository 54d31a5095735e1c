//! Measures the cost of a durable write and the daemon's memory use. `scripts/bench scale` runs it.

use crate::process::Process;
use crate::world::*;
use fcd::testing::api::op::{Op, OpState, Progress};
use fcd::testing::ids::OpId;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const ROUNDS: usize = 1000;
const WARM_UP: usize = 50;
/// The bytes that a commit of the rows below writes: four pages with their headers.
const COMMIT_BYTES: usize = 4 * (4096 + 24);
const FLOOR_FILE_BYTES: usize = 1 << 20;
const CONNECTIONS: usize = 1000;
const LONG_REQUEST_BYTES: usize = 100_000;
/// Time between closing the last connection and measuring the memory.
const SETTLE: Duration = Duration::from_secs(1);

fn percentiles(mut took: Vec<Duration>) -> (Duration, Duration, Duration) {
    took.sort();
    (
        took[took.len() / 10],
        took[took.len() / 2],
        took[took.len() * 9 / 10],
    )
}

fn timed(body: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    body();
    begun.elapsed()
}

/// Compares the time of a durable change with the time to write and sync as many bytes over
/// allocated blocks of a file.
fn durable_write() {
    let world = World::new();
    let vm = world.create("web");
    let row = world
        .daemon()
        .core
        .store
        .read(|state| state.vm(&vm.id).unwrap().as_ref().clone());
    // The tests' state directories are in memory, where a sync costs nothing. This one must be on a
    // disk.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = fcd::testing::store::Store::open(dir.path()).unwrap();
    store.change_durable(|tx| tx.insert_vm(row)).unwrap();
    let bytes = vec![7; FLOOR_FILE_BYTES];
    let file = File::create(dir.path().join("floor")).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    file.sync_all().unwrap();
    let (mut floor, mut commit) = (Vec::new(), Vec::new());
    for n in 0..ROUNDS + WARM_UP {
        let at = (n * COMMIT_BYTES) % (FLOOR_FILE_BYTES - COMMIT_BYTES);
        let synced = timed(|| {
            file.write_all_at(&bytes[..COMMIT_BYTES], at as u64)
                .unwrap();
            file.sync_data().unwrap();
        });
        let op = Op {
            id: OpId::random(),
            method: "vm.start".into(),
            vm: Some(vm.id.clone()),
            owner_uid: 0,
            state: OpState::Running,
            may_cancel: true,
            progress: Progress::default(),
            started_at: n as u64,
            ended_at: None,
            result: None,
            error: None,
        };
        let committed = timed(|| {
            let change = |tx: &mut fcd::testing::store::Tx| {
                tx.put_op(op);
                tx.update_vm_unlocked(&vm.id, |row| row.generation = n as u64)
            };
            store.change_durable(change).unwrap();
        });
        if n >= WARM_UP {
            floor.push(synced);
            commit.push(committed);
        }
    }
    let (floor, commit) = (percentiles(floor), percentiles(commit));
    let ratio = |c: Duration, f: Duration| c.as_secs_f64() / f.as_secs_f64();
    println!(
        "durable write, p10 p50 p90: commit {:?} {:?} {:?}, fdatasync {:?} {:?} {:?}",
        commit.0, commit.1, commit.2, floor.0, floor.1, floor.2
    );
    println!(
        "durable write: {:.2} times an fdatasync at p50, {:.2} at p10 (target 1.3)",
        ratio(commit.1, floor.1),
        ratio(commit.0, floor.0)
    );
}

/// Returns `VmRSS` and `RssAnon` of the process (proc(5), `status`), in MB.
fn memory(process: &Process) -> (f64, f64) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.child.id())).unwrap();
    let kib = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap()
    };
    (kib("VmRSS:") * 1024.0 / 1e6, kib("RssAnon:") * 1024.0 / 1e6)
}

fn connections() {
    fcd::testing::host::limits::raise_open_files(4 * CONNECTIONS as u64).unwrap();
    let process = Process::start(|command| {
        let config = command.get_args().nth(1).unwrap().to_owned();
        let max = 2 * CONNECTIONS;
        std::fs::write(
            config,
            format!("[limits]\nconnections_max = {max}\nconnections_per_uid_max = {max}\n"),
        )
        .unwrap();
    });
    std::thread::sleep(SETTLE);
    let idle = memory(&process);
    let mut all: Vec<_> = (0..CONNECTIONS)
        .map(|_| BufReader::new(UnixStream::connect(process.socket()).unwrap()))
        .collect();
    let unknown = "x".repeat(LONG_REQUEST_BYTES);
    for method in ["fcd.info", "vm.list", "op.list", &unknown, "fcd.info"] {
        let line =
            format!("{{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"{method}\",\"params\":{{}}}}\n");
        all.iter_mut()
            .for_each(|c| c.get_mut().write_all(line.as_bytes()).unwrap());
        all.iter_mut()
            .for_each(|c| assert!(c.read_line(&mut String::new()).unwrap() > 0));
    }
    let during = memory(&process);
    drop(all);
    std::thread::sleep(SETTLE);
    let after = memory(&process);
    println!(
        "memory (VmRSS, of it anonymous): idle {:.1} MB, {:.1} (target 8)",
        idle.0, idle.1
    );
    println!(
        "memory with {CONNECTIONS} connections open: {:.1} MB, {:.1}",
        during.0, during.1
    );
    println!(
        "memory {SETTLE:?} after {CONNECTIONS} connections: {:.1} MB, {:.1}; {:.1} MB above idle (target 4)",
        after.0,
        after.1,
        after.0 - idle.0
    );
}

#[test]
#[ignore = "measures: scripts/bench scale"]
fn bench() {
    durable_write();
    connections();
}
