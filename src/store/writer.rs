//! The one thread that writes: it takes all changes that wait, commits them as one transaction, and answers.

use super::batch::{Batch, Failure};
use super::reserve::{PROBE_FREE_BYTES, Reserve};
use super::state::Image;
use super::{Inner, Mode, schema};
use crate::error::{Error, Kind};
use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Between a failed write and the first probe; doubled each time up to the most.
const PROBE_FIRST: Duration = Duration::from_millis(100);
const PROBE_MOST: Duration = Duration::from_secs(2);
/// The writer looks around so often even when nobody calls.
const IDLE: Duration = Duration::from_secs(600);

enum Work {
    Batch(Batch),
    Probe,
    Close,
}

pub(super) struct Writer {
    inner: Arc<Inner>,
    /// Dropped after an I/O error: nothing is synced again through a descriptor on which that failed.
    connection: Option<Connection>,
    reserve: Reserve,
    /// Rows that a failed commit may or may not have changed on disk, as they have to be.
    repair: BTreeMap<(u8, String), Image>,
    probe_at: Instant,
    probe_pause: Duration,
}

/// What came of an attempt: whether the reserve was spent for it.
type Written = std::result::Result<bool, Failure>;

impl Writer {
    pub(super) fn new(inner: Arc<Inner>, connection: Connection) -> Self {
        let reserve = Reserve::new(&inner.dir);
        let probe_at = Instant::now();
        Self { inner, connection: Some(connection), reserve, repair: BTreeMap::new(), probe_at, probe_pause: PROBE_FIRST }
    }

    /// The first write of this daemon's life; a full disk leaves the store read-only, with all it knows to read.
    pub(super) fn begin(&mut self) {
        match self.probe() {
            Ok(()) => {}
            Err(failure) if failure.kind == Kind::DiskFull && self.reserve.release() && self.write(&[], 0).is_ok() => {
                self.turn_read_only(failure);
            }
            Err(failure) => self.turn_read_only(failure),
        }
    }

    pub(super) fn run(mut self) {
        loop {
            match self.next_work() {
                Work::Batch(batch) => self.commit(batch),
                Work::Probe => self.probe_and_tell(),
                Work::Close => return self.finish(),
            }
        }
    }

    fn next_work(&mut self) -> Work {
        let mut core = self.inner.core.lock();
        loop {
            let wait_until = if core.mode.is_read_only() { self.probe_at } else { Instant::now() + IDLE };
            self.inner.wake.wait_while(&mut core, wait_until, |c| c.queue.is_empty() && !c.closing && !c.probe_now);
            if !core.queue.is_empty() {
                let batch = std::mem::take(&mut core.queue);
                core.in_flight = Some(batch.outcome.clone());
                return Work::Batch(batch);
            }
            if core.closing {
                return Work::Close;
            }
            let due = std::mem::take(&mut core.probe_now) || Instant::now() >= self.probe_at;
            if core.mode.is_read_only() && due {
                return Work::Probe;
            }
        }
    }

    fn commit(&mut self, batch: Batch) {
        match self.write_with_reserve(&batch) {
            Ok(spent) => {
                self.inner.count(&batch);
                // Before anybody is answered: whoever has an answer finds its events.
                self.inner.events.publish(&batch.changes);
                self.inner.core.lock().in_flight = None;
                batch.outcome.settle(Ok(()));
                if spent {
                    log::warn!("store: the disk is full, so the reserve was spent on a delete");
                }
                if spent && let Err(e) = self.reserve.take() {
                    self.turn_read_only(Failure::from_error(&e, &self.inner.dir));
                }
                // Nobody waits for this but the next batch. The changes are safe in the log, whatever becomes of it.
                if let Err(failure) = self.fold_log() {
                    self.turn_read_only(failure);
                }
            }
            Err(failure) => self.fail(batch, failure),
        }
    }

    fn write_with_reserve(&mut self, batch: &Batch) -> Written {
        let images: Vec<Image> = batch.changes.iter().flat_map(|c| c.steps.iter().map(|s| s.after.clone())).collect();
        let failure = match self.write(&images, batch.last_seq()) {
            Ok(()) => return Ok(false),
            Err(failure) => failure,
        };
        let essential = batch.changes.iter().any(|c| c.essential);
        if failure.kind != Kind::DiskFull || !essential || !self.reserve.release() {
            return Err(failure);
        }
        self.write(&images, batch.last_seq()).map(|()| true)
    }

