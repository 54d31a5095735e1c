//! Idempotency keys. For a day, a call with the same key, method and parameters gets the same
//! operation. The store keeps that operation's result for as long as the key.

use super::access::Caller;
use super::call::CallOutcome;
use super::core::{Core, DURABLE_DEADLINE};
use crate::api::op::Op;
use crate::error::{Error, Kind, Result};
use crate::host::hex;
use crate::host::time::now_s;
use crate::ids::OpId;
use crate::locks::{Condvar, Mutex, Rank};
use crate::sched::{HashSet, Instant};
use crate::store::{KeyRow, Tx};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::Duration;

/// How long a key is kept.
const KEPT_S: u64 = 24 * 3600;
/// How long a call waits for another call with its key to begin.
const HELD_DEADLINE: Duration = DURABLE_DEADLINE;

/// Keys of calls that are just beginning.
pub(super) struct Beginning {
    keys: Mutex<HashSet<(u32, String)>>,
    freed: Condvar,
}

impl Beginning {
    pub(super) fn new() -> Self {
        Self {
            keys: Mutex::new(Rank::Runtimes, HashSet::default()),
            freed: Condvar::new(),
        }
    }
    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn len(&self) -> usize {
        self.keys.lock().len()
    }
}

/// A claimed key: either a new key, or the key of an earlier call.
pub enum Keyed {
    /// The key is new. The call must begin and record its outcome.
    New(HeldKey),
    /// The operation of an earlier call with this key.
    Same(Box<Op>),
}

/// A key that no other call can claim until this is dropped.
pub struct HeldKey {
    keys: Keys,
    uid: u32,
    key: String,
    method: String,
    params_hash: String,
}

impl Drop for HeldKey {
    fn drop(&mut self) {
        let key = (self.uid, std::mem::take(&mut self.key));
        self.keys.beginning.keys.lock().remove(&key);
        self.keys.beginning.freed.notify_all();
    }
}

/// Claims idempotency keys for calls.
#[derive(Clone)]
pub struct Keys {
    pub(super) core: Core,
    pub(super) beginning: Arc<Beginning>,
}

impl Keys {
    /// Claims a key. Waits if another call with this key is just beginning.
    ///
    /// # Errors
    /// `idempotency_conflict` for another method or other parameters; `operation_limit` if the
    /// caller has too many keys; `operation_not_found` if the operation is no longer kept; `busy`.
    pub fn claim_key(
        &self,
        caller: &Caller,
        key: &str,
        method: &str,
        params: &str,
    ) -> Result<Keyed> {
        let params: Value = serde_json::from_str(params)
            .map_err(|e| Error::invalid("read the parameters").with_source(e))?;
        // A `Value` sorts its members, so their order does not matter.
        let hash = Sha256::digest(format!("{method}\n{params}").as_bytes());
        let held = self.hold_key(caller.uid, key, method, hex::encode(&hash))?;
        let Some(row) = self
            .core
            .store
            .read(|s| s.key(caller.uid, key).cloned())
            .filter(|row| row.expires_at > now_s())
        else {
            // Check the limit now, because it is too late once the operation has begun.
            self.core
                .store
                .read(|s| s.check_keys(caller.uid, Some(now_s())))?;
            return Ok(Keyed::New(held));
        };
        if row.params_hash != held.params_hash {
            return Err(Error::new(
                Kind::IdempotencyConflict,
                format!("the key {key:?} was used for a different call"),
            )
            .hint("use a new key for each call"));
        }
        match self.core.op_kept(&row.op) {
            Ok(op) => Ok(Keyed::Same(Box::new(op))),
            Err(e) => Err(e.context(format!(
                "the operation of the key {key:?} is no longer kept"
            ))),
        }
    }

    fn hold_key(&self, uid: u32, key: &str, method: &str, params_hash: String) -> Result<HeldKey> {
        let wanted = (uid, key.to_owned());
        let mut keys = self.beginning.keys.lock();
        if !self
            .beginning
            .freed
            .wait_while(&mut keys, Instant::now() + HELD_DEADLINE, |k| {
                k.contains(&wanted)
            })
        {
            return Err(Error::new(
                Kind::Busy,
                format!("a call with the key {key:?} is just starting"),
            )
            .hint("try again in a moment"));
        }
        keys.insert(wanted);
        drop(keys);
        Ok(HeldKey {
            keys: self.clone(),
            uid,
            key: key.to_owned(),
            method: method.to_owned(),
            params_hash,
        })
    }
}

impl HeldKey {
    /// Writes the key's row. Call this in the transaction that creates what the key stands for.
    pub(super) fn put(&self, tx: &mut Tx, op: &OpId) -> Result<()> {
        let now = now_s();
        tx.expire_keys(now);
        let (key, params_hash) = (self.key.clone(), self.params_hash.clone());
        tx.put_key(KeyRow {
            uid: self.uid,
            key,
            params_hash,
            op: op.clone(),
            expires_at: now + KEPT_S,
        })
    }

    /// Records the outcome, durably. If that fails, logs the error, and the operation continues
    /// without the key.
    pub fn record(self, outcome: CallOutcome) -> CallOutcome {
        let recorded = match &outcome {
            CallOutcome::Op(op) | CallOutcome::Joined(op) => self.write(op),
            CallOutcome::Done(value) => self.record_value(value.clone()),
        };
        if let Err(e) = recorded {
            log::warn!("record the key of a call of {}: {e}", self.method);
        }
        outcome
    }

    fn write(&self, op: &OpId) -> Result<()> {
        let ((), ticket) = self.keys.core.store.change(|tx| self.put(tx, op))?;
        self.keys.core.wait_durable(ticket)
    }

    /// Records an immediate reply as the result of an operation that has ended.
    fn record_value(&self, value: Value) -> Result<()> {
        let op = self.keys.core.begin_own_op(&self.method, None, self.uid)?;
        let written = self.write(op.id());
        self.keys.core.end_op(op, Ok(value));
        written
    }

    pub(super) fn method(&self) -> &str {
        &self.method
    }
}
