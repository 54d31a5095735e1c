//! Runs a host command in the user's terminal, such as the `ssh` that `fcctl ssh` starts.

use super::wait::poll_until;
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use nix::poll::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;

/// Runs a program with this process's streams and environment and returns its status (128+n if
/// signal n killed it). The program stays in this process group, so that the terminal's signals
/// reach it. They also reach the caller, which has to catch them. When `cancel` fires, the program
/// gets SIGTERM and is still waited for.
///
/// # Errors
/// `command_missing` or `host`.
#[allow(clippy::disallowed_methods)] // One of the few places that may start processes.
pub fn run(program: &str, args: &[OsString], cancel: &Cancel) -> Result<u8> {
    let io = |e: std::io::Error| Error::io(format!("run {program}"), e);
    let mut child = std::process::Command::new(program)
        .args(args)
        .spawn()
        .map_err(|e| {
            if e.kind() == std::io::ErrorKind::NotFound {
                Error::new(Kind::CommandMissing, format!("{program} is not installed"))
            } else {
                io(e)
            }
        })?;
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a child has a pid");
    let exited = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| io(e.into()))?;
    let mut fds = [
        PollFd::new(exited.as_fd(), PollFlags::POLLIN),
        PollFd::new(cancel.fd(), PollFlags::POLLIN),
    ];
    poll_until(&mut fds, None).map_err(io)?;
    if cancel.is_cancelled() {
        // This fails if the program has just exited.
        let _ = pidfd_send_signal(&exited, Signal::TERM);
    }
    let status = child.wait().map_err(io)?;
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_reports_status_signal_missing_program_and_cancel() {
        let cancel = Cancel::try_new().unwrap();
        let sh = |script: &str| run("sh", &["-c".into(), script.into()], &cancel);
        assert_eq!(sh("exit 3").unwrap(), 3);
        // SIGKILL cannot be ignored. A parent such as nohup(1) may have made SIGHUP ignored.
        assert_eq!(sh("kill -KILL $$").unwrap(), 128 + 9);
        assert_eq!(
            run("no-such-program", &[], &cancel).unwrap_err().kind(),
            Kind::CommandMissing
        );
        cancel.cancel(crate::locks::CancelCause::Requested);
        assert_eq!(sh("exec sleep 1000").unwrap(), 128 + 15);
    }
}
