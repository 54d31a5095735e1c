//! Finds operations, and the idempotency keys that name them.

use super::State;
use crate::error::{Error, Kind, Result};
use crate::ids::OpId;
use crate::store::key::KEYS_PER_UID_MAX;
use crate::store::{KeyRow, OpRow};
use crate::uids::Retention;
use std::sync::Arc;

impl State {
    pub fn op(&self, id: &OpId) -> Option<&Arc<OpRow>> {
        self.ops.get(id)
    }

    pub fn ops(&self) -> impl Iterator<Item = &Arc<OpRow>> {
        self.ops.values()
    }

    /// See [`OpHistory::to_prune`].
    pub(in crate::store) fn op_to_prune(&self, uid: u32, retention: Retention) -> Option<OpId> {
        self.history.to_prune(uid, retention).cloned()
    }

    pub fn key(&self, uid: u32, key: &str) -> Option<&Arc<KeyRow>> {
        self.keys.get(&(uid, key.to_owned()))
    }

    pub fn keys(&self) -> impl Iterator<Item = &Arc<KeyRow>> {
        self.keys.values()
    }

    pub(in crate::store) fn keys_of(&self, uid: u32) -> impl Iterator<Item = &Arc<KeyRow>> {
        self.keys
            .range((uid, String::new())..)
            .map(|(_, row)| row)
            .take_while(move |row| row.uid == uid)
    }

    /// Checks that the uid may add another key.
    ///
    /// # Errors
    /// `operation_limit` if the uid has too many keys to add another one. Keys that have expired at
    /// `now` do not count.
    pub fn check_keys(&self, uid: u32, now: Option<u64>) -> Result<()> {
        let is_live = |row: &&Arc<KeyRow>| now.is_none_or(|now| row.expires_at > now);
        if self.keys_of(uid).filter(is_live).count() < KEYS_PER_UID_MAX {
            return Ok(());
        }
        let text = format!("uid {uid} has {KEYS_PER_UID_MAX} idempotency keys already");
        Err(Error::new(Kind::OperationLimit, text)
            .hint("call without a key, or wait until some have expired (after a day)"))
    }
}
