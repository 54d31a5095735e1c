//! The checker. It keeps a list of the locks that each thread holds, and compares the list with the
//! table before each acquisition.
//!
//! Two environment variables are read once. `FCD_LOCK_ABORT=1` makes the process abort on the first
//! violation. Tests set it for their daemons, so that no `catch_unwind` hides a violation.
//! `FCD_LOCK_EDGES=FILE` appends a line `From To` for every declared edge when this process first
//! sees it; the test suite fails if no process saw an edge.

use super::meter::{self, Usage};
use super::rank::{Edge, Rank, Site, rule};
use super::stats;
use crate::sched::Instant;
use parking_lot::Mutex;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::{Debug, Write as _};
use std::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

#[cfg(feature = "shuttle")]
// Shuttle's tasks run on one OS thread, so with std's macro they would share one list.
use shuttle::thread_local;

#[cfg(any(test, feature = "fakes"))]
pub use meter::holds;
pub use meter::{contention, lock_beneath};

/// True if this build checks locks.
pub const IS_ON: bool = true;

/// The rank of a lock.
pub struct Tag(Rank);
impl Tag {
    pub const fn new(rank: Rank) -> Self {
        Self(rank)
    }
}

/// A lock that a thread is about to take.
pub struct Request<'a> {
    pub key: Option<&'a dyn Debug>,
    /// The lock's address, null for a region. It distinguishes a lock that is taken twice from two
    /// locks of one rank.
    pub instance: *const (),
    /// False for `try_lock`, which cannot hang.
    pub blocks: bool,
}

struct Held {
    asked: Instant,
    /// The thread's usage when it asked for the lock.
    contended_before: u64,
    /// Set while the thread has a lock under which there is only memory.
    since: Option<(Usage, Instant)>,
    id: u64,
    rank: Rank,
    key: Option<String>,
    instance: usize,
    at: Site,
    taken: bool,
}

impl Held {
    fn new(rank: Rank, want: Request<'_>, at: Site) -> Self {
        Self {
            asked: Instant::now(),
            contended_before: meter::contended(),
            since: None,
            id: 0,
            rank,
            key: want.key.map(|k| format!("{k:?}")),
            instance: want.instance as usize,
            at,
            taken: want.instance.is_null(),
        }
    }

    /// True for the locks of subsystems, which have no keys. A [`LockSet`](super::LockSet) counts
    /// the waits and holds of its own locks.
    fn is_leaf(&self) -> bool {
        self.key.is_none() && self.instance != 0
    }
}

struct HeldList {
    thread: String,
    last_id: u64,
    held: Vec<Held>,
}

/// This thread's list, shared with [`dump`]. No other lock is taken while its mutex is held.
struct Local(Arc<Mutex<HeldList>>);

impl Local {
    fn register() -> Self {
        #[cfg(any(test, feature = "fakes"))]
        check_log_calls();
        let thread = super::raw::current().name().unwrap_or("?").to_owned();
        let list = Arc::new(Mutex::new(HeldList {
            thread,
            last_id: 0,
            held: Vec::new(),
        }));
        THREADS.lock().push(list.clone());
        Self(list)
    }
}

/// Installs a logger that checks every log call, so that tests find log calls under a lock although
/// they write no log. Does nothing if a logger is already installed.
#[cfg(any(test, feature = "fakes"))]
fn check_log_calls() {
    struct Checks;
    impl log::Log for Checks {
        fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            log_call(record);
        }
        fn flush(&self) {}
    }
    if log::set_logger(&Checks).is_ok() {
        log::set_max_level(log::LevelFilter::Trace);
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        THREADS.lock().retain(|list| !Arc::ptr_eq(list, &self.0));
    }
}

static THREADS: Mutex<Vec<Arc<Mutex<HeldList>>>> = Mutex::new(Vec::new());
static EDGES: [AtomicU32; Rank::ALL.len()] = [const { AtomicU32::new(0) }; Rank::ALL.len()];
static SITES: Mutex<BTreeMap<(Rank, Rank), (Site, Site)>> = Mutex::new(BTreeMap::new());
static VIOLATIONS: AtomicU64 = AtomicU64::new(0);
/// The number of violations that the checker's own tests have provoked.
static EXPECTED: AtomicU64 = AtomicU64::new(0);
static CHAOS_ON: AtomicBool = AtomicBool::new(false);
static CHAOS: Mutex<Option<fn(Rank)>> = Mutex::new(None);

