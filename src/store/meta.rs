//! Table `meta`: single values of the daemon itself, by name.

use super::sql;
use crate::error::Result;
use rusqlite::{Connection, params};

pub(super) const CREATE: &str =
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;";

pub(super) fn save(c: &Connection, name: &str, value: Option<&str>) -> rusqlite::Result<()> {
    let Some(value) = value else {
        return sql::delete(c, "DELETE FROM meta WHERE name = ?1", [name]);
    };
    c.prepare_cached("INSERT INTO meta (name, value) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = excluded.value")?
        .execute(params![name, value])
        .map(drop)
}

pub(super) fn load(c: &Connection) -> Result<Vec<(String, String)>> {
    let read = || -> rusqlite::Result<Vec<(String, String)>> {
        c.prepare("SELECT name, value FROM meta")?
            .query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?
            .collect()
    };
    read().map_err(|e| sql::refused("read table meta").with_source(e))
}
