//! Keeps the whole state in memory. Every change of a row is an [`Image`]. Applying an image
//! returns the image that it replaces.

mod ops;
mod vms;

use super::history::OpHistory;
use super::{KeyRow, LedgerRow, OpRow, SnapshotRow, VmRow, WorkspaceRow};
use super::{key, ledger, meta, op, snapshot, vm, workspace};
use crate::error::Result;
use crate::ids::{OpId, SnapshotId, SnapshotName, VmId, VmName};
use crate::sched::HashMap;
use rusqlite::Connection;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The contents of one row. `None` means that the row does not exist.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Image {
    Vm(VmId, Option<Arc<VmRow>>),
    Workspace(VmId, Option<Arc<WorkspaceRow>>),
    Op(OpId, Option<Arc<OpRow>>),
    Ledger(u64, Option<Arc<LedgerRow>>),
    Key((u32, String), Option<Arc<KeyRow>>),
    Meta(String, Option<Arc<str>>),
    Snapshot(SnapshotId, Option<Arc<SnapshotRow>>),
}

impl Image {
    /// Returns a key that identifies the row across all tables.
    pub(super) fn row_key(&self) -> (u8, String) {
        match self {
            Image::Vm(id, _) => (0, id.to_string()),
            Image::Workspace(vm, _) => (1, vm.to_string()),
            Image::Op(id, _) => (2, id.to_string()),
            Image::Ledger(id, _) => (3, id.to_string()),
            Image::Key((uid, key), _) => (4, format!("{uid} {key}")),
            Image::Meta(name, _) => (5, name.clone()),
            Image::Snapshot(id, _) => (6, id.to_string()),
        }
    }

    pub(super) fn absent(&self) -> Image {
        match self.clone() {
            Image::Vm(k, _) => Image::Vm(k, None),
            Image::Workspace(k, _) => Image::Workspace(k, None),
            Image::Op(k, _) => Image::Op(k, None),
            Image::Ledger(k, _) => Image::Ledger(k, None),
            Image::Key(k, _) => Image::Key(k, None),
            Image::Meta(k, _) => Image::Meta(k, None),
            Image::Snapshot(k, _) => Image::Snapshot(k, None),
        }
    }

    /// Returns the VM that the row belongs to. Returns `None` for a row without a VM, and for an
    /// operation or a ledger row that does not exist.
    pub(super) fn vm(&self) -> Option<&VmId> {
        match self {
            Image::Vm(id, _) | Image::Workspace(id, _) => Some(id),
            Image::Op(_, row) => row.as_ref()?.vm.as_ref(),
            Image::Ledger(_, row) => row.as_ref()?.vm.as_ref(),
            Image::Key(..) | Image::Meta(..) | Image::Snapshot(..) => None,
        }
    }

    pub(super) fn save(&self, c: &Connection) -> rusqlite::Result<()> {
        match self {
            Image::Vm(id, row) => vm::save(c, id, row.as_deref()),
            Image::Workspace(id, row) => workspace::save(c, id, row.as_deref()),
            Image::Op(id, row) => op::save(c, id, row.as_deref()),
            Image::Ledger(id, row) => ledger::save(c, *id, row.as_deref()),
            Image::Key((uid, k), row) => key::save(c, *uid, k, row.as_deref()),
            Image::Meta(name, value) => meta::save(c, name, value.as_deref()),
            Image::Snapshot(id, row) => snapshot::save(c, id, row.as_deref()),
        }
    }
}

/// A VM's position in listings: the time of its creation, in seconds since the epoch, and its ID.
pub type Age = (u64, VmId);

fn age(row: &VmRow) -> Age {
    (row.created_at, row.id.clone())
}

/// All rows, with indexes. Rows are shared: clone the `Arc` to take one out of
/// [`super::Store::read`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    vms: BTreeMap<VmId, Arc<VmRow>>,
    names: HashMap<VmName, VmId>,
    slots: BTreeSet<u32>,
    /// All VMs by age, the oldest first. `owners` contains the same for each owner. These maps hold
    /// the rows themselves, because looking up every VM of a long list by its ID would cost more
    /// than everything else that a listing does.
    ages: BTreeMap<Age, Arc<VmRow>>,
    owners: BTreeMap<u32, BTreeMap<Age, Arc<VmRow>>>,
    workspaces: BTreeMap<VmId, Arc<WorkspaceRow>>,
    ops: BTreeMap<OpId, Arc<OpRow>>,
    history: OpHistory,
    ledger: BTreeMap<u64, Arc<LedgerRow>>,
    ledger_by_vm: BTreeMap<VmId, BTreeSet<u64>>,
    keys: BTreeMap<(u32, String), Arc<KeyRow>>,
    meta: BTreeMap<String, Arc<str>>,
    snapshots: BTreeMap<SnapshotId, Arc<SnapshotRow>>,
}

fn set<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) -> Option<V> {
    match value {
        Some(value) => map.insert(key, value),
        None => map.remove(&key),
    }
}

impl State {
    pub fn workspace(&self, vm: &VmId) -> Option<&Arc<WorkspaceRow>> {
        self.workspaces.get(vm)
    }

    #[cfg(any(test, feature = "fakes"))]
    pub fn workspaces(&self) -> impl Iterator<Item = &Arc<WorkspaceRow>> {
        self.workspaces.values()
    }

    pub fn ledger_row(&self, id: u64) -> Option<&Arc<LedgerRow>> {
        self.ledger.get(&id)
    }

    /// Returns the ledger rows in the order in which they were added.
    pub fn ledger(&self) -> impl DoubleEndedIterator<Item = &Arc<LedgerRow>> {
        self.ledger.values()
    }