thread_local! {
    static LOCAL: Local = Local::register();
}
std::thread_local! {
    /// True if this thread's edges and violations are recorded. It is false in the checker's own
    /// tests, whose edges and violations must not be counted as the daemon's.
    static RECORDING: Cell<bool> = const { Cell::new(true) };
}

pub struct Token {
    id: u64,
}

impl Token {
    /// Records that the lock was acquired, so that [`dump`] no longer shows the thread as waiting.
    pub fn taken(&self) {
        let mut contended = None;
        self.edit(|held, i| {
            let h = &mut held[i];
            h.taken = true;
            if h.is_leaf() {
                stats::waited(h.rank, h.asked.elapsed());
            }
            if meter::contended() > h.contended_before {
                contended = Some((h.rank, h.at));
            }
            begin_hold(h);
        });
        if let Some(site) = contended {
            meter::contended_at(site);
        }
        let mut rank = None;
        self.edit(|held, i| rank = Some(held[i].rank));
        if let Some(rank) = rank {
            perturb(rank);
        }
    }

    /// Records that the thread has to wait for the lock.
    pub fn contended(&self) {
        meter::note_contended();
    }

    /// Records that a condition wait, which released the lock, has ended.
    pub fn resumed(&self) {
        self.edit(|held, i| begin_hold(&mut held[i]));
    }

    fn end_hold(&self) {
        let mut ended = None;
        self.edit(|held, i| {
            ended = held[i]
                .since
                .take()
                .map(|s| (s, held[i].rank, held[i].is_leaf(), held[i].at))
        });
        ended
            .into_iter()
            .for_each(|(since, rank, is_leaf, at)| meter::measure(rank, is_leaf, since, at));
    }

    fn edit(&self, f: impl FnOnce(&mut Vec<Held>, usize)) {
        let _ = LOCAL.try_with(|local| {
            let held = &mut local.0.lock().held;
            if let Some(i) = held.iter().rposition(|h| h.id == self.id) {
                f(held, i);
            }
        });
    }
}

impl Drop for Token {
    // This must not panic, because it also runs during unwinding. Guards may be dropped in any
    // order.
    fn drop(&mut self) {
        self.end_hold();
        self.edit(|held, i| drop(held.remove(i)));
    }
}

fn begin_hold(h: &mut Held) {
    if h.rank.is_memory_only() && h.instance != 0 {
        h.since = Some((Usage::now(), Instant::now()));
    }
}

/// Adds the wanted lock to this thread's list. Panics before the thread blocks if the table does
/// not allow this lock together with those that the thread holds.
#[track_caller]
pub fn acquire(tag: &Tag, want: Request<'_>) -> Token {
    let (rank, at, blocks) = (tag.0, Location::caller(), want.blocks);
    perturb(rank);
    let wanted = Held::new(rank, want, at);
    // Judge under the list's mutex, but panic and record outside it, because both may call other
    // code.
    let judged = LOCAL.with(|local| {
        let list = &mut *local.0.lock();
        if let Some(bad) = list
            .held
            .iter()
            .position(|h| !wanted.rank.under().contains(h.rank))
        {
            return Err((
                report(&list.thread, &list.held, bad, &wanted),
                hangs(&list.held[bad], &wanted) && blocks,
            ));
        }
        let edges: Vec<_> = list
            .held
            .iter()
            .filter(|h| is_new(h.rank, rank))
            .map(|h| (h.rank, h.at))
            .collect();
        list.last_id += 1;
        let id = list.last_id;
        list.held.push(Held { id, ..wanted });
        Ok((id, edges))
    });
    match judged {
        Ok((id, edges)) => {
            record(rank, at, edges);
            Token { id }
        }
        Err((report, hangs)) => {
            fail(&report, hangs);
            Token { id: 0 }
        }
    }
}

/// Calls the function that [`set_chaos`] set.
fn perturb(rank: Rank) {
    if CHAOS_ON.load(Ordering::Relaxed) {
        let hook = *CHAOS.lock();
        if let Some(hook) = hook {
            hook(rank);
        }
    }
}

