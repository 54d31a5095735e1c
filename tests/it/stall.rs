//! Compares calls on a VM whose import is stalled with the same calls on a VM that has the same
//! fault but no import. The two sides take turns. `scripts/test` runs `the_gate`, and
//! `scripts/bench stall` runs `bench`, which measures longer.

use crate::world::*;
use fcd::testing::api::exec::{ExecStart, ExecStartRequest};
use fcd::testing::api::op::{OpCancel, OpList, OpListRequest, OpRequest};
use fcd::testing::api::vm::*;
use fcd::testing::client::Client;
use fcd::testing::error::Kind;
use std::io::Write;
use std::time::{Duration, Instant};

/// The time after which the daemon ends a stalled import, and so the longest time that a call would
/// wait for the import. It is short in the negative control, where calls do wait.
const STALL: Duration = Duration::from_secs(if cfg!(feature = "one-lock") { 4 } else { 30 });
/// Time for a guest to shut down. With the network cut, both sides wait this long in vain.
const GRACE_MS: u64 = 50;
const BYTES: u64 = 4096;

/// The reason why an import is stalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The client stops writing.
    Silent,
    /// The guest stops reading.
    Unread,
    /// The guest's network is cut.
    Cut,
}
use Fault::{Cut, Silent, Unread};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Show,
    List,
    Exec,
    Stop,
    Delete,
}

/// A daemon with the VM that is measured and `others` stalled imports of other VMs.
struct Stage {
    world: World,
    client: Client,
    others: Vec<Import>,
    /// True if the VM with the import is timed first. The first side has colder caches, so the two
    /// sides take turns.
    is_held_first: bool,
}

/// The number of other imports, the number of workers, and the length of the queue.
#[derive(Clone, Copy, Debug)]
struct Load {
    others: usize,
    workers: usize,
    queue: usize,
}

impl Load {
    /// The load of this many running imports, each with its own worker.
    const fn of(others: usize) -> Self {
        Self {
            others,
            workers: others + 2,
            queue: 2 * others + 64,
        }
    }
}

impl Stage {
    fn new(load: Load) -> Self {
        let many = 8 * load.others + 256;
        let world = World::with(|c| {
            c.limits.pool_workers = load.workers;
            c.limits.pool_queue = load.queue;
            c.limits.queue_per_uid_max = many;
            c.limits.connections_max = many;
            c.limits.connections_per_uid_max = many;
            c.limits.operations_per_uid_max = many;
            c.limits.vms_per_uid_max = many;
            c.limits.mem_mib_max = many as u64 * c.vm.mem_mib;
            c.limits.transfer_idle_s = STALL.as_secs();
        });
        let others = (0..load.others)
            .map(|n| Self::start_other_import(&world, load, n))
            .collect();
        let client = world.client();
        Self {
            world,
            client,
            others,
            is_held_first: false,
        }
    }

    /// Starts another VM with an import that is stalled or waits for a worker.
    fn start_other_import(world: &World, load: Load, n: usize) -> Import {
        let name = format!("other-{n}");
        world.running(&name);
        if n >= load.workers {
            return world.queue_import(&name);
        }
        let mut import = world.import(&name);
        write_some(&mut import);
        import
    }

    /// Starts a VM, which is created if it does not exist. With `Unread`, its guest stops reading.
    fn vm(&self, name: &str, fault: Fault) -> std::net::SocketAddr {
        let addr = match self.world.show(name) {
            Ok(vm) => {
                let addr = self.world.place(&vm.id);
                self.world.start(name).unwrap();
                addr
            }
            Err(_) => self.world.running(name).1,
        };
        if fault == Unread {
            drop(self.world.guest.stall_reads(addr, BYTES));
        }
        addr
    }

    /// Starts an import that stalls. If the pool is full, the import waits for a worker.
    fn stall(&self, name: &str, fault: Fault) -> Import {
        let runs = self.world.daemon().transfers.pool.counts().running
            < self.world.config.limits.pool_workers;
        if !runs {
            return self.world.queue_import(name);
        }
        let mut import = self.world.import(name);
        write_some(&mut import);
        if fault == Unread {
            write_some(&mut import);
        }
        import.call.bytes(BYTES);
        import
    }

