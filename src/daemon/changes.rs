//! Tells waiters that some VM's row has changed. They look again; nothing is carried in the signal.

use crate::error::{Error, Result};
use crate::locks::{Mutex, Rank};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

#[derive(Default)]
struct Subscribers {
    next: u64,
    events: HashMap<u64, Arc<EventFd>>,
}

pub struct Changes {
    subscribers: Arc<Mutex<Subscribers>>,
}

/// Readable after a change. Taken back when dropped.
pub struct Subscription {
    subscribers: Arc<Mutex<Subscribers>>,
    id: u64,
    event: Arc<EventFd>,
}

impl Changes {
    pub fn new() -> Self {
        Self { subscribers: Arc::new(Mutex::new(Rank::Runtimes, Subscribers::default())) }
    }

    /// Wakes every subscriber. Memory and a counter only; never blocks.
    pub fn publish(&self) {
        for event in self.subscribers.lock().events.values() {
            // EAGAIN: the counter is at its end, so it is readable already.
            let _ = event.write(1);
        }
    }

    pub fn subscribe(&self) -> Result<Subscription> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::io("make an eventfd", e))?;
        let event = Arc::new(event);
        let mut subscribers = self.subscribers.lock();
        subscribers.next += 1;
        let id = subscribers.next;
        subscribers.events.insert(id, event.clone());
        drop(subscribers);
        Ok(Subscription { subscribers: self.subscribers.clone(), id, event })
    }

    /// Subscriptions now held.
    pub fn len(&self) -> usize {
        self.subscribers.lock().events.len()
    }
}

impl Subscription {
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
    /// Forgets the changes so far: call it before looking.
    pub fn clear(&self) {
        let _ = self.event.read();
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.subscribers.lock().events.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    fn readable(s: &Subscription) -> bool {
        let mut fds = [PollFd::new(s.fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn a_change_wakes_until_cleared_and_a_dropped_subscription_leaves_nothing() {
        let changes = Changes::new();
        let s = changes.subscribe().unwrap();
        assert!(!readable(&s));
        changes.publish();
        changes.publish();
        assert!(readable(&s));
        s.clear();
        assert!(!readable(&s));
        drop(s);
        assert_eq!(changes.len(), 0);
    }
}
