//! The immediate answer to a mutating call.

use crate::error::{Error, Result};
use crate::ids::OpId;
use serde::Serialize;
use serde_json::Value;

/// The immediate answer to a call.
#[derive(Debug)]
pub enum CallOutcome {
    /// The call started this operation.
    Op(OpId),
    /// The operation was in progress already. The call waits for the operation but does not own it.
    Joined(OpId),
    /// There is nothing to wait for.
    Done(Value),
}

impl CallOutcome {
    pub(super) fn done(reply: &impl Serialize) -> Result<Self> {
        to_value(reply).map(CallOutcome::Done)
    }
}

pub(super) fn to_value(reply: &impl Serialize) -> Result<Value> {
    serde_json::to_value(reply).map_err(|e| Error::internal("serialize a reply").with_source(e))
}
