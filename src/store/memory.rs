#![allow(clippy::disallowed_types)] // No task loses its turn while it holds this mutex.
//! Databases in memory, for simulations. A commit happens as a whole or not at all, which other
//! tests show for SQLite. A simulation opens thousands of stores in a second, and SQLite would take
//! most of that time.

use super::Loaded;
use super::state::{Image, State};
use crate::error::{Error, Result};
use crate::ids::OpId;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The contents of one database.
#[derive(Default)]
struct Contents {
    rows: BTreeMap<(u8, String), Image>,
    seq: u64,
}

/// A database. It outlives the daemon that wrote it, like a file.
pub(super) struct Memory {
    install_id: String,
    contents: Mutex<Contents>,
}

static DATABASES: Mutex<BTreeMap<PathBuf, Arc<Memory>>> = Mutex::new(BTreeMap::new());

/// Makes stores in this directory use a new database in memory.
pub fn create(dir: &Path, install_id: &str) {
    let memory = Memory {
        install_id: install_id.to_owned(),
        contents: Mutex::default(),
    };
    let mut all = DATABASES.lock().unwrap_or_else(PoisonError::into_inner);
    all.insert(dir.to_owned(), Arc::new(memory));
}

pub fn remove(dir: &Path) {
    let mut all = DATABASES.lock().unwrap_or_else(PoisonError::into_inner);
    all.remove(dir);
}

/// Returns the durable state of a database.
pub fn read(dir: &Path) -> Result<State> {
    let memory = of(dir).ok_or_else(|| Error::internal("no database in memory"))?;
    Ok(memory.load().state)
}

/// True if an operation is recorded as ended in the durable rows.
pub fn has_ended(dir: &Path, op: &OpId) -> Option<bool> {
    let memory = of(dir)?;
    let contents = memory
        .contents
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    match contents.rows.get(&Image::Op(op.clone(), None).row_key()) {
        Some(Image::Op(_, Some(row))) => Some(row.state.has_ended()),
        _ => None,
    }
}

/// Returns the number of the last durable change.
pub fn seq(dir: &Path) -> u64 {
    of(dir).map_or(0, |memory| {
        let contents = memory.contents.lock();
        contents.unwrap_or_else(PoisonError::into_inner).seq
    })
}

pub(super) fn of(dir: &Path) -> Option<Arc<Memory>> {
    let all = DATABASES.lock().unwrap_or_else(PoisonError::into_inner);
    all.get(dir).cloned()
}

impl Memory {
    pub(super) fn load(&self) -> Loaded {
        let contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = State::default();
        for image in contents.rows.values() {
            state.apply(image.clone());
        }
        Loaded {
            state,
            install_id: self.install_id.clone(),
            seq: contents.seq,
        }
    }

    pub(super) fn commit<'a>(&self, images: impl Iterator<Item = &'a Image>, seq: u64) {
        let mut contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        for image in images {
            let key = image.row_key();
            if *image == image.absent() {
                contents.rows.remove(&key);
            } else {
                contents.rows.insert(key, image.clone());
            }
        }
        contents.seq = seq;
    }
}
