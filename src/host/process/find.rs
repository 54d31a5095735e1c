//! Finds processes by their arguments, and reads their properties from `/proc`.

use super::identity::{Identity, boot_id, read_stat};
use crate::error::{Error, Result};
use std::fs::File;
use std::path::PathBuf;

/// Finds running processes that have exactly `argument` as an argument. Root finds processes of all
/// users, and other users find only their own.
pub fn find_by_argument(argument: &str) -> Result<Vec<Identity>> {
    Ok(scan(|a| a == argument.as_bytes())?
        .into_iter()
        .map(|(_, identity)| identity)
        .collect())
}

/// Finds running processes with an argument that begins with `prefix`, and returns each with that
/// argument. Root finds processes of all users, and other users find only their own.
pub fn find_by_prefix(prefix: &str) -> Result<Vec<(String, Identity)>> {
    scan(|a| a.starts_with(prefix.as_bytes()))
}

/// Scans `/proc` for processes with an argument that `fits`, and returns each with the first such
/// argument.
fn scan(fits: impl Fn(&[u8]) -> bool) -> Result<Vec<(String, Identity)>> {
    crate::locks::may_block("file access");
    let me = rustix::process::geteuid().as_raw();
    let mut found = Vec::new();
    let entries = std::fs::read_dir("/proc").map_err(|e| Error::io("read /proc", e))?;
    for entry in entries.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Some(argument) = arguments(pid)
            .into_iter()
            .find(|a| fits(a))
            .and_then(|a| String::from_utf8(a).ok())
        else {
            continue;
        };
        if me != 0 && uid(pid) != Some(me) {
            continue;
        }
        let Some(before) = read_stat(pid).filter(|stat| !stat.is_dead()) else {
            continue;
        };
        // Read the arguments again after the stat. If the pid was reused between the two reads, the
        // stat belongs to another process.
        if arguments(pid).iter().any(|a| *a == argument.as_bytes()) {
            found.push((
                argument,
                Identity {
                    pid,
                    start_time: before.start_time,
                    boot_id: boot_id()?.to_owned(),
                },
            ));
        }
    }
    Ok(found)
}

/// Returns the argv of a process, which is empty if the process has exited or cannot be read.
pub fn arguments(pid: u32) -> Vec<Vec<u8>> {
    crate::locks::may_block("look at a process");
    const CMDLINE_BYTES_MAX: u64 = 256 * 1024;
    let Ok(file) = File::open(format!("/proc/{pid}/cmdline")) else {
        return Vec::new();
    };
    let Ok(bytes) = crate::host::command::read_bounded(file, CMDLINE_BYTES_MAX) else {
        return Vec::new();
    };
    bytes.split(|b| *b == 0).map(<[u8]>::to_vec).collect()
}

/// Returns the path of the executable, without the ` (deleted)` that the kernel appends if it was
/// replaced.
pub fn executable(pid: u32) -> Option<PathBuf> {
    crate::locks::may_block("file access");
    let path = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    Some(
        path.to_str()
            .and_then(|p| p.strip_suffix(" (deleted)"))
            .map_or(path.clone(), PathBuf::from),
    )
}

/// Returns the real uid of a process, or None if the process has exited.
pub fn uid(pid: u32) -> Option<u32> {
    crate::locks::may_block("file access");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|l| l.strip_prefix("Uid:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}
