//! Notifies threads of changes through an eventfd, on which they wait in `poll`.

use super::tx::Step;
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};

struct Event {
    vm: Option<VmId>,
    fd: EventFd,
}

/// A subscription to notifications. Dropping it ends the subscription.
pub struct Watch(Arc<Event>);

impl Watch {
    /// Returns the descriptor. It is readable after a change, even if the change was undone, until
    /// [`Watch::clear`] is called.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
    /// Makes the descriptor unreadable until the next change. Call this before reading the state
    /// again, so that no change is missed.
    pub fn clear(&self) {
        // The descriptor does not block. EAGAIN means that there was nothing to clear.
        let _ = self.0.fd.read();
    }
}

#[derive(Default)]
pub(super) struct Watchers(Vec<Weak<Event>>);

impl Watchers {
    pub(super) fn add(&mut self, vm: Option<VmId>) -> Result<Watch> {
        let fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::new(Kind::Exhausted, "watch the store").with_source(e))?;
        let event = Arc::new(Event { vm, fd });
        self.0.retain(|w| w.strong_count() > 0);
        self.0.push(Arc::downgrade(&event));
        Ok(Watch(event))
    }

    pub(super) fn notify<'a>(&self, steps: impl IntoIterator<Item = &'a Step> + Clone) {
        for event in self.0.iter().filter_map(Weak::upgrade) {
            let concerns = |s: &Step| {
                event.vm.is_none()
                    || s.before.vm() == event.vm.as_ref()
                    || s.after.vm() == event.vm.as_ref()
            };
            if steps.clone().into_iter().any(concerns) {
                // This fails only after 2^64 - 1 writes, and then the descriptor is readable
                // anyway.
                let _ = event.fd.write(1);
            }
        }
    }
}
