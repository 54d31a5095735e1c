//! The writer commits all waiting changes as one transaction, and then answers the callers of these
//! changes. `turn.rs` decides on which thread the writer runs.

use super::batch::{Batch, Failure};
use super::database::Database;
use super::reserve::PROBE_FREE_BYTES;
use super::state::Image;
use super::{Inner, Mode};
use crate::error::{Error, Kind};
use crate::sched::Instant;
use rusqlite::Connection;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Pause between a failed write and the first probe. It doubles each time, up to `PROBE_PAUSE_MAX`.
const PROBE_PAUSE_MIN: Duration = Duration::from_millis(100);
const PROBE_PAUSE_MAX: Duration = Duration::from_secs(2);

pub(super) struct Writer {
    database: Database,
    /// True if the reserve was used and must be taken again.
    is_reserve_spent: bool,
    probe_at: Instant,
    probe_pause: Duration,
}

/// The result of an attempt to write: true if it used the reserve.
type Written = std::result::Result<bool, Failure>;

impl Writer {
    pub(super) fn new(dir: &Path, connection: Connection) -> rusqlite::Result<Self> {
        Database::new(dir, connection).map(Self::of)
    }

    #[cfg(feature = "sim")]
    pub(super) fn in_memory(dir: &Path, memory: std::sync::Arc<super::memory::Memory>) -> Self {
        Self::of(Database::in_memory(dir, memory))
    }

    fn of(database: Database) -> Self {
        Self {
            database,
            is_reserve_spent: false,
            probe_at: Instant::now(),
            probe_pause: PROBE_PAUSE_MIN,
        }
    }

    /// Returns the time when a read-only store is probed next.
    pub(super) fn probe_at(&self) -> Instant {
        self.probe_at
    }

    /// True if [`Writer::do_chores`] is due before the next batch.
    pub(super) fn has_chores(&self) -> bool {
        self.is_reserve_spent || self.database.is_log_full()
    }

    /// Takes the reserve again and folds the log, if they are due. Only the next batch waits for
    /// this. If either fails, the store becomes read-only.
    pub(super) fn do_chores(&mut self, inner: &Inner) {
        if std::mem::take(&mut self.is_reserve_spent) {
            log::warn!("store: the disk is full, so the reserve was used for a delete");
            if let Err(e) = self.database.reserve.take() {
                self.turn_read_only(inner, self.database.failure(&e));
            }
        }
        // The changes are safe in the log even if this fails.
        if let Err(failure) = self.database.fold_log(inner) {
            self.turn_read_only(inner, failure);
        }
    }

    /// Makes the first write after the daemon's start. If this write fails, for example because the
    /// disk is full, the store is read-only but can still be read.
    pub(super) fn begin(&mut self, inner: &Inner) {
        match self.probe(inner) {
            Ok(()) => {}
            Err(failure)
                if failure.kind == Kind::DiskFull
                    && self.database.reserve.release()
                    && self.database.write(inner, &[], 0).is_ok() =>
            {
                self.turn_read_only(inner, failure);
            }
            Err(failure) => self.turn_read_only(inner, failure),
        }
    }

    pub(super) fn commit(&mut self, inner: &Inner, batch: Batch) {
        crate::locks::may_block("write the database");
        match self.write_with_reserve(inner, &batch) {
            Ok(spent) => {
                self.is_reserve_spent = spent;
                inner.count(&batch);
                // Publish before answering, so that a caller that has its answer finds the events.
                inner.events.publish(&batch.changes);
                inner.core.lock().in_flight = None;
                batch.outcome.settle(Ok(()));
            }
            Err(failure) => self.fail(inner, batch, failure),
        }
    }

    fn write_with_reserve(&mut self, inner: &Inner, batch: &Batch) -> Written {
        let images: Vec<Image> = batch
            .changes
            .iter()
            .flat_map(|c| c.steps.iter().map(|s| s.after.clone()))
            .collect();
        let failure = match self.database.write(inner, &images, batch.last_seq()) {
            Ok(()) => return Ok(false),
            Err(failure) => failure,
        };
        let essential = batch.changes.iter().any(|c| c.essential);
        if failure.kind != Kind::DiskFull || !essential || !self.database.reserve.release() {
            return Err(failure);
        }
        self.database
            .write(inner, &images, batch.last_seq())
            .map(|()| true)
    }

    /// Makes the store read-only, restores the durable state in memory, and returns the error to
    /// all callers of the batch and of later changes.
    fn fail(&mut self, inner: &Inner, batch: Batch, failure: Failure) {
        let mut core = inner.core.lock();
        let behind = std::mem::take(&mut core.queue);
        for change in batch.changes.iter().flat_map(|c| &c.steps) {
            self.database.restore(&change.before);
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
        self.probe_pause = PROBE_PAUSE_MIN;
        self.back_off();
    }

    fn back_off(&mut self) {
        self.probe_at = Instant::now() + self.probe_pause;
        self.probe_pause = (self.probe_pause * 2).min(PROBE_PAUSE_MAX);
    }

    /// Probes the store with a real commit. The commit requires the reserve and some additional
    /// free space. Then extends and folds the log.
    fn probe(&mut self, inner: &Inner) -> std::result::Result<(), Failure> {
        self.database
            .reserve
            .take()
            .map_err(|e| self.database.failure(&e))?;
        if self
            .database
            .reserve
            .free_bytes()
            .is_some_and(|free| free < PROBE_FREE_BYTES)
        {
            let full = Error::io(
                "keep room for changes",
                std::io::Error::from_raw_os_error(libc::ENOSPC),
            );
            return Err(self.database.failure(&full));
        }
        let seq = inner.core.lock().seq;
        self.database.write(inner, &[], seq)?;
        self.database.extend_log();
        self.database.fold_log(inner)
    }

    pub(super) fn probe_and_report(&mut self, inner: &Inner) {
        match self.probe(inner) {
            Ok(()) => {
                log::info!("store: writable again");
                self.probe_pause = PROBE_PAUSE_MIN;
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
        if self.database.needs_repair() {
            // Try one last time to repair the rows. The log stays even if this fails.
            let seq = inner.core.lock().seq;
            let _ = self.database.write(inner, &[], seq);
        }
        self.database.close();
    }
}

impl Inner {
    fn count(&self, batch: &Batch) {
        self.batches.fetch_add(1, Ordering::Relaxed);
        self.changes
            .fetch_add(batch.changes.len() as u64, Ordering::Relaxed);
    }
}
