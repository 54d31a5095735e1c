//! The checker switched off: nothing is stored, nothing is done.

use super::rank::{Edge, Rank};
use std::fmt::Debug;

/// Whether this build checks locks.
pub const IS_ON: bool = false;

/// The rank of a lock: not kept.
pub struct Tag;
impl Tag {
    #[inline(always)]
    pub const fn new(_rank: Rank) -> Self {
        Self
    }
}

/// How a lock is wanted.
pub struct Want<'a> {
    pub key: Option<&'a dyn Debug>,
    pub instance: *const (),
    pub sorted: bool,
    pub blocks: bool,
}

pub struct Token;
impl Token {
    #[inline(always)]
    pub fn taken(&self) {}
}

#[inline(always)]
pub fn acquire(_tag: &Tag, _want: Want<'_>) -> Token {
    Token
}
#[inline(always)]
pub fn check_wait(_region: Rank, _except: &Token) {}
/// Panics where this thread holds a lock under which only memory may be touched.
#[inline(always)]
pub fn require_memory_only(_what: &str) {}
/// Panics where a log call happens under such a lock.
#[inline(always)]
pub fn log_call(_record: &log::Record<'_>) {}
/// Panics where this thread holds a lock or is in a region.
#[inline(always)]
pub fn assert_none_held(_at: &str) {}
/// Locks and regions of this thread.
#[inline(always)]
pub fn held() -> usize {
    0
}
#[inline(always)]
pub fn lock_beneath<T>(mutex: &parking_lot::Mutex<T>) -> parking_lot::MutexGuard<'_, T> {
    mutex.lock()
}
/// Violations so far, also those that a panic handler swallowed.
#[inline(always)]
pub fn violations() -> u64 {
    0
}
/// Called before each acquisition, with nothing of the checker's borrowed.
#[inline(always)]
pub fn set_chaos(_hook: Option<fn(Rank)>) {}
/// The declared edges that occurred in this process.
pub fn observed() -> Vec<Edge> {
    Vec::new()
}
/// The table as Graphviz.
pub fn dot() -> String {
    super::rank::dot(None)
}
/// What every thread holds and wants.
pub fn dump() -> String {
    "the lock checker is off in this build\n".to_owned()
}
