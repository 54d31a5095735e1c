//! A cancel token: a flag with a cause, an eventfd for `poll`, and wakers for condition waits.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

type Waker = Box<dyn Fn() + Send + Sync>;

struct Inner {
    cause: std::sync::OnceLock<String>,
    event: EventFd,
    wakers: parking_lot::Mutex<(u64, Vec<(u64, Waker)>)>,
}

/// Fires at most once and stays fired. Clones share one state.
#[derive(Clone)]
pub struct Cancel {
    inner: Arc<Inner>,
}

impl Cancel {
    /// Fails with the eventfd's error (EMFILE, ENFILE).
    pub fn try_new() -> std::io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self {
            inner: Arc::new(Inner { cause: std::sync::OnceLock::new(), event, wakers: parking_lot::Mutex::new((0, Vec::new())) }),
        })
    }

    /// Fires, unless it has. `cause` reads after "cancelled: ": `the VM was stopped`.
    pub fn cancel(&self, cause: impl Into<String>) {
        if self.inner.cause.set(cause.into()).is_err() {
            return;
        }
        // The counter cannot overflow: one write in its life.
        let _ = self.inner.event.write(1);
        for (_, waker) in &self.inner.wakers.lock().1 {
            waker();
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.inner.cause.get().is_some()
    }

    pub fn cause(&self) -> Option<&str> {
        self.inner.cause.get().map(String::as_str)
    }

    /// Becomes readable when the token fires and stays so. Never read from it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }

    /// Calls `waker` when the token fires, or now if it has. Forgotten when the result is dropped. The waker
    /// must not block nor take a lock of a rank.
    pub fn on_cancel(&self, waker: impl Fn() + Send + Sync + 'static) -> Subscription {
        let mut wakers = self.inner.wakers.lock();
        wakers.0 += 1;
        let id = wakers.0;
        if self.is_cancelled() {
            waker();
        } else {
            wakers.1.push((id, Box::new(waker)));
        }
        Subscription { cancel: self.clone(), id }
    }
}

pub struct Subscription {
    cancel: Cancel,
    id: u64,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.cancel.inner.wakers.lock().1.retain(|(id, _)| *id != self.id);
    }
}
