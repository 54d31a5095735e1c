//! Table `workspaces`: the last workspace that was imported into each VM. A row is deleted together
//! with its VM.

use super::sql::{self, json};
use crate::api::vm::WorkspaceInfo;
use crate::ids::VmId;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkspaceRow {
    pub vm: VmId,
    #[serde(flatten)]
    pub info: WorkspaceInfo,
    /// The VM's generation during the import.
    pub generation: u64,
}

pub(super) const CREATE: &str =
    "CREATE TABLE workspaces (vm TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT;";

pub(super) fn save(c: &Connection, vm: &VmId, row: Option<&WorkspaceRow>) -> rusqlite::Result<()> {
    let Some(row) = row else {
        return sql::delete(c, "DELETE FROM workspaces WHERE vm = ?1", [vm.as_str()]);
    };
    c.prepare_cached("INSERT INTO workspaces (vm, body) VALUES (?1, ?2) ON CONFLICT (vm) DO UPDATE SET body = excluded.body")?
        .execute(params![vm.as_str(), json(row)?])
        .map(drop)
}

pub(super) fn load(c: &Connection) -> crate::error::Result<Vec<WorkspaceRow>> {
    sql::load(
        c,
        "workspaces",
        "SELECT vm, body FROM workspaces ORDER BY vm",
    )
}