    /// One transaction: what has to be mended, then the rows.
    fn write(&mut self, images: &[Image], seq: u64) -> std::result::Result<(), Failure> {
        let attempt = catch_unwind(AssertUnwindSafe(|| self.try_write(images, seq)));
        let error = match attempt {
            Ok(Ok(())) => {
                self.repair.clear();
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
        Failure::from_error(&error, &self.inner.dir)
    }

    /// Folds the log into the database file when it is due. After a failed sync of that file the log still has everything, and a
    /// new connection copies all of it again.
    fn fold_log(&mut self) -> std::result::Result<(), Failure> {
        let Some(c) = &self.connection else { return Ok(()) };
        #[cfg(any(test, feature = "fakes"))]
        let folded = self.inner.faults.fold().and_then(|()| schema::fold_log(c));
        #[cfg(not(any(test, feature = "fakes")))]
        let folded = schema::fold_log(c);
        folded.map_err(|e| self.failed(sqlite_error(&e).context("fold the write-ahead log into the database")))
    }

    /// The log is only made longer where there is room for more than that.
    fn extend_log(&self) {
        if self.reserve.free_bytes().is_some_and(|free| free < PROBE_FREE_BYTES + schema::LOG_BYTES) {
            return;
        }
        if let Err(e) = schema::extend_log(&self.inner.dir) {
            log::warn!("store: changes will take longer to write: extend the write-ahead log: {e}");
        }
    }

    fn try_write(&mut self, images: &[Image], seq: u64) -> crate::error::Result<()> {
        if self.connection.is_none() {
            self.connection = Some(schema::reopen(&self.inner.dir)?);
        }
        let c = self.connection.as_mut().expect("opened above");
        #[cfg(any(test, feature = "fakes"))]
        self.inner.faults.pass_gate();
        let write = |c: &mut Connection| -> rusqlite::Result<()> {
            let tx = c.transaction_with_behavior(TransactionBehavior::Immediate)?;
            // Removed first, all of them: on the way to the old state no name may seem taken.
            for image in self.repair.values() {
                image.absent().save(&tx)?;
            }
            for image in self.repair.values().chain(images) {
                image.save(&tx)?;
            }
            schema::set_info(&tx, "open", "1")?;
            schema::set_info(&tx, "seq", &seq.max(self.inner.seq_at_open).to_string())?;
            #[cfg(any(test, feature = "fakes"))]
            return self.inner.faults.commit(tx);
            #[cfg(not(any(test, feature = "fakes")))]
            tx.commit()
        };
        write(c).map_err(|e| sqlite_error(&e))
    }

    /// Everyone in the batch and behind it gets the error, and memory goes back to what the disk holds.
    fn fail(&mut self, batch: Batch, failure: Failure) {
        let mut core = self.inner.core.lock();
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

    fn turn_read_only(&mut self, failure: Failure) {
        log::error!("store: read-only: {}", failure.text);
        self.inner.core.lock().mode = Mode::ReadOnly(failure);
        self.probe_pause = PROBE_FIRST;
        self.back_off();
    }

    fn back_off(&mut self) {
        self.probe_at = Instant::now() + self.probe_pause;
        self.probe_pause = (self.probe_pause * 2).min(PROBE_MOST);
    }

    /// A real commit, with the reserve in hand and some room beside it.
    fn probe(&mut self) -> std::result::Result<(), Failure> {
        self.reserve.take().map_err(|e| Failure::from_error(&e, &self.inner.dir))?;
        if self.reserve.free_bytes().is_some_and(|free| free < PROBE_FREE_BYTES) {
            let full = Error::io("keep room for changes", std::io::Error::from_raw_os_error(libc::ENOSPC));
            return Err(Failure::from_error(&full, &self.inner.dir));
        }
        let seq = self.inner.core.lock().seq;
        self.write(&[], seq)?;
        self.extend_log();
        self.fold_log()
    }

    fn probe_and_tell(&mut self) {
        match self.probe() {
            Ok(()) => {
                log::info!("store: takes changes again");
                self.probe_pause = PROBE_FIRST;
                self.inner.core.lock().mode = Mode::Writable;
                self.inner.mode_changed.notify_all();
            }
            Err(failure) => {
                log::debug!("store: still read-only: {}", failure.text);
                self.inner.core.lock().mode = Mode::ReadOnly(failure);
                self.back_off();
            }
        }
    }

    fn finish(mut self) {
        if !self.repair.is_empty() {
            // One last try; the log stays in any case.
            let seq = self.inner.core.lock().seq;
            let _ = self.write(&[], seq);
        }
        let clean = self.repair.is_empty();
        if let Some(c) = self.connection.take().filter(|_| clean)
            && let Err(e) = schema::close(c)
        {
            log::warn!("store: close: {e}");
        }
    }
}

impl Drop for Writer {
    /// Whatever ends the thread, nobody waits for it for ever.
    fn drop(&mut self) {
        let mut core = self.inner.core.lock();
        core.closing = true;
        let left = std::mem::take(&mut core.queue);
        if left.is_empty() {
            return;
        }
        core.revert(left.changes);
        drop(core);
        left.outcome.settle(Err(Failure::closed()));
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
