//! Snapshots: a guest's memory and disks at one moment, which can be restored later.

use super::call::calls;
use super::vm::{Net, VmReply};
use crate::ids::{ImageRef, SnapshotId, SnapshotName, VmId, VmName};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub id: SnapshotId,
    pub name: SnapshotName,
    pub owner_uid: u32,
    /// The VM from which the snapshot was taken. It may have been deleted since.
    pub vm: VmId,
    /// The VM's name when the snapshot was taken.
    pub vm_name: VmName,
    /// When the snapshot was taken, in seconds since the epoch.
    pub created_at: u64,
    pub image: ImageRef,
    pub vcpus: u32,
    pub mem_mib: u64,
    pub disk_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work_disk_bytes: Option<u64>,
    pub net: Net,
    /// The driver and machine, such as `qemu (tcg, microvm)`. A restore needs the same driver and
    /// machine.
    pub driver: String,
    /// The version of the VMM that saved the guest, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_version: Option<String>,
    /// The space that the snapshot uses on the host.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreateRequest {
    pub vm: String,
    /// The name of the snapshot. Defaults to the VM's name followed by a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<SnapshotName>,
}

/// A snapshot by name, id, or unambiguous prefix of an id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    pub snapshot: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotListRequest {
    /// Return only the snapshots of this VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The cursor of the page: `next` of the previous one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The most items to return; there may be fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRestoreRequest {
    pub snapshot: String,
    /// Restore into a new VM of this name. By default, restore the VM from which the snapshot was
    /// taken. That VM must not be running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_vm: Option<VmName>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReply {
    pub snapshot: Snapshot,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotListReply<S = Snapshot> {
    /// The snapshots, oldest first.
    pub snapshots: Vec<S>,
    /// The cursor of the next page, or None if there are no more items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotDeleteReply {
    pub deleted: SnapshotId,
}

calls! {
    /// The guest is paused until its memory and disks are saved.
    SnapshotCreate = "snapshot.create" (SnapshotCreateRequest) -> SnapshotReply
        [Owner, Keyed, CancelOperation, NoFds, feature "snapshots"];
    SnapshotList = "snapshot.list" (SnapshotListRequest) -> SnapshotListReply
        [Anybody, Unkeyed, Nothing, NoFds, feature "snapshots"];
    SnapshotShow = "snapshot.show" (SnapshotRequest) -> SnapshotReply [Owner, Unkeyed, Nothing, NoFds, feature "snapshots"];
    SnapshotDelete = "snapshot.delete" (SnapshotRequest) -> SnapshotDeleteReply
        [Owner, Keyed, Nothing, NoFds, feature "snapshots"];
    /// Starts a VM from the snapshot. The VM is the one from which the snapshot was taken, whose
    /// disks are then replaced, or a new one (`new_vm`).
    SnapshotRestore = "snapshot.restore" (SnapshotRestoreRequest) -> VmReply
        [Owner, Keyed, CancelOperation, NoFds, feature "snapshots"];
}

super::page::list_calls! { SnapshotList: snapshots of Snapshot; }
