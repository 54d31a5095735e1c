//! What happens to VMs and operations, told once it is durable.
//!
//! Events belong to changes of the store. A change has a number, `seq`, which grows over restarts of the daemon, too;
//! the events of one change share it and come in one note, so that whoever goes on after a `seq` misses none.

use super::calls;
use super::fault::Fault;
use super::op::OpState;
use super::vm::{Vm, VmState};
use crate::ids::{OpId, VmId, VmName};
use serde::{Deserialize, Serialize};

/// Members of [`Vm`] with their new values: a VM as it was, with these put in, is the VM as it is.
pub type Members = serde_json::Map<String, serde_json::Value>;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsWatchRequest {
    /// Go on after this change. Without it, and where what came after is no longer kept, a snapshot comes first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
}

/// The caller's VMs after the change `seq`. What is not yet durable is not in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub seq: u64,
    /// Seconds since the epoch.
    pub at: u64,
    /// `since` was given and what came after it is no longer kept: begin anew from here.
    pub resync: bool,
    /// Another note goes on with this snapshot.
    pub more: bool,
    pub vms: Vec<Vm>,
}

/// What one change brought, as far as the caller may see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Events {
    pub seq: u64,
    pub events: Vec<Event>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Of the change that it belongs to.
    pub seq: u64,
    /// When it was durable, in seconds since the epoch.
    pub at: u64,
    /// None for an operation on no VM.
    pub vm: Option<VmId>,
    pub name: Option<VmName>,
    /// Of the VM; where there is none, of the operation.
    pub owner_uid: u32,
    #[serde(flatten)]
    pub what: What,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event")]
pub enum What {
    #[serde(rename = "vm.created")]
    Created { set: Members },
    /// Settings, the workspace, and whatever else changes while the state stays.
    #[serde(rename = "vm.changed")]
    Changed { set: Members },
    /// The state or its reason.
    #[serde(rename = "vm.state")]
    State {
        from: VmState,
        to: VmState,
        reason: Option<String>,
        /// The operation that did it.
        op: Option<OpId>,
        set: Members,
    },
    #[serde(rename = "vm.deleted")]
    Deleted { op: Option<OpId> },
    #[serde(rename = "op.ended")]
    OpEnded {
        op: OpId,
        method: String,
        state: OpState,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<Fault>,
    },
    /// One that is newer than this side. Never sent.
    #[serde(other, rename = "unknown")]
    Unknown,
}

/// The caller read too slowly: the watch ends here, and `dropped` changes that came since were not kept for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lagged {
    pub dropped: u64,
    /// Everything up to it was told: watch again since it.
    pub resume_seq: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsWatchReply {
    pub resume_seq: u64,
}

calls! {
    /// `snapshot` and `events` notes (`more`) until the caller goes; answered only after a `lagged` note.
    EventsWatch = "events.watch" (EventsWatchRequest) -> EventsWatchReply;
}
