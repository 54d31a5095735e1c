//! Measures a daemon restart with many VMs. `scripts/bench scale` runs it.

use crate::world::*;
use fcd::testing::api::vm::*;
use fcd::testing::config::Config;
use fcd::testing::daemon::{Daemon, Seams};
use fcd::testing::store::Store;
use nix::sys::resource::{UsageWho, getrusage};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The number of unrelated processes to start, because a host in use has many.
const OTHER_PROCESSES: usize = 200;
const ROUNDS: usize = 5;
/// The number of VMs that are changed after the restart, evenly spread.
const CHANGED: usize = 10;

/// Processes that do not belong to the daemon. The daemon only has to skip them.
struct Others(Vec<Child>);

impl Others {
    fn start() -> Self {
        let sleep = || {
            Command::new("sleep")
                .arg("1000")
                .stdin(Stdio::null())
                .spawn()
                .unwrap()
        };
        Self((0..OTHER_PROCESSES).map(|_| sleep()).collect())
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn cpu() -> Duration {
    let used = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let time =
        |t: nix::sys::time::TimeVal| Duration::new(t.tv_sec() as u64, t.tv_usec() as u32 * 1000);
    time(used.user_time()) + time(used.system_time())
}

fn many(config: &mut Config, vms: usize) {
    config.limits.vms_per_uid_max = vms + 1;
    config.limits.mem_mib_max = (vms as u64 + 1) * 1024;
    config.limits.operations_per_uid_max = vms + 1;
    config.qemu.uid_count = vms as u32 + 1;
}

/// Creates a state directory with `vms` stopped VMs that have run before.
fn at_rest(vms: usize) -> World {
    let mut world = World::with(|config| many(config, vms));
    for n in 0..vms {
        let create = VmCreateRequest {
            name: Some(format!("vm-{n}").parse().unwrap()),
            ..Default::default()
        };
        world.daemon().creator.create(&root(), &create).unwrap();
    }
    let vms_dir = world.config.state_dir.join("vms");
    world.edit_rows(|tx| {
        let ids: Vec<_> = tx.vms().map(|row| row.id.clone()).collect();
        for id in &ids {
            tx.update_vm_unlocked(id, |row| {
                (row.state, row.generation) = (VmState::Stopped, 1)
            })
            .unwrap();
            tx.intend(
                Some(id),
                1,
                "directory",
                vms_dir.join(id.as_str()).display().to_string(),
            );
            std::fs::create_dir(vms_dir.join(id.as_str())).unwrap();
        }
    });
    world
}

/// Measures the time from starting a daemon with the real drivers until several changes are
/// durable. Returns the time to open the daemon, that whole time, and the CPU time until every VM
/// is reconciled.
fn usable_after(config: &Config, vms: usize) -> (Duration, Duration, Duration) {
    let (begun, used) = (Instant::now(), cpu());
    let daemon = Daemon::open(config.clone(), Seams::real(config).unwrap()).unwrap();
    let opened = begun.elapsed();
    let reconciler = {
        let daemon = daemon.clone();
        fcd::testing::host::thread::spawn("reconcile", move || daemon.reconciler.reconcile())
            .unwrap()
    };
    for n in 0..CHANGED {
        let vm = format!("vm-{}", n * (vms - 1) / (CHANGED - 1));
        daemon
            .controls
            .set(
                &root(),
                &VmSetRequest {
                    vm,
                    vcpus: Some(2),
                    ..Default::default()
                },
            )
            .unwrap();
    }
    let usable = begun.elapsed();
    reconciler.join().unwrap();
    let used = cpu() - used;
    daemon.close(Instant::now(), soon());
    drop(Store::open(&config.state_dir).unwrap());
    (opened, usable, used)
}

fn resting(vms: usize) {
    let world = at_rest(vms);
    let rounds: Vec<_> = (0..ROUNDS)
        .map(|_| usable_after(&world.config, vms))
        .collect();
    let of = |pick: fn(&(Duration, Duration, Duration)) -> Duration| {
        median(rounds.iter().map(pick).collect())
    };
    let (opened, usable, used) = (of(|r| r.0), of(|r| r.1), of(|r| r.2));
    let least = rounds.iter().map(|r| r.1).min().unwrap();
    println!(
        "{vms:>6} resting VMs: open {opened:?}, usable {usable:?} (least {least:?}), CPU until reconciled {used:?}"
    );
}

/// Measures how long it takes to reconcile running VMs. This is only the daemon's own part, because
/// the fake VMMs answer immediately.
fn running(vms: usize) {
    let mut world = World::with(|config| many(config, vms));
    for n in 0..vms {
        world.running(&format!("vm-{n}"));
    }
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        world.reopen();
        let begun = Instant::now();
        world.daemon().reconciler.reconcile();
        rounds.push(begun.elapsed());
    }
    let took = median(rounds);
    println!(
        "{vms:>6} running VMs: adopted in {took:?}, {:?} each",
        took / u32::try_from(vms).unwrap()
    );
    for n in 0..vms {
        world.delete(&format!("vm-{n}")).unwrap();
    }
}

#[test]
#[ignore = "measures: scripts/bench scale"]
fn bench_restart() {
    let others = Others::start();
    println!(
        "{} processes on the host",
        std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter(is_process)
            .count()
    );
    resting(1_000);
    resting(10_000);
    running(100);
    drop(others);
}

fn is_process(entry: &std::fs::DirEntry) -> bool {
    entry
        .file_name()
        .to_string_lossy()
        .bytes()
        .all(|b| b.is_ascii_digit())
}
