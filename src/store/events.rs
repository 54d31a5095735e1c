//! Publishes durable changes in the order of their numbers.
//!
//! Every change of the store has a number, `seq`, which keeps growing across restarts. The number
//! of a failed change is not reused. The writer publishes a batch once it is on disk and before it
//! answers anybody. A change is published as a whole; a failed change is never published.
//!
//! The last [`KEPT_MAX`] changes are kept, so that a listener can resume where it stopped. A mirror
//! of the durable rows is kept too. The mirror shares its rows with the state, so it costs only a
//! map of pointers. The changes after a snapshot of the mirror apply exactly to that snapshot, and
//! the snapshot contains nothing that may still be undone.
//!
//! The publisher never waits. It puts a pointer into each listener's bounded queue. A listener
//! whose queue is full gets one `lagged` notification with the number to resume from, and is
//! removed. So a stream never has a gap. A listener takes from its queue on its own thread, or
//! lends the queue to the feed, where one thread serves all listeners that keep up (`feed.rs`).

use super::batch::Change;
use super::state::{Image, State};
use super::{Inner, VmRow, WorkspaceRow};
use crate::api::Fault;
use crate::api::op::OpState;
use crate::error::{Error, Kind, Result};
use crate::host::time::now_s;
use crate::ids::{OpId, VmId};
use crate::locks::{Mutex, Rank};
use crate::sched::Instant;
use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// How many changes are kept for listeners that resume.
pub const KEPT_MAX: usize = 4096;
/// Maximum number of changes that wait for one listener.
pub const QUEUE_MAX: usize = 1024;
/// How often a thread that waits for the feed checks again even if nothing has woken it.
const CHECK_PERIOD: Duration = Duration::from_secs(1);

/// A VM's rows at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub row: Arc<VmRow>,
    pub workspace: Option<Arc<WorkspaceRow>>,
}

/// The effect of one change on a VM.
#[derive(Clone, Debug, PartialEq)]
pub struct VmChange {
    pub before: Option<Seen>,
    pub after: Option<Seen>,
}

/// An operation that ended. Its result is not kept.
#[derive(Clone, Debug, PartialEq)]
pub struct OpEnd {
    pub id: OpId,
    pub method: String,
    pub state: OpState,
    pub error: Option<Fault>,
    pub owner_uid: u32,
    /// The VM after the change, or before it if the change removed it.
    pub vm: Option<Arc<VmRow>>,
}

/// A durable change, as listeners see it.
#[derive(Clone, Debug, PartialEq)]
pub struct StoreChange {
    pub seq: u64,
    /// The time when the change became durable, in seconds since the epoch.
    pub at: u64,
    pub vms: Vec<VmChange>,
    pub ended: Vec<OpEnd>,
}

impl VmChange {
    pub fn owner_uid(&self) -> Option<u32> {
        self.after
            .as_ref()
            .or(self.before.as_ref())
            .map(|s| s.row.owner_uid)
    }
}

impl OpEnd {
    /// Returns the user who began the operation and, if the operation has a VM, that VM's owner.
    pub fn owners(&self) -> impl Iterator<Item = u32> {
        [
            Some(self.owner_uid),
            self.vm.as_ref().map(|row| row.owner_uid),
        ]
        .into_iter()
        .flatten()
    }
}

impl StoreChange {
    fn concerns(&self, sees: &dyn Fn(u32) -> bool) -> bool {
        self.vms
            .iter()
            .filter_map(VmChange::owner_uid)
            .chain(self.ended.iter().flat_map(OpEnd::owners))
            .any(sees)
    }
}

/// How a listener's stream begins.
#[derive(Debug)]
pub enum Start {
    /// The stream begins with all VMs that the listener may see. `resync` is true if the listener
    /// asked for changes that are no longer kept or that never existed.
    Snapshot {
        seq: u64,
        resync: bool,
        vms: Vec<Seen>,
    },
    /// The stream begins with all changes that the listener missed.
    Missed(Vec<Arc<StoreChange>>),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    Change(Arc<StoreChange>),
    /// The last item: the queue was full, and `dropped` changes were lost. All changes up to
    /// `resume_seq` were delivered.
    Lagged {
        dropped: u64,
        resume_seq: u64,
    },
}

