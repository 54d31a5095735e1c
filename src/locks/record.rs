//! Records which thread holds or awaits a keyed lock, for which operation and since when. Release
//! builds keep these records too; a record is two `Arc`s and a time stamp.

use super::raw;
use crate::sched::Instant;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

thread_local! {
    static OPERATION: RefCell<Option<Arc<str>>> = const { RefCell::new(None) };
    /// The kernel's ID of this thread.
    static TID: i32 = nix::unistd::gettid().as_raw();
}

/// A holder or a waiter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Party {
    pub thread: String,
    /// The kernel's ID of the thread.
    pub tid: i32,
    /// The label that [`operation_scope`] set.
    pub operation: Option<Arc<str>>,
    /// The time when a holder got the lock, or when a waiter joined the queue.
    pub since: Instant,
}

/// A key that is held or waited for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyRecord {
    /// The key, formatted with `Debug`.
    pub key: String,
    pub holder: Option<Party>,
    /// The waiters, in the order in which they will get the lock.
    pub waiters: Vec<Party>,
}

/// The record that a [`LockSet`](super::LockSet) keeps of a holder or waiter.
pub(super) struct PartyRecord {
    pub(super) thread: raw::Thread,
    tid: i32,
    operation: Option<Arc<str>>,
    since: Instant,
}

impl PartyRecord {
    pub(super) fn now() -> Self {
        let operation = OPERATION
            .try_with(|o| o.borrow().clone())
            .unwrap_or_default();
        Self {
            thread: raw::current(),
            tid: TID.try_with(|tid| *tid).unwrap_or_default(),
            operation,
            since: Instant::now(),
        }
    }

    /// Returns a record with the same thread and operation whose time is now.
    pub(super) fn renewed(&self) -> Self {
        Self {
            thread: self.thread.clone(),
            tid: self.tid,
            operation: self.operation.clone(),
            since: Instant::now(),
        }
    }

    /// Returns how long ago the record was made.
    pub(super) fn age(&self) -> Duration {
        self.since.elapsed()
    }
}

impl From<&PartyRecord> for Party {
    fn from(here: &PartyRecord) -> Self {
        let thread = here.thread.name().unwrap_or("?").to_owned();
        Self {
            thread,
            tid: here.tid,
            operation: here.operation.clone(),
            since: here.since,
        }
    }
}

/// Labels the lock records of this thread, for example `vm.start 3f2a`, until the result is
/// dropped. Scopes nest.
pub fn operation_scope(label: impl Into<Arc<str>>) -> OperationScope {
    let outer = OPERATION.with(|o| o.borrow_mut().replace(label.into()));
    OperationScope {
        outer,
        _not_send: PhantomData,
    }
}

/// Restores the outer label on drop.
#[must_use = "dropping it ends the scope"]
pub struct OperationScope {
    outer: Option<Arc<str>>,
    _not_send: PhantomData<*const ()>,
}

impl Drop for OperationScope {
    fn drop(&mut self) {
        let outer = self.outer.take();
        let _ = OPERATION.try_with(|o| *o.borrow_mut() = outer);
    }
}
