//! The host's limits: open files, memory and cores.

use crate::error::{Error, Kind, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard one and returns the resulting limit.
///
/// # Errors
/// `exhausted` if the resulting limit is below `needed`.
pub fn raise_open_files(needed: u64) -> Result<u64> {
    let doing = "raise the limit of open files";
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|e| Error::io(doing, e))?;
    let limit = if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        hard
    } else {
        soft
    };
    if limit < needed {
        let message = format!("{doing}: {needed} are needed but only {limit} are allowed");
        return Err(Error::new(Kind::Exhausted, message).hint(format!(
            "run fcd with ulimit -n {needed} or LimitNOFILE={needed}"
        )));
    }
    Ok(limit)
}

/// Returns the host's memory in MiB (`MemTotal` in `/proc/meminfo`).
pub fn mem_total_mib() -> Result<u64> {
    crate::locks::may_block("file access");
    let text =
        std::fs::read_to_string("/proc/meminfo").map_err(|e| Error::io("read /proc/meminfo", e))?;
    parse_mem_total_mib(&text)
        .ok_or_else(|| Error::new(Kind::Host, "read /proc/meminfo: it contains no MemTotal"))
}

fn parse_mem_total_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// Returns the number of cores that this process may use, or 1 if that is unknown.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_total_is_parsed() {
        assert_eq!(
            parse_mem_total_mib("MemTotal:       24609484 kB\nMemFree: 1 kB\n"),
            Some(24032)
        );
        assert_eq!(parse_mem_total_mib("MemFree: 1 kB\n"), None);
        assert!(mem_total_mib().unwrap() > 0);
    }

    #[test]
    fn open_files_are_raised_and_checked() {
        let limit = raise_open_files(16).unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap().0, limit);
        assert_eq!(
            raise_open_files(u64::MAX).unwrap_err().kind(),
            Kind::Exhausted
        );
    }
}
