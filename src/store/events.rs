//! Durable changes, published in the order of their numbers.
//!
//! Every change of the store has a number, `seq`, which keeps growing over restarts. The number of
//! a change that failed is not reused. The writer publishes a batch once it is on disk and before
//! it answers anybody. A change is published as a whole; one that failed is never published.
//!
//! The last [`KEPT_MAX`] changes are kept, so that a listener can continue where it was. A mirror
//! of the durable rows is kept beside them. It shares its rows with the state, so it costs a map of
//! pointers. A snapshot of it matches the changes that follow exactly and shows nothing that may
//! still be undone.
//!
//! The publisher never waits. It puts a pointer into each listener's bounded queue. A listener
//! whose queue is full gets one `lagged` note with the number to continue from, and is removed. A
//! stream therefore never has a gap. A listener takes from its queue on its own thread, or lends it to
//! the feed, where one thread serves all listeners that keep up (`feed.rs`).

use super::batch::Change;
use super::state::{Image, State};
use super::{Inner, VmRow, WorkspaceRow};
use crate::api::Fault;
use crate::api::op::OpState;
use crate::error::{Error, Kind, Result};
use crate::ids::{OpId, VmId};
use crate::locks::{Mutex, Rank};
use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Changes that are kept for those who come back.
pub const KEPT_MAX: usize = 4096;
/// Changes that wait for one listener.
pub const QUEUE_MAX: usize = 1024;
/// A thread that waits for the feed looks again after so long, even if nobody wakes it.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A VM's rows at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub row: Arc<VmRow>,
    pub workspace: Option<Arc<WorkspaceRow>>,
}

/// One VM over one change.
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
    /// As it is after the change, or was when the change removed it.
    pub vm: Option<Arc<VmRow>>,
}

/// A durable change.
#[derive(Clone, Debug, PartialEq)]
pub struct Happened {
    pub seq: u64,
    /// When it was durable, in seconds since the epoch.
    pub at: u64,
    pub vms: Vec<VmChange>,
    pub ended: Vec<OpEnd>,
}

impl VmChange {
    pub fn owner_uid(&self) -> Option<u32> {
        self.after.as_ref().or(self.before.as_ref()).map(|s| s.row.owner_uid)
    }
}

impl OpEnd {
    /// Who began it, and whose VM it was about.
    pub fn owners(&self) -> impl Iterator<Item = u32> {
        [Some(self.owner_uid), self.vm.as_ref().map(|row| row.owner_uid)].into_iter().flatten()
    }
}

impl Happened {
    fn concerns(&self, sees: &dyn Fn(u32) -> bool) -> bool {
        self.vms.iter().filter_map(VmChange::owner_uid).chain(self.ended.iter().flat_map(OpEnd::owners)).any(sees)
    }
}

/// What a listener begins with.
#[derive(Debug)]
pub enum Start {
    /// `resync`: it asked for what is no longer kept, or never was.
    Snapshot { seq: u64, resync: bool, vms: Vec<Seen> },
    /// What it missed. All of it.
    Missed(Vec<Arc<Happened>>),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    Happened(Arc<Happened>),
    /// The last of all: so many more came than the queue holds. All up to `resume_seq` was given.
    Lagged {
        dropped: u64,
        resume_seq: u64,
    },
}

type Sees = Box<dyn Fn(u32) -> bool + Send>;

/// Who takes from a listener's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taker {
    /// Its own thread, which waits for its descriptor.
    Itself,
    /// The feed.
    Feed,
    /// The feed, which is passing on what it took just now. `is_claimed`: the listener's own thread waits to be next.
    FeedAtWork { is_claimed: bool },
}

pub(super) struct Listener {
    sees: Sees,
    pub(super) queue: VecDeque<Arc<Happened>>,
    /// Set by the first change that found no room; none is queued from then on.
    pub(super) lag: Option<(u64, u64)>,
    pub(super) taker: Taker,
    pub(super) fd: Arc<EventFd>,
}

