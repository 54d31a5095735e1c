//! The store: all state in memory, every change of it in SQLite before anybody is told that it happened.
//!
//! One leaf section makes {validate, change memory, publish, enqueue the rows} atomic, so the order of rows is the order
//! of effects. One writer commits all changes that wait as one transaction (WAL,
//! `synchronous=FULL`). A caller that waits for its change runs the writer on its own thread if
//! nobody else does; otherwise a thread of the store runs it (`turn.rs`). Reads come from memory,
//! may show what is not yet durable, and never wait for the disk.
//!
//! A commit is one write and one fdatasync(2). SQLite's writes to the write-ahead log are joined
//! (`vfs.rs`). The log is made long enough beforehand (`schema::extend_log`), so that a commit only
//! overwrites blocks and fdatasync(2) has no metadata to write. The store's thread folds the log
//! into the database file after a batch was answered.
//!
//! When a commit fails, everyone waiting for it or behind it gets the error, memory goes back to the last durable
//! state, and the store is read-only until a probe, a real commit, succeeds. A caller that got the error of a failed
//! commit knows that the change is undone in this daemon; if the daemon is killed before the next commit succeeds, the
//! whole failed batch may be found on disk after all, as with any database.
//!
//! The number of a change, its `seq`, is its place in the order of all changes, over restarts, too. Numbers only grow; those
//! of failed changes are left out. Durable changes are published under their numbers: see `events.rs`.

mod batch;
mod change;
mod database;
mod events;
#[cfg(any(test, feature = "fakes"))]
pub mod faults;
mod feed;
mod history;
mod key;
mod ledger;
mod meta;
mod op;
mod reserve;
mod schema;
mod snapshot;
mod sql;
mod state;
#[cfg(test)]
mod tests;
mod turn;
mod tx;
mod vfs;
mod vm;
mod watch;
mod workspace;
mod writer;

pub use batch::Ticket;
pub use events::{Happened, KEPT_MAX, Next, OpEnd, QUEUE_MAX, Seen, Start, Subscription, VmChange};
pub use feed::{Due, Feed};
pub use key::{KEYS_PER_UID_MAX, KeyRow};
pub use ledger::LedgerRow;
pub use op::OpRow;
pub use reserve::RESERVE_BYTES;
pub use schema::INSTALL_ID_LEN;
pub use snapshot::SnapshotRow;
pub use state::{Age, State};
pub use tx::Tx;
pub use vm::{Intent, TapFact, VmRow};
pub use watch::Watch;
pub use workspace::WorkspaceRow;

use crate::error::{Error, Result};
use crate::host::thread;
use crate::ids::VmId;
use crate::locks::{Condvar, Mutex, Rank, region};
use crate::uids::Retention;
use batch::{Batch, Change, Failure, Outcome};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use writer::Writer;

/// Changes that wait for the disk; beyond that a change that is not essential is refused.
pub const QUEUE_CHANGES_MAX: usize = 16_384;
/// How long [`Store::change_durable`] waits for the disk.
pub const DURABLE_WAIT: Duration = Duration::from_secs(60);

/// Whether changes are taken.
enum Mode {
    Writable,
    ReadOnly(Failure),
}

impl Mode {
    fn is_read_only(&self) -> bool {
        matches!(self, Mode::ReadOnly(_))
    }
}

/// What the one lock guards.
struct Core {
    state: State,
    retention: Retention,
    /// Of the last change.
    seq: u64,
    ledger_next: u64,
    queue: Batch,
    /// The batch that is being written.
    in_flight: Option<Arc<Outcome>>,
    mode: Mode,
    /// Here while nobody writes, and until the store is closed. See `turn.rs`.
    writer: Option<Box<Writer>>,
    /// The store's thread is asked to write what waits.
    is_thread_wanted: bool,
    probe_now: bool,
    closing: bool,
    watchers: watch::Watchers,
}

impl Core {
    /// Undoes changes, the last one first.
    fn revert(&mut self, changes: Vec<Change>) {
        for mut change in changes.into_iter().rev() {
            self.watchers.tell(&change.steps);
            tx::revert(&mut self.state, &mut change.steps);
        }
    }
}

struct Inner {
    install_id: String,
    seq_at_open: u64,
    core: Mutex<Core>,
    /// The store's thread waits here.
    wake: Condvar,
    mode_changed: Condvar,
    events: events::Bus,
    batches: AtomicU64,
    changes: AtomicU64,
    #[cfg(any(test, feature = "fakes"))]
    faults: faults::Faults,
}

/// How much went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Commits that succeeded, and the changes in them.
    pub batches: u64,
    pub changes: u64,
    /// Changes that wait for the disk now.
    pub queued: usize,
    pub read_only: bool,
}

/// A handle; clones share one store.
#[derive(Clone)]
pub struct Store(Arc<Handle>);

struct Handle {
    inner: Arc<Inner>,
    // Taken by whoever closes; never held with the other lock of the rank.
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Opens the database in `dir`, which exists, belongs to this user and is writable by nobody else. On a full disk
    /// an existing store opens read-only and recovers by itself.
    ///
    /// # Errors
    /// `store_refused`: damaged, foreign, newer, in use, or open to others. `host` and `disk_full`: it cannot be made.
    pub fn open(dir: &Path) -> Result<Store> {
        Self::open_keeping(dir, crate::uids::RETENTION)
    }

