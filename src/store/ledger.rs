//! Table `ledger`: every host resource that may exist, under a name that identifies it on the host.
//! A row is durable before its resource is acquired, and is deleted once the resource is gone.

use super::sql::{self, json};
use crate::ids::VmId;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerRow {
    pub id: u64,
    pub vm: Option<VmId>,
    pub generation: u64,
    /// The kind of the resource, for example `process` or `directory`.
    pub kind: String,
    /// The name that identifies the resource on the host: a path, a tag or a device name.
    pub name: String,
    /// Always `None`. The member stays because rows of earlier versions contain it.
    pub facts: Option<serde_json::Value>,
}

pub(super) const CREATE: &str =
    "CREATE TABLE ledger (id INTEGER PRIMARY KEY, vm TEXT, body TEXT NOT NULL) STRICT;";

pub(super) fn save(c: &Connection, id: u64, row: Option<&LedgerRow>) -> rusqlite::Result<()> {
    let Some(row) = row else {
        return sql::delete(c, "DELETE FROM ledger WHERE id = ?1", [id as i64]);
    };
    c.prepare_cached(
        "INSERT INTO ledger (id, vm, body) VALUES (?1, ?2, ?3)
         ON CONFLICT (id) DO UPDATE SET vm = excluded.vm, body = excluded.body",
    )?
    .execute(params![
        id as i64,
        row.vm.as_ref().map(VmId::as_str),
        json(row)?
    ])
    .map(drop)
}

pub(super) fn load(c: &Connection) -> crate::error::Result<Vec<LedgerRow>> {
    sql::load(
        c,
        "ledger",
        "SELECT CAST(id AS TEXT), body FROM ledger ORDER BY id",
    )
}
