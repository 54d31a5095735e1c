//! Resource usage of a process, from proc(5): counters since its start, and its current memory.

use super::process::{Identity, Process};
use crate::error::{Error, Kind, Result};
use nix::unistd::{SysconfVar, sysconf};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// CPU time of all threads, in user and kernel mode.
    pub cpu_ns: u64,
    /// Resident memory, including shared pages.
    pub memory_bytes: u64,
    /// Bytes read from block devices, if the kernel counts them.
    pub disk_read_bytes: Option<u64>,
    /// Bytes written to block devices, if the kernel counts them.
    pub disk_written_bytes: Option<u64>,
}

/// Returns the usage of a VMM's process.
///
/// # Errors
/// `vmm_failed` if the process has exited.
pub fn of(identity: &Identity) -> Result<Usage> {
    crate::locks::may_block("file access");
    let gone = || {
        Error::new(
            Kind::VmmFailed,
            format!("read the usage of process {}: it has exited", identity.pid),
        )
    };
    let process = Process::open(identity)?.ok_or_else(gone)?;
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", identity.pid)).ok();
    let usage = read("stat")
        .and_then(|stat| cpu_ns(&stat))
        .zip(read("statm").and_then(|statm| memory_bytes(&statm)));
    let io = read("io");
    let count = |name: &str| io.as_deref().and_then(|io| counter(io, name));
    // If the process still lives, its pid was not reused and the numbers are its own.
    match usage {
        Some((cpu_ns, memory_bytes)) if process.is_alive() => Ok(Usage {
            cpu_ns,
            memory_bytes,
            disk_read_bytes: count("read_bytes"),
            disk_written_bytes: count("write_bytes"),
        }),
        _ => Err(gone()),
    }
}

/// Returns the CPU time from `/proc/<pid>/stat`: the sum of fields 14 and 15, which are in clock
/// ticks. The process's name may contain anything, so the fields are counted from the last
/// parenthesis.
fn cpu_ns(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields
        .get(11)?
        .parse::<u64>()
        .ok()?
        .checked_add(fields.get(12)?.parse().ok()?)?;
    let per_s = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??)
        .ok()
        .filter(|n| *n > 0)?;
    ticks.checked_mul(1_000_000_000 / per_s)
}

/// Returns the resident memory from `/proc/<pid>/statm`: the second field, which is in pages.
fn memory_bytes(statm: &str) -> Option<u64> {
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(u64::try_from(sysconf(SysconfVar::PAGE_SIZE).ok()??).ok()?)
}

fn counter(io: &str, name: &str) -> Option<u64> {
    io.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(": ")?
            .trim()
            .parse()
            .ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::process::{Spawn, spawn};
    use crate::locks::Cancel;
    use crate::sched::Instant;
    use std::time::Duration;

    #[test]
    fn usage_fields_are_parsed() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 1 0 99 1 1";
        assert_eq!(cpu_ns(stat), Some(2_000_000_000), "at 100 ticks a second");
        for bad in [
            "",
            "7 (a",
            "7 (a) S 1",
            "7 (a) S 1 7 7 0 -1 4194560 1 2 3 4 x 50 0",
        ] {
            assert_eq!(cpu_ns(bad), None, "{bad}");
        }
        assert_eq!(
            (memory_bytes("9 2 1 1 0 1 0\n"), memory_bytes("9")),
            (Some(8192), None)
        );
        let io = "rchar: 1\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 1\n";
        assert_eq!(
            (
                counter(io, "read_bytes"),
                counter(io, "write_bytes"),
                counter(io, "x")
            ),
            (Some(4096), Some(8192), None)
        );
    }

    #[test]
    fn busy_process_uses_cpu_and_exited_one_fails() {
        let args = ["-c", "while :; do :; done"].map(Into::into).to_vec();
        let spec = Spawn {
            program: "/bin/sh".into(),
            args,
            env: vec![],
            cwd: "/".into(),
            output: None,
            credentials: None,
            groups: Vec::new(),
        };
        let process = spawn(spec).unwrap();
        let first = of(process.identity()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while of(process.identity()).unwrap().cpu_ns < first.cpu_ns + 50_000_000 {
            assert!(Instant::now() < deadline, "it gets no CPU time");
            std::thread::yield_now();
        }
        assert!(first.memory_bytes > 0);
        process.signal(rustix::process::Signal::KILL).unwrap();
        assert!(process.wait(deadline, &Cancel::try_new().unwrap()).unwrap());
        assert_eq!(of(process.identity()).unwrap_err().kind(), Kind::VmmFailed);
    }
}