    pub fn ledger_of(&self, vm: &VmId) -> impl DoubleEndedIterator<Item = &Arc<LedgerRow>> {
        self.ledger_by_vm
            .get(vm)
            .into_iter()
            .flatten()
            .filter_map(|id| self.ledger.get(id))
    }

    pub fn meta(&self, name: &str) -> Option<&str> {
        self.meta.get(name).map(|v| &**v)
    }

    /// Returns the names of all values in table `meta`.
    pub fn metas(&self) -> impl Iterator<Item = &str> {
        self.meta.keys().map(String::as_str)
    }

    pub fn snapshot(&self, id: &SnapshotId) -> Option<&Arc<SnapshotRow>> {
        self.snapshots.get(id)
    }

    /// Returns the snapshots in the order of their IDs.
    pub fn snapshots(&self) -> impl Iterator<Item = &Arc<SnapshotRow>> {
        self.snapshots.values()
    }

    pub fn snapshot_by_name(&self, name: &SnapshotName) -> Option<&Arc<SnapshotRow>> {
        self.snapshots.values().find(|row| row.name == *name)
    }

    pub(super) fn ledger_last(&self) -> u64 {
        self.ledger.keys().next_back().copied().unwrap_or(0)
    }

    /// Stores the row and returns the image that it replaces.
    pub(super) fn apply(&mut self, image: Image) -> Image {
        match image {
            Image::Vm(id, row) => {
                let before = set(&mut self.vms, id.clone(), row.clone());
                if let Some(b) = &before {
                    self.names.remove(&b.name);
                    self.slots.remove(&b.slot);
                    self.ages.remove(&age(b));
                    if let Entry::Occupied(mut theirs) = self.owners.entry(b.owner_uid) {
                        theirs.get_mut().remove(&age(b));
                        if theirs.get().is_empty() {
                            theirs.remove();
                        }
                    }
                }
                if let Some(r) = &row {
                    self.names.insert(r.name.clone(), id.clone());
                    self.slots.insert(r.slot);
                    self.ages.insert(age(r), r.clone());
                    self.owners
                        .entry(r.owner_uid)
                        .or_default()
                        .insert(age(r), r.clone());
                }
                Image::Vm(id, before)
            }
            Image::Op(id, row) => {
                let before = set(&mut self.ops, id.clone(), row.clone());
                if let Some(b) = &before {
                    self.history.remove(b);
                }
                if let Some(r) = &row {
                    self.history.add(r);
                }
                Image::Op(id, before)
            }
            Image::Workspace(vm, row) => {
                Image::Workspace(vm.clone(), set(&mut self.workspaces, vm, row))
            }
            Image::Ledger(id, row) => {
                let before = set(&mut self.ledger, id, row.clone());
                if let Some(vm) = before.as_ref().and_then(|b| b.vm.clone())
                    && let Entry::Occupied(mut rows) = self.ledger_by_vm.entry(vm)
                {
                    rows.get_mut().remove(&id);
                    if rows.get().is_empty() {
                        rows.remove();
                    }
                }
                if let Some(vm) = row.and_then(|r| r.vm.clone()) {
                    self.ledger_by_vm.entry(vm).or_default().insert(id);
                }
                Image::Ledger(id, before)
            }
            Image::Key(key, row) => {
                let before = set(&mut self.keys, key.clone(), row.clone());
                // Add the new key before removing the old one, so that an operation that both name
                // cannot be removed in between.
                if let Some(r) = &row {
                    self.history
                        .key_added(&r.op, self.ops.get(&r.op).map(|op| &**op));
                }
                if let Some(b) = &before {
                    self.history
                        .key_removed(&b.op, self.ops.get(&b.op).map(|op| &**op));
                }
                Image::Key(key, before)
            }
            Image::Meta(name, value) => Image::Meta(name.clone(), set(&mut self.meta, name, value)),
            Image::Snapshot(id, row) => {
                Image::Snapshot(id.clone(), set(&mut self.snapshots, id, row))
            }
        }
    }

    /// Loads everything from the database. Returns `store_refused` if a row cannot be read, or if
    /// rows contradict each other.
    pub(super) fn load(c: &Connection) -> Result<State> {
        let mut state = State::default();
        for row in vm::load(c)? {
            if state.names.contains_key(&row.name) || state.slots.contains(&row.slot) {
                return Err(super::sql::refused(format!(
                    "two VMs have the name {} or the slot {}",
                    row.name, row.slot
                )));
            }
            state.apply(Image::Vm(row.id.clone(), Some(row.into())));
        }
        for row in workspace::load(c)? {
            if !state.vms.contains_key(&row.vm) {
                return Err(super::sql::refused(format!(
                    "a workspace belongs to VM {}, which does not exist",
                    row.vm
                )));
            }
            state.apply(Image::Workspace(row.vm.clone(), Some(row.into())));
        }
        for row in op::load(c)? {
            state.apply(Image::Op(row.id.clone(), Some(row.into())));
        }
        for row in ledger::load(c)? {
            state.apply(Image::Ledger(row.id, Some(row.into())));
        }
        for row in key::load(c)? {
            state.apply(Image::Key((row.uid, row.key.clone()), Some(row.into())));
        }
        for (name, value) in meta::load(c)? {
            state.apply(Image::Meta(name, Some(value.into())));
        }
        for row in snapshot::load(c)? {
            if state.snapshot_by_name(&row.name).is_some() {
                return Err(super::sql::refused(format!(
                    "two snapshots have the name {}",
                    row.name
                )));
            }
            state.apply(Image::Snapshot(row.id.clone(), Some(row.into())));
        }
        Ok(state)
    }
}
