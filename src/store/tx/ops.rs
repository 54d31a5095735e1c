//! Changes operations, and the idempotency keys that name them.

use super::{Image, Tx};
use crate::error::Result;
use crate::store::{KeyRow, OpRow};
use std::sync::Arc;

impl Tx<'_> {
    /// Adds or replaces an operation. If the user or all users together have too many ended
    /// operations, the oldest ones are removed, except for those that a key names.
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

    /// Adds or replaces a key.
    ///
    /// # Errors
    /// `operation_limit` if the uid has too many keys.
    pub fn put_key(&mut self, row: KeyRow) -> Result<()> {
        if self.key(row.uid, &row.key).is_none() {
            self.check_keys(row.uid, None)?;
        }
        self.set_key((row.uid, row.key.clone()), Some(Arc::new(row)));
        Ok(())
    }

    /// Sets or removes a key. If the key named an operation before, that operation may then be
    /// pruned.
    fn set_key(&mut self, key: (u32, String), row: Option<Arc<KeyRow>>) {
        let former = self.key(key.0, &key.1).map(|former| former.op.clone());
        self.apply(Image::Key(key, row));
        if let Some(uid) = former.and_then(|op| self.op(&op).map(|row| row.owner_uid)) {
            self.prune_ops(uid);
        }
    }

    /// Removes the keys that have expired at `now` (seconds since the epoch). Returns their number.
    pub fn expire_keys(&mut self, now: u64) -> usize {
        let old: Vec<_> = self
            .keys()
            .filter(|k| k.expires_at <= now)
            .map(|k| (k.uid, k.key.clone()))
            .collect();
        let count = old.len();
        old.into_iter().for_each(|key| self.set_key(key, None));
        count
    }
}
