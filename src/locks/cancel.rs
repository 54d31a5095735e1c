//! The cancel token: a flag with a cause, an eventfd for `poll`, and wakers for condition waits.

use super::cause::CancelCause;
use super::raw;
use crate::sched::OnceLock;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

type Waker = Box<dyn FnOnce() + Send>;

struct Inner {
    cause: OnceLock<CancelCause>,
    event: EventFd,
    wakers: raw::Mutex<Wakers>,
    /// Notified when a waker has returned.
    returned: raw::Condvar,
}

impl Inner {
    #[cfg(not(feature = "shuttle"))]
    fn wakers(&self) -> crate::sched::MutexGuard<'_, Wakers> {
        super::check::lock_beneath(&self.wakers)
    }
    #[cfg(feature = "shuttle")]
    fn wakers(&self) -> raw::MutexGuard<'_, Wakers> {
        self.wakers.lock()
    }
}

#[derive(Default)]
struct Wakers {
    last_id: u64,
    waiting: Vec<(u64, Waker)>,
    /// The waker that `cancel` is running, and the thread that runs it.
    running: Option<(u64, raw::ThreadId)>,
}

/// A token that fires at most once and stays fired. Clones share one state.
#[derive(Clone)]
pub struct Cancel {
    inner: Arc<Inner>,
}

impl Cancel {
    /// Creates a token that has not fired. Fails if no eventfd can be created (EMFILE, ENFILE).
    pub fn try_new() -> std::io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let (cause, wakers) = (OnceLock::new(), raw::Mutex::new(Wakers::default()));
        Ok(Self {
            inner: Arc::new(Inner {
                cause,
                event,
                wakers,
                returned: raw::Condvar::new(),
            }),
        })
    }

    /// Fires the token, unless it has already fired. The wakers run in this call, while no lock of
    /// the token is held.
    pub fn cancel(&self, cause: CancelCause) {
        // The cause is set before the wakers run, so that a later subscriber sees it.
        if self.inner.cause.set(cause).is_err() {
            return;
        }
        // The counter cannot overflow because it is written only once.
        let _ = self.inner.event.write(1);
        loop {
            let mut wakers = self.inner.wakers();
            let Some((id, waker)) = wakers.waiting.pop() else {
                return;
            };
            wakers.running = Some((id, raw::current().id()));
            drop(wakers);
            // The panic hook reports a waker's panic. Nothing is logged here, because the caller
            // may hold locks.
            drop(std::panic::catch_unwind(std::panic::AssertUnwindSafe(
                waker,
            )));
            self.inner.wakers().running = None;
            self.inner.returned.notify_all();
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.inner.cause.get().is_some()
    }

    /// Returns why the token fired, or None if it has not fired.
    pub fn cause(&self) -> Option<&CancelCause> {
        self.inner.cause.get()
    }

    /// Returns a descriptor that becomes readable when the token fires, and stays readable. Never
    /// read from this descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }

    /// Calls `waker` once: when the token fires, on the thread that fires it, or now if it has
    /// already fired. Dropping the result unsubscribes; after the drop the waker is not running and
    /// will not run. The waker must not block or take a lock that has a rank, because the firing
    /// thread may hold any lock. The waker may use this token.
    pub fn on_cancel(&self, waker: impl FnOnce() + Send + 'static) -> Subscription {
        let mut wakers = self.inner.wakers();
        // Check under the mutex, which `cancel` takes after setting the cause. Either this function
        // or `cancel` then calls the waker, never both.
        if self.is_cancelled() {
            drop(wakers);
            waker();
            return Subscription {
                cancel: self.clone(),
                id: 0,
                waits: true,
            };
        }
        wakers.last_id += 1;
        let id = wakers.last_id;
        wakers.waiting.push((id, Box::new(waker)));
        drop(wakers);
        Subscription {
            cancel: self.clone(),
            id,
            waits: true,
        }
    }
}

impl std::fmt::Debug for Cancel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Cancel").field(&self.cause()).finish()
    }
}

/// Keeps a waker subscribed.
#[must_use = "dropping it unsubscribes the waker"]
pub struct Subscription {
    cancel: Cancel,
    id: u64,
    /// True if the drop waits for a call of the waker that is in progress.
    waits: bool,
}

impl Subscription {
    /// Unsubscribes the waker without waiting for a call that is in progress. For a waker that owns
    /// all that it uses, where the caller holds a lock and must not sleep.
    pub(super) fn end_without_waiting(mut self) {
        self.waits = false;
    }
}

impl Drop for Subscription {
    /// Unsubscribes the waker. If another thread is currently calling the waker, waits until that
    /// call returns, so that the caller can then close what the waker uses, such as a descriptor.
    /// Wakers do not block, so the wait is short.
    fn drop(&mut self) {
        let inner = &self.cancel.inner;
        let mut wakers = inner.wakers();
        if let Some(i) = wakers.waiting.iter().position(|(id, _)| *id == self.id) {
            let waker = wakers.waiting.swap_remove(i);
            drop(wakers); // Values that the closure owns may use the token when they are dropped.
            drop(waker);
            return;
        }
        let me = raw::current().id();
        while self.waits
            && wakers
                .running
                .is_some_and(|(id, thread)| id == self.id && thread != me)
        {
            inner.returned.wait(&mut wakers);
        }
    }
}
