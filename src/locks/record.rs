//! Who holds or awaits a keyed lock, for which operation, since when. In release too: an `Arc` or two and a clock.

use super::raw;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;

thread_local! {
    static OPERATION: RefCell<Option<Arc<str>>> = const { RefCell::new(None) };
}

/// A holder or a waiter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Party {
    pub thread: String,
    /// What [`operation_scope`] said.
    pub operation: Option<Arc<str>>,
    /// A holder: since it has the lock; a waiter: since it stands in the queue.
    pub since: Instant,
}

/// What a slot keeps.
pub(super) struct Here {
    pub(super) thread: raw::Thread,
    operation: Option<Arc<str>>,
    since: Instant,
}

impl Here {
    pub(super) fn now() -> Self {
        let operation = OPERATION.try_with(|o| o.borrow().clone()).unwrap_or_default();
        Self { thread: raw::current(), operation, since: Instant::now() }
    }

    /// The same party, from now on.
    pub(super) fn renewed(&self) -> Self {
        Self { thread: self.thread.clone(), operation: self.operation.clone(), since: Instant::now() }
    }
}

impl From<&Here> for Party {
    fn from(here: &Here) -> Self {
        let thread = here.thread.name().unwrap_or("?").to_owned();
        Self { thread, operation: here.operation.clone(), since: here.since }
    }
}

/// Names what this thread does, for lock records, until the result is dropped: `vm.start 3f2a`. Nests.
pub fn operation_scope(label: impl Into<Arc<str>>) -> OperationScope {
    let outer = OPERATION.with(|o| o.borrow_mut().replace(label.into()));
    OperationScope { outer, _not_send: PhantomData }
}

/// Brings the outer label back on drop.
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
