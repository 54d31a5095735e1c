//! A process held by its pidfd, and how it ended.

use super::identity::{Identity, boot_id, read_stat};
use crate::error::{Error, Result};
use crate::host::wait::{WaitResult, cancelled, is_readable, wait_any, wait_uncancelled};
use crate::locks::{Cancel, Mutex, Rank};
use crate::sched::Instant;
use nix::poll::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Status(i32),
    Signal(i32),
    /// The exit status is not available, for example because the process was not a child of this
    /// daemon.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Status(status) => write!(f, "exit status {status}"),
            Exit::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(name) => write!(f, "signal {signal} ({name})"),
                Err(_) => write!(f, "signal {signal}"),
            },
            Exit::Unknown => f.write_str("unknown exit status (it was started by an earlier fcd)"),
        }
    }
}

/// How our children ended, by start time and pid, or None until a child has been reaped. The first
/// thread that sees a child exit reaps it and records its exit here for the others.
static CHILDREN: Mutex<BTreeMap<(u64, u32), Option<Exit>>> =
    Mutex::new(Rank::Consoles, BTreeMap::new());
/// How many exits are remembered. The oldest is dropped first.
const EXITS_MAX: usize = 4096;

/// A process held by its pidfd. It may exit, but the descriptor never refers to another process.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    fd: OwnedFd,
}

impl Process {
    /// Opens a process. Returns None if it has been reaped, its pid belongs to another process, or
    /// the host has rebooted.
    pub fn open(identity: &Identity) -> Result<Option<Self>> {
        let doing = || format!("open process {}", identity.pid);
        if identity.boot_id != boot_id()? {
            return Ok(None);
        }
        let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let fd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(Error::io(doing(), e)),
        };
        // Compare the start time after opening the pidfd: if the pid had already been reused, the
        // start time would differ.
        match read_stat(identity.pid) {
            Some(stat) if stat.start_time == identity.start_time => Ok(Some(Self {
                identity: identity.clone(),
                fd,
            })),
            _ => Ok(None),
        }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Returns the pidfd, which is readable once the process has exited.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Returns false if the process has exited, even if it is not reaped yet.
    pub fn is_alive(&self) -> bool {
        !is_readable(&self.fd)
    }

    /// Sends a signal. Returns false if the process has already been reaped.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        match rustix::process::pidfd_send_signal(&self.fd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(e) => Err(Error::io(
                format!("signal process {}", self.identity.pid),
                e,
            )),
        }
    }

    /// Waits until the process has exited and reaps it if it is our child. Returns false at the
    /// deadline.
    ///
    /// # Errors
    /// `cancelled` if the token fires first.
    pub fn wait(&self, deadline: Instant, cancel: &Cancel) -> Result<bool> {
        let doing = || format!("wait for process {} to exit", self.identity.pid);
        match wait_any(&[(self.fd(), PollFlags::POLLIN)], deadline, cancel)
            .map_err(|e| Error::io(doing(), e))?
        {
            WaitResult::Ready => {
                self.exit();
                Ok(true)
            }
            WaitResult::Deadline => Ok(false),
            WaitResult::Cancelled => Err(cancelled(&doing(), cancel)),
        }
    }

    /// Waits like [`Process::wait`], but ignores cancellation. Use it to clean up.
    pub fn wait_uncancelled(&self, deadline: Instant) -> Result<bool> {
        let woken = wait_uncancelled(&[(self.fd(), PollFlags::POLLIN)], deadline)
            .map_err(|e| Error::io(format!("wait for process {} to exit", self.identity.pid), e))?;
        if woken == WaitResult::Ready {
            self.exit();
        }
        Ok(woken == WaitResult::Ready)
    }

    /// Returns how the process ended, or None while it runs. Reaps the process if it is our child.
    pub fn exit(&self) -> Option<Exit> {
        let key = (self.identity.start_time, self.identity.pid);
        let mut children = CHILDREN.lock();
        match rustix::process::waitid(
            WaitId::PidFd(self.fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        ) {
            Ok(None) => None,
            Ok(Some(status)) => {
                let exit = match (status.exit_status(), status.terminating_signal()) {
                    (Some(status), _) => Exit::Status(status),
                    (None, Some(signal)) => Exit::Signal(signal),
                    (None, None) => Exit::Unknown,
                };
                children.insert(key, Some(exit));
                if children.len() > EXITS_MAX {
                    let oldest = children
                        .iter()
                        .find(|(_, exit)| exit.is_some())
                        .map(|(key, _)| *key);
                    oldest.and_then(|key| children.remove(&key));
                }
                Some(exit)
            }
            // It is not our child, or it has been reaped already; see `pidfd_info`.
            Err(_) if self.is_alive() => None,
            Err(_) => Some(
                children
                    .get(&key)
                    .copied()
                    .flatten()
                    .unwrap_or(Exit::Unknown),
            ),
        }
    }
}

/// Records a new child, so that its exit will be remembered. The child must not have been reaped.
pub(super) fn remember_child(identity: &Identity) {
    CHILDREN
        .lock()
        .insert((identity.start_time, identity.pid), None);
}

/// Returns how a process that no longer exists ended, or `Exit::Unknown` if that is not remembered.
pub fn exit_of_gone(identity: &Identity) -> Exit {
    CHILDREN
        .lock()
        .get(&(identity.start_time, identity.pid))
        .copied()
        .flatten()
        .unwrap_or(Exit::Unknown)
}

/// True if the process is running. A zombie is not, and is reaped if it is our child.
pub fn is_alive(identity: &Identity) -> bool {
    match Process::open(identity) {
        Ok(Some(process)) => process.exit().is_none() && process.is_alive(),
        Ok(None) => false,
        // Fall back to /proc, for example when no descriptor is left.
        Err(_) => read_stat(identity.pid)
            .is_some_and(|s| s.start_time == identity.start_time && !s.is_dead()),
    }
}
