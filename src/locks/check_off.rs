use super::rank::Rank;
use std::fmt::Debug;
pub struct Token;
#[inline(always)]
pub fn acquire(_rank: Rank, _key: &dyn Debug, _sorted: bool) -> Token {
    Token
}
#[inline(always)]
pub fn check_wait(_region: Rank, _except: &Token) {}
#[inline(always)]
pub fn assert_none_held(_at: &str) {}
/// Violations so far, also those that a panic handler swallowed.
#[inline(always)]
pub fn violations() -> u64 {
    0
}
