//! Idempotency keys: the same key with the same parameters stands for the same operation, for a
//! day. The store keeps that operation's answer for as long as the key, however many operations
//! follow.

use super::access::Caller;
use super::call::CallOutcome;
use super::core::{Core, DURABLE_DEADLINE, now_s};
use crate::api::op::Op;
use crate::error::{Error, Kind, Result};
use crate::ids::OpId;
use crate::locks::{Condvar, Mutex, Rank};
use crate::store::{KeyRow, Tx};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a key is kept.
const KEPT_S: u64 = 24 * 3600;
/// How long a call waits for another one with its key to have begun.
const HELD_DEADLINE: Duration = DURABLE_DEADLINE;

/// Keys of calls that are beginning.
pub(super) struct Beginning {
    keys: Mutex<HashSet<(u32, String)>>,
    freed: Condvar,
}

impl Beginning {
    pub fn new() -> Self {
        Self { keys: Mutex::new(Rank::Runtimes, HashSet::new()), freed: Condvar::new() }
    }
    pub fn len(&self) -> usize {
        self.keys.lock().len()
    }
}

/// What a call's key stands for.
pub enum Keyed {
    /// Nothing yet: the call is to begin, and to record what it began.
    New(HeldKey),
    /// An operation of an earlier call.
    Same(Box<Op>),
}

/// A key that no other call gets past before this is dropped.
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

/// Idempotency keys.
#[derive(Clone)]
pub struct Keys {
    pub(super) core: Core,
    pub(super) beginning: Arc<Beginning>,
}

impl Keys {
    /// Waits for another call with this key that is beginning.
    ///
    /// # Errors
    /// `idempotency_conflict` for another method or other parameters; `operation_limit` when the
    /// caller has too many keys; `operation_not_found` when the operation never became durable;
    /// `busy`.
    pub fn claim_key(&self, caller: &Caller, key: &str, method: &str, params: &str) -> Result<Keyed> {
        let params: Value = serde_json::from_str(params).map_err(|e| Error::invalid("read the parameters").with_source(e))?;
        // Members are sorted in a `Value`, so their order does not count.
        let hash = Sha256::digest(format!("{method}\n{params}").as_bytes());
        let params_hash: String = hash.iter().map(|b| format!("{b:02x}")).collect();
        let held = self.hold_key(caller.uid, key, method, params_hash)?;
        let Some(row) = self.core.store.read(|s| s.key(caller.uid, key).cloned()).filter(|row| row.expires_at > now_s()) else {
            // Once something has begun it is too late to find that its key cannot be recorded.
            self.core.store.read(|s| s.check_keys(caller.uid, Some(now_s())))?;
            return Ok(Keyed::New(held));
        };
        if row.params_hash != held.params_hash {
            return Err(Error::new(Kind::IdempotencyConflict, format!("the key {key:?} came before with another call"))
                .hint("use a new key for each call"));
        }
        match self.core.op_kept(&row.op) {
            Ok(op) => Ok(Keyed::Same(Box::new(op))),
            Err(e) => Err(e.context(format!("the key {key:?} stands for an operation that is no longer kept"))),
        }
    }

    fn hold_key(&self, uid: u32, key: &str, method: &str, params_hash: String) -> Result<HeldKey> {
        let wanted = (uid, key.to_owned());
        let mut keys = self.beginning.keys.lock();
        if !self.beginning.freed.wait_while(&mut keys, Instant::now() + HELD_DEADLINE, |k| k.contains(&wanted)) {
            return Err(Error::new(Kind::Busy, format!("a call with the key {key:?} is beginning")).hint("try again in a moment"));
        }
        keys.insert(wanted);
        drop(keys);
        Ok(HeldKey { keys: self.clone(), uid, key: key.to_owned(), method: method.to_owned(), params_hash })
    }
}

impl HeldKey {
    /// Its row, for a section that also makes what it stands for.
    pub(super) fn put(&self, tx: &mut Tx, op: &OpId) -> Result<()> {
        let now = now_s();
        tx.expire_keys(now);
        let (key, params_hash) = (self.key.clone(), self.params_hash.clone());
        tx.put_key(KeyRow { uid: self.uid, key, params_hash, op: op.clone(), expires_at: now + KEPT_S })
    }

    /// Durable when this returns. What has begun goes on also when its key cannot be written down.
    pub fn record(self, begun: CallOutcome) -> CallOutcome {
        let recorded = match &begun {
            CallOutcome::Op(op) | CallOutcome::Joined(op) => self.write(op),
            CallOutcome::Done(value) => self.record_value(value.clone()),
        };
        if let Err(e) = recorded {
            log::warn!("record the key of a call of {}: {e}", self.method);
        }
        begun
    }

    fn write(&self, op: &OpId) -> Result<()> {
        let ((), ticket) = self.keys.core.store.change(|tx| self.put(tx, op))?;
        self.keys.core.wait_durable(ticket)
    }

    /// For what was answered at once: an operation that has ended with this answer.
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
