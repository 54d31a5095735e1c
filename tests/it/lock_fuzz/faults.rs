//! Disturbs the actors of a round: threads lose the processor around locks, writes to the store
//! fail or are slow, and the daemon closes.

use super::actor::Stage;
use super::{ACTORS, REQUESTS, Random};
use fcd::testing::locks::{Rank, check};
use fcd::testing::store::faults::Fault;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The time between two looks at how far the actors are.
const LOOK: Duration = Duration::from_millis(1);
/// The most replies between two faults of the store.
const REPLIES_PER_FAULT: u64 = 40;
/// How long a slow write takes.
const SLOW_WRITE: Duration = Duration::from_millis(20);
/// How long a log call stalls.
const LOG_STALL: Duration = Duration::from_micros(500);

static SEED: AtomicU64 = AtomicU64::new(0);
static THREADS: AtomicU64 = AtomicU64::new(0);
std::thread_local! {
    static DRAWN: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Makes threads yield or sleep around locks from now on.
pub fn perturb(seed: u64) {
    SEED.store(seed, Ordering::SeqCst);
    check::set_chaos(Some(yield_or_sleep));
}

/// Returns the next random number of this thread, as a generator.
fn random() -> Random {
    DRAWN.with(|drawn| {
        let mut random = Random(drawn.get().unwrap_or_else(|| {
            SEED.load(Ordering::SeqCst) ^ (THREADS.fetch_add(1, Ordering::SeqCst) << 32)
        }));
        let n = random.next();
        drawn.set(Some(random.0));
        Random(n)
    })
}

/// Makes log calls sleep at times, as they would if the log were written to a slow reader. A lock
/// that is held meanwhile is a violation, and its hold counts as one that slept.
pub fn stall_log_calls() {
    struct Stalls;
    impl log::Log for Stalls {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            check::log_call(record);
            if random().one_in(8) {
                std::thread::sleep(LOG_STALL);
            }
        }
        fn flush(&self) {}
    }
    log::set_logger(&Stalls).expect("nothing has logged before");
    log::set_max_level(log::LevelFilter::Trace);
}

/// Lets other threads run. Is called before and after a lock is taken.
fn yield_or_sleep(_: Rank) {
    const PAUSE: Duration = Duration::from_micros(50);
    match random().0 % 256 {
        // A thread that holds a lock only yields, because sleeping there is what the fuzzer must
        // find.
        0 if check::held() == 0 => std::thread::sleep(PAUSE),
        1..16 => std::thread::yield_now(),
        _ => {}
    }
}

/// The disturbances of a round.
#[derive(Clone, Copy)]
pub struct Round {
    pub store_fails: bool,
    /// The daemon closes while requests are in progress.
    pub closes: bool,
    /// The daemon's files are not on a tmpfs.
    pub is_on_disk: bool,
}

impl Round {
    pub fn of(seed: u64) -> Self {
        Self {
            store_fails: seed % 4 == 1,
            closes: seed % 4 == 3,
            is_on_disk: seed % 8 < 2,
        }
    }

    pub fn is_plain(self) -> bool {
        !self.store_fails && !self.closes
    }

    /// Disturbs the actors until they have ended.
    pub fn disturb(self, stage: &Stage<'_>, mut random: Random, is_over: impl Fn() -> bool) {
        if self.closes {
            let after = random.below(ACTORS * REQUESTS * 3 / 4);
            await_replies(stage, after, &is_over);
            stage.world.close();
        }
        while self.store_fails && !is_over() {
            let now = stage.replies.load(Ordering::SeqCst);
            await_replies(stage, now + random.below(REPLIES_PER_FAULT), &is_over);
            break_store(stage, &mut random);
        }
        if self.store_fails {
            stage.world.daemon().core.store.faults().heal();
            let store = &stage.world.daemon().core.store;
            assert!(store.wait_writable(crate::world::soon()));
        }
    }
}

fn await_replies(stage: &Stage<'_>, wanted: u64, is_over: &impl Fn() -> bool) {
    while stage.replies.load(Ordering::SeqCst) < wanted && !is_over() {
        std::thread::park_timeout(LOOK);
    }
}

fn break_store(stage: &Stage<'_>, random: &mut Random) {
    let faults = stage.world.daemon().core.store.faults();
    let attempts = 1 + random.below(2);
    match random.below(5) {
        0 => faults.fail(Fault::DiskFull, attempts),
        1 => faults.fail(Fault::Io, attempts),
        2 => faults.fail(Fault::IoAfterCommit, 1),
        3 => faults.fail_folds(1),
        _ => {
            let gate = faults.gate();
            std::thread::park_timeout(SLOW_WRITE);
            drop(gate);
        }
    }
}
