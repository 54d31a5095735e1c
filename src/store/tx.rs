//! One change: reads see its own writes, and an error or a panic undoes all of it.

use super::state::{Image, State};
use super::{KeyRow, LedgerRow, OpRow, SnapshotRow, VmRow, WorkspaceRow};
use crate::error::{Error, Kind, Result};
use crate::ids::{OpId, SnapshotId, VmId};
use crate::locks::KeyGuard;
use crate::uids::Retention;
use std::ops::Deref;
use std::sync::Arc;

/// One row's change: what it was and what it is.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) before: Image,
    pub(super) after: Image,
}

/// The change that is being made. All of [`State`]'s lookups are its own, too.
pub struct Tx<'a> {
    state: &'a mut State,
    ledger_next: &'a mut u64,
    retention: Retention,
    steps: Vec<Step>,
}

impl Deref for Tx<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        self.state
    }
}

impl Drop for Tx<'_> {
    /// What was not finished never was.
    fn drop(&mut self) {
        revert(self.state, &mut self.steps);
    }
}

/// Undoes the steps, the last one first.
pub(super) fn revert(state: &mut State, steps: &mut Vec<Step>) {
    while let Some(step) = steps.pop() {
        state.apply(step.before);
    }
}

impl<'a> Tx<'a> {
    pub(super) fn new(state: &'a mut State, ledger_next: &'a mut u64, retention: Retention) -> Self {
        Self { state, ledger_next, retention, steps: Vec::new() }
    }

    pub(super) fn finish(mut self) -> Vec<Step> {
        std::mem::take(&mut self.steps)
    }

    fn apply(&mut self, after: Image) {
        let before = self.state.apply(after.clone());
        if before != after {
            self.steps.push(Step { before, after });
        }
    }

    /// Adds a VM. A row that is there changes by [`Tx::update_vm`] only.
    ///
    /// # Errors
    /// `name_taken`, or `internal` when another VM has the id or the slot.
    pub fn insert_vm(&mut self, row: VmRow) -> Result<()> {
        if self.vm(&row.id).is_some() {
            return Err(Error::internal(format!("VM {} is there already", row.id)));
        }
        self.write_vm(row)
    }

    fn write_vm(&mut self, row: VmRow) -> Result<()> {
        if self.vm_by_name(&row.name).is_some_and(|other| other.id != row.id) {
            return Err(Error::new(Kind::NameTaken, format!("the name {} is taken", row.name)).hint("choose another with --name"));
        }
        if self.vm(&row.id).is_none_or(|old| old.slot != row.slot) && self.slot_is_taken(row.slot) {
            return Err(Error::internal(format!("slot {} belongs to another VM than {}", row.slot, row.id)));
        }
        self.apply(Image::Vm(row.id.clone(), Some(Arc::new(row))));
        Ok(())
    }

    /// Changes some members of the row as it is now. The guard is evidence that the VM's lock is held, so what its holder
    /// has read of the row still holds; no row is ever written as a whole, so nothing that was read earlier comes back.
    ///
    /// # Errors
    /// `vm_not_found`, and those of [`Tx::insert_vm`].
    pub fn update_vm(&mut self, vm: &KeyGuard<'_, VmId>, change: impl FnOnce(&mut VmRow)) -> Result<()> {
        self.change_vm(vm.key(), change)
    }

    fn change_vm(&mut self, id: &VmId, change: impl FnOnce(&mut VmRow)) -> Result<()> {
        let Some(row) = self.vm(id) else {
            return Err(Error::new(Kind::VmNotFound, format!("no VM {id}")).hint("fcctl ps -a"));
        };
        let mut row = VmRow::clone(row);
        change(&mut row);
        if row.id != *id {
            return Err(Error::internal(format!("a change of VM {id} gave it the id {}", row.id)));
        }
        self.write_vm(row)
    }

    /// Removes the VM and its workspace. What the ledger knows of it stays until it is struck.
    pub fn remove_vm(&mut self, vm: &KeyGuard<'_, VmId>) -> Option<Arc<VmRow>> {
        self.take_vm(vm.key())
    }

    fn take_vm(&mut self, id: &VmId) -> Option<Arc<VmRow>> {
        let row = self.vm(id).cloned()?;
        self.remove_workspace(id);
        self.apply(Image::Vm(id.clone(), None));
        Some(row)
    }

    /// Adds or replaces, without a lock: for tests of the store.
    #[cfg(test)]
    pub fn put_vm(&mut self, row: VmRow) -> Result<()> {
        self.write_vm(row)
    }

    /// [`Tx::update_vm`] without a lock: for tests, which play a daemon that died or have the store to themselves.
    #[cfg(any(test, feature = "fakes"))]
    pub fn update_vm_unlocked(&mut self, id: &VmId, change: impl FnOnce(&mut VmRow)) -> Result<()> {
        self.change_vm(id, change)
    }