    /// Makes one call and returns the time that it took.
    fn time(&mut self, verb: Verb, name: &str) -> Duration {
        let begun = Instant::now();
        match verb {
            Verb::Show => drop(self.client.call::<VmShow>(&request(name)).unwrap()),
            Verb::List => drop(
                self.client
                    .call::<VmList>(&VmListRequest {
                        all: true,
                        ..Default::default()
                    })
                    .unwrap(),
            ),
            Verb::Exec => {
                let (vm, argv) = (name.to_owned(), vec!["true".to_owned()]);
                let request = ExecStartRequest {
                    vm,
                    argv,
                    env: vec![],
                    workdir: None,
                    user: None,
                    pty: None,
                    streams: vec![],
                    no_wait_children: false,
                };
                drop(
                    self.client
                        .call_more::<ExecStart>(&request, &[], &mut |_| Ok(()))
                        .unwrap(),
                );
            }
            Verb::Stop => {
                let request = VmStopRequest {
                    timeout_ms: Some(GRACE_MS),
                    ..stop(name)
                };
                drop(
                    self.client
                        .call_more::<VmStop>(&request, &[], &mut |_| Ok(()))
                        .unwrap(),
                );
            }
            Verb::Delete => drop(
                self.client
                    .call_more::<VmDelete>(&delete(name), &[], &mut |_| Ok(()))
                    .unwrap(),
            ),
        }
        begun.elapsed()
    }

    /// Measures both sides once. Returns the time without an import and the time with a stalled
    /// one.
    fn round(&mut self, verb: Verb, fault: Fault) -> (Duration, Duration) {
        let (idle_addr, addr) = (self.vm("idle", fault), self.vm("held", fault));
        let import = self.stall("held", fault);
        if fault == Cut {
            self.world.guest.set_cut(idle_addr, true);
            self.world.guest.set_cut(addr, true);
        }
        // Both sides begin with warm caches.
        for name in ["idle", "held"] {
            self.time(Verb::Show, name);
        }
        self.is_held_first = !self.is_held_first;
        let (idle, held) = if self.is_held_first {
            let held = self.time(verb, "held");
            (self.time(verb, "idle"), held)
        } else {
            (self.time(verb, "idle"), self.time(verb, "held"))
        };
        assert!(
            held < STALL / 2,
            "{verb:?} of a VM took {held:?} under {fault:?}: it waited for the import"
        );
        drop(import.stream);
        import.call.hang_up();
        for name in ["idle", "held"] {
            // Removes the VM if the call has not deleted it.
            if let Err(e) = self.world.delete(name) {
                assert!(e.is(Kind::VmNotFound), "{e:?}");
            }
        }
        (idle, held)
    }

    /// Queues a second import behind a stalled one. Checks that the second import reports that it
    /// waits, and that cancelling ends it. Returns the time that the cancel took.
    fn second_import_waits_visibly(&mut self) -> Duration {
        self.vm("held", Silent);
        let first = self.stall("held", Silent);
        let mut second = self.world.queue_import("held");
        let op = second.call.op();
        second.call.stage("wait");
        let ops = self
            .client
            .call::<OpList>(&OpListRequest {
                all: false,
                ..Default::default()
            })
            .unwrap()
            .ops;
        let shown = ops
            .iter()
            .find(|o| o.id == op)
            .expect("the second import is listed");
        assert!(shown.progress.stage.contains("wait"), "{shown:?}");
        let begun = Instant::now();
        self.client
            .call::<OpCancel>(&OpRequest { op: op.to_string() })
            .unwrap();
        assert!(second.call.finish(SOON).unwrap_err().is(Kind::Cancelled));
        let took = begun.elapsed();
        drop((first.stream, second.stream));
        first.call.hang_up();
        self.world.delete("held").unwrap();
        took
    }

    fn end(self) {
        for import in self.others {
            drop(import.stream);
            import.call.hang_up();
        }
        self.world.await_rest();
    }
}

fn write_some(import: &mut Import) {
    let mut chunk = (BYTES as u32).to_be_bytes().to_vec();
    chunk.resize(4 + BYTES as usize, 7);
    import.stream.write_all(&chunk).unwrap();
}

/// Returns the calls to measure. An exec is left out if the guest does not respond, because it
/// would never end.
fn verbs(fault: Fault) -> &'static [Verb] {
    match fault {
        Cut => &[Verb::Show, Verb::List, Verb::Stop, Verb::Delete],
        _ => &[Verb::Show, Verb::List, Verb::Exec, Verb::Stop, Verb::Delete],
    }
}

