//! Holds what every part of the daemon shares: the store, the operation registry, the locks, the
//! threads, and the limits. [`Core`] is a cheap handle; each part holds a clone.
//!
//! Methods here are small: change a row, wait until it is durable, start a thread. The parts decide
//! what a VM does. This module never imports them.

use super::access::{Caller, find, vm_not_found};
use super::close::Threads;
use super::effects::Effects;
use super::history::{Event, History, What};
use super::locks::OpLocks;
use super::uses::Uses;
use crate::config::Limits;
use crate::error::{Error, Kind, Result};
use crate::ids::{Tag, VmId};
use crate::locks::Cancel;
use crate::ops::Ops;
use crate::sched::Instant;
use crate::store::{Store, Ticket, Tx, VmRow};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The directory in the state directory that contains one directory per VM.
pub(super) const VMS_DIR: &str = "vms";
/// How long a change may take to reach the disk.
pub(super) const DURABLE_DEADLINE: Duration = Duration::from_secs(60);

/// The state behind a [`Core`].
pub struct Shared {
    pub store: Store,
    pub ops: Ops,
    pub locks: OpLocks,
    pub limits: Limits,
    pub state_dir: PathBuf,
    /// Fires when the daemon closes.
    pub closing: Cancel,
    /// Fires when a caller has asked the daemon to exit and to remove its installation.
    pub uninstalling: Cancel,
    pub effects: Effects,
    pub history: History,
    /// VMs that get a directory before they have a row.
    pub(super) beginning: Uses<VmId>,
    pub(super) threads: Threads,
}

/// A handle to what all parts of the daemon share.
#[derive(Clone)]
pub struct Core(Arc<Shared>);

impl Deref for Core {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Core {
    pub(super) fn new(shared: Shared) -> Self {
        Self(Arc::new(shared))
    }

    /// Finds the VM that `text` names, if the caller may see it.
    pub fn resolve(&self, caller: &Caller, text: &str) -> Result<VmRow> {
        self.store.read(|s| find(s, caller, text).cloned())
    }

    /// Returns the VM's current row.
    ///
    /// # Errors
    /// `vm_not_found` if the VM has been deleted.
    pub(super) fn row(&self, id: &VmId) -> Result<VmRow> {
        self.store
            .read(|s| s.vm(id).map(|r| (**r).clone()))
            .ok_or_else(|| vm_not_found(id.as_str()))
    }

    /// True once `close` has been called.
    pub fn is_closing(&self) -> bool {
        self.closing.is_cancelled()
    }

    /// Starts a thread for an operation. The thread is counted, so that `close` can wait for it.
    /// Its name labels the locks that it takes until it sets a better label.
    pub(super) fn spawn(&self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let count = self.threads.enter();
        let label: Arc<str> = name.into();
        crate::host::thread::spawn(name, move || {
            let _count = count;
            let _label = crate::locks::operation_scope(label);
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_err() {
                log::error!("an operation's thread panicked");
            }
            crate::locks::check::assert_none_held("the end of an operation's thread");
        })
        .map(drop)
    }

    /// Returns how many operation threads are running.
    #[cfg(any(test, feature = "fakes"))]
    pub fn thread_count(&self) -> usize {
        self.threads.count()
    }

    /// Runs one transaction of the store. An `essential` change (kill, delete, commit) is accepted
    /// even when the disk is full.
    pub(super) fn change<T>(
        &self,
        essential: bool,
        change: impl FnOnce(&mut Tx) -> Result<T>,
    ) -> Result<(T, Ticket)> {
        if essential {
            self.store.change_essential(change)
        } else {
            self.store.change(change)
        }
    }

    /// Changes a VM's row under its lock. The caller must not hold a lock.
    pub(super) fn change_row(
        &self,
        vm: &VmId,
        essential: bool,
        change: impl FnOnce(&mut VmRow),
    ) -> Result<Ticket> {
        let guard = self.locks.vm.lock(vm);
        self.change(essential, |tx| tx.update_vm(&guard, change))
            .map(|((), ticket)| ticket)
    }

    /// Sleeps for `period`. Returns true, possibly earlier, if the daemon is closing.
    pub(super) fn sleep(&self, period: Duration) -> bool {
        let _ = crate::host::wait::sleep(period, &self.closing);
        self.closing.is_cancelled()
    }

    /// Returns the VM's own directory.
    pub(super) fn vm_dir(&self, vm: &VmId) -> PathBuf {
        self.state_dir.join(VMS_DIR).join(vm.as_str())
    }

    /// Adds a hint with the free space to an error about a full disk.
    pub(super) fn with_free_space(&self, e: Error) -> Error {
        if e.kind() != Kind::DiskFull {
            return e;
        }
        let Ok(space) = crate::host::fs::space(&self.state_dir) else {
            return e;
        };
        let (dir, free) = (self.state_dir.display(), space.free_bytes >> 20);
        e.hint(format!(
            "{dir} has {free} MiB free (df -h); free some space, then try again"
        ))
    }

    /// Returns the tag of the VM's current boot.
    pub(super) fn tag(&self, row: &VmRow) -> Tag {
        Tag::new(self.store.install_id(), &row.id, row.generation)
    }

    /// Returns the prefix of every tag of this installation.
    pub(super) fn tag_prefix(&self) -> String {
        Tag::prefix(self.store.install_id())
    }

    /// Records what happened to a VM, for tests. `seq` is the change of the store that made the
    /// event visible, or else the latest change. `since` is an instant before the event became
    /// visible.
    #[inline]
    pub(super) fn note(
        &self,
        row: &VmRow,
        seq: Option<u64>,
        since: Option<Instant>,
        what: impl FnOnce() -> What,
    ) {
        self.history.note(|| {
            let (seq, now) = (seq.unwrap_or_else(|| self.store.seq()), Instant::now());
            let between = (since.unwrap_or(now), now);
            Event {
                vm: row.id.clone(),
                name: row.name.clone(),
                seq,
                between,
                what: what(),
            }
        });
    }
}
