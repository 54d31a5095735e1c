//! Table `ops`: running operations, and the last ones that ended.

use super::sql::{self, json};
use crate::api::op::Op;
use crate::ids::OpId;
use rusqlite::{Connection, params};

/// An operation as the API shows it. Nothing else about an operation survives a restart.
pub type OpRow = Op;

pub(super) const CREATE: &str =
    "CREATE TABLE ops (id TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT;";

pub(super) fn save(c: &Connection, id: &OpId, row: Option<&OpRow>) -> rusqlite::Result<()> {
    let Some(row) = row else {
        return sql::delete(c, "DELETE FROM ops WHERE id = ?1", [id.as_str()]);
    };
    c.prepare_cached("INSERT INTO ops (id, body) VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET body = excluded.body")?
        .execute(params![id.as_str(), json(row)?])
        .map(drop)
}

pub(super) fn load(c: &Connection) -> crate::error::Result<Vec<OpRow>> {
    sql::load(c, "ops", "SELECT id, body FROM ops ORDER BY id")
}
