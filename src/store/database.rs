//! Gives the writer access to the database. Reopens the connection after an error, repairs what a
//! failed commit may have left, and keeps the write-ahead log short.

use super::batch::Failure;
use super::reserve::{PROBE_FREE_BYTES, Reserve};
use super::state::Image;
use super::{Inner, schema};
use crate::error::{Error, Kind};
use rusqlite::hooks::Wal;
use rusqlite::{Connection, ErrorCode};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub(super) struct Database {
    dir: PathBuf,
    /// `None` after an I/O error. The connection is dropped then, because a descriptor whose sync
    /// has failed must not be synced again.
    connection: Option<Connection>,
    /// The number of frames in the log after the last commit, or zero after an attempt to fold the
    /// log.
    log_frames: Arc<AtomicU32>,
    /// True if this connection has recorded that the log belongs to the database; see
    /// `schema::open`.
    is_marked_open: bool,
    pub reserve: Reserve,
    /// The correct contents of the rows that a failed commit may have changed on disk.
    repair: BTreeMap<(u8, String), Image>,
    /// Replaces the file in a simulation.
    #[cfg(feature = "sim")]
    memory: Option<Arc<super::memory::Memory>>,
}

impl Database {
    pub(super) fn new(dir: &Path, connection: Connection) -> rusqlite::Result<Self> {
        let mut database = Self::closed(dir);
        database.use_connection(connection)?;
        Ok(database)
    }