type Sees = Box<dyn Fn(u32) -> bool + Send>;

/// The thread that takes from a listener's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taker {
    /// The listener's own thread, which waits on its descriptor.
    Own,
    /// The feed.
    Feed,
    /// The feed, which is sending what it just took. `is_claimed` means that the listener's own
    /// thread waits to take over.
    FeedAtWork { is_claimed: bool },
}

pub(super) struct Listener {
    sees: Sees,
    pub(super) queue: VecDeque<Arc<StoreChange>>,
    /// The number of dropped changes, and the number of the last change before them. The first
    /// change that does not fit sets this, and no more changes are queued after that.
    pub(super) lag: Option<(u64, u64)>,
    pub(super) taker: Taker,
    pub(super) fd: Arc<EventFd>,
}

impl Listener {
    fn offer(&mut self, change: &Arc<StoreChange>) {
        if !change.concerns(&*self.sees) {
            return;
        }
        match &mut self.lag {
            Some((dropped, _)) => *dropped += 1,
            None if self.queue.len() < QUEUE_MAX => self.queue.push_back(change.clone()),
            lag => *lag = Some((1, change.seq - 1)),
        }
    }

    pub(super) fn has_more(&self) -> bool {
        !self.queue.is_empty() || self.lag.is_some()
    }
}

pub(super) struct Published {
    vms: BTreeMap<VmId, Seen>,
    /// The number of the last durable change.
    seq: u64,
    /// The number after which `kept` contains every change that has events.
    floor: u64,
    kept: VecDeque<Arc<StoreChange>>,
    pub(super) listeners: BTreeMap<u64, Listener>,
    last_listener: u64,
    /// The feed's descriptor, or `None` if there is no feed. It becomes readable when a lent queue
    /// has changes.
    pub(super) feed: Option<Arc<EventFd>>,
}

pub(super) struct Bus {
    // This lock has the same rank as the store's other locks, and is never held together with one.
    pub(super) published: Mutex<Published>,
}

impl Bus {
    pub(super) fn new(state: &State, seq: u64) -> Self {
        let seen = |row: &Arc<VmRow>| Seen {
            row: row.clone(),
            workspace: state.workspace(&row.id).cloned(),
        };
        let published = Published {
            vms: state.vms().map(|row| (row.id.clone(), seen(row))).collect(),
            seq,
            floor: seq,
            kept: VecDeque::new(),
            listeners: BTreeMap::new(),
            last_listener: 0,
            feed: None,
        };
        Self {
            published: Mutex::new(Rank::Store, published),
        }
    }

    #[cfg(test)]
    pub(super) fn listeners(&self) -> usize {
        self.published.lock().listeners.len()
    }

    /// Publishes changes that are on disk. Only the writer calls this, one batch after the other.
    pub(super) fn publish(&self, changes: &[Change]) {
        let at = now_s();
        let mut published = self.published.lock();
        for change in changes {
            let change = published.apply(change, at);
            published.seq = change.seq;
            if !change.vms.is_empty() || !change.ended.is_empty() {
                published.keep(Arc::new(change));
            }
        }
        let to_wake = published.to_wake();
        drop(published);
        wake(&to_wake);
    }
}

