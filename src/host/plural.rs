//! Numbers with their nouns.

/// Formats a number with its noun: `1 VM`, `3 VMs`.
pub fn count(n: u64, one: &str) -> String {
    if n == 1 {
        format!("1 {one}")
    } else {
        format!("{n} {one}s")
    }
}
