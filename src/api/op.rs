//! Operations: whatever may take longer than a second.

use super::calls;
use crate::ids::{OpId, VmId};
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpState {
    Running,
    /// Cancel was asked for; the operation is cleaning up.
    Cancelling,
    Ok,
    Failed,
    Cancelled,
}

impl OpState {
    pub const fn has_ended(self) -> bool {
        matches!(self, OpState::Ok | OpState::Failed | OpState::Cancelled)
    }
}

/// At most ten a second; the last one is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done now: `wait for ssh`.
    pub stage: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// Of `done` and `total`: `bytes`, `files`, `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
}

/// An operation as anybody may see it who may see its VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Op {
    pub id: OpId,
    /// The method that began it: `vm.start`.
    pub method: String,
    pub vm: Option<VmId>,
    pub owner_uid: u32,
    pub state: OpState,
    pub may_cancel: bool,
    pub progress: Progress,
    /// Seconds since the epoch.
    pub started_at: u64,
    pub ended_at: Option<u64>,
    /// What it answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<super::Fault>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpRequest {
    /// The id or an unambiguous prefix of it.
    pub op: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpWaitRequest {
    pub op: String,
    #[serde(default)]
    pub timeout_ms: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpListRequest {
    /// Also those that have ended.
    #[serde(default)]
    pub all: bool,
    /// Continue behind this place: `next` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// At most so many items; fewer may come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpReply {
    pub op: Op,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpListReply<O = Op> {
    /// In the order in which they began.
    pub ops: Vec<O>,
    /// There are more: ask again with `after` set to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// The answer at once of an operation that was called without `more`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpStarted {
    pub op: OpId,
}

calls! {
    OpList = "op.list" (OpListRequest) -> OpListReply;
    OpShow = "op.show" (OpRequest) -> OpReply;
    /// Answers when the operation has ended, however it ended; with `more`, progress on the way.
    OpWait = "op.wait" (OpWaitRequest) -> OpReply;
    /// Asks it to stop and answers at once.
    OpCancel = "op.cancel" (OpRequest) -> OpReply;
}

super::page::list_calls! { OpList: ops of Op; }
