//! Decides which ended operations are kept: so many of each uid, so many in all, and every one that a key stands for.

use super::OpRow;
use crate::ids::OpId;
use crate::uids::Retention;
use std::collections::{BTreeMap, BTreeSet};

/// When it ended, and its id: in this order the oldest goes first.
type EndedKey = (u64, OpId);

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct OpHistory {
    /// Ended operations that no key stands for, per uid.
    free: BTreeMap<u32, BTreeSet<EndedKey>>,
    free_total: usize,
    /// How many keys stand for an operation, ended or not.
    keyed: BTreeMap<OpId, usize>,
}

impl OpHistory {
    pub(super) fn add(&mut self, row: &OpRow) {
        if row.state.has_ended()
            && !self.keyed.contains_key(&row.id)
            && self.free.entry(row.owner_uid).or_default().insert(ended_key(row))
        {
            self.free_total += 1;
        }
    }

    pub(super) fn remove(&mut self, row: &OpRow) {
        let Some(theirs) = self.free.get_mut(&row.owner_uid) else { return };
        if theirs.remove(&ended_key(row)) {
            self.free_total -= 1;
        }
        if theirs.is_empty() {
            self.free.remove(&row.owner_uid);
        }
    }

    /// A key stands for the operation from now on. `row` is the operation, where there is one.
    pub(super) fn key_added(&mut self, op: &OpId, row: Option<&OpRow>) {
        *self.keyed.entry(op.clone()).or_default() += 1;
        if let Some(row) = row {
            self.remove(row);
        }
    }

    /// One key less stands for the operation.
    pub(super) fn key_removed(&mut self, op: &OpId, row: Option<&OpRow>) {
        let Some(keys) = self.keyed.get_mut(op) else { return };
        *keys -= 1;
        if *keys == 0 {
            self.keyed.remove(op);
            if let Some(row) = row {
                self.add(row);
            }
        }
    }

    /// The operation that goes first, when there are too many of `uid` or in all. Root's make room only for root's.
    pub(super) fn to_prune(&self, uid: u32, retention: Retention) -> Option<&OpId> {
        let oldest = |uid: u32| self.free.get(&uid)?.first().map(|(_, id)| id);
        if self.free.get(&uid).is_some_and(|theirs| theirs.len() > retention.per_uid_max) {
            return oldest(uid);
        }
        if self.free_total <= retention.total_max {
            return None;
        }
        let others = self.free.iter().filter(|(uid, _)| **uid != 0);
        let largest = others.max_by_key(|(_, theirs)| theirs.len()).map_or(0, |(uid, _)| *uid);
        oldest(largest)
    }
}

fn ended_key(row: &OpRow) -> EndedKey {
    (row.ended_at.unwrap_or(row.started_at), row.id.clone())
}
