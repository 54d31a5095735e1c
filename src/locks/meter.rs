//! Measures the holds of locks, for the checker: their CPU time and whether the thread slept. Also
//! counts where threads had to wait.

use super::rank::{Contention, Rank, Site};
use super::stats;
use crate::sched::{Instant, Mutex, MutexGuard};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;

/// A hold that takes more CPU time than this counts as long. A thread that only touches memory
/// releases its lock within microseconds.
const HOLD_CPU_LONG: Duration = Duration::from_millis(1);

/// A simulation has no real threads at a time, so its holds and waits say nothing.
const IS_SIMULATED: bool = cfg!(feature = "sim");

/// Statistics about the holds of one rank's locks since the process started.
#[derive(Clone, Debug, Default)]
pub struct Holds {
    pub count: u64,
    /// The longest hold in CPU time of the thread, including the checker's own.
    pub longest: Duration,
    pub longest_at: String,
    /// Holds of more than [`HOLD_CPU_LONG`].
    pub long: u64,
    /// Voluntary context switches of threads during a hold.
    pub switches: u64,
    /// Switches in holds during which the thread waited for no other lock, so something else
    /// blocked it.
    pub unexplained: u64,
    pub unexplained_at: String,
}

/// The resources that a thread has used so far.
#[derive(Clone, Copy, Default)]
pub(super) struct Usage {
    cpu: Duration,
    switches: u64,
    contended: u64,
}

impl Usage {
    pub(super) fn now() -> Self {
        if IS_SIMULATED {
            return Self::default();
        }
        use nix::sys::resource::{UsageWho, getrusage};
        use nix::time::{ClockId, clock_gettime};
        let cpu =
            clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
        let switches =
            getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |u| u.voluntary_context_switches());
        Self {
            cpu,
            switches: u64::try_from(switches).unwrap_or(0),
            contended: contended(),
        }
    }
}

/// Statistics about the holds of the locks under which there is only memory.
static HOLDS: Mutex<BTreeMap<Rank, Holds>> = Mutex::new(BTreeMap::new());
/// How often a thread had to wait for a lock, by the place that asked for it.
static CONTENTION: Mutex<BTreeMap<(Rank, Site), u64>> = Mutex::new(BTreeMap::new());

std::thread_local! {
    /// How often this thread had to wait for a mutex or a condition.
    static CONTENDED: Cell<u64> = const { Cell::new(0) };
}

pub(super) fn contended() -> u64 {
    CONTENDED.with(Cell::get)
}

/// Records that this thread has to wait.
pub(super) fn note_contended() {
    CONTENDED.with(|c| c.set(c.get() + 1));
}

/// Records that a thread had to wait for a lock that it took at this place.
pub(super) fn contended_at(place: (Rank, Site)) {
    if IS_SIMULATED {
        return;
    }
    *lock_beneath(&CONTENTION).entry(place).or_default() += 1;
}

pub(super) fn measure(rank: Rank, is_leaf: bool, (since, began): (Usage, Instant), at: Site) {
    if IS_SIMULATED {
        return;
    }
    let now = Usage::now();
    if is_leaf {
        stats::held(rank, began.elapsed());
    }
    let (cpu, switches) = (
        now.cpu.saturating_sub(since.cpu),
        now.switches.saturating_sub(since.switches),
    );
    let mut holds = lock_beneath(&HOLDS);
    let holds = holds.entry(rank).or_default();
    holds.count += 1;
    holds.switches += switches;
    if switches > 0 && now.contended == since.contended {
        holds.unexplained += switches;
        holds.unexplained_at = at.to_string();
    }
    holds.long += u64::from(cpu > HOLD_CPU_LONG);
    if cpu > holds.longest {
        (holds.longest, holds.longest_at) = (cpu, at.to_string());
    }
}

/// Returns statistics about the holds of each rank so far. Only the locks under which there is only
/// memory are measured.
#[cfg(any(test, feature = "fakes"))]
pub fn holds() -> BTreeMap<Rank, Holds> {
    HOLDS.lock().clone()
}

/// Returns the places where threads had to wait for a lock, and how often.
pub fn contention() -> Vec<Contention> {
    let sites = CONTENTION.lock();
    let of = |(&(rank, at), &count): (&(Rank, Site), &u64)| Contention { rank, at, count };
    sites.iter().map(of).collect()
}

/// Locks the underlying mutex.
#[cfg(feature = "sim")]
pub fn lock_beneath<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}

/// Locks the underlying mutex, and counts the lock as contended if the thread has to wait.
#[cfg(not(feature = "sim"))]
pub fn lock_beneath<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.try_lock().unwrap_or_else(|| {
        note_contended();
        mutex.lock()
    })
}
