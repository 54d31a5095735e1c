//! The processes of VMMs. Each has a tag among its arguments and runs a known program under one of
//! our uids. They are watched and killed through pidfds.

use super::console::Consoles;
use super::watch::{Watcher, report};
use super::{Died, Identity, Tagged, end};
use crate::error::{Error, Kind, Result};
use crate::host::process::{self, Process};
use crate::locks::{Cancel, Rank, region};
use crate::sched::Instant;
use rustix::process::Signal;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Finds VMM processes by their tags, watches them and kills them.
pub trait Processes: Send + Sync {
    /// Finds the live process with this tag. Returns None if there is no such process.
    fn find(&self, tag: &str) -> Result<Option<Identity>>;

    /// Finds all live processes whose tag has this prefix, in one pass over the host's processes.
    fn list(&self, tag_prefix: &str) -> Result<Vec<Tagged>>;

    /// True if the process is alive. A zombie is not.
    fn is_alive(&self, identity: &Identity) -> bool;

    /// True if the process is alive and carries `tag`. A reused or forged pid must be neither
    /// adopted nor killed.
    fn is_ours(&self, identity: &Identity, tag: &str) -> bool;

    /// True if the process runs this driver's program.
    fn runs(&self, identity: &Identity) -> bool;

    /// Waits until the process has exited. Returns false at the deadline or after a cancel.
    fn wait_exit(&self, identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool>;

    /// Kills the process (SIGKILL by pidfd) and waits until it has exited. Succeeds if it has
    /// already exited. Fails with `timeout` if the process still exists at the deadline. The
    /// resources of the process must not be reused then.
    fn kill(&self, identity: &Identity, deadline: Instant) -> Result<()>;

    /// Calls `died` once, on a separate thread, when the process exits or if it has already exited.
    /// Reads the console log in `dir` to find out how the guest ended. Does not call `died` after
    /// the driver has been dropped.
    fn watch(&self, dir: &Path, identity: &Identity, died: Died) -> Result<()>;
}

/// The processes on this host that run one driver's programs.
pub(super) struct HostProcesses {
    watcher: Watcher,
    consoles: Arc<Consoles>,
    /// The reasons that VMMs have given for their end.
    pub notes: Arc<end::Notes>,
    /// The uids of VMs, if the daemon is root.
    uids: Range<u32>,
    /// True if this executable is one of the driver's VMMs.
    is_program: Box<dyn Fn(&Path) -> bool + Send + Sync>,
}

impl HostProcesses {
    /// Creates the collection, which watches no process yet. Fails if no eventfd can be created
    /// (EMFILE, ENFILE).
    pub(super) fn try_new(
        consoles: Arc<Consoles>,
        uids: Range<u32>,
        is_program: Box<dyn Fn(&Path) -> bool + Send + Sync>,
    ) -> Result<Self> {
        Ok(Self {
            watcher: Watcher::try_new()?,
            consoles,
            notes: Arc::new(end::Notes::new()),
            uids,
            is_program,
        })
    }

    /// Returns the process if it is alive and one of our VMMs with this tag.
    pub(super) fn verify(&self, identity: &Identity, tag: &str) -> Result<Option<Process>> {
        let Some(process) = Process::open(identity)?.filter(Process::is_alive) else {
            return Ok(None);
        };
        let is_ours = self.runs(identity)
            && process::arguments(identity.pid)
                .iter()
                .any(|a| a == tag.as_bytes())
            && process::uid(identity.pid).is_some_and(|uid| self.may_be_ours(uid));
        Ok((is_ours && process.is_alive()).then_some(process))
    }

    /// True if a process with this uid may be one of our VMMs. An ordinary user's daemon accepts
    /// only its own uid. A root daemon accepts root and the uids of VMs.
    fn may_be_ours(&self, uid: u32) -> bool {
        let me = rustix::process::geteuid().as_raw();
        uid == me || (me == 0 && self.uids.contains(&uid))
    }
}

impl Processes for HostProcesses {
    fn find(&self, tag: &str) -> Result<Option<Identity>> {
        for identity in process::find_by_argument(tag)? {
            if self.verify(&identity, tag)?.is_some() {
                return Ok(Some(identity));
            }
        }
        Ok(None)
    }

    fn list(&self, tag_prefix: &str) -> Result<Vec<Tagged>> {
        let found = process::find_by_prefix(tag_prefix)?;
        let all = found
            .into_iter()
            .map(|(tag, identity)| Tagged { tag, identity });
        Ok(all
            .filter(|vmm| {
                self.verify(&vmm.identity, &vmm.tag)
                    .is_ok_and(|process| process.is_some())
            })
            .collect())
    }

    fn is_alive(&self, identity: &Identity) -> bool {
        process::is_alive(identity)
    }

    fn is_ours(&self, identity: &Identity, tag: &str) -> bool {
        self.verify(identity, tag)
            .is_ok_and(|process| process.is_some())
    }

    fn runs(&self, identity: &Identity) -> bool {
        process::executable(identity.pid).is_some_and(|path| (self.is_program)(&path))
    }

    fn wait_exit(&self, identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool> {
        let Some(process) = Process::open(identity)? else {
            return Ok(true);
        };
        let _blocking = region(Rank::VmmApi);
        match process.wait(deadline, cancel) {
            Err(e) if e.kind() == Kind::Cancelled => Ok(false),
            other => other,
        }
    }

    fn kill(&self, identity: &Identity, deadline: Instant) -> Result<()> {
        let Some(process) = Process::open(identity)? else {
            return Ok(());
        };
        process.signal(Signal::KILL)?;
        let _blocking = region(Rank::VmmApi);
        if process.wait_uncancelled(deadline)? {
            return Ok(());
        }
        Err(Error::new(
            Kind::Timeout,
            format!("kill the VMM: process {} is still running", identity.pid),
        ))
    }

    fn watch(&self, dir: &Path, identity: &Identity, died: Died) -> Result<()> {
        let (dir, consoles, notes, whose) = (
            dir.to_owned(),
            self.consoles.clone(),
            self.notes.clone(),
            identity.clone(),
        );
        // This callback runs on a separate thread, so it may wait for the console.
        let died = Box::new(move |exit| died(end::of(exit, notes.take(&whose), &consoles, &dir)));
        match Process::open(identity)? {
            Some(process) => self.watcher.add(process, died),
            None => {
                report(process::exit_of_gone(identity), died);
                Ok(())
            }
        }
    }
}
