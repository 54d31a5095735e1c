//! A queue of notifications from an operation's thread to the connection that waits for it.

use crate::api::frame::Note;
use crate::error::{Error, Result};
use crate::locks::{Mutex, Rank};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Limit of queued notifications. An operation normally sends only a few.
const NOTES_MAX: usize = 256;

struct Inner {
    queue: Mutex<VecDeque<Note>>,
    event: EventFd,
}

/// A queue of notifications. Clones share one queue.
#[derive(Clone)]
pub struct Notes {
    inner: Arc<Inner>,
}

impl Notes {
    pub fn new() -> Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::io("make an eventfd", e))?;
        Ok(Self {
            inner: Arc::new(Inner {
                queue: Mutex::new(Rank::Runtimes, VecDeque::new()),
                event,
            }),
        })
    }

    /// Queues a notification without blocking. If the queue is full, drops the oldest notification.
    pub fn send(&self, note: Note) {
        let mut queue = self.inner.queue.lock();
        if queue.len() == NOTES_MAX {
            queue.pop_front();
        }
        queue.push_back(note);
        drop(queue);
        let _ = self.inner.event.write(1);
    }

    /// Returns a descriptor that is readable when the queue is not empty.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }

    pub fn take(&self) -> Vec<Note> {
        let _ = self.inner.event.read();
        self.inner.queue.lock().drain(..).collect()
    }
}