/// Panics if the table does not allow a condition wait under the locks that the thread holds. The
/// lock of `except` is ignored, because the wait releases it until [`Token::resumed`].
#[track_caller]
pub fn check_wait(region: Rank, except: &Token) {
    let at = Location::caller();
    except.end_hold();
    except.contended();
    let want = Request {
        key: None,
        instance: std::ptr::null(),
        blocks: false,
    };
    let wanted = Held::new(region, want, at);
    let judged = LOCAL.with(|local| {
        let list = local.0.lock();
        let others = || list.held.iter().filter(|h| h.id != except.id);
        match list
            .held
            .iter()
            .position(|h| h.id != except.id && !wanted.rank.under().contains(h.rank))
        {
            Some(bad) => Err(report(&list.thread, &list.held, bad, &wanted)),
            None => Ok(others()
                .filter(|h| is_new(h.rank, region))
                .map(|h| (h.rank, h.at))
                .collect()),
        }
    });
    match judged {
        Ok(edges) => record(region, at, edges),
        Err(report) => fail(&report, false),
    }
}

/// Panics if this thread holds a lock under which only memory may be touched. Call this function
/// before a system call that touches a file, a socket or a process, or that may sleep. Waits for a
/// guest, a host command or the disk have virtual ranks of their own. An unwinding thread is not
/// checked, because the destructors that it runs may make system calls.
#[track_caller]
pub fn may_block(what: &str) {
    require_allowed(Rank::Blocking, what, &Location::caller());
}

/// Panics like [`may_block`] for a log call, because the call may block on the reader of
/// the log.
pub fn log_call(record: &log::Record<'_>) {
    require_allowed(
        Rank::Log,
        Rank::Log.name(),
        &format_args!(
            "{}:{}",
            record.file().unwrap_or("?"),
            record.line().unwrap_or(0)
        ),
    );
}

fn require_allowed(rank: Rank, what: &str, at: &dyn std::fmt::Display) {
    if std::thread::panicking() {
        return;
    }
    // A thread whose thread-locals have been destroyed holds nothing.
    let judged = LOCAL.try_with(|local| {
        let list = local.0.lock();
        let bad = list.held.iter().position(|h| !rank.under().contains(h.rank))?;
        let mut out = format!(
            "{what} with locks held in thread '{}'\n  {what} at {at}\n",
            list.thread
        );
        list_held(&mut out, &list.held, bad);
        let _ = write!(
            out,
            "  rule    under {} there is only memory; a {} may happen only under: {} (src/locks/rank.rs)",
            list.held[bad].rank.name(),
            rank.name(),
            rule(rank)
        );
        Some(out)
    });
    if let Ok(Some(report)) = judged {
        fail(&report, false);
    }
}

/// Returns the number of locks and regions that this thread holds or waits for.
#[cfg(any(test, feature = "fakes"))]
pub fn held() -> usize {
    LOCAL.with(|local| local.0.lock().held.len())
}

/// Panics if this thread holds a lock or is in a region.
pub fn assert_none_held(at: &str) {
    let report = LOCAL.with(|local| {
        let list = local.0.lock();
        let mut out = format!("locks still held in thread '{}' at: {at}", list.thread);
        for h in list.held.iter().rev() {
            let _ = write!(out, "\n  holding {:<28} at {}", label(h), h.at);
        }
        (!list.held.is_empty()).then_some(out)
    });
    if let Some(report) = report {
        fail(&report, false);
    }
}

/// Returns the number of violations so far, including those whose panic was caught.
pub fn violations() -> u64 {
    VIOLATIONS.load(Ordering::SeqCst)
}

/// Sets a function that is called before and after each acquisition of a lock, outside all of the
/// checker's own locks.
#[cfg(any(test, feature = "fakes"))]
pub fn set_chaos(hook: Option<fn(Rank)>) {
    *CHAOS.lock() = hook;
    CHAOS_ON.store(hook.is_some(), Ordering::Relaxed);
}

/// Returns the declared edges that occurred in this process.
pub fn observed() -> Vec<Edge> {
    let sites = SITES.lock();
    let edges = sites.iter();
    edges
        .map(|(&(from, to), (from_at, to_at))| Edge {
            from,
            to,
            first: (from_at.to_string(), to_at.to_string()),
        })
        .collect()
}

/// Returns the table as a Graphviz graph, with the edges observed so far.
#[cfg(any(test, feature = "fakes"))]
pub fn dot() -> String {
    super::rank::dot(Some(&observed()))
}

