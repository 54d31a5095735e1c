//! The store keeps all state in memory, and writes every change to SQLite before anybody learns
//! that it happened.
//!
//! Under one leaf lock a change is validated, applied to memory, published to watchers and
//! enqueued, so changes reach the disk in the order in which they took effect. One writer commits
//! all queued changes as one transaction (WAL, `synchronous=FULL`). A caller that waits for its
//! change runs the writer on its own thread if no other thread does; otherwise a thread of the
//! store runs it (`turn.rs`). Reads come from memory, may show what is not yet durable, and never
//! wait for the disk.
//!
//! A commit is one write and one fdatasync(2). SQLite's writes to the write-ahead log are joined
//! (`vfs.rs`). The log is extended in advance (`schema::extend_log`), so that a commit only
//! overwrites blocks and fdatasync(2) has no metadata to write. The store's thread folds the log
//! into the database file after the callers of a batch have been answered.
//!
//! If a commit fails, all callers that wait for it or for a later change get the error. Memory
//! returns to the last durable state, and the store is read-only until a probe, which is a real
//! commit, succeeds. A caller that got the error knows that the change is undone in this daemon.
//! But if the daemon is killed before the next successful commit, the whole failed batch may be on
//! disk after all, as with any database.
//!
//! The number of a change, its `seq`, is its position in the order of all changes, also across
//! restarts. Numbers only grow, and those of failed changes are not reused. Durable changes are
//! published under their numbers: see `events.rs`.

mod batch;
mod change;
mod database;
mod events;
#[cfg(any(test, feature = "fakes"))]
pub mod faults;
mod feed;
mod guards;
mod history;
mod key;
mod ledger;
#[cfg(feature = "sim")]
pub mod memory;
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
pub use events::{Next, OpEnd, Seen, Start, StoreChange, Subscription, VmChange};
pub use feed::{Due, Feed};
pub use guards::WorkspaceOf;
pub use key::KeyRow;
pub use ledger::LedgerRow;
pub use op::OpRow;
pub use schema::INSTALL_ID_LEN;
pub use snapshot::SnapshotRow;
pub use state::{Age, State};
pub use tx::Tx;
pub use vm::{Intent, TapFact, VmRow, VmShape};
pub use watch::Watch;
pub use workspace::WorkspaceRow;
#[cfg(any(test, feature = "fakes"))]
pub use {
    events::{KEPT_MAX, QUEUE_MAX},
    key::KEYS_PER_UID_MAX,
    reserve::RESERVE_BYTES,
};

use crate::error::{Error, Result};
use crate::host::thread;
use crate::ids::VmId;
use crate::locks::{Condvar, Mutex, Rank, durable_wait};
use crate::sched::Instant;
use crate::sched::JoinHandle;
use crate::uids::Retention;
use batch::{Batch, Change, Failure, Outcome};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use writer::Writer;

/// Maximum number of changes that wait for the disk. Once this many wait, changes that are not
/// essential are refused.
pub const QUEUE_CHANGES_MAX: usize = 16_384;
/// How long [`Store::change_durable`] waits for the disk.
#[cfg(any(test, feature = "fakes"))]
pub const DURABLE_WAIT: std::time::Duration = std::time::Duration::from_secs(60);

/// The store either accepts changes, or it is read-only because of a failure.
enum Mode {
    Writable,
    ReadOnly(Failure),
}

impl Mode {
    fn is_read_only(&self) -> bool {
        matches!(self, Mode::ReadOnly(_))
    }
}

/// The data that the store's lock protects.
struct Core {
    state: State,
    retention: Retention,
    /// The number of the last change.
    seq: u64,
    ledger_next: u64,
    queue: Batch,
    /// The outcome of the batch that is being written, if there is one.
    in_flight: Option<Arc<Outcome>>,
    mode: Mode,
    /// The writer, while no thread uses it and the store is not closed. See `turn.rs`.
    writer: Option<Box<Writer>>,
    /// True if the store's thread should write the queue.
    is_thread_wanted: bool,
    probe_now: bool,
    closing: bool,
    watchers: watch::Watchers,
}

impl Core {
    /// Undoes changes in memory, the last one first, and notifies the watchers.
    fn revert(&mut self, changes: Vec<Change>) {
        for mut change in changes.into_iter().rev() {
            self.watchers.notify(&change.steps);
            tx::revert(&mut self.state, &mut change.steps);
        }
    }
}

struct Inner {
    install_id: String,
    seq_at_open: u64,
    core: Mutex<Core>,
    /// The store's thread waits on this condition.
    wake: Condvar,
    mode_changed: Condvar,
    events: events::Bus,
    batches: AtomicU64,
    changes: AtomicU64,
    #[cfg(any(test, feature = "fakes"))]
    faults: faults::Faults,
}

/// Counters of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg(any(test, feature = "fakes"))]
pub struct Stats {
    /// The number of successful commits. `changes` counts the changes in them.
    pub batches: u64,
    pub changes: u64,
    /// The number of changes that are waiting for the disk.
    pub queued: usize,
    pub read_only: bool,
}

/// A handle to a store. Clones share the store.
#[derive(Clone)]
pub struct Store(Arc<Handle>);

struct Handle {
    inner: Arc<Inner>,
    // `close` takes the thread's handle. This lock is never held together with the other lock of
    // the same rank.
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Opens the database in `dir`, which must exist, belong to this user and be writable by nobody
    /// else. On a full disk an existing store opens read-only and recovers automatically.
    ///
    /// # Errors
    /// `store_refused` if the database is damaged, foreign, newer, in use, or open to others;
    /// `host` or `disk_full` if it cannot be created.
    #[cfg(any(test, feature = "fakes"))]
    pub fn open(dir: &Path) -> Result<Store> {
        Self::open_keeping(dir, crate::uids::RETENTION)
    }