    /// [`Tx::remove_vm`] without a lock: for tests of the store.
    #[cfg(test)]
    pub fn remove_vm_unlocked(&mut self, id: &VmId) -> Option<Arc<VmRow>> {
        self.take_vm(id)
    }

    /// # Errors
    /// `vm_not_found`.
    pub fn put_workspace(&mut self, row: WorkspaceRow) -> Result<()> {
        if self.vm(&row.vm).is_none() {
            return Err(Error::new(Kind::VmNotFound, format!("no VM {}", row.vm)).hint("fcctl ps -a"));
        }
        self.apply(Image::Workspace(row.vm.clone(), Some(Arc::new(row))));
        Ok(())
    }

    pub fn remove_workspace(&mut self, vm: &VmId) {
        self.apply(Image::Workspace(vm.clone(), None));
    }

    /// Adds or replaces. The oldest ended ones of the same user go when there are too many, but those that a key stands for.
    pub fn put_op(&mut self, row: OpRow) {
        let uid = row.owner_uid;
        self.apply(Image::Op(row.id.clone(), Some(Arc::new(row))));
        self.prune_ops(uid);
    }

    fn prune_ops(&mut self, uid: u32) {
        while let Some(old) = self.op_to_prune(uid, self.retention) {
            self.apply(Image::Op(old, None));
        }
    }

    pub fn remove_op(&mut self, id: &OpId) {
        self.apply(Image::Op(id.clone(), None));
    }

    /// Writes down that a host resource may exist from now on; wait for the change before acquiring it. Ids are
    /// never used twice in a daemon's life.
    pub fn intend(&mut self, vm: Option<&VmId>, generation: u64, kind: &str, name: impl Into<String>) -> u64 {
        let id = *self.ledger_next;
        *self.ledger_next += 1;
        let row = LedgerRow { id, vm: vm.cloned(), generation, kind: kind.to_owned(), name: name.into(), facts: None };
        self.apply(Image::Ledger(id, Some(Arc::new(row))));
        id
    }

    /// What was learnt of a resource when it was acquired.
    ///
    /// # Errors
    /// `internal` when the row is struck already.
    pub fn record_facts(&mut self, id: u64, facts: serde_json::Value) -> Result<()> {
        let Some(row) = self.ledger_row(id) else {
            return Err(Error::internal(format!("ledger row {id} is not there")));
        };
        let row = LedgerRow { facts: Some(facts), ..LedgerRow::clone(row) };
        self.apply(Image::Ledger(id, Some(Arc::new(row))));
        Ok(())
    }

    /// The resource is gone. False when it was struck before.
    pub fn strike(&mut self, id: u64) -> bool {
        let was = self.ledger_row(id).is_some();
        self.apply(Image::Ledger(id, None));
        was
    }

    /// # Errors
    /// `operation_limit` when the uid has too many live keys.
    pub fn put_key(&mut self, row: KeyRow) -> Result<()> {
        if self.key(row.uid, &row.key).is_none() {
            self.check_keys(row.uid, None)?;
        }
        self.set_key((row.uid, row.key.clone()), Some(Arc::new(row)));
        Ok(())
    }

    pub fn remove_key(&mut self, uid: u32, key: &str) {
        self.set_key((uid, key.to_owned()), None);
    }

    /// The operation that a key stood for may be one too many from then on.
    fn set_key(&mut self, key: (u32, String), row: Option<Arc<KeyRow>>) {
        let former = self.key(key.0, &key.1).map(|former| former.op.clone());
        self.apply(Image::Key(key, row));
        if let Some(uid) = former.and_then(|op| self.op(&op).map(|row| row.owner_uid)) {
            self.prune_ops(uid);
        }
    }

    /// Forgets the keys that had expired at `now`, seconds since the epoch, and says how many.
    pub fn expire_keys(&mut self, now: u64) -> usize {
        let old: Vec<_> = self.keys().filter(|k| k.expires_at <= now).map(|k| (k.uid, k.key.clone())).collect();
        let count = old.len();
        old.into_iter().for_each(|key| self.set_key(key, None));
        count
    }

    /// # Errors
    /// `name_taken`.
    pub fn put_snapshot(&mut self, row: SnapshotRow) -> Result<()> {
        if self.snapshot_by_name(&row.name).is_some_and(|other| other.id != row.id) {
            let text = format!("the snapshot name {} is taken", row.name);
            return Err(Error::new(Kind::NameTaken, text).hint("choose another with --name"));
        }
        self.apply(Image::Snapshot(row.id.clone(), Some(Arc::new(row))));
        Ok(())
    }

    pub fn remove_snapshot(&mut self, id: &SnapshotId) {
        self.apply(Image::Snapshot(id.clone(), None));
    }

    pub fn put_meta(&mut self, name: &str, value: &str) {
        self.apply(Image::Meta(name.to_owned(), Some(value.into())));
    }

    pub fn remove_meta(&mut self, name: &str) {
        self.apply(Image::Meta(name.to_owned(), None));
    }
}
