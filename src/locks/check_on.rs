use super::rank::Rank;
use parking_lot::Mutex;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::{Debug, Write as _};
use std::panic::Location;
use std::sync::atomic::{AtomicU32, Ordering};

struct Held {
    id: u64,
    rank: Rank,
    key: String,
    at: &'static Location<'static>,
}

#[cfg(feature = "shuttle")]
use shuttle::thread_local;

#[derive(Default)]
struct HeldList {
    next_id: u64,
    held: Vec<Held>,
}

thread_local! {
    static HELD: RefCell<HeldList> = RefCell::new(HeldList::default());
}

type Site = &'static Location<'static>;
static EDGES: [AtomicU32; Rank::ALL.len()] = [const { AtomicU32::new(0) }; Rank::ALL.len()];
static SITES: Mutex<BTreeMap<(Rank, Rank), (Site, Site)>> = Mutex::new(BTreeMap::new());

pub struct Token {
    id: u64,
}

impl Drop for Token {
    // Never panics: it runs during unwinding. Any drop order is fine.
    fn drop(&mut self) {
        let _ = HELD.try_with(|list| {
            let held = &mut list.borrow_mut().held;
            if let Some(i) = held.iter().rposition(|h| h.id == self.id) {
                held.remove(i);
            }
        });
    }
}

#[track_caller]
pub fn acquire(rank: Rank, key: &dyn Debug, sorted: bool) -> Token {
    let at = Location::caller();
    let key = format!("{key:?}");
    let result = HELD.with(|list| {
        let list = &mut *list.borrow_mut();
        if let Err(report) = verdict(&list.held, rank, &key, sorted, at, u64::MAX) {
            return Err(report);
        }
        for h in &list.held {
            record_edge(h.rank, rank, h.at, at);
        }
        list.next_id += 1;
        let id = list.next_id;
        list.held.push(Held { id, rank, key, at });
        Ok(Token { id })
    });
    result.unwrap_or_else(|report| {
        fail(&report);
        Token { id: 0 }
    })
}

#[track_caller]
pub fn check_wait(region: Rank, except: &Token) {
    let at = Location::caller();
    let r = HELD.with(|list| verdict(&list.borrow().held, region, "()", false, at, except.id));
    if let Err(report) = r {
        fail(&report)
    }
}

pub fn held() -> usize {
    HELD.with(|l| l.borrow().held.len())
}

fn fail(report: &str) {
    VIOLATIONS.fetch_add(1, Ordering::SeqCst);
    if std::thread::panicking() { log::error!("{report}") } else { panic!("{report}") }
}

fn record_edge(from: Rank, to: Rank, from_at: Site, to_at: Site) {
    let bit = 1 << to as u32;
    if EDGES[from as usize].fetch_or(bit, Ordering::Relaxed) & bit == 0 {
        SITES.lock().insert((from, to), (from_at, to_at));
    }
}

fn label(rank: Rank, key: &str) -> String {
    if key == "()" { rank.name().to_string() } else { format!("{}[{key}]", rank.name()) }
}

fn verdict(held: &[Held], rank: Rank, key: &str, sorted: bool, at: Site, except: u64) -> Result<(), String> {
    let ok = |h: &Held| h.id == except || rank.under().contains(h.rank) || (sorted && h.rank == rank && h.key.as_str() != key);
    let Some(bad) = held.iter().find(|h| !ok(h)) else { return Ok(()) };
    let mut out = String::new();
    let me = std::thread::current();
    let what = if bad.rank == rank && bad.key == key {
        "lock taken twice"
    } else if bad.rank == rank {
        "two locks of one rank"
    } else if rank.under().contains(bad.rank) || bad.rank.under().contains(rank) {
        "lock order violation"
    } else {
        "locks that exclude each other"
    };
    let _ = writeln!(out, "{what} in thread '{}'", me.name().unwrap_or("?"));
    let _ = writeln!(out, "  wanted  {:<28} at {at}", label(rank, key));
    for h in held.iter().rev() {
        let mark = if h.id == bad.id { "   <- conflict" } else { "" };
        let _ = writeln!(out, "  holding {:<28} at {}{mark}", label(h.rank, &h.key), h.at);
    }
    let under: Vec<_> = rank.under().iter().map(Rank::name).collect();
    let _ = write!(
        out,
        "  rule    {} may be taken only under: {} (src/locks/rank.rs)",
        rank.name(),
        if under.is_empty() { "nothing".into() } else { under.join(", ") }
    );
    Err(out)
}

pub fn dot() -> String {
    let mut out = String::from("digraph locks {\n");
    for to in Rank::ALL {
        for from in to.under().iter() {
            let seen = SITES.lock().get(&(from, to)).copied();
            let _ = match seen {
                Some((a, b)) => writeln!(out, "  {from:?} -> {to:?} [tooltip=\"{a} -> {b}\"];"),
                None => writeln!(out, "  {from:?} -> {to:?} [style=dotted];"),
            };
        }
    }
    out + "}\n"
}
static VIOLATIONS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
/// Violations so far, also those that a panic handler swallowed.
pub fn violations() -> u64 {
    VIOLATIONS.load(Ordering::SeqCst)
}
pub fn assert_none_held(at: &str) {
    if held() != 0 {
        fail(&format!("locks held at {at}"));
    }
}