fn percentile(took: &[Duration], percent: usize) -> Duration {
    let mut took = took.to_vec();
    took.sort();
    took[(took.len() * percent / 100).min(took.len() - 1)]
}

#[test]
#[ignore = "measures, so it runs alone: a step of scripts/test"]
fn the_gate() {
    const ROUNDS: usize = 9;
    const SLACK: Duration = Duration::from_millis(1);
    /// Limit of the sets of rounds per call. Other load on the machine may slow one side in one
    /// set. A call that waits for the import is slower in every set.
    const SETS_MAX: usize = 3;
    let fits = |(idle, held): &(Duration, Duration)| *held <= idle.mul_f64(1.2) + SLACK;
    // The first load is one other import. The second fills all workers and the queue.
    for load in [
        Load::of(1),
        Load {
            others: 4,
            workers: 2,
            queue: 4,
        },
    ] {
        let mut stage = Stage::new(load);
        for (fault, verb) in [Silent, Unread, Cut]
            .iter()
            .flat_map(|f| verbs(*f).iter().map(|v| (*f, *v)))
        {
            let mut sets = Vec::new();
            while sets.len() < SETS_MAX && !sets.last().is_some_and(fits) {
                let (idle, held): (Vec<_>, Vec<_>) =
                    (0..ROUNDS).map(|_| stage.round(verb, fault)).unzip();
                sets.push((median(idle), median(held)));
            }
            assert!(
                sets.last().is_some_and(fits),
                "{verb:?} under {fault:?} with {load:?}: idle and held {sets:?}"
            );
        }
        if load.queue > load.others {
            stage.second_import_waits_visibly();
        }
        stage.end();
    }
}

/// Shows that the other tests would reveal a lock that is held during a whole import: a stop of the
/// importing VM waits for its import, while a stop of another VM ends.
#[test]
#[cfg(feature = "one-lock")]
fn import_with_one_lock_delays_stop() {
    let mut stage = Stage::new(Load::of(0));
    for name in ["idle", "held"] {
        stage.vm(name, Silent);
    }
    let import = stage.stall("held", Silent);
    let mut held = stage.world.begin::<VmStop>(stop("held"), vec![]);
    stage.time(Verb::Stop, "idle");
    assert!(!held.has_ended(), "the stop did not wait for the import");
    drop(import.stream);
    import.call.hang_up();
    held.finish(SOON).unwrap();
    stage.end();
}

#[test]
#[ignore = "measures: scripts/bench stall"]
fn bench() {
    let rounds = std::env::var("FCD_BENCH_ROUNDS").map_or(40, |n| n.parse().expect("a number"));
    println!(
        "{:>9} {:>7} {:>7} {:>9} {:>9} {:>6} {:>9} {:>9} {:>6}",
        "imports",
        "fault",
        "verb",
        "idle p50",
        "held p50",
        "ratio",
        "idle p99",
        "held p99",
        "ratio"
    );
    let full = Load {
        others: 8,
        workers: 2,
        queue: 8,
    };
    for (label, load) in [
        ("1", Load::of(1)),
        ("8", Load::of(8)),
        ("64", Load::of(64)),
        ("1000", Load::of(1000)),
        ("pool full", full),
    ] {
        let mut stage = Stage::new(load);
        for fault in [Silent, Unread, Cut] {
            for verb in verbs(fault) {
                let (idle, held): (Vec<_>, Vec<_>) =
                    (0..rounds).map(|_| stage.round(*verb, fault)).unzip();
                let ratio =
                    |p| percentile(&held, p).as_secs_f64() / percentile(&idle, p).as_secs_f64();
                let us = |took: &[Duration], p| percentile(took, p).as_micros();
                println!(
                    "{label:>9} {:>7} {:>7} {:>7}us {:>7}us {:>6.2} {:>7}us {:>7}us {:>6.2}",
                    format!("{fault:?}"),
                    format!("{verb:?}"),
                    us(&idle, 50),
                    us(&held, 50),
                    ratio(50),
                    us(&idle, 99),
                    us(&held, 99),
                    ratio(99)
                );
            }
        }
        if load.queue > load.others {
            println!(
                "{label:>9} a second import waits visibly; cancelled within {:?}",
                stage.second_import_waits_visibly()
            );
        }
        stage.end();
    }
}
