//! Keeps the registry of operations in memory.
//!
//! [`Ops`] holds running operations and a bounded number of ended ones per user. The code that
//! carries out an operation holds its [`OpHandle`]; other threads find, watch ([`Watcher`]) or
//! cancel the operation, or wait for it. The registry does not use the store: it returns ended
//! operations ([`EndedOp`]), and the caller records them. All state is under one lock, and no
//! callback runs under it.

mod handle;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
mod watch;

pub use handle::{OpHandle, Reporter};
pub use watch::{Change, Watcher};

use crate::api::Fault;
use crate::api::op::{Op, OpState, Progress};
use crate::error::{Error, Kind, Result};
use crate::host::plural::count;
use crate::host::time::now_s;
use crate::host::wait::cancelled;
use crate::ids::{OpId, VmId};
use crate::locks::{Cancel, CancelCause, Condvar, Mutex, Rank, Waited};
use crate::sched::{HashMap, Instant};
use crate::uids::{Retention, UidCounts};
use std::collections::VecDeque;
use std::sync::Arc;

/// The registry of operations. All clones share the same state.
#[derive(Clone)]
pub struct Ops {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    retention: Retention,
    on_dropped: Box<dyn Fn(EndedOp) + Send + Sync>,
}

#[derive(Default)]
struct State {
    entries: HashMap<OpId, Entry>,
    last_number: u64,
    last_watcher: u64,
    /// Ended operations per uid, oldest first.
    ended: HashMap<u32, VecDeque<OpId>>,
    ended_counts: UidCounts,
}

struct Entry {
    op: Op,
    /// The operation's cancel token, or `None` once the operation has ended.
    cancel: Option<Cancel>,
    /// The operation's number. Numbers grow in the order in which operations began.
    number: u64,
    /// Counts the changes that watchers are notified of.
    changes: u64,
    ended: Arc<Condvar>,
    /// The number of threads in [`Ops::wait`]. The entry is not pruned while there are any.
    waiting: usize,
    watchers: Vec<watch::Notifier>,
}

/// Limits from the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many operations of one uid may be in progress.
    pub per_uid_max: usize,
}

/// The operations that a list contains.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// If set, the list contains only operations of this uid.
    pub owner: Option<u32>,
    /// If set, the list contains only operations on this VM.
    pub vm: Option<VmId>,
    /// If true, the list also contains operations that have ended.
    pub all: bool,
    /// If set, the list contains only operations with a higher number than this.
    pub after: Option<u64>,
}

/// An operation that has ended, which the caller must record, and the older operations that were
/// pruned to make room.
#[derive(Clone, Debug)]
pub struct EndedOp {
    pub op: Op,
    #[cfg_attr(
        not(any(test, feature = "fakes")),
        allow(dead_code, reason = "only tests read it")
    )]
    pub pruned: Vec<OpId>,
}

impl Entry {
    fn new(op: Op, cancel: Option<Cancel>, number: u64) -> Self {
        Self {
            op,
            cancel,
            number,
            changes: 0,
            ended: Arc::default(),
            waiting: 0,
            watchers: Vec::new(),
        }
    }

    /// Returns the operation as callers see it. Its state is `cancelling` once its token has fired,
    /// even if nobody has called [`Ops::cancel`], for example because a stop of its VM fired the
    /// token.
    fn snapshot(&self) -> Op {
        let mut op = self.op.clone();
        if op.state == OpState::Running && self.cancel.as_ref().is_some_and(Cancel::is_cancelled) {
            op.state = OpState::Cancelling;
        }
        op
    }

    /// True if no thread waits for the operation or watches it.
    fn is_unseen(&self) -> bool {
        self.waiting == 0 && self.watchers.is_empty()
    }

    fn changed(&mut self) {
        self.changes += 1;
        let has_ended = self.op.state.has_ended();
        self.watchers
            .iter_mut()
            .for_each(|notifier| notifier.notify(has_ended));
    }
}

