//! Provides the helpers that the tables share. A row consists of key columns and a body as JSON.
//! Lookups read memory and never use SQL.

use crate::error::{Error, Kind, Result};
use rusqlite::{Connection, Params};
use serde::{Serialize, de::DeserializeOwned};

pub(super) fn refused(message: impl Into<String>) -> Error {
    Error::new(Kind::StoreRefused, message)
}

pub(super) fn json(row: &impl Serialize) -> rusqlite::Result<String> {
    serde_json::to_string(row).map_err(|e| rusqlite::Error::ToSqlConversionFailure(e.into()))
}

pub(super) fn delete(c: &Connection, sql: &str, key: impl Params) -> rusqlite::Result<()> {
    c.prepare_cached(sql)?.execute(key).map(drop)
}

/// Reads and parses the bodies of one table. `sql` selects the key and the body of each row as
/// text. Returns `store_refused` if the table cannot be read or a body cannot be parsed.
pub(super) fn load<T: DeserializeOwned>(c: &Connection, table: &str, sql: &str) -> Result<Vec<T>> {
    let read = || -> rusqlite::Result<Vec<(String, String)>> {
        c.prepare(sql)?
            .query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?
            .collect()
    };
    let rows = read().map_err(|e| refused(format!("read table {table}")).with_source(e))?;
    rows.into_iter()
        .map(|(key, body)| {
            serde_json::from_str(&body)
                .map_err(|e| refused(format!("read row {key:?} of table {table}")).with_source(e))
        })
        .collect()
}