impl Listener {
    fn offer(&mut self, happened: &Arc<Happened>) {
        if !happened.concerns(&*self.sees) {
            return;
        }
        match &mut self.lag {
            Some((dropped, _)) => *dropped += 1,
            None if self.queue.len() < QUEUE_MAX => self.queue.push_back(happened.clone()),
            lag => *lag = Some((1, happened.seq - 1)),
        }
    }

    pub(super) fn has_more(&self) -> bool {
        !self.queue.is_empty() || self.lag.is_some()
    }
}

pub(super) struct Published {
    vms: BTreeMap<VmId, Seen>,
    /// Of the last durable change.
    seq: u64,
    /// All later ones that brought anything are in `kept`.
    floor: u64,
    kept: VecDeque<Arc<Happened>>,
    pub(super) listeners: BTreeMap<u64, Listener>,
    last_listener: u64,
    /// Readable when the feed is to look at the queues that are lent to it.
    pub(super) feed: Option<Arc<EventFd>>,
}

pub(super) struct Bus {
    // The rank of the store, whose other locks are never held with it.
    pub(super) published: Mutex<Published>,
}

impl Bus {
    pub(super) fn new(state: &State, seq: u64) -> Self {
        let seen = |row: &Arc<VmRow>| Seen { row: row.clone(), workspace: state.workspace(&row.id).cloned() };
        let published = Published {
            vms: state.vms().map(|row| (row.id.clone(), seen(row))).collect(),
            seq,
            floor: seq,
            kept: VecDeque::new(),
            listeners: BTreeMap::new(),
            last_listener: 0,
            feed: None,
        };
        Self { published: Mutex::new(Rank::Store, published) }
    }

    #[cfg(test)]
    pub(super) fn listeners(&self) -> usize {
        self.published.lock().listeners.len()
    }

    /// Tells of changes that are on the disk now. Called by the writer only, batch after batch.
    pub(super) fn publish(&self, changes: &[Change]) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let mut published = self.published.lock();
        for change in changes {
            let happened = published.apply(change, at);
            published.seq = change.seq;
            if !happened.vms.is_empty() || !happened.ended.is_empty() {
                published.keep(Arc::new(happened));
            }
        }
        let to_wake = published.to_wake();
        drop(published);
        wake(&to_wake);
    }
}

impl Published {
    /// Brings the mirror up to date and says what that changed: steps of one row add up.
    fn apply(&mut self, change: &Change, at: u64) -> Happened {
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
                    self.vms.insert(id.clone(), Seen { row: row.clone(), workspace });
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
        let ended = change.steps.iter().filter_map(|step| self.op_end(&step.before, &step.after, &touched)).collect();
        let whole = |(id, before): (VmId, Option<Seen>)| VmChange { after: self.vms.get(&id).cloned(), before };
        let vms = touched.into_iter().map(whole).filter(|c| c.before != c.after).collect();
        Happened { seq: change.seq, at, vms, ended }
    }

    fn op_end(&self, before: &Image, after: &Image, touched: &[(VmId, Option<Seen>)]) -> Option<OpEnd> {
        let (Image::Op(_, before), Image::Op(_, Some(op))) = (before, after) else { return None };
        if !op.state.has_ended() || before.as_ref().is_some_and(|b| b.state.has_ended()) {
            return None;
        }
        let vm = op.vm.as_ref().and_then(|id| {
            let removed = || touched.iter().find(|(touched, _)| touched == id).and_then(|(_, before)| before.as_ref());
            self.vms.get(id).or_else(removed).map(|seen| seen.row.clone())
        });
        let (id, method, state) = (op.id.clone(), op.method.clone(), op.state);
        Some(OpEnd { id, method, state, error: op.error.clone(), owner_uid: op.owner_uid, vm })
    }

    fn keep(&mut self, happened: Arc<Happened>) {
        self.listeners.values_mut().for_each(|l| l.offer(&happened));
        self.kept.push_back(happened);
        if self.kept.len() > KEPT_MAX
            && let Some(oldest) = self.kept.pop_front()
        {
            self.floor = oldest.seq;
        }
    }