    fn closed(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            connection: None,
            log_frames: Arc::default(),
            is_marked_open: false,
            reserve: Reserve::new(dir),
            repair: BTreeMap::new(),
            #[cfg(feature = "sim")]
            memory: None,
        }
    }

    #[cfg(feature = "sim")]
    pub(super) fn in_memory(dir: &Path, memory: Arc<super::memory::Memory>) -> Self {
        let mut database = Self::closed(dir);
        database.memory = Some(memory);
        // There is no disk that could become full.
        database.reserve.held = true;
        database
    }

    /// Commits to a database in memory. Returns `None` if there is none.
    #[cfg(feature = "sim")]
    fn try_write_memory(
        &self,
        inner: &Inner,
        images: &[Image],
        seq: u64,
    ) -> Option<crate::error::Result<()>> {
        use super::faults::Fault;
        let memory = self.memory.as_ref()?;
        inner.faults.pass_gate();
        let fault = inner.faults.next();
        let commits = matches!(fault, None | Some(Fault::IoAfterCommit));
        if commits {
            let rows = self.repair.values().chain(images);
            memory.commit(rows, seq.max(inner.seq_at_open));
            inner.faults.after_commit();
        }
        Some(match fault {
            None => Ok(()),
            Some(Fault::DiskFull) => Err(Error::new(Kind::DiskFull, "the disk is full")),
            Some(Fault::Io | Fault::IoAfterCommit) => {
                Err(Error::new(Kind::StoreReadOnly, "disk I/O error"))
            }
            Some(Fault::Panic) => panic!("a fault of the test"),
        })
    }

    pub(super) fn failure(&self, e: &Error) -> Failure {
        Failure::from_error(e, &self.dir)
    }

    /// True if [`Database::fold_log`] has something to do.
    pub(super) fn is_log_full(&self) -> bool {
        self.log_frames.load(Ordering::Relaxed) >= schema::LOG_FRAMES
    }

    /// Makes the next write restore this row, unless an earlier failure has already recorded its
    /// correct contents.
    pub(super) fn restore(&mut self, row: &Image) {
        self.repair
            .entry(row.row_key())
            .or_insert_with(|| row.clone());
    }

    pub(super) fn needs_repair(&self) -> bool {
        !self.repair.is_empty()
    }

    /// Closes the connection. If rows must be repaired, the connection is only dropped, so that the
    /// log stays.
    pub(super) fn close(&mut self) {
        let clean = self.repair.is_empty();
        if let Some(c) = self.connection.take().filter(|_| clean)
            && let Err(e) = schema::close(c)
        {
            log::warn!("store: close: {e}");
        }
    }

    fn use_connection(&mut self, connection: Connection) -> rusqlite::Result<()> {
        self.is_marked_open = false;
        let frames = self.log_frames.clone();
        let count = move |_: &mut Wal, now: i32| {
            frames.store(u32::try_from(now).unwrap_or(0), Ordering::Relaxed);
            Ok(())
        };
        let connection = self.connection.insert(connection);
        connection.wal_hook(Some(count))
    }

    /// Writes the rows to repair and then `images`, in one transaction. After a failure, the rows
    /// to repair are kept for the next write.
    pub(super) fn write(
        &mut self,
        inner: &Inner,
        images: &[Image],
        seq: u64,
    ) -> std::result::Result<(), Failure> {
        let attempt = catch_unwind(AssertUnwindSafe(|| self.try_write(inner, images, seq)));
        let error = match attempt {
            Ok(Ok(())) => {
                self.repair.clear();
                self.is_marked_open = true;
                return Ok(());
            }
            Ok(Err(e)) => e,
            Err(_) => Error::internal("the store's writer panicked"),
        };
        Err(self.failed(error))
    }

    /// Builds the failure for an error of the database. Drops the connection, unless the error is
    /// that the disk is full. If the disk is nearly full, reports any other error as `disk_full`
    /// too.
    fn failed(&mut self, mut error: Error) -> Failure {
        if error.kind() != Kind::DiskFull {
            self.connection = None;
            if self
                .reserve
                .free_bytes()
                .is_some_and(|free| free < PROBE_FREE_BYTES)
            {
                // If the file system allocates blocks late, a full disk shows as a failed sync.
                error = error.with_kind(Kind::DiskFull);
            }
        }
        self.failure(&error)
    }

    /// Folds the log into the database file if the log has reached [`schema::LOG_FRAMES`]. If
    /// syncing the database file fails, the log still has every change, and a new connection copies
    /// these changes again.
    #[cfg_attr(not(any(test, feature = "fakes")), allow(unused_variables))]
    pub(super) fn fold_log(&mut self, inner: &Inner) -> std::result::Result<(), Failure> {
        // After a failure, the next commit counts the frames again.
        let frames = self.log_frames.swap(0, Ordering::Relaxed);
        let Some(c) = self
            .connection
            .as_ref()
            .filter(|_| frames >= schema::LOG_FRAMES)
        else {
            return Ok(());
        };
        #[cfg(any(test, feature = "fakes"))]
        let folded = inner.faults.fold().and_then(|()| schema::fold_log(c));
        #[cfg(not(any(test, feature = "fakes")))]
        let folded = schema::fold_log(c);
        folded.map_err(|e| {
            self.failed(sqlite_error(&e).context("fold the write-ahead log into the database"))
        })
    }

    /// Extends the log if the disk has room for the whole log with some space to spare. A failure
    /// is only logged, because commits then merely take longer.
    pub(super) fn extend_log(&self) {
        #[cfg(feature = "sim")]
        if self.memory.is_some() {
            return;
        }
        if self
            .reserve
            .free_bytes()
            .is_some_and(|free| free < PROBE_FREE_BYTES + schema::LOG_BYTES)
        {
            return;
        }
        if let Err(e) = schema::extend_log(&self.dir) {
            log::warn!("store: extend the write-ahead log: {e}; changes will take longer to write");
        }
    }

    fn try_write(&mut self, inner: &Inner, images: &[Image], seq: u64) -> crate::error::Result<()> {
        #[cfg(feature = "sim")]
        if let Some(written) = self.try_write_memory(inner, images, seq) {
            return written;
        }
        if self.connection.is_none() {
            let connection = schema::reopen(&self.dir)?;
            self.use_connection(connection)
                .map_err(|e| sqlite_error(&e))?;
        }
        let c = self.connection.as_ref().expect("opened above");
        #[cfg(any(test, feature = "fakes"))]
        inner.faults.pass_gate();
        let write = || -> rusqlite::Result<()> {
            let tx = schema::Transaction::begin(c)?;
            // Remove all of these rows first. Otherwise a restored name could conflict with a row
            // that is not restored yet.
            for image in self.repair.values() {
                image.absent().save(c)?;
            }
            for image in self.repair.values().chain(images) {
                image.save(c)?;
            }
            if !self.is_marked_open {
                schema::set_info(c, "open", "1")?;
                schema::set_info(c, schema::WRITER, schema::THIS_VERSION)?;
            }
            schema::set_info(c, "seq", &seq.max(inner.seq_at_open).to_string())?;
            #[cfg(any(test, feature = "fakes"))]
            return inner.faults.commit(tx);
            #[cfg(not(any(test, feature = "fakes")))]
            tx.commit()
        };
        write().map_err(|e| sqlite_error(&e))
    }
}

fn sqlite_error(e: &rusqlite::Error) -> Error {
    match e.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => Error::new(Kind::DiskFull, e.to_string()),
        _ => Error::new(Kind::StoreReadOnly, e.to_string()),
    }
}