impl Published {
    /// Applies a change to the mirror and returns what it changed. Several steps of one row are
    /// combined.
    fn apply(&mut self, change: &Change, at: u64) -> StoreChange {
        let mut touched: Vec<(VmId, Option<Seen>)> = Vec::new();
        for step in &change.steps {
            if let Image::Vm(id, _) | Image::Workspace(id, _) = &step.after
                && !touched.iter().any(|(known, _)| known == id)
            {
                touched.push((id.clone(), self.vms.get(id).cloned()));
            }
            match &step.after {
                Image::Vm(id, Some(row)) => {
                    let workspace = self.vms.get(id).and_then(|seen| seen.workspace.clone());
                    self.vms.insert(
                        id.clone(),
                        Seen {
                            row: row.clone(),
                            workspace,
                        },
                    );
                }
                Image::Vm(id, None) => drop(self.vms.remove(id)),
                Image::Workspace(id, workspace) => {
                    if let Some(seen) = self.vms.get_mut(id) {
                        seen.workspace.clone_from(workspace);
                    }
                }
                _ => {}
            }
        }
        let ended = change
            .steps
            .iter()
            .filter_map(|step| self.op_end(&step.before, &step.after, &touched))
            .collect();
        let whole = |(id, before): (VmId, Option<Seen>)| VmChange {
            after: self.vms.get(&id).cloned(),
            before,
        };
        let vms = touched
            .into_iter()
            .map(whole)
            .filter(|c| c.before != c.after)
            .collect();
        StoreChange {
            seq: change.seq,
            at,
            vms,
            ended,
        }
    }

    fn op_end(
        &self,
        before: &Image,
        after: &Image,
        touched: &[(VmId, Option<Seen>)],
    ) -> Option<OpEnd> {
        let (Image::Op(_, before), Image::Op(_, Some(op))) = (before, after) else {
            return None;
        };
        if !op.state.has_ended() || before.as_ref().is_some_and(|b| b.state.has_ended()) {
            return None;
        }
        let vm = op.vm.as_ref().and_then(|id| {
            let removed = || {
                touched
                    .iter()
                    .find(|(touched, _)| touched == id)
                    .and_then(|(_, before)| before.as_ref())
            };
            self.vms
                .get(id)
                .or_else(removed)
                .map(|seen| seen.row.clone())
        });
        let (id, method, state) = (op.id.clone(), op.method.clone(), op.state);
        Some(OpEnd {
            id,
            method,
            state,
            error: op.error.clone(),
            owner_uid: op.owner_uid,
            vm,
        })
    }

    fn keep(&mut self, change: Arc<StoreChange>) {
        self.listeners.values_mut().for_each(|l| l.offer(&change));
        self.kept.push_back(change);
        if self.kept.len() > KEPT_MAX
            && let Some(oldest) = self.kept.pop_front()
        {
            self.floor = oldest.seq;
        }
    }

    /// Returns the descriptors of all threads that have something to take. The feed has one
    /// descriptor for all lent queues.
    fn to_wake(&self) -> Vec<Arc<EventFd>> {
        let (own, lent): (Vec<_>, Vec<_>) = self
            .listeners
            .values()
            .filter(|l| l.has_more())
            .partition(|l| l.taker == Taker::Own);
        let feed = self.feed.iter().filter(|_| !lent.is_empty());
        own.iter().map(|l| &l.fd).chain(feed).cloned().collect()
    }

    fn start(&self, since: Option<u64>, sees: &dyn Fn(u32) -> bool) -> Start {
        match since {
            // A number that was never assigned comes from another database.
            Some(since) if (self.floor..=self.seq).contains(&since) => {
                let from = self.kept.partition_point(|h| h.seq <= since);
                Start::Missed(
                    self.kept
                        .range(from..)
                        .filter(|h| h.concerns(sees))
                        .cloned()
                        .collect(),
                )
            }
            _ => {
                let vms = self
                    .vms
                    .values()
                    .filter(|seen| sees(seen.row.owner_uid))
                    .cloned()
                    .collect();
                Start::Snapshot {
                    seq: self.seq,
                    resync: since.is_some(),
                    vms,
                }
            }
        }
    }
}

/// Makes descriptors readable. Call it without a lock, because a write to an eventfd wakes a
/// thread, which would then wait for that lock.
pub(super) fn wake(fds: &[Arc<EventFd>]) {
    for fd in fds {
        // This fails only after 2^64 - 1 writes, and then the descriptor is readable anyway.
        let _ = fd.write(1);
    }
}

