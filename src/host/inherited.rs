//! The descriptors and ignored signals that a process inherits from its parent.

use crate::error::{Error, Result};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// The first descriptor after stdin, stdout and stderr (sd_listen_fds(3), SD_LISTEN_FDS_START).
const FIRST: RawFd = 3;

/// Closes every descriptor except stdin, stdout, stderr and those that systemd passes
/// (`LISTEN_FDS`), which become close-on-exec.
///
/// Call this function before the program opens anything, because it closes every other open
/// descriptor.
pub fn close_descriptors(env: &dyn Fn(&str) -> Option<String>) -> Result<()> {
    let kept = listen_fds(env, std::process::id());
    let closed = close_range(FIRST + kept, RawFd::MAX, 0);
    let marked = if kept > 0 {
        close_range(FIRST, FIRST + kept - 1, libc::CLOSE_RANGE_CLOEXEC)
    } else {
        Ok(())
    };
    closed
        .and(marked)
        .map_err(|e| Error::io("close the inherited descriptors", e))
}

/// Returns how many descriptors systemd passes to the process `pid`. The first one is [`FIRST`].
fn listen_fds(env: &dyn Fn(&str) -> Option<String>, pid: u32) -> RawFd {
    let number = |name: &str| env(name)?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(pid) {
        return 0;
    }
    number("LISTEN_FDS")
        .and_then(|n| RawFd::try_from(n).ok())
        .filter(|n| *n <= RawFd::MAX - FIRST)
        .unwrap_or(0)
}

/// Returns duplicates of the descriptors that systemd passes to this process. They are open for as
/// long as the process, because [`close_descriptors`] keeps them.
pub fn passed_descriptors(env: &dyn Fn(&str) -> Option<String>) -> impl Iterator<Item = OwnedFd> {
    let end = FIRST + listen_fds(env, std::process::id());
    (FIRST..end).filter_map(duplicate)
}

#[allow(unsafe_code)]
fn duplicate(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: systemd has opened the descriptor for this process, and nothing closes it. If it is
    // not open, the call below fails.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_dupfd_cloexec(fd, FIRST).ok()
}

#[allow(unsafe_code)]
fn close_range(first: RawFd, last: RawFd, flags: u32) -> std::io::Result<()> {
    // SAFETY: the call takes no pointers, and the program has not yet opened a descriptor that it
    // owns.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if done == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// True if the process ignores `signal`, as `nohup` arranges for SIGHUP.
pub fn ignores(signal: i32) -> Result<bool> {
    crate::locks::may_block("file access");
    const PATH: &str = "/proc/self/status";
    let status = std::fs::read_to_string(PATH).map_err(|e| Error::io(format!("read {PATH}"), e))?;
    Ok(ignored(&status).is_some_and(|set| set & (1 << (signal - 1)) != 0))
}

/// Returns the set of ignored signals from the text of `/proc/<pid>/status` (proc(5)).
fn ignored(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_fds_count_only_for_their_process() {
        let with = |pid: &'static str, fds: &'static str| {
            let env = move |name: &str| match name {
                "LISTEN_PID" => Some(pid.to_owned()),
                "LISTEN_FDS" => Some(fds.to_owned()),
                _ => None,
            };
            listen_fds(&env, 42)
        };
        assert_eq!(with("42", "2"), 2);
        for (pid, fds) in [
            ("41", "2"),
            ("", "2"),
            ("x", "2"),
            ("42", ""),
            ("42", "-1"),
            ("42", "4294967295"),
            ("42", "2147483647"),
        ] {
            assert_eq!(with(pid, fds), 0, "LISTEN_PID={pid} LISTEN_FDS={fds}");
        }
        assert_eq!(listen_fds(&|_| None, 42), 0);
    }

    #[test]
    fn ignored_signals_are_read_from_status() {
        // The process ignores SIGHUP and SIGPIPE.
        let status = "Name:\tfcd\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000004002\n";
        assert_eq!(ignored(status), Some(0x1001));
        assert_eq!(ignored("Name:\tfcd\n"), None);
        assert!(!ignores(libc::SIGTERM).unwrap());
    }
}
