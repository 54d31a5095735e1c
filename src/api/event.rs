//! Events about VMs and operations, which are published once they are durable.
//!
//! Events belong to changes of the store. Every change has a number, `seq`, which keeps growing
//! across restarts of the daemon. The events of one change share its number and arrive in one note,
//! so a client that resumes after a `seq` misses none.

use super::call::calls;
use super::fault::Fault;
use super::op::OpState;
use super::vm::{Vm, VmState};
use crate::ids::{OpId, VmId, VmName};
use serde::{Deserialize, Serialize};

/// Members of [`Vm`] with their new values. Merging them into the previous VM gives the current
/// one.
pub type Members = serde_json::Map<String, serde_json::Value>;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsWatchRequest {
    /// The change to resume after. If it is absent, or if the later changes are no longer kept, a
    /// snapshot comes first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
}

/// The VMs that the caller may see, after the change `seq`. Changes that are not yet durable are
/// not included.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub seq: u64,
    /// When the snapshot was sent, in seconds since the epoch.
    pub at: u64,
    /// True if `since` was given but the later changes are no longer kept. The client must then
    /// start over from this snapshot.
    pub resync: bool,
    /// True if another note continues this snapshot.
    pub more: bool,
    pub vms: Vec<Vm>,
}

/// The events of one change that the caller may see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Events {
    pub seq: u64,
    pub events: Vec<Event>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The number of the change that the event belongs to.
    pub seq: u64,
    /// When the change became durable, in seconds since the epoch.
    pub at: u64,
    /// The VM of the event. None for an operation that does not concern a VM.
    pub vm: Option<VmId>,
    pub name: Option<VmName>,
    /// The owner of the VM, or of the operation if there is no VM.
    pub owner_uid: u32,
    #[serde(flatten)]
    pub what: What,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event")]
pub enum What {
    #[serde(rename = "vm.created")]
    Created { set: Members },
    /// Settings, the workspace or other members have changed, but not the state.
    #[serde(rename = "vm.changed")]
    Changed { set: Members },
    /// The state or its reason has changed.
    #[serde(rename = "vm.state")]
    State {
        from: VmState,
        to: VmState,
        reason: Option<String>,
        /// The operation that changed the state.
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
    /// An event that this client does not know. The daemon never sends this variant.
    #[serde(other, rename = "unknown")]
    Unknown,
}

/// The caller read too slowly. The watch ends here, and `dropped` later changes were discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lagged {
    pub dropped: u64,
    /// Everything up to this change was sent. Pass it as `since` to resume.
    pub resume_seq: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsWatchReply {
    pub resume_seq: u64,
}

calls! {
    /// Sends `snapshot` and `events` notes (`more`) until the caller disconnects or reads too
    /// slowly. A caller that reads too slowly gets a `lagged` note and then the reply.
    EventsWatch = "events.watch" (EventsWatchRequest) -> EventsWatchReply [Anybody, Unkeyed, EndCall, NoFds, feature "events"];
}
