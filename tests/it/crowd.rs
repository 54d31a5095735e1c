//! Misbehaving clients and idle clients must not slow down other clients.

use crate::world::*;
use fcd::testing::api::vm::*;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const IDLE: usize = 1000;
const CALLS: usize = 2000;
const P99_MAX: Duration = Duration::from_millis(50);
/// The longest frame that the protocol allows.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// Writes one bad request, or a part of one.
type Misdeed = fn(&mut UnixStream) -> std::io::Result<()>;

const MISDEEDS: [Misdeed; 5] = [
    |s| s.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.list\",\"par"),
    |s| s.write_all(b"this is not JSON at all\n"),
    |s| {
        s.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"")?;
        (0..=FRAME_BYTES_MAX / 4096).try_for_each(|_| s.write_all(&[b'x'; 4096]))
    },
    |s| s.write_all(&[b"[".repeat(100_000), b"\n".to_vec()].concat()),
    // Sends one byte per packet.
    |s| {
        b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"fcd.info\",\"params\":{}}\n"
            .iter()
            .try_for_each(|b| s.write_all(&[*b]))
    },
];

fn misbehave(world: &World, n: usize) {
    let Ok(mut stream) = UnixStream::connect(&world.config.socket) else {
        return;
    };
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    // The daemon may hang up before it has read everything. Half of the clients do not wait for a
    // reply.
    _ = MISDEEDS[n % MISDEEDS.len()](&mut stream);
    if n.is_multiple_of(2) {
        _ = stream.shutdown(Shutdown::Write);
        _ = stream.read(&mut [0; 256]);
    }
}

#[test]
#[ignore = "measures, so it runs alone: a step of scripts/test"]
fn idle_and_bad_clients_do_not_slow_others() {
    fcd::testing::host::limits::raise_open_files(4 * IDLE as u64).unwrap();
    let world = World::with(|c| {
        c.limits.connections_max = 2 * IDLE;
        c.limits.connections_per_uid_max = 2 * IDLE;
    });
    world.create("web");
    let idle: Vec<_> = (0..IDLE)
        .map(|_| UnixStream::connect(&world.config.socket).unwrap())
        .collect();
    let (done, misdeeds) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut took = std::thread::scope(|scope| {
        for first in 0..2 {
            let (world, done, misdeeds) = (&world, &done, &misdeeds);
            scope.spawn(move || {
                let mut n = first;
                while !done.load(Ordering::SeqCst) {
                    misbehave(world, n);
                    misdeeds.fetch_add(1, Ordering::SeqCst);
                    n += 1;
                }
            });
        }
        let mut client = world.client();
        let took: Vec<Duration> = (0..CALLS)
            .map(|_| {
                let begun = Instant::now();
                client.call::<VmShow>(&request("web")).unwrap();
                begun.elapsed()
            })
            .collect();
        await_that("every kind of misdeed has happened", || {
            misdeeds.load(Ordering::SeqCst) >= MISDEEDS.len() as u64
        });
        done.store(true, Ordering::SeqCst);
        took
    });
    took.sort();
    let (p50, p99) = (took[CALLS / 2], took[CALLS * 99 / 100]);
    println!(
        "beside {} idle connections and {} bad requests: p50 {p50:?}, p99 {p99:?}",
        idle.len(),
        misdeeds.load(Ordering::SeqCst)
    );
    assert!(p99 < P99_MAX, "p50 {p50:?}, p99 {p99:?}");
    // The idle connections are still served.
    let mut last = idle.last().unwrap();
    last.set_read_timeout(Some(SOON)).unwrap();
    last.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"fcd.info\",\"params\":{}}\n")
        .unwrap();
    assert!(last.read(&mut [0; 16]).unwrap() > 0);
    drop(idle);
}
