//! Table `snapshots`: saved guests with their memory and disks. A snapshot may outlive its VM.

use super::sql::{self, json};
use super::vm::VmShape;
use super::workspace::WorkspaceRow;
use crate::ids::{SnapshotId, SnapshotName, VmId, VmName};
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

/// A snapshot, with every property of its VM that must be the same in a restore. Any change of the
/// members needs a new schema version: see `schema.rs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRow {
    pub id: SnapshotId,
    /// The snapshot's name, which is unique among the rows.
    pub name: SnapshotName,
    pub owner_uid: u32,
    /// The VM that was saved. It may have been deleted.
    pub vm: VmId,
    pub vm_name: VmName,
    /// The time when the snapshot was created, in seconds since the epoch.
    pub created_at: u64,
    /// The shape that the VM had.
    #[serde(flatten)]
    pub shape: VmShape,
    pub disk_driver: String,
    pub guest_version: u32,
    pub has_balloon: bool,
    pub balloon_mib: Option<u64>,
    /// True if the VM's network interface was a tap.
    pub on_bridge: bool,
    /// The VMM that the VM ran on, as [`crate::vmm::Driver::describe`] reports it.
    pub driver: String,
    /// The VMM's version. `None` if an earlier fcd saved the guest.
    pub vmm_version: Option<String>,
    pub workspace: Option<WorkspaceRow>,
    /// The number of bytes that the snapshot's files occupy on the host.
    pub bytes: u64,
}

/// The migration to schema version 5, which creates the table.
pub(super) const CREATE: &str = "CREATE TABLE snapshots (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, body TEXT NOT NULL) STRICT;";

/// The migration to schema version 8, which adds `vmm_version`.
pub(super) const ADD_VMM_VERSION: &str =
    "UPDATE snapshots SET body = json_set(body, '$.vmm_version', json('null'));";

pub(super) fn save(
    c: &Connection,
    id: &SnapshotId,
    row: Option<&SnapshotRow>,
) -> rusqlite::Result<()> {
    let Some(row) = row else {
        return sql::delete(c, "DELETE FROM snapshots WHERE id = ?1", [id.as_str()]);
    };
    c.prepare_cached(
        "INSERT INTO snapshots (id, name, body) VALUES (?1, ?2, ?3)
         ON CONFLICT (id) DO UPDATE SET name = excluded.name, body = excluded.body",
    )?
    .execute(params![id.as_str(), row.name.as_str(), json(row)?])
    .map(drop)
}

pub(super) fn load(c: &Connection) -> crate::error::Result<Vec<SnapshotRow>> {
    sql::load(c, "snapshots", "SELECT id, body FROM snapshots ORDER BY id")
}