impl State {
    fn entry(&mut self, id: &OpId) -> Result<&mut Entry> {
        self.entries
            .get_mut(id)
            .ok_or_else(|| not_found(id.as_str()))
    }

    fn insert(&mut self, op: Op, cancel: Option<Cancel>) {
        self.last_number += 1;
        if op.state.has_ended() {
            self.add_ended(op.owner_uid, op.id.clone());
        }
        self.entries
            .insert(op.id.clone(), Entry::new(op, cancel, self.last_number));
    }

    fn check_limit(&self, uid: u32, limits: Limits) -> Result<()> {
        let running = self
            .entries
            .values()
            .filter(|e| e.op.owner_uid == uid && !e.op.state.has_ended())
            .count();
        if running < limits.per_uid_max {
            return Ok(());
        }
        Err(Error::new(
            Kind::OperationLimit,
            format!(
                "you have {} in progress, which is the limit",
                count(running as u64, "operation")
            ),
        )
        .hint("wait for one to finish or cancel one (fcctl op list, fcctl op cancel)"))
    }

    fn add_ended(&mut self, uid: u32, id: OpId) {
        self.ended.entry(uid).or_default().push_back(id);
        self.ended_counts.add(uid);
    }

    /// Removes an operation as if it had never begun. Returns false and keeps the operation if a
    /// thread is waiting for it or watching it.
    fn discard(&mut self, id: &OpId) -> bool {
        let is_unseen = self.entries.get(id).is_some_and(Entry::is_unseen);
        if is_unseen {
            self.entries.remove(id);
        }
        is_unseen
    }

    fn end(
        &mut self,
        id: &OpId,
        result: Result<serde_json::Value>,
        retention: Retention,
    ) -> Option<EndedOp> {
        let entry = self.entries.get_mut(id)?;
        let op = &mut entry.op;
        match result {
            Ok(value) => (op.state, op.result) = (OpState::Ok, Some(value)),
            Err(error) => {
                op.state = if error.kind() == Kind::Cancelled {
                    OpState::Cancelled
                } else {
                    OpState::Failed
                };
                op.error = Some(Fault {
                    op: Some(id.clone()),
                    ..Fault::from(error)
                });
            }
        }
        op.ended_at = Some(now_s());
        // Drop the parts. There may be many, and they are of no use once the operation has ended.
        (op.progress.parts, op.progress.parts_total) = (Vec::new(), None);
        let op = op.clone();
        entry.cancel = None;
        entry.changed();
        entry.ended.notify_all();
        self.add_ended(op.owner_uid, id.clone());
        let pruned = self.prune(op.owner_uid, retention);
        Some(EndedOp { op, pruned })
    }

    /// Removes the oldest ended operations while there are too many of `uid` or in total. Returns
    /// their IDs.
    fn prune(&mut self, uid: u32, retention: Retention) -> Vec<OpId> {
        let mut pruned = Vec::new();
        while self.ended_counts.of(uid) > retention.per_uid_max {
            let Some(id) = self.forget_oldest(uid) else {
                break;
            };
            pruned.push(id);
        }
        while self.ended_counts.total() > retention.total_max {
            let Some(id) = self
                .ended_counts
                .largest()
                .and_then(|uid| self.forget_oldest(uid))
            else {
                break;
            };
            pruned.push(id);
        }
        pruned
    }

    /// Removes the oldest ended operation of this uid that no thread waits for or watches. Returns
    /// `None` if there is no such operation.
    fn forget_oldest(&mut self, uid: u32) -> Option<OpId> {
        let theirs = self.ended.get_mut(&uid)?;
        let at = theirs
            .iter()
            .position(|id| self.entries.get(id).is_none_or(Entry::is_unseen))?;
        let id = theirs.remove(at)?;
        if theirs.is_empty() {
            self.ended.remove(&uid);
        }
        self.ended_counts.remove(uid);
        self.entries.remove(&id);
        Some(id)
    }
}

