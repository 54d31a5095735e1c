//! Snapshots: a guest's memory and disks at one moment, to go on from there.

use super::calls;
use super::vm::{Net, VmReply};
use crate::ids::{ImageRef, SnapshotId, SnapshotName, VmId, VmName};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub id: SnapshotId,
    pub name: SnapshotName,
    pub owner_uid: u32,
    /// Of which it is; it may be gone.
    pub vm: VmId,
    /// Its name when the snapshot was made.
    pub vm_name: VmName,
    /// Seconds since the epoch.
    pub created_at: u64,
    pub image: ImageRef,
    pub vcpus: u32,
    pub mem_mib: u64,
    pub disk_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work_disk_bytes: Option<u64>,
    pub net: Net,
    /// `qemu (tcg, microvm)`: it goes on only where this is to be had.
    pub driver: String,
    /// The version of the VMM that saved the guest, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_version: Option<String>,
    /// What it takes on the host.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreateRequest {
    pub vm: String,
    /// The VM's name and a number when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<SnapshotName>,
}

/// A name, an id, or the beginning of an id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    pub snapshot: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotListRequest {
    /// Only the snapshots of this VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Continue behind this place: `next` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// At most so many items; fewer may come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRestoreRequest {
    pub snapshot: String,
    /// A new VM of this name goes on from there; else the one that the snapshot is of, which must be at rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_vm: Option<VmName>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReply {
    pub snapshot: Snapshot,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotListReply<S = Snapshot> {
    /// From the oldest to the newest.
    pub snapshots: Vec<S>,
    /// There are more: ask again with `after` set to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotDeleteReply {
    pub deleted: SnapshotId,
}

calls! {
    /// An operation; hang-up cancels it. The guest stands still until its memory and its disks are saved.
    SnapshotCreate = "snapshot.create" (SnapshotCreateRequest) -> SnapshotReply;
    SnapshotList = "snapshot.list" (SnapshotListRequest) -> SnapshotListReply;
    SnapshotShow = "snapshot.show" (SnapshotRequest) -> SnapshotReply;
    SnapshotDelete = "snapshot.delete" (SnapshotRequest) -> SnapshotDeleteReply;
    /// An operation; hang-up cancels it. The VM's disks are those of the snapshot from then on.
    SnapshotRestore = "snapshot.restore" (SnapshotRestoreRequest) -> VmReply;
}

super::page::list_calls! { SnapshotList: snapshots of Snapshot; }
