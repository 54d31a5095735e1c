//! What every driver does the same way: its VMMs are processes that carry a tag among their arguments, run one of a few programs
//! under one of our uids, and are watched and ended by pidfd.

use super::console::Consoles;
use super::watch::{Watcher, tell};
use super::{Died, Identity, Tagged, end};
use crate::error::{Error, Kind, Result};
use crate::host::process::{self, Process};
use crate::locks::{Cancel, Rank, region};
use rustix::process::Signal;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

pub struct Processes {
    watcher: Watcher,
    /// What those said of their ends that can.
    pub notes: Arc<end::Notes>,
    /// Of VMs, when the daemon is root.
    uids: Range<u32>,
    /// Whether this executable is a VMM of the driver's.
    is_program: Box<dyn Fn(&Path) -> bool + Send + Sync>,
}

impl Processes {
    /// Fails with the eventfd's error (EMFILE, ENFILE).
    pub fn try_new(uids: Range<u32>, is_program: Box<dyn Fn(&Path) -> bool + Send + Sync>) -> Result<Self> {
        Ok(Self { watcher: Watcher::try_new()?, notes: Arc::new(end::Notes::new()), uids, is_program })
    }

    /// The process, if it lives and is a VMM of ours with this tag.
    pub fn verify(&self, identity: &Identity, tag: &str) -> Result<Option<Process>> {
        let Some(process) = Process::open(identity)?.filter(Process::is_alive) else { return Ok(None) };
        let is_ours = self.runs(identity)
            && process::arguments(identity.pid).iter().any(|a| a == tag.as_bytes())
            && process::uid(identity.pid).is_some_and(|uid| self.may_be_ours(uid));
        Ok((is_ours && process.is_alive()).then_some(process))
    }

    /// Whether this process is the driver's program.
    pub fn runs(&self, identity: &Identity) -> bool {
        process::executable(identity.pid).is_some_and(|path| (self.is_program)(&path))
    }

    /// As a user, only what runs as that user; as root, what runs as root or as a VM.
    fn may_be_ours(&self, uid: u32) -> bool {
        let me = rustix::process::geteuid().as_raw();
        uid == me || (me == 0 && self.uids.contains(&uid))
    }

    pub fn find(&self, tag: &str) -> Result<Option<Identity>> {
        for identity in process::find_by_argument(tag)? {
            if self.verify(&identity, tag)?.is_some() {
                return Ok(Some(identity));
            }
        }
        Ok(None)
    }

    pub fn list(&self, tag_prefix: &str) -> Result<Vec<Tagged>> {
        let found = process::find_by_prefix(tag_prefix)?;
        let all = found.into_iter().map(|(tag, identity)| Tagged { tag, identity });
        Ok(all.filter(|vmm| self.verify(&vmm.identity, &vmm.tag).is_ok_and(|process| process.is_some())).collect())
    }

    pub fn watch(&self, dir: &Path, consoles: &Arc<Consoles>, identity: &Identity, died: Died) -> Result<()> {
        let (dir, consoles, notes, whose) = (dir.to_owned(), consoles.clone(), self.notes.clone(), identity.clone());
        // On a thread of its own, which may wait for the console.
        let died = Box::new(move |exit| died(end::of(exit, notes.take(&whose), &consoles, &dir)));
        match Process::open(identity)? {
            Some(process) => self.watcher.add(process, died),
            None => {
                tell(process::exit_of_gone(identity), died);
                Ok(())
            }
        }
    }
}

pub fn wait_exit(identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool> {
    let Some(process) = Process::open(identity)? else { return Ok(true) };
    let _blocking = region(Rank::VmmApi);
    match process.wait(deadline, cancel) {
        Err(e) if e.kind() == Kind::Cancelled => Ok(false),
        other => other,
    }
}

pub fn kill(identity: &Identity, deadline: Instant) -> Result<()> {
    let Some(process) = Process::open(identity)? else { return Ok(()) };
    process.signal(Signal::KILL)?;
    let _blocking = region(Rank::VmmApi);
    if process.wait_uncancelled(deadline)? {
        return Ok(());
    }
    Err(Error::new(Kind::Timeout, format!("kill the VMM: process {} has not exited in time", identity.pid)))
}
