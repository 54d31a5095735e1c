//! Implements transactions. A transaction reads its own writes, and an error or a panic undoes all
//! of them.

mod ops;
mod vms;

use super::state::{Image, State};
use super::{LedgerRow, SnapshotRow};
use crate::error::{Error, Kind, Result};
use crate::ids::{SnapshotId, VmId};
use crate::uids::Retention;
use std::ops::Deref;
use std::sync::Arc;

/// The change of one row: its contents before and after.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) before: Image,
    pub(super) after: Image,
}

/// The transaction in progress. All lookups of [`State`] also work on a transaction.
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
    /// Undoes a transaction that was not finished.
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
    pub(super) fn new(
        state: &'a mut State,
        ledger_next: &'a mut u64,
        retention: Retention,
    ) -> Self {
        Self {
            state,
            ledger_next,
            retention,
            steps: Vec::new(),
        }
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

    /// Records that a host resource may exist from now on, and returns the ID of the new ledger
    /// row. The caller must wait until the change is durable before it acquires the resource. IDs
    /// are never reused while the daemon lives.
    pub fn intend(
        &mut self,
        vm: Option<&VmId>,
        generation: u64,
        kind: &str,
        name: impl Into<String>,
    ) -> u64 {
        let id = *self.ledger_next;
        *self.ledger_next += 1;
        let row = LedgerRow {
            id,
            vm: vm.cloned(),
            generation,
            kind: kind.to_owned(),
            name: name.into(),
            facts: None,
        };
        self.apply(Image::Ledger(id, Some(Arc::new(row))));
        id
    }

    /// Deletes a ledger row, because its resource is gone. Returns false if there is no such row.
    pub fn strike(&mut self, id: u64) -> bool {
        let was = self.ledger_row(id).is_some();
        self.apply(Image::Ledger(id, None));
        was
    }

    /// Adds or replaces a snapshot.
    ///
    /// # Errors
    /// `name_taken` if another snapshot has the name.
    pub fn put_snapshot(&mut self, row: SnapshotRow) -> Result<()> {
        if self
            .snapshot_by_name(&row.name)
            .is_some_and(|other| other.id != row.id)
        {
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
