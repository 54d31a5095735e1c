//! Records why a guest is paused although its owner has not paused it.

use super::{BootEnd, Runtime, Runtimes, Use};
use crate::ids::VmId;
use crate::locks::{Cancel, CancelCause};

impl Runtimes {
    /// Records that the guest is paused because the host's disk is full, or that there is room
    /// again. Boots and transfers do not wait for room, so a pause cancels them.
    pub(crate) fn set_paused(&self, vm: &VmId, is_paused: bool) {
        self.with(vm, |r| r.is_paused = is_paused);
        if !is_paused {
            return;
        }
        self.boot_died(vm, BootEnd::HostDiskFull);
        let transfers = |r: &mut Runtime| -> Vec<Cancel> {
            r.users
                .values()
                .rev()
                .filter(|(kind, _)| *kind == Use::Transfer)
                .map(|(_, token)| token.clone())
                .collect()
        };
        for token in self.with(vm, transfers) {
            token.cancel(CancelCause::HostDiskFull);
        }
    }

    /// Records whether the guest must be paused because it is saved. The caller also calls the
    /// driver.
    pub(crate) fn hold(&self, vm: &VmId, is_held: bool) {
        self.with(vm, |r| r.is_held = is_held);
    }

    pub(crate) fn is_held(&self, vm: &VmId) -> bool {
        self.map.lock().get(vm).is_some_and(|r| r.is_held)
    }

    pub(crate) fn is_paused(&self, vm: &VmId) -> bool {
        self.map.lock().get(vm).is_some_and(|r| r.is_paused)
    }
}