impl Ops {
    /// Creates an empty registry. `on_dropped` receives operations whose handle was dropped without
    /// a result, for example by a panic; these have failed with `internal`. The callback runs on
    /// the thread that drops the handle, without the registry's lock.
    pub fn new(retention: Retention, on_dropped: impl Fn(EndedOp) + Send + Sync + 'static) -> Self {
        let state = Mutex::new(Rank::Ops, State::default());
        Self {
            shared: Arc::new(Shared {
                state,
                retention,
                on_dropped: Box::new(on_dropped),
            }),
        }
    }

    /// Registers a new operation and returns its handle.
    ///
    /// # Errors
    /// `operation_limit`, or `host` if no descriptor is left for its cancel token.
    pub fn begin(
        &self,
        method: &str,
        vm: Option<VmId>,
        uid: u32,
        may_cancel: bool,
        limits: Limits,
    ) -> Result<OpHandle> {
        let cancel = new_token(method)?;
        let mut state = self.shared.state.lock();
        state.check_limit(uid, limits)?;
        let mut id = OpId::random();
        while state.entries.contains_key(&id) {
            id = OpId::random();
        }
        let op = Op {
            id: id.clone(),
            method: method.to_owned(),
            vm,
            owner_uid: uid,
            state: OpState::Running,
            may_cancel,
            progress: Progress::default(),
            started_at: now_s(),
            ended_at: None,
            result: None,
            error: None,
        };
        state.insert(op, Some(cancel.clone()));
        drop(state);
        Ok(OpHandle::new(self.clone(), id, cancel))
    }

    /// Loads the operations that the store has kept, in the order in which they began. Operations
    /// that had not ended are marked as failed (`the daemon was restarted`), and are returned so
    /// that the caller records them. Operations that the registry already has are skipped.
    pub fn restore(&self, ops: Vec<Op>) -> Result<Vec<EndedOp>> {
        let mut broken = Vec::new();
        for op in ops {
            let mut state = self.shared.state.lock();
            if state.entries.contains_key(&op.id) {
                continue;
            }
            let (id, uid, has_ended) = (op.id.clone(), op.owner_uid, op.state.has_ended());
            state.insert(op, None);
            if has_ended {
                state.prune(uid, self.shared.retention);
                continue;
            }
            let error = Error::internal("the daemon was restarted")
                .with_kind(Kind::Host)
                .hint("start the operation again");
            broken.extend(state.end(&id, Err(error), self.shared.retention));
        }
        Ok(broken)
    }

    pub fn get(&self, id: &OpId) -> Result<Op> {
        self.shared.state.lock().entry(id).map(|e| e.snapshot())
    }

    /// Returns the operations that match `filter`, with their numbers, in the order in which they
    /// began.
    pub fn list(&self, filter: &Filter) -> Vec<(u64, Op)> {
        let fits = |e: &&Entry| {
            filter.owner.is_none_or(|uid| uid == e.op.owner_uid)
                && (filter.vm.is_none() || filter.vm == e.op.vm)
                && (filter.all || !e.op.state.has_ended())
                && filter.after.is_none_or(|after| e.number > after)
        };
        let state = self.shared.state.lock();
        let mut found: Vec<_> = state
            .entries
            .values()
            .filter(fits)
            .map(|e| (e.number, e.snapshot()))
            .collect();
        drop(state);
        found.sort_by_key(|(number, _)| *number);
        found
    }

    /// Returns the number of operations in progress.
    #[cfg(any(test, feature = "fakes"))]
    pub fn running(&self) -> usize {
        self.shared
            .state
            .lock()
            .entries
            .values()
            .filter(|e| !e.op.state.has_ended())
            .count()
    }