    /// [`Store::open`] with other bounds on the ended operations that are kept.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_keeping(dir: &Path, retention: Retention) -> Result<Store> {
        let connection = schema::open(dir, &schema::migrations())?;
        let (state, install_id, seq) =
            load(&connection).map_err(|e| e.context(format!("open the store in {}", dir.display())))?;
        let events = events::Bus::new(&state, seq);
        let core = Core {
            ledger_next: state.ledger_last() + 1,
            state,
            retention,
            seq,
            queue: Batch::default(),
            in_flight: None,
            mode: Mode::Writable,
            writer: None,
            is_thread_wanted: false,
            probe_now: false,
            closing: false,
            watchers: watch::Watchers::default(),
        };
        let inner = Arc::new(Inner {
            install_id,
            seq_at_open: seq,
            core: Mutex::new(Rank::Store, core),
            wake: Condvar::new(),
            mode_changed: Condvar::new(),
            events,
            batches: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            #[cfg(any(test, feature = "fakes"))]
            faults: faults::Faults::default(),
        });
        let mut writer = Writer::new(dir, connection).map_err(|e| schema::refuse(&dir.join(schema::FILE_NAME), e))?;
        writer.begin(&inner);
        inner.core.lock().writer = Some(Box::new(writer));
        let writing = inner.clone();
        let thread = thread::spawn("store-writer", move || writing.write_until_closed())?;
        Ok(Store(Arc::new(Handle { inner, writer: Mutex::new(Rank::Store, Some(thread)) })))
    }

    /// Of this state directory, made once: part of every name that we give to a host resource.
    pub fn install_id(&self) -> &str {
        &self.0.inner.install_id
    }

    /// Looks at memory. Nothing in `look` may block or take a lock.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.0.inner.core.lock().state)
    }

    /// Told of every change, or of those of one VM, as memory has it: durable or not. See [`Store::subscribe`].
    ///
    /// # Errors
    /// `exhausted` when there is no descriptor for it.
    pub fn watch(&self, vm: Option<VmId>) -> Result<Watch> {
        self.0.inner.core.lock().watchers.add(vm)
    }

    /// Given every change that is durable, in the order of their numbers, as far as it concerns an owner whom `sees` lets
    /// through. `since`: only later ones. Nothing in `sees` may block or take a lock.
    ///
    /// # Errors
    /// `exhausted` when there is no descriptor for it.
    pub fn subscribe(&self, since: Option<u64>, sees: impl Fn(u32) -> bool + Send + 'static) -> Result<(Subscription, Start)> {
        Subscription::new(self.0.inner.clone(), since, Box::new(sees))
    }

    /// What passes changes on for subscriptions that are lent. There is one at a time.
    ///
    /// # Errors
    /// `exhausted` when there is no descriptor for it; `internal` when there is one already.
    pub fn feed(&self) -> Result<Feed> {
        Feed::new(self.0.inner.clone())
    }

    /// None while changes are taken, else why not.
    pub fn read_only(&self) -> Option<Error> {
        match &self.0.inner.core.lock().mode {
            Mode::Writable => None,
            Mode::ReadOnly(failure) => Some(failure.to_error()),
        }
    }

    /// Probes a read-only store now and waits until it takes changes. False when the deadline came first. Opens
    /// `Rank::DurableWait`.
    pub fn wait_writable(&self, deadline: Instant) -> bool {
        let _waiting = region(Rank::DurableWait);
        let inner = &self.0.inner;
        let mut core = inner.core.lock();
        core.probe_now = core.mode.is_read_only();
        inner.wake.notify_all();
        inner.mode_changed.wait_while(&mut core, deadline, |c| c.mode.is_read_only() && !c.closing);
        !core.mode.is_read_only()
    }

    /// Of the last change.
    pub fn seq(&self) -> u64 {
        self.0.inner.core.lock().seq
    }

    pub fn stats(&self) -> Stats {
        let inner = &self.0.inner;
        let core = inner.core.lock();
        Stats {
            batches: inner.batches.load(Ordering::Relaxed),
            changes: inner.changes.load(Ordering::Relaxed),
            queued: core.queue.changes.len(),
            read_only: core.mode.is_read_only(),
        }
    }

    /// Writes what waits and ends the writer. Reads still work; changes get `shutting_down`. Opens `Rank::DurableWait`.
    pub fn close(&self) {
        let _waiting = region(Rank::DurableWait);
        self.0.close();
    }

    #[cfg(any(test, feature = "fakes"))]
    pub fn faults(&self) -> &faults::Faults {
        &self.0.inner.faults
    }
}

impl Handle {
    fn close(&self) {
        self.inner.core.lock().closing = true;
        self.inner.wake.notify_all();
        let writer = self.writer.lock().take();
        if let Some(writer) = writer
            && writer.join().is_err()
        {
            log::error!("store: the writer panicked");
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.close();
    }
}

fn load(c: &rusqlite::Connection) -> Result<(State, String, u64)> {
    let info = |name: &str| schema::info(c, name).map_err(|e| sql::refused(format!("read {name}")).with_source(e));
    let state = State::load(c)?;
    let install_id = info("install_id")?.filter(|id| id.len() == INSTALL_ID_LEN);
    let install_id = install_id.ok_or_else(|| sql::refused("the database has no install id"))?;
    let seq = info("seq")?.unwrap_or_else(|| "0".into());
    let seq = seq.parse().map_err(|e| sql::refused(format!("read seq {seq:?}")).with_source(e))?;
    Ok((state, install_id, seq))
}
