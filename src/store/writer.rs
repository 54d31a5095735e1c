//! The one writer: it commits all changes that wait as one transaction, and answers. `turn.rs` says
//! on whose thread.

use super::batch::{Batch, Failure};
use super::reserve::{PROBE_FREE_BYTES, Reserve};
use super::state::Image;
use super::{Inner, Mode, schema};
use crate::error::{Error, Kind};
use rusqlite::hooks::Wal;
use rusqlite::{Connection, ErrorCode};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Between a failed write and the first probe; doubled each time up to the most.
const PROBE_FIRST: Duration = Duration::from_millis(100);
const PROBE_MOST: Duration = Duration::from_secs(2);

pub(super) struct Writer {
    dir: PathBuf,
    /// Dropped after an I/O error: nothing is synced again through a descriptor on which that failed.
    connection: Option<Connection>,
    /// The number of frames in the log after the last commit, or zero after an attempt to fold it.
    log_frames: Arc<AtomicU32>,
    /// This connection has written that the log belongs to the database: see `schema::open`.
    is_marked_open: bool,
    reserve: Reserve,
    /// The reserve was spent and has to be taken again.
    is_reserve_spent: bool,
    /// Rows that a failed commit may or may not have changed on disk, as they have to be.
    repair: BTreeMap<(u8, String), Image>,
    probe_at: Instant,
    probe_pause: Duration,
}

/// What came of an attempt: whether the reserve was spent for it.
type Written = std::result::Result<bool, Failure>;

