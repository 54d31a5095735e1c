//! Finds out how a process that is not our child ended, with `PIDFD_GET_INFO`
//! (include/uapi/linux/pidfd.h). Linux has this request since 6.13. Since 6.15 it also reports the
//! exit status of a process that its parent has reaped.

use super::process::{Exit, Process};
use super::wait::{WaitResult, wait_uncancelled};
use crate::sched::Instant;
use nix::poll::PollFlags;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

/// How long the parent may take to reap the process. The parent is PID 1, which does little else.
const REAP_DEADLINE: Duration = Duration::from_secs(2);

const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// The kernel's `struct pidfd_info` in its first version.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroupid: u64,
    /// The process's ids and those of its credentials.
    ids: [u32; 11],
    exit_code: i32,
}

nix::ioctl_readwrite!(get_info, 0xff, 11, PidfdInfo);

/// Returns how an exited process ended. Waits a moment for its parent to reap it. Returns
/// `Exit::Unknown` on an older kernel, or if the parent has not reaped the process by then.
pub fn wait_exit(process: &Process) -> Exit {
    // Requesting no events still reports POLLHUP, which follows the reaping.
    let reaped = wait_uncancelled(
        &[(process.fd(), PollFlags::empty())],
        Instant::now() + REAP_DEADLINE,
    );
    let status = matches!(reaped, Ok(WaitResult::Ready))
        .then(|| wait_status(process.fd()))
        .flatten();
    let status = status.map(ExitStatus::from_raw);
    match status.map(|status| (status.code(), status.signal())) {
        Some((Some(code), _)) => Exit::Status(code),
        Some((None, Some(signal))) => Exit::Signal(signal),
        _ => Exit::Unknown,
    }
}

#[allow(unsafe_code)]
fn wait_status(fd: BorrowedFd<'_>) -> Option<i32> {
    let mut info = PidfdInfo {
        mask: PIDFD_INFO_EXIT,
        ..PidfdInfo::default()
    };
    // SAFETY: the kernel writes at most the size that is part of the request's number, and the
    // descriptor is borrowed.
    unsafe { get_info(fd.as_raw_fd(), &raw mut info) }.ok()?;
    (info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::process::find_by_argument;
    use rustix::process::Signal;
    use std::io::{BufRead, BufReader};

    /// The first kernel version that keeps the exit status.
    const SINCE: (u32, u32) = (6, 15);

    fn kernel() -> (u32, u32) {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release
            .trim()
            .split(['.', '-', '+'])
            .map(|part| part.parse().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap())
    }

    /// Returns how a shell's child ends after it gets this signal.
    #[allow(clippy::disallowed_methods)] // The test needs a process that is not our child.
    fn end(prepare: &str, signal: Signal) -> Exit {
        let tag = format!("fcd-test-{}-{}", std::process::id(), signal.as_raw());
        let script = format!("{prepare} echo ready; while :; do sleep 0.01; done");
        let mut shell = std::process::Command::new("sh")
            .args(["-c", &format!("sh -c '{script}' {tag} & wait")])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(shell.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let found = find_by_argument(&tag).unwrap();
        let process = Process::open(&found[0]).unwrap().unwrap();
        process.signal(signal).unwrap();
        let soon = Instant::now() + Duration::from_secs(20);
        assert!(process.wait_uncancelled(soon).unwrap());
        assert_eq!(process.exit(), Some(Exit::Unknown), "it is not our child");
        let exit = wait_exit(&process);
        shell.wait().unwrap();
        exit
    }

    #[test]
    fn exit_of_foreign_child_is_known_if_the_kernel_keeps_it() {
        let has_it = kernel() >= SINCE;
        let expected = |exit| if has_it { exit } else { Exit::Unknown };
        assert_eq!(end("", Signal::KILL), expected(Exit::Signal(9)));
        assert_eq!(
            end("trap \"exit 7\" TERM;", Signal::TERM),
            expected(Exit::Status(7))
        );
    }
}