/// Lists the locks that each thread holds or waits for, for a watchdog.
#[cfg(any(test, feature = "fakes"))]
pub fn dump() -> String {
    let threads = THREADS.lock().clone();
    let mut out = String::new();
    for list in threads {
        let list = list.lock();
        for h in &list.held {
            let verb = if h.taken { "holds" } else { "awaits" };
            let _ = writeln!(
                out,
                "thread '{}' {verb} {} at {}",
                list.thread,
                label(h),
                h.at
            );
        }
    }
    if out.is_empty() {
        "no thread holds a lock\n".to_owned()
    } else {
        out
    }
}

/// Stops recording this thread's edges, and counts its later violations as expected.
#[cfg(all(test, not(feature = "shuttle")))]
pub fn stop_recording() {
    RECORDING.with(|r| r.set(false));
}

#[cfg(all(test, not(feature = "shuttle")))]
pub(super) fn violations_expected() -> u64 {
    EXPECTED.load(Ordering::SeqCst)
}

/// True if the wanted lock is the held one, so that waiting for it would never end.
fn hangs(held: &Held, wanted: &Held) -> bool {
    held.instance != 0 && held.instance == wanted.instance && held.key == wanted.key
}

fn label(h: &Held) -> String {
    match h.key.as_deref() {
        None | Some("()") => h.rank.name().to_owned(),
        Some(key) => format!("{}[{key}]", h.rank.name()),
    }
}

fn head(bad: &Held, wanted: &Held) -> &'static str {
    if hangs(bad, wanted) {
        "lock taken twice"
    } else if bad.rank == wanted.rank {
        "two locks of one rank"
    } else if wanted.rank.is_virtual() && !bad.rank.is_virtual() {
        "blocking with locks held"
    } else if bad.rank.under().contains(wanted.rank) {
        "lock order violation"
    } else {
        "locks that exclude each other"
    }
}

fn report(thread: &str, held: &[Held], bad: usize, wanted: &Held) -> String {
    let mut out = format!("{} in thread '{thread}'\n", head(&held[bad], wanted));
    let _ = writeln!(out, "  wanted  {:<28} at {}", label(wanted), wanted.at);
    list_held(&mut out, held, bad);
    let _ = write!(
        out,
        "  rule    {} may be taken only under: {} (src/locks/rank.rs)",
        wanted.rank.name(),
        rule(wanted.rank)
    );
    out
}

fn list_held(out: &mut String, held: &[Held], bad: usize) {
    for (i, h) in held.iter().enumerate().rev() {
        let mark = if i == bad { "   <- conflict" } else { "" };
        let _ = writeln!(out, "  holding {:<28} at {}{mark}", label(h), h.at);
    }
}

/// Panics with the report. An unwinding thread cannot panic again: it prints the report and
/// continues, unless that would block for ever (`hangs`); then the process aborts.
fn fail(report: &str, hangs: bool) {
    static ABORT: OnceLock<bool> = OnceLock::new();
    let counted = RECORDING.with(Cell::get);
    if counted { &VIOLATIONS } else { &EXPECTED }.fetch_add(1, Ordering::SeqCst);
    let aborts = counted
        && *ABORT.get_or_init(|| std::env::var_os("FCD_LOCK_ABORT").is_some_and(|v| v == "1"));
    let unwinding = std::thread::panicking();
    if aborts || (unwinding && hangs) {
        eprintln!("{report}"); // Do not use the log, which may be off or locked by this thread.
        std::process::abort();
    }
    if unwinding {
        eprintln!("{report}")
    } else {
        panic!("{report}")
    }
}

fn is_new(from: Rank, to: Rank) -> bool {
    let bit = 1 << to as u32;
    EDGES[from as usize].load(Ordering::Relaxed) & bit == 0
        && from != to
        && RECORDING.with(Cell::get)
}

fn record(to: Rank, to_at: Site, edges: Vec<(Rank, Site)>) {
    for (from, from_at) in edges {
        if EDGES[from as usize].fetch_or(1 << to as u32, Ordering::Relaxed) & (1 << to as u32) == 0
        {
            SITES.lock().insert((from, to), (from_at, to_at));
            append_edge(from, to);
        }
    }
}

fn append_edge(from: Rank, to: Rank) {
    static FILE: OnceLock<Option<std::fs::File>> = OnceLock::new();
    let file = FILE.get_or_init(|| {
        let path = std::env::var_os("FCD_LOCK_EDGES")?;
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .ok()
    });
    if let Some(mut file) = file.as_ref() {
        // One write per line, so that lines of processes that share the file do not mix.
        let _ = std::io::Write::write_all(&mut file, format!("{from:?} {to:?}\n").as_bytes());
    }
}
