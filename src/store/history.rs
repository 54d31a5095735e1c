//! Decides which ended operations are kept: a limited number per uid and in all, and every
//! operation that an idempotency key refers to.

use super::OpRow;
use crate::ids::OpId;
use crate::uids::Retention;
use std::collections::{BTreeMap, BTreeSet};

/// The time of its end, and its ID. The oldest operation is removed first.
type EndedKey = (u64, OpId);

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct OpHistory {
    /// Ended operations without a key, per uid.
    free: BTreeMap<u32, BTreeSet<EndedKey>>,
    free_total: usize,
    /// The number of keys that refer to an operation, ended or not.
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

    /// Records that another key refers to the operation. `row` is the operation, if it exists.
    pub(super) fn key_added(&mut self, op: &OpId, row: Option<&OpRow>) {
        *self.keyed.entry(op.clone()).or_default() += 1;
        if let Some(row) = row {
            self.remove(row);
        }
    }

    /// Records that one key less refers to the operation.
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

    /// The operation to remove next, if `uid` has too many or there are too many in all. In the
    /// latter case it belongs to the user with the most. Operations of root are removed only if no
    /// other user has any.
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