/// A listener's handle. Poll [`Subscription::fd`] for reading, then call [`Subscription::next`]
/// until it returns `None`.
pub struct Subscription {
    inner: Arc<Inner>,
    id: u64,
    lends: bool,
    fd: Arc<EventFd>,
}

impl Subscription {
    pub(super) fn new(inner: Arc<Inner>, since: Option<u64>, sees: Sees) -> Result<(Self, Start)> {
        let fd = event_fd("listen to the store")?;
        let mut published = inner.events.published.lock();
        let start = published.start(since, &*sees);
        published.last_listener += 1;
        let id = published.last_listener;
        let listener = Listener {
            sees,
            queue: VecDeque::new(),
            lag: None,
            taker: Taker::Own,
            fd: fd.clone(),
        };
        published.listeners.insert(id, listener);
        drop(published);
        Ok((
            Self {
                inner,
                id,
                lends: false,
                fd,
            },
            start,
        ))
    }

    /// Returns the unique number of this subscription.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns the descriptor that is readable while there are changes to take.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Lends the subscription to the feed, if there is one. The feed takes over once
    /// [`Subscription::next`] returns `None`. If the feed cannot continue, it returns the
    /// subscription and makes the descriptor readable. The listener can end this with
    /// [`Subscription::keep`].
    pub fn lend(&mut self) {
        self.lends = true;
    }

    /// Stops lending the subscription and takes its queue back. Returns false if the subscription
    /// was not lent.
    pub fn keep(&mut self) -> bool {
        let was_lent = std::mem::take(&mut self.lends);
        self.take_back();
        was_lent
    }

    /// Returns the oldest change that has not been taken. Returns `None` if the queue is empty or
    /// the feed is serving it. Nothing follows [`Next::Lagged`].
    #[allow(clippy::should_implement_trait)] // Not an iterator, because `None` is not the end.
    pub fn next(&mut self) -> Option<Next> {
        let mut published = self.inner.events.published.lock();
        let has_feed = published.feed.is_some();
        let listener = published
            .listeners
            .get_mut(&self.id)
            .filter(|l| l.taker == Taker::Own)?;
        if let Some(change) = listener.queue.pop_front() {
            return Some(Next::Change(change));
        }
        if let Some((dropped, resume_seq)) = listener.lag {
            drop(published.listeners.remove(&self.id));
            return Some(Next::Lagged {
                dropped,
                resume_seq,
            });
        }
        if self.lends && has_feed {
            listener.taker = Taker::Feed;
        }
        // Clear the descriptor under the lock, so that no change is missed. EAGAIN means that
        // nothing has arrived.
        let _ = self.fd.read();
        None
    }

    /// Takes the queue back from the feed. Waits until the feed has stopped sending for this
    /// subscription, but leaves the subscription lent. The wait is short, because the feed sends
    /// only what it has already taken and never waits for a caller.
    pub fn take_back(&mut self) {
        loop {
            let mut published = self.inner.events.published.lock();
            let Some(listener) = published.listeners.get_mut(&self.id) else {
                return;
            };
            let Taker::FeedAtWork { is_claimed } = &mut listener.taker else {
                listener.taker = Taker::Own;
                return;
            };
            *is_claimed = true;
            let _ = self.fd.read();
            drop(published);
            wait_readable(self.fd.as_fd());
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let removed = self
            .inner
            .events
            .published
            .lock()
            .listeners
            .remove(&self.id);
        // Drop the listener outside the lock, because it may hold the last pointers to many rows.
        drop(removed);
    }
}

pub(super) fn event_fd(doing: &str) -> Result<Arc<EventFd>> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map(Arc::new)
        .map_err(|e| Error::new(Kind::Exhausted, doing).with_source(e))
}

fn wait_readable(fd: BorrowedFd<'_>) {
    let deadline = Instant::now() + CHECK_PERIOD;
    let _ = crate::host::wait::wait_uncancelled(&[(fd, PollFlags::POLLIN)], deadline);
}
