//! Table `idempotency`: the operation that a caller's key refers to.

use super::sql::{self, json};
use crate::ids::OpId;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

/// Maximum number of live keys per uid.
pub const KEYS_PER_UID_MAX: usize = 4096;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyRow {
    pub uid: u32,
    pub key: String,
    /// A hash of the method and its parameters. A call with the same key and another hash fails
    /// with `idempotency_conflict`.
    pub params_hash: String,
    pub op: OpId,
    /// The time when the key expires, in seconds since the epoch.
    pub expires_at: u64,
}

pub(super) const CREATE: &str = "CREATE TABLE idempotency (uid INTEGER NOT NULL, key TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (uid, key)) STRICT;";

pub(super) fn save(
    c: &Connection,
    uid: u32,
    key: &str,
    row: Option<&KeyRow>,
) -> rusqlite::Result<()> {
    let Some(row) = row else {
        return sql::delete(
            c,
            "DELETE FROM idempotency WHERE uid = ?1 AND key = ?2",
            params![uid, key],
        );
    };
    c.prepare_cached(
        "INSERT INTO idempotency (uid, key, body) VALUES (?1, ?2, ?3) ON CONFLICT (uid, key) DO UPDATE SET body = excluded.body",
    )?
    .execute(params![uid, key, json(row)?])
    .map(drop)
}

pub(super) fn load(c: &Connection) -> crate::error::Result<Vec<KeyRow>> {
    sql::load(
        c,
        "idempotency",
        "SELECT key, body FROM idempotency ORDER BY uid, key",
    )
}
