//! The identity of a process, as the kernel reports it in `/proc`.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::sync::OnceLock;

/// Identifies a process even if its pid is reused later or the host reboots.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    pub pid: u32,
    /// The start time in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start_time: u64,
    /// The content of `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// Returns the kernel's id of the current boot.
pub fn boot_id() -> Result<&'static str> {
    crate::locks::may_block("file access");
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    if let Some(id) = BOOT_ID.get() {
        return Ok(id);
    }
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(PATH).map_err(|e| Error::io(format!("read {PATH}"), e))?;
    Ok(BOOT_ID.get_or_init(|| id.trim().to_owned()))
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stat {
    state: u8,
    pub start_time: u64,
}

impl Stat {
    pub(super) fn is_dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

pub(super) fn read_stat(pid: u32) -> Option<Stat> {
    crate::locks::may_block("file access");
    parse_stat(&std::fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// Parses `/proc/<pid>/stat` (proc(5)). The name is in parentheses and may itself contain `) `, so
/// the last parenthesis ends it.
fn parse_stat(stat: &[u8]) -> Option<Stat> {
    let end = stat.iter().rposition(|b| *b == b')')?;
    let mut fields = stat[end + 1..]
        .split(|b| b.is_ascii_whitespace())
        .filter(|f| !f.is_empty());
    let state = *fields.next()?.first()?;
    // The state is field 3, the start time field 22.
    let start_time = std::str::from_utf8(fields.nth(18)?).ok()?.parse().ok()?;
    Some(Stat { state, start_time })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_name_with_parentheses_is_parsed() {
        let line =
            b"42 (a) R 1 (b) ) S 1 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 987654 1000 2 0\n";
        assert_eq!(
            parse_stat(line),
            Some(Stat {
                state: b'S',
                start_time: 987_654
            })
        );
        assert_eq!(parse_stat(b"42 (x) S 1 2"), None);
        assert_eq!(parse_stat(b""), None);
    }
}
