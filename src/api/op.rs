//! Operations: calls that may take longer than a second.

use super::call::calls;
use crate::ids::{OpId, VmId};
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpState {
    Running,
    /// Cancellation was requested; the operation is cleaning up.
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

/// The progress of an operation. It is sent at most ten times a second, and the last progress is
/// always sent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The current stage, such as `wait for ssh`.
    pub stage: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// The unit of `done` and `total`, such as `bytes`, `files` or `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// The parts that progress separately, such as the layers of an image, in their order. At most
    /// [`PARTS_MAX`] parts are listed; those in progress and those that wait are preferred.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Part>,
    /// The number of parts, including those that are not listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts_total: Option<u64>,
}

/// The most parts in one [`Progress`].
pub const PARTS_MAX: usize = 32;

/// A part of an operation, such as one layer of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// A short name, such as the beginning of a layer's digest.
    pub name: String,
    pub state: PartState,
    /// The unit is that of the whole [`Progress`].
    pub done: u64,
    pub total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartState {
    Waiting,
    Downloading,
    /// The part is left from an earlier operation, so there is nothing to do.
    Cached,
    Done,
}

impl PartState {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Downloading => "downloading",
            Self::Cached => "cached",
            Self::Done => "done",
        }
    }
}

/// Chooses the parts to show if there is room for `max`: first those in progress, then those that
/// wait. The parts keep their order.
pub fn most_relevant(parts: Vec<Part>, max: usize) -> Vec<Part> {
    if parts.len() <= max {
        return parts;
    }
    let mut ranked: Vec<(usize, Part)> = parts.into_iter().enumerate().collect();
    ranked.sort_by_key(|(_, part)| match part.state {
        PartState::Downloading => 0,
        PartState::Waiting => 1,
        PartState::Done => 2,
        PartState::Cached => 3,
    });
    ranked.truncate(max);
    ranked.sort_by_key(|(at, _)| *at);
    ranked.into_iter().map(|(_, part)| part).collect()
}

/// An operation. Root, the user who began it and the owner of its VM may see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Op {
    pub id: OpId,
    /// The method that began the operation, such as `vm.start`.
    pub method: String,
    pub vm: Option<VmId>,
    pub owner_uid: u32,
    pub state: OpState,
    pub may_cancel: bool,
    pub progress: Progress,
    /// When the operation began, in seconds since the epoch.
    pub started_at: u64,
    pub ended_at: Option<u64>,
    /// The reply of an operation that succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<super::Fault>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpRequest {
    /// The operation's id, or an unambiguous prefix of the id.
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
    /// Include operations that have ended.
    #[serde(default)]
    pub all: bool,
    /// The cursor of the page: `next` of the previous one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The most items to return; there may be fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpReply {
    pub op: Op,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpListReply<O = Op> {
    /// The operations, sorted by their start, oldest first.
    pub ops: Vec<O>,
    /// The cursor of the next page, or None if there are no more items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// The immediate reply of an operation that was called without `more`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpStarted {
    pub op: OpId,
}

calls! {
    OpList = "op.list" (OpListRequest) -> OpListReply [Anybody, Unkeyed, Nothing, NoFds];
    OpShow = "op.show" (OpRequest) -> OpReply [Owner, Unkeyed, Nothing, NoFds];
    /// Replies when the operation has ended, whether it succeeded or not. Fails with `timeout` if
    /// the operation is still running after `timeout_ms`. With `more`, sends the operation's
    /// progress first.
    OpWait = "op.wait" (OpWaitRequest) -> OpReply [Owner, Unkeyed, EndCall, NoFds];
    /// Requests cancellation and replies without waiting for it.
    OpCancel = "op.cancel" (OpRequest) -> OpReply [Owner, Unkeyed, Nothing, NoFds];
}

super::page::list_calls! { OpList: ops of Op; }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_in_progress_are_shown_first_and_in_order() {
        use PartState::{Cached, Done, Downloading, Waiting};
        let states = [
            Cached,
            Done,
            Downloading,
            Done,
            Downloading,
            Waiting,
            Waiting,
        ];
        let parts: Vec<Part> = (states.into_iter().enumerate())
            .map(|(at, state)| Part {
                name: at.to_string(),
                state,
                done: 0,
                total: 1,
            })
            .collect();
        let shown = |max| {
            let parts = most_relevant(parts.clone(), max);
            parts.into_iter().map(|part| part.name).collect::<String>()
        };
        assert_eq!(shown(9), "0123456");
        assert_eq!(shown(5), "12456");
        assert_eq!(shown(3), "245");
        assert_eq!(shown(1), "2");
        assert_eq!(shown(0), "");
    }
}