    /// Finds an operation by its id or an unambiguous prefix of it. `owner` is as in [`Filter`].
    ///
    /// # Errors
    /// `operation_not_found` or `ambiguous_prefix`.
    pub fn find(&self, prefix: &str, owner: Option<u32>) -> Result<Op> {
        let state = self.shared.state.lock();
        let visible = |e: &&Entry| owner.is_none_or(|uid| uid == e.op.owner_uid);
        let mut fits = state
            .entries
            .values()
            .filter(visible)
            .filter(|e| e.op.id.as_str().starts_with(prefix));
        match (fits.next(), fits.next()) {
            (Some(entry), None) if !prefix.is_empty() => Ok(entry.snapshot()),
            (Some(_), Some(_)) if !prefix.is_empty() => {
                let text = format!("more than one operation has an id that begins with {prefix}");
                Err(Error::new(Kind::AmbiguousPrefix, text)
                    .hint("give more of the id (fcctl op list --all)"))
            }
            _ => Err(not_found(prefix)),
        }
    }

    /// Requests cancellation and returns without waiting for it. Further requests have no effect.
    ///
    /// # Errors
    /// `wrong_state` if the operation has ended or cannot be cancelled; `operation_not_found`.
    pub fn cancel(&self, id: &OpId, cause: CancelCause) -> Result<Op> {
        let mut state = self.shared.state.lock();
        let entry = state.entry(id)?;
        let why_not = match entry.op.state {
            OpState::Running | OpState::Cancelling if !entry.op.may_cancel => {
                Some("it cannot be cancelled")
            }
            OpState::Running | OpState::Cancelling => None,
            OpState::Ok | OpState::Failed | OpState::Cancelled => Some("it has ended"),
        };
        if let Some(why_not) = why_not {
            let text = format!("cancel operation {id} ({}): {why_not}", entry.op.method);
            return Err(Error::new(Kind::WrongState, text).hint(format!("run fcctl op show {id}")));
        }
        if entry.op.state == OpState::Running {
            entry.op.state = OpState::Cancelling;
            entry.changed();
        }
        let (op, token) = (entry.op.clone(), entry.cancel.clone());
        drop(state); // `cancel` calls wakers, which must not run under the lock.
        if let Some(token) = token {
            token.cancel(cause);
        }
        Ok(op)
    }

    /// Waits until the operation has ended, successfully or not.
    ///
    /// # Errors
    /// `timeout` at the deadline, and `cancelled` if the waiter's own token fires. The operation
    /// continues in both cases. `operation_not_found` if there is no such operation.
    pub fn wait(&self, id: &OpId, deadline: Instant, cancel: &Cancel) -> Result<Op> {
        let mut state = self.shared.state.lock();
        let entry = state.entry(id)?;
        entry.waiting += 1;
        let ended = entry.ended.clone();
        let runs = |s: &mut State| s.entries.get(id).is_some_and(|e| !e.op.state.has_ended());
        let waited = ended.wait_while_cancellable(&mut state, deadline, cancel, runs);
        let entry = state.entry(id)?; // Cannot fail, because an entry with a waiter is not pruned.
        entry.waiting -= 1;
        let doing = || format!("wait for operation {id}");
        match waited {
            Waited::Done => Ok(entry.snapshot()),
            Waited::TimedOut => Err(Error::new(
                Kind::Timeout,
                format!("{}: it is still in progress", doing()),
            )),
            Waited::Cancelled => Err(cancelled(&doing(), cancel)),
        }
    }

    /// Watches an operation through a descriptor for `poll`. The descriptor is readable at first,
    /// then after changes, at most ten times a second, and without delay when the operation ends.
    pub fn watch(&self, id: &OpId) -> Result<Watcher> {
        Watcher::new(self.clone(), id)
    }
}

fn new_token(method: &str) -> Result<Cancel> {
    Cancel::try_new().map_err(|e| Error::io(format!("begin {method}: create a cancel token"), e))
}

fn not_found(what: &str) -> Error {
    Error::new(
        Kind::OperationNotFound,
        format!("there is no operation {what:?}"),
    )
    .hint("run fcctl op list --all")
}
