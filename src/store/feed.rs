//! The feed: one thread that passes changes on for all subscriptions that are lent to it.
//!
//! A thread for each listener is woken by every change, and hundreds of them then compete for the lock and the processors
//! to do the same work. The feed takes what has come for all of them in one hold of the lock, passes it on without waiting
//! for anybody, and returns what a listener's own thread has to do: that thread may wait, and goes on where the feed ended.
//! Whoever takes from a queue is alone in that ([`Taker`]), so nothing is passed on twice, left out, or out of order.

use super::events::{Taker, event_fd, wake};
use super::{Happened, Inner};
use crate::error::{Error, Result};
use nix::sys::eventfd::EventFd;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// What has come for one subscription. Changes that are left in it when it is returned are passed on by its own thread.
pub struct Due {
    /// See [`super::Subscription::id`].
    pub id: u64,
    pub changes: VecDeque<Arc<Happened>>,
    /// The subscription's own thread has to go on, even if no change is left.
    pub is_given_back: bool,
}

/// Poll [`Feed::fd`], then call [`Feed::take`] and [`Feed::finish`] until there is nothing. Dropped, it gives back every
/// subscription that it has.
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
            return Err(Error::internal("the store has a feed already"));
        }
        published.feed = Some(fd.clone());
        drop(published);
        Ok(Self { inner, fd })
    }

    /// Readable when something may have come.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Takes all that has come. Every [`Due`] is to go to [`Feed::finish`].
    pub fn take(&mut self) -> Vec<Due> {
        // Before the look, so that what comes after it makes the descriptor readable. EAGAIN: nothing has come.
        let _ = self.fd.read();
        let mut published = self.inner.events.published.lock();
        let due = published.listeners.iter_mut().filter(|(_, l)| l.taker == Taker::Feed && l.has_more()).map(|(id, l)| {
            l.taker = Taker::FeedAtWork { is_claimed: false };
            Due { id: *id, changes: std::mem::take(&mut l.queue), is_given_back: false }
        });
        due.collect()
    }

    /// Ends the work on what was taken.
    pub fn finish(&mut self, done: Vec<Due>) {
        let mut to_wake = Vec::new();
        let mut published = self.inner.events.published.lock();
        for mut due in done {
            let Some(listener) = published.listeners.get_mut(&due.id) else { continue };
            let is_claimed = matches!(listener.taker, Taker::FeedAtWork { is_claimed: true });
            // The end of a subscription that lags is its own thread's to tell.
            let is_returned = is_claimed || due.is_given_back || !due.changes.is_empty() || listener.lag.is_some();
            due.changes.append(&mut listener.queue);
            listener.queue = due.changes;
            listener.taker = if is_returned { Taker::Itself } else { Taker::Feed };
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
        for listener in published.listeners.values_mut().filter(|l| l.taker != Taker::Itself) {
            listener.taker = Taker::Itself;
            to_wake.push(listener.fd.clone());
        }
        drop(published);
        wake(&to_wake);
    }
}
