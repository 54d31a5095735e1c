//! The disabled checker. It has the items of `check_on.rs`, which documents them; here they store
//! nothing and do nothing.

use super::rank::Rank;
use crate::sched;
use std::fmt::Debug;

/// True if this build checks locks.
pub const IS_ON: bool = false;

/// Stands for the rank of a lock, which this build does not store.
pub struct Tag;
impl Tag {
    #[inline(always)]
    pub const fn new(_rank: Rank) -> Self {
        Self
    }
}

/// A lock that a thread is about to take.
#[allow(dead_code, reason = "check_on.rs reads the fields")]
pub struct Request<'a> {
    pub key: Option<&'a dyn Debug>,
    pub instance: *const (),
    pub blocks: bool,
}

pub struct Token;
impl Token {
    #[inline(always)]
    pub fn taken(&self) {}
    #[inline(always)]
    pub fn contended(&self) {}
    #[inline(always)]
    pub fn resumed(&self) {}
}

#[inline(always)]
pub fn acquire(_tag: &Tag, _want: Request<'_>) -> Token {
    Token
}
#[inline(always)]
pub fn check_wait(_region: Rank, _except: &Token) {}
#[inline(always)]
pub fn may_block(_what: &str) {}
#[inline(always)]
pub fn log_call(_record: &log::Record<'_>) {}
#[inline(always)]
pub fn assert_none_held(_at: &str) {}
#[cfg(any(test, feature = "fakes"))]
#[inline(always)]
pub fn held() -> usize {
    0
}
#[inline(always)]
pub fn lock_beneath<T>(mutex: &sched::Mutex<T>) -> sched::MutexGuard<'_, T> {
    mutex.lock()
}
#[inline(always)]
pub fn violations() -> u64 {
    0
}
#[cfg(any(test, feature = "fakes"))]
#[inline(always)]
pub fn set_chaos(_hook: Option<fn(Rank)>) {}
#[cfg(any(test, feature = "fakes"))]
pub fn observed() -> Vec<super::rank::Edge> {
    Vec::new()
}
/// Returns the table as a Graphviz graph.
#[cfg(any(test, feature = "fakes"))]
pub fn dot() -> String {
    super::rank::dot(None)
}
#[cfg(any(test, feature = "fakes"))]
pub fn dump() -> String {
    "the lock checker is off in this build\n".to_owned()
}