    /// The descriptors of all who have something to take: the feed's is one for all who lend their queue.
    fn to_wake(&self) -> Vec<Arc<EventFd>> {
        let (own, lent): (Vec<_>, Vec<_>) =
            self.listeners.values().filter(|l| l.has_more()).partition(|l| l.taker == Taker::Itself);
        let feed = self.feed.iter().filter(|_| !lent.is_empty());
        own.iter().map(|l| &l.fd).chain(feed).cloned().collect()
    }

    fn start(&self, since: Option<u64>, sees: &dyn Fn(u32) -> bool) -> Start {
        match since {
            // A number that was not given out yet is another database's.
            Some(since) if (self.floor..=self.seq).contains(&since) => {
                let from = self.kept.partition_point(|h| h.seq <= since);
                Start::Missed(self.kept.range(from..).filter(|h| h.concerns(sees)).cloned().collect())
            }
            _ => {
                let vms = self.vms.values().filter(|seen| sees(seen.row.owner_uid)).cloned().collect();
                Start::Snapshot { seq: self.seq, resync: since.is_some(), vms }
            }
        }
    }
}

/// Makes descriptors readable. Without a lock: a write to an eventfd wakes a thread, which would then wait for that lock.
pub(super) fn wake(fds: &[Arc<EventFd>]) {
    for fd in fds {
        // Full only after 2^64 - 1 writes without a look, and then it is readable.
        let _ = fd.write(1);
    }
}

/// Poll [`Subscription::fd`] for reading, then call [`Subscription::next`] until it gives none.
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
        let listener = Listener { sees, queue: VecDeque::new(), lag: None, taker: Taker::Itself, fd: fd.clone() };
        published.listeners.insert(id, listener);
        drop(published);
        Ok((Self { inner, id, lends: false, fd }, start))
    }

    /// Tells subscriptions apart.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Readable while there is something to take.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// From now on the feed, where there is one, passes on what comes after [`Subscription::next`] gave none. It stops once
    /// it cannot, and with [`Subscription::take_back`]; then the descriptor is readable.
    pub fn lend(&mut self) {
        self.lends = true;
    }

    /// Ends what [`Subscription::lend`] began, and takes the subscription back. False when it was not lent at all.
    pub fn keep(&mut self) -> bool {
        let was_lent = std::mem::take(&mut self.lends);
        self.take_back();
        was_lent
    }

    /// The oldest change that was not taken yet. None: there is none now, and after [`Next::Lagged`] none ever.
    #[allow(clippy::should_implement_trait)] // Not an iterator: none now, more later.
    pub fn next(&mut self) -> Option<Next> {
        let mut published = self.inner.events.published.lock();
        let has_feed = published.feed.is_some();
        let listener = published.listeners.get_mut(&self.id).filter(|l| l.taker == Taker::Itself)?;
        if let Some(happened) = listener.queue.pop_front() {
            return Some(Next::Happened(happened));
        }
        if let Some((dropped, resume_seq)) = listener.lag {
            drop(published.listeners.remove(&self.id));
            return Some(Next::Lagged { dropped, resume_seq });
        }
        if self.lends && has_feed {
            listener.taker = Taker::Feed;
        }
        // Under the lock, so that no change falls between. EAGAIN: nothing came since the last time.
        let _ = self.fd.read();
        None
    }

    /// Waits until the feed does not pass on anything of this subscription, which takes it no longer than it needs for what
    /// it holds: it never waits for a caller.
    pub fn take_back(&mut self) {
        loop {
            let mut published = self.inner.events.published.lock();
            let Some(listener) = published.listeners.get_mut(&self.id) else { return };
            let Taker::FeedAtWork { is_claimed } = &mut listener.taker else {
                listener.taker = Taker::Itself;
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
        let removed = self.inner.events.published.lock().listeners.remove(&self.id);
        // Not under the lock: it may hold the last pointer to many rows.
        drop(removed);
    }
}

pub(super) fn event_fd(doing: &str) -> Result<Arc<EventFd>> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map(Arc::new)
        .map_err(|e| Error::new(Kind::Exhausted, doing).with_source(e))
}

fn wait_readable(fd: BorrowedFd<'_>) {
    let deadline = Instant::now() + LOOK_AGAIN;
    let _ = crate::host::wait::wait_uncancelled(&[(fd, PollFlags::POLLIN)], deadline);
}
