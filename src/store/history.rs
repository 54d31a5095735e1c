//! Decides which ended operations are kept: a limited number per uid and in total, and every
//! operation that an idempotency key refers to.

use super::OpRow;
use crate::ids::OpId;
use crate::sched::HashMap;
use crate::uids::Retention;
use std::collections::{BTreeMap, BTreeSet};

/// An operation's position in the history: the second in which it ended, and its number in the
/// order of insertion. Many operations end in the same second. The one inserted last must not be
/// pruned first, because its key may not be recorded yet.
type EndOrder = (u64, u64);

#[derive(Clone, Debug, Default)]
pub(super) struct OpHistory {
    /// Ended operations without a key, per uid, the oldest first.
    free: BTreeMap<u32, BTreeMap<EndOrder, OpId>>,
    /// The position of each operation in `free`.
    orders: HashMap<OpId, EndOrder>,
    added: u64,
    /// The number of keys that refer to each operation, ended or not.
    keyed: BTreeMap<OpId, usize>,
}

/// The order of operations that ended in the same second is lost on disk, so equality ignores it.
impl PartialEq for OpHistory {
    fn eq(&self, other: &Self) -> bool {
        let ids = |history: &Self| -> BTreeSet<(u32, OpId)> {
            let all = history.free.iter();
            all.flat_map(|(uid, theirs)| theirs.values().map(|id| (*uid, id.clone())))
                .collect()
        };
        self.keyed == other.keyed && ids(self) == ids(other)
    }
}

impl OpHistory {
    pub(super) fn add(&mut self, row: &OpRow) {
        let is_free = row.state.has_ended() && !self.keyed.contains_key(&row.id);
        if !is_free || self.orders.contains_key(&row.id) {
            return;
        }
        self.added += 1;
        let order = (row.ended_at.unwrap_or(row.started_at), self.added);
        self.free
            .entry(row.owner_uid)
            .or_default()
            .insert(order, row.id.clone());
        self.orders.insert(row.id.clone(), order);
    }

    pub(super) fn remove(&mut self, row: &OpRow) {
        let Some(order) = self.orders.remove(&row.id) else {
            return;
        };
        let Some(theirs) = self.free.get_mut(&row.owner_uid) else {
            return;
        };
        theirs.remove(&order);
        if theirs.is_empty() {
            self.free.remove(&row.owner_uid);
        }
    }

    /// Records that one more key refers to the operation, so that the operation is not pruned.
    /// `row` is the operation, if the store has it.
    pub(super) fn key_added(&mut self, op: &OpId, row: Option<&OpRow>) {
        *self.keyed.entry(op.clone()).or_default() += 1;
        if let Some(row) = row {
            self.remove(row);
        }
    }

    /// Records that one key fewer refers to the operation. If no key is left and the operation has
    /// ended, it can be pruned again.
    pub(super) fn key_removed(&mut self, op: &OpId, row: Option<&OpRow>) {
        let Some(keys) = self.keyed.get_mut(op) else {
            return;
        };
        *keys -= 1;
        if *keys == 0 {
            self.keyed.remove(op);
            if let Some(row) = row {
                self.add(row);
            }
        }
    }

    /// Returns the operation to remove next if `uid` or all users together have too many, and
    /// `None` otherwise. An operation of root is removed only to make room for another operation of
    /// root.
    pub(super) fn to_prune(&self, uid: u32, retention: Retention) -> Option<&OpId> {
        let oldest = |uid: u32| self.free.get(&uid)?.first_key_value().map(|(_, id)| id);
        if self
            .free
            .get(&uid)
            .is_some_and(|theirs| theirs.len() > retention.per_uid_max)
        {
            return oldest(uid);
        }
        if self.orders.len() <= retention.total_max {
            return None;
        }
        let others = self.free.iter().filter(|(uid, _)| **uid != 0);
        let largest = others
            .max_by_key(|(_, theirs)| theirs.len())
            .map_or(0, |(uid, _)| *uid);
        oldest(largest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::op::{Op, OpState};

    fn ended(id: OpId) -> OpRow {
        let started_at = 7;
        Op {
            id,
            method: "vm.delete".to_owned(),
            vm: None,
            owner_uid: 1,
            state: OpState::Ok,
            started_at,
            ended_at: Some(started_at),
            may_cancel: false,
            progress: Default::default(),
            result: None,
            error: None,
        }
    }

    #[test]
    fn operations_that_end_in_the_same_second_are_pruned_oldest_first() {
        let mut ids: Vec<OpId> = (0..6).map(|_| OpId::random()).collect();
        ids.sort();
        ids.reverse();
        let mut history = OpHistory::default();
        ids.iter().for_each(|id| history.add(&ended(id.clone())));
        let retention = Retention {
            per_uid_max: 5,
            total_max: 100,
        };
        assert_eq!(history.to_prune(1, retention), ids.first());
    }
}
