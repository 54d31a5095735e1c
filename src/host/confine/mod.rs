//! Helper processes: the daemon's own binary, started again with almost no rights to parse what a
//! guest sends.
//!
//! The parent calls [`spawn`] and gets a [`Helper`]: a process and a [`Channel`] to it. The new
//! process reads the request with [`Asked::from_args`], gives up everything with
//! [`Asked::confine`], and only then receives its work and its descriptors over the channel. The
//! two processes share nothing else.
//!
//! [`Asked::confine`] confines a helper as follows. It has no descriptors except the channel and
//! `/dev/null`. It runs with the given uid and gid, without supplementary groups, in a new session.
//! It dumps no core, and its address space, open files and processes are limited. It cannot gain
//! rights (no_new_privs), and processes of its own uid cannot inspect it (not dumpable). It cannot
//! reach the file system or signal other processes (Landlock; `doctor` warns if the kernel has
//! none), and it can make only the system calls of its [`Profile`] (seccomp). It dies with the
//! thread that spawned it, so that thread must live as long as the helper is needed.
//!
//! The parent must treat every byte from the channel as hostile: a guest may control the helper.

mod channel;
mod enter;
mod fields;
mod filter;
#[cfg(test)]
mod tests;

pub use channel::Channel;
pub use enter::{Asked, Profile, landlock_version};
pub use fields::{Reader, Writer};
pub use filter::{Allowed, Call};
#[cfg(test)]
pub use tests::{PROBE, PROBE_WITH_THREADS, run_probe};

use super::Credentials;
use super::process::Exit;
use super::wait::{WaitResult, wait_uncancelled};
use crate::error::{Error, Kind, Result};
use crate::sched::Instant;
use nix::poll::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

/// The first argument of a helper process. The second argument is the helper's name.
pub const ARGUMENT: &str = "helper";
/// The path of the running executable, even after an upgrade has replaced its file.
const OWN_EXECUTABLE: &str = "/proc/self/exe";
/// How long to wait for a killed helper to exit before a separate thread waits for it.
const REAP_PATIENCE: Duration = Duration::from_secs(1);

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Sets the program that helpers run instead of the running executable, which is not `fcd` in a
/// test. Only the first call has an effect.
#[cfg(any(test, feature = "fakes"))]
pub fn set_program(path: impl Into<PathBuf>) {
    let _ = PROGRAM.set(path.into());
}

/// A running helper. It is killed and reaped when dropped.
#[derive(Debug)]
pub struct Helper {
    pub channel: Channel,
    pid: Pid,
    pidfd: OwnedFd,
    exit: Option<Exit>,
}

/// Starts the helper `name`. Without an owner, it keeps the daemon's uid, as it must if the daemon
/// is not root.
///
/// # Errors
/// `host` if the host has no process, descriptor or memory left.
#[allow(clippy::disallowed_methods)] // One of the few places that may start processes.
pub fn spawn(name: &str, owner: Option<Credentials>) -> Result<Helper> {
    let failed = |e: std::io::Error| Error::io(format!("start the helper process {name}"), e);
    let (channel, theirs) = Channel::pair().map_err(failed)?;
    let program = PROGRAM
        .get()
        .map_or(Path::new(OWN_EXECUTABLE), PathBuf::as_path);
    // The standard library uses posix_spawn(3), which does not copy the page tables of a large
    // daemon, only if no working directory, credentials or pre-exec closure is set. The new process
    // therefore applies these settings itself.
    let mut command = std::process::Command::new(program);
    command
        .arg0("fcd")
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.args(enter::arguments(name, owner));
    let child = command.spawn().map_err(failed)?;
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a child has a pid");
    // The child has not been reaped, so its pid cannot have been reused.
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|e| {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        failed(e.into())
    })?;
    Ok(Helper {
        channel,
        pid,
        pidfd,
        exit: None,
    })
}

impl Helper {
    /// Returns the pid for log lines. Code that acts on the process uses the pidfd.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().cast_unsigned()
    }

    /// Returns a descriptor that becomes readable once the helper has exited.
    pub fn exited(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills the helper. Does nothing if it has already exited.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Kills the helper and waits until it has exited. Only then can it no longer use the
    /// descriptors that it got.
    ///
    /// # Errors
    /// `host` at the deadline, because the process is stuck in the kernel.
    pub fn end(&mut self, deadline: Instant) -> Result<()> {
        self.kill();
        if self.wait(deadline).is_some() {
            return Ok(());
        }
        let text = format!("helper process {} was killed, but does not end", self.pid());
        Err(Error::new(Kind::Host, text).hint("look at the kernel's log: dmesg"))
    }

    /// Waits until the helper has exited, and reaps it. Returns None at the deadline.
    pub fn wait(&mut self, deadline: Instant) -> Option<Exit> {
        if self.exit.is_none() {
            match wait_uncancelled(&[(self.pidfd.as_fd(), PollFlags::POLLIN)], deadline) {
                Ok(WaitResult::Ready) => self.exit = Some(reap(&self.pidfd)),
                _ => return None,
            }
        }
        self.exit
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.kill();
        if self.wait(Instant::now() + REAP_PATIENCE).is_some() {
            return;
        }
        // A killed process that does not end is stuck in the kernel. It must not block the thread
        // that drops the `Helper`.
        let Ok(pidfd) = self.pidfd.try_clone() else {
            return;
        };
        let _ = super::thread::spawn("reap-helper", move || reap(&pidfd));
    }
}

/// Waits without a deadline until a child has exited, and reaps it.
fn reap(pidfd: &OwnedFd) -> Exit {
    loop {
        match rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
            Ok(Some(status)) => {
                return match (status.exit_status(), status.terminating_signal()) {
                    (Some(status), _) => Exit::Status(status),
                    (None, Some(signal)) => Exit::Signal(signal),
                    (None, None) => Exit::Unknown,
                };
            }
            Err(rustix::io::Errno::INTR) => {}
            Ok(None) | Err(_) => return Exit::Unknown,
        }
    }
}