impl Writer {
    pub(super) fn new(dir: &Path, connection: Connection) -> rusqlite::Result<Self> {
        let mut writer = Self {
            dir: dir.to_owned(),
            connection: None,
            log_frames: Arc::default(),
            is_marked_open: false,
            reserve: Reserve::new(dir),
            is_reserve_spent: false,
            repair: BTreeMap::new(),
            probe_at: Instant::now(),
            probe_pause: PROBE_FIRST,
        };
        writer.use_connection(connection)?;
        Ok(writer)
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

    /// When a store that is read-only is tried again.
    pub(super) fn probe_at(&self) -> Instant {
        self.probe_at
    }

    /// Whether [`Writer::do_chores`] is due before the next batch.
    pub(super) fn has_chores(&self) -> bool {
        self.is_reserve_spent || self.log_frames.load(Ordering::Relaxed) >= schema::LOG_FRAMES
    }

    /// What is left to do after batches. Nobody waits for it but the next batch.
    pub(super) fn do_chores(&mut self, inner: &Inner) {
        if std::mem::take(&mut self.is_reserve_spent) {
            log::warn!("store: the disk is full, so the reserve was spent on a delete");
            if let Err(e) = self.reserve.take() {
                self.turn_read_only(inner, Failure::from_error(&e, &self.dir));
            }
        }
        // The changes are safe in the log, whatever becomes of it.
        if let Err(failure) = self.fold_log(inner) {
            self.turn_read_only(inner, failure);
        }
    }

    /// The first write of this daemon's life; a full disk leaves the store read-only, with all it knows to read.
    pub(super) fn begin(&mut self, inner: &Inner) {
        match self.probe(inner) {
            Ok(()) => {}
            Err(failure) if failure.kind == Kind::DiskFull && self.reserve.release() && self.write(inner, &[], 0).is_ok() => {
                self.turn_read_only(inner, failure);
            }
            Err(failure) => self.turn_read_only(inner, failure),
        }
    }

    pub(super) fn commit(&mut self, inner: &Inner, batch: Batch) {
        match self.write_with_reserve(inner, &batch) {
            Ok(spent) => {
                self.is_reserve_spent = spent;
                inner.count(&batch);
                // Before anybody is answered, so that a caller that has its answer finds the events.
                inner.events.publish(&batch.changes);
                inner.core.lock().in_flight = None;
                batch.outcome.settle(Ok(()));
            }
            Err(failure) => self.fail(inner, batch, failure),
        }
    }

    fn write_with_reserve(&mut self, inner: &Inner, batch: &Batch) -> Written {
        let images: Vec<Image> = batch.changes.iter().flat_map(|c| c.steps.iter().map(|s| s.after.clone())).collect();
        let failure = match self.write(inner, &images, batch.last_seq()) {
            Ok(()) => return Ok(false),
            Err(failure) => failure,
        };
        let essential = batch.changes.iter().any(|c| c.essential);
        if failure.kind != Kind::DiskFull || !essential || !self.reserve.release() {
            return Err(failure);
        }
        self.write(inner, &images, batch.last_seq()).map(|()| true)
    }

    /// One transaction: what has to be mended, then the rows.
    fn write(&mut self, inner: &Inner, images: &[Image], seq: u64) -> std::result::Result<(), Failure> {
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

    /// Gives up the connection unless the disk was only full, and finds out whether it is full.
    fn failed(&mut self, mut error: Error) -> Failure {
        if error.kind() != Kind::DiskFull {
            self.connection = None;
            if self.reserve.free_bytes().is_some_and(|free| free < PROBE_FREE_BYTES) {
                // Where blocks are given out late, a full disk shows as a failed sync.
                error = error.with_kind(Kind::DiskFull);
            }
        }
        Failure::from_error(&error, &self.dir)
    }

    /// Folds the log into the database file when it is due. After a failed sync of that file the log still has everything, and a
    /// new connection copies all of it again.
    #[cfg_attr(not(any(test, feature = "fakes")), allow(unused_variables))]
    fn fold_log(&mut self, inner: &Inner) -> std::result::Result<(), Failure> {
        // After a failure the next commit counts them again.
        let frames = self.log_frames.swap(0, Ordering::Relaxed);
        let Some(c) = self.connection.as_ref().filter(|_| frames >= schema::LOG_FRAMES) else { return Ok(()) };
        #[cfg(any(test, feature = "fakes"))]
        let folded = inner.faults.fold().and_then(|()| schema::fold_log(c));
        #[cfg(not(any(test, feature = "fakes")))]
        let folded = schema::fold_log(c);
        folded.map_err(|e| self.failed(sqlite_error(&e).context("fold the write-ahead log into the database")))
    }

    /// The log is only made longer where there is room for more than that.
    fn extend_log(&self) {
        if self.reserve.free_bytes().is_some_and(|free| free < PROBE_FREE_BYTES + schema::LOG_BYTES) {
            return;
        }
        if let Err(e) = schema::extend_log(&self.dir) {
            log::warn!("store: changes will take longer to write: extend the write-ahead log: {e}");
        }
    }

    fn try_write(&mut self, inner: &Inner, images: &[Image], seq: u64) -> crate::error::Result<()> {
        if self.connection.is_none() {
            let connection = schema::reopen(&self.dir)?;
            self.use_connection(connection).map_err(|e| sqlite_error(&e))?;
        }
        let c = self.connection.as_ref().expect("opened above");
        #[cfg(any(test, feature = "fakes"))]
        inner.faults.pass_gate();
        let write = || -> rusqlite::Result<()> {
            let tx = schema::Transaction::begin(c)?;
            // Removed first, all of them: on the way to the old state no name may seem taken.
            for image in self.repair.values() {
                image.absent().save(c)?;
            }
            for image in self.repair.values().chain(images) {
                image.save(c)?;
            }
            if !self.is_marked_open {
                schema::set_info(c, "open", "1")?;
            }
            schema::set_info(c, "seq", &seq.max(inner.seq_at_open).to_string())?;
            #[cfg(any(test, feature = "fakes"))]
            return inner.faults.commit(tx);
            #[cfg(not(any(test, feature = "fakes")))]
            tx.commit()
        };
        write().map_err(|e| sqlite_error(&e))
    }

    /// Everyone in the batch and behind it gets the error, and memory goes back to what the disk holds.
    fn fail(&mut self, inner: &Inner, batch: Batch, failure: Failure) {
        let mut core = inner.core.lock();
        let behind = std::mem::take(&mut core.queue);
        for change in batch.changes.iter().flat_map(|c| &c.steps) {
            self.repair.entry(change.before.row_key()).or_insert_with(|| change.before.clone());
        }
        core.revert(behind.changes);
        core.revert(batch.changes);
        core.in_flight = None;
        core.mode = Mode::ReadOnly(failure.clone());
        drop(core);
        batch.outcome.settle(Err(failure.clone()));
        behind.outcome.settle(Err(failure.clone()));
        log::error!("store: read-only: {}", failure.text);
        self.back_off();
    }

    fn turn_read_only(&mut self, inner: &Inner, failure: Failure) {
        log::error!("store: read-only: {}", failure.text);
        inner.core.lock().mode = Mode::ReadOnly(failure);
        self.probe_pause = PROBE_FIRST;
        self.back_off();
    }

    fn back_off(&mut self) {
        self.probe_at = Instant::now() + self.probe_pause;
        self.probe_pause = (self.probe_pause * 2).min(PROBE_MOST);
    }

    /// A real commit, with the reserve in hand and some room beside it.
    fn probe(&mut self, inner: &Inner) -> std::result::Result<(), Failure> {
        self.reserve.take().map_err(|e| Failure::from_error(&e, &self.dir))?;
        if self.reserve.free_bytes().is_some_and(|free| free < PROBE_FREE_BYTES) {
            let full = Error::io("keep room for changes", std::io::Error::from_raw_os_error(libc::ENOSPC));
            return Err(Failure::from_error(&full, &self.dir));
        }
        let seq = inner.core.lock().seq;
        self.write(inner, &[], seq)?;
        self.extend_log();
        self.fold_log(inner)
    }

    pub(super) fn probe_and_tell(&mut self, inner: &Inner) {
        match self.probe(inner) {
            Ok(()) => {
                log::info!("store: takes changes again");
                self.probe_pause = PROBE_FIRST;
                inner.core.lock().mode = Mode::Writable;
                inner.mode_changed.notify_all();
            }
            Err(failure) => {
                log::debug!("store: still read-only: {}", failure.text);
                inner.core.lock().mode = Mode::ReadOnly(failure);
                self.back_off();
            }
        }
    }

    pub(super) fn finish(mut self: Box<Self>, inner: &Inner) {
        if !self.repair.is_empty() {
            // One last try; the log stays in any case.
            let seq = inner.core.lock().seq;
            let _ = self.write(inner, &[], seq);
        }
        let clean = self.repair.is_empty();
        if let Some(c) = self.connection.take().filter(|_| clean)
            && let Err(e) = schema::close(c)
        {
            log::warn!("store: close: {e}");
        }
    }
}

fn sqlite_error(e: &rusqlite::Error) -> Error {
    match e.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => Error::new(Kind::DiskFull, e.to_string()),
        _ => Error::new(Kind::StoreReadOnly, e.to_string()),
    }
}

impl Inner {
    fn count(&self, batch: &Batch) {
        self.batches.fetch_add(1, Ordering::Relaxed);
        self.changes.fetch_add(batch.changes.len() as u64, Ordering::Relaxed);
    }
}
