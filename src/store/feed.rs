//! Serves all subscriptions that are lent to the feed, from one thread.
//!
//! If each listener had its own thread, every change would wake hundreds of threads, which would
//! compete for the lock and the processors to do the same work. The feed locks once to take the new
//! changes of all its listeners, and sends the changes without waiting for anybody. If it cannot
//! send some of them, it returns these to the listener's own thread. That thread may wait, and
//! continues where the feed stopped. Only one thread takes from a queue at a time ([`Taker`]), so
//! nothing is sent twice, left out, or out of order.

use super::events::{Taker, event_fd, wake};
use super::{Inner, StoreChange};
use crate::error::{Error, Result};
use nix::sys::eventfd::EventFd;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// New changes for one subscription. If some are left when [`Feed::finish`] gets them back, the
/// subscription's own thread sends them.
pub struct Due {
    /// See [`super::Subscription::id`].
    pub id: u64,
    pub changes: VecDeque<Arc<StoreChange>>,
    /// True if the subscription's own thread must continue, even if no change is left.
    pub is_returned: bool,
}

/// The handle of the feed's thread. Poll [`Feed::fd`], then call [`Feed::take`] and
/// [`Feed::finish`] until `take` returns nothing. Dropping the handle returns all subscriptions to
/// their own threads.
pub struct Feed {
    inner: Arc<Inner>,
    fd: Arc<EventFd>,
}

impl Feed {
    pub(super) fn new(inner: Arc<Inner>) -> Result<Self> {
        let fd = event_fd("feed listeners of the store")?;
        let mut published = inner.events.published.lock();
        if published.feed.is_some() {
            drop(published);
            return Err(Error::internal("the store already has a feed"));
        }
        published.feed = Some(fd.clone());
        drop(published);
        Ok(Self { inner, fd })
    }

    /// Returns the descriptor that is readable when there may be new changes.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Takes all new changes. Every [`Due`] must be passed to [`Feed::finish`].
    pub fn take(&mut self) -> Vec<Due> {
        // Clear the descriptor first, so that later changes make the descriptor readable again.
        // EAGAIN means that nothing has arrived.
        let _ = self.fd.read();
        let mut published = self.inner.events.published.lock();
        let due = published
            .listeners
            .iter_mut()
            .filter(|(_, l)| l.taker == Taker::Feed && l.has_more())
            .map(|(id, l)| {
                l.taker = Taker::FeedAtWork { is_claimed: false };
                Due {
                    id: *id,
                    changes: std::mem::take(&mut l.queue),
                    is_returned: false,
                }
            });
        due.collect()
    }

    /// Hands back the subscriptions from [`Feed::take`], with the changes that were not sent.
    pub fn finish(&mut self, done: Vec<Due>) {
        let mut to_wake = Vec::new();
        let mut published = self.inner.events.published.lock();
        for mut due in done {
            let Some(listener) = published.listeners.get_mut(&due.id) else {
                continue;
            };
            let is_claimed = matches!(listener.taker, Taker::FeedAtWork { is_claimed: true });
            // A lagging subscription is ended by its own thread.
            let is_returned =
                is_claimed || due.is_returned || !due.changes.is_empty() || listener.lag.is_some();
            due.changes.append(&mut listener.queue);
            listener.queue = due.changes;
            listener.taker = if is_returned { Taker::Own } else { Taker::Feed };
            if is_returned {
                to_wake.push(listener.fd.clone());
            }
        }
        drop(published);
        wake(&to_wake);
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let mut to_wake = Vec::new();
        let mut published = self.inner.events.published.lock();
        published.feed = None;
        for listener in published
            .listeners
            .values_mut()
            .filter(|l| l.taker != Taker::Own)
        {
            listener.taker = Taker::Own;
            to_wake.push(listener.fd.clone());
        }
        drop(published);
        wake(&to_wake);
    }
}
