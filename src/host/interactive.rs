//! A host command that has the user's terminal: an `ssh` that `fcctl` starts for them.

use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;

/// Runs a program with our own streams and environment until it ends: its status, 128+n for signal n. It stays in
/// our process group, so that the terminal's signals reach it; the caller catches its own meanwhile. When `cancel`
/// fires it is sent SIGTERM and still waited for. Errors: `command_missing`, `host`.
#[allow(clippy::disallowed_methods)] // Beside `command`, the other place.
pub fn run(program: &str, args: &[OsString], cancel: &Cancel) -> Result<u8> {
    let io = |e: std::io::Error| Error::io(format!("run {program}"), e);
    let mut child = std::process::Command::new(program).args(args).spawn().map_err(|e| {
        if e.kind() == std::io::ErrorKind::NotFound {
            Error::new(Kind::CommandMissing, format!("{program} is not installed"))
        } else {
            io(e)
        }
    })?;
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a child has a pid");
    let exited = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| io(e.into()))?;
    loop {
        let mut fds = [PollFd::new(exited.as_fd(), PollFlags::POLLIN), PollFd::new(cancel.fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(io(e.into())),
            Ok(_) => {}
        }
        if cancel.is_cancelled() {
            // Fails when it has just exited.
            let _ = pidfd_send_signal(&exited, Signal::TERM);
        }
        break;
    }
    let status = child.wait().map_err(io)?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_signal_absence_and_cancel() {
        let cancel = Cancel::try_new().unwrap();
        let sh = |script: &str| run("sh", &["-c".into(), script.into()], &cancel);
        assert_eq!(sh("exit 3").unwrap(), 3);
        // One that nobody above can have had ignored, as nohup(1) does SIGHUP.
        assert_eq!(sh("kill -KILL $$").unwrap(), 128 + 9);
        assert_eq!(run("no-such-program", &[], &cancel).unwrap_err().kind(), Kind::CommandMissing);
        cancel.cancel("enough");
        assert_eq!(sh("exec sleep 1000").unwrap(), 128 + 15);
    }
}