    /// Opens the database as [`Store::open`] does, with these limits for the ended operations that
    /// are kept.
    ///
    /// # Errors
    /// Those of [`Store::open`].
    pub fn open_keeping(dir: &Path, retention: Retention) -> Result<Store> {
        #[cfg(feature = "sim")]
        if let Some(memory) = memory::of(dir) {
            return Self::start(memory.load(), retention, Writer::in_memory(dir, memory));
        }
        let connection = schema::open(dir, &schema::migrations())?;
        let loaded = load(&connection)
            .map_err(|e| e.context(format!("open the store in {}", dir.display())))?;
        let writer = Writer::new(dir, connection)
            .map_err(|e| schema::refuse(&dir.join(schema::FILE_NAME), e))?;
        Self::start(loaded, retention, writer)
    }

    fn start(loaded: Loaded, retention: Retention, mut writer: Writer) -> Result<Store> {
        let Loaded {
            state,
            install_id,
            seq,
        } = loaded;
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
        writer.begin(&inner);
        inner.core.lock().writer = Some(Box::new(writer));
        let writing = inner.clone();
        let thread = thread::spawn("store-writer", move || writing.write_until_closed())?;
        Ok(Store(Arc::new(Handle {
            inner,
            writer: Mutex::new(Rank::Store, Some(thread)),
        })))
    }

    /// Returns the ID of this state directory. It is generated once, and the names of all host
    /// resources contain it.
    pub fn install_id(&self) -> &str {
        &self.0.inner.install_id
    }

    /// Reads the state in memory. `look` must not block or take a lock.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.0.inner.core.lock().state)
    }

    /// Returns an eventfd that becomes readable after every change, or after every change of one
    /// VM. The changes may not be durable yet. See also [`Store::subscribe`].
    ///
    /// # Errors
    /// `exhausted` if no file descriptor is left.
    pub fn watch(&self, vm: Option<VmId>) -> Result<Watch> {
        self.0.inner.core.lock().watchers.add(vm)
    }

    /// Subscribes to durable changes, in the order of their numbers, that concern an owner for whom
    /// `sees` returns true. With `since`, the stream begins with the changes after that number, or
    /// with a snapshot if some of these are no longer kept. Without `since`, it begins with a
    /// snapshot. `sees` must not block or take a lock.
    ///
    /// # Errors
    /// `exhausted` if no file descriptor is left.
    pub fn subscribe(
        &self,
        since: Option<u64>,
        sees: impl Fn(u32) -> bool + Send + 'static,
    ) -> Result<(Subscription, Start)> {
        Subscription::new(self.0.inner.clone(), since, Box::new(sees))
    }

    /// Returns the feed, which serves the subscriptions that are lent to it. Only one can exist at
    /// a time.
    ///
    /// # Errors
    /// `exhausted` if no file descriptor is left; `internal` if the feed exists already.
    pub fn feed(&self) -> Result<Feed> {
        Feed::new(self.0.inner.clone())
    }

    /// Returns why the store is read-only, or `None` if it is writable.
    pub fn read_only(&self) -> Option<Error> {
        match &self.0.inner.core.lock().mode {
            Mode::Writable => None,
            Mode::ReadOnly(failure) => Some(failure.to_error()),
        }
    }

    /// Probes a read-only store now, and waits until it is writable. Returns false if it is still
    /// read-only at the deadline or when the store is closed. Opens `Rank::DurableWait`.
    pub fn wait_writable(&self, deadline: Instant) -> bool {
        let _waiting = durable_wait();
        let inner = &self.0.inner;
        let mut core = inner.core.lock();
        core.probe_now = core.mode.is_read_only();
        inner.wake.notify_all();
        inner
            .mode_changed
            .wait_while(&mut core, deadline, |c| c.mode.is_read_only() && !c.closing);
        !core.mode.is_read_only()
    }

    /// Returns the number of the last change, which may not be durable yet.
    pub fn seq(&self) -> u64 {
        self.0.inner.core.lock().seq
    }

    #[cfg(any(test, feature = "fakes"))]
    pub fn stats(&self) -> Stats {
        let inner = &self.0.inner;
        let core = inner.core.lock();
        Stats {
            batches: inner.batches.load(std::sync::atomic::Ordering::Relaxed),
            changes: inner.changes.load(std::sync::atomic::Ordering::Relaxed),
            queued: core.queue.changes.len(),
            read_only: core.mode.is_read_only(),
        }
    }

    /// Writes the queue and ends the writer. Reads still work; changes get `shutting_down`. Opens
    /// `Rank::DurableWait`.
    pub fn close(&self) {
        let _waiting = durable_wait();
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

/// The contents of a database.
struct Loaded {
    state: State,
    install_id: String,
    /// The number of the last change.
    seq: u64,
}

fn load(c: &rusqlite::Connection) -> Result<Loaded> {
    let info = |name: &str| {
        schema::info(c, name).map_err(|e| sql::refused(format!("read {name}")).with_source(e))
    };
    let state = State::load(c)?;
    let install_id = info("install_id")?.filter(|id| id.len() == INSTALL_ID_LEN);
    let install_id = install_id.ok_or_else(|| sql::refused("the database has no install id"))?;
    let seq = info("seq")?.unwrap_or_else(|| "0".into());
    let seq = seq
        .parse()
        .map_err(|e| sql::refused(format!("read seq {seq:?}")).with_source(e))?;
    Ok(Loaded {
        state,
        install_id,
        seq,
    })
}
