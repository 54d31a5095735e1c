//! Keeps the state of a VM that is in memory only: how to cancel the operation in progress, which
//! operation follows, and why the guest is paused.

mod pauses;
mod users;

pub(super) use users::{Use, User};

use super::transitions::Verb;
use crate::api::vm::VmState;
use crate::ids::{OpId, VmId};
use crate::locks::{Cancel, CancelCause, Mutex, Rank};
use crate::sched::HashMap;
use crate::vmm::End;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The cause of a boot's failure if no request cancelled the boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BootEnd {
    /// The guest was paused because the host's disk is full. A boot does not wait for room.
    HostDiskFull,
    VmmDied(End),
}

impl BootEnd {
    fn cause(&self) -> CancelCause {
        match self {
            BootEnd::HostDiskFull => CancelCause::HostDiskFull,
            BootEnd::VmmDied(end) => CancelCause::VmmEnded(end.to_string()),
        }
    }
}

impl fmt::Display for BootEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause().fmt(f)
    }
}

/// The operation that takes over the VM when the operation in progress releases it.
pub(super) struct Successor {
    pub verb: Verb,
    pub op: crate::ops::OpHandle,
    pub timeout: Option<Duration>,
}

impl Successor {
    pub(super) fn deletes(verb: Verb) -> bool {
        Self::weight(verb) == 2
    }
    /// Returns the state that the VM enters when the successor begins.
    pub(super) fn target(&self) -> VmState {
        if Self::deletes(self.verb) {
            VmState::Deleting
        } else {
            VmState::Stopping
        }
    }
    /// Returns the weight of a successor. A successor replaces a queued one of lower weight: a
    /// delete replaces a stop, and a forced stop replaces a graceful stop.
    pub(super) fn weight(verb: Verb) -> u8 {
        match verb {
            Verb::Delete | Verb::DeleteForce => 2,
            Verb::StopForce | Verb::Kill => 1,
            _ => 0,
        }
    }
}

#[derive(Default)]
struct Runtime {
    /// Cancels the boot in progress.
    boot: Option<Cancel>,
    /// True if the boot has failed and is about to kill its VMM.
    gives_up: bool,
    /// Shortens the graceful stop in progress.
    grace: Option<Cancel>,
    successor: Option<Successor>,
    /// The cause of the failure of the boot in progress.
    died: Option<BootEnd>,
    /// True if the stop in progress does not delete a VM with `rm`.
    keeps: bool,
    /// The transfers and sessions that a stop ends.
    users: BTreeMap<u64, (Use, Cancel)>,
    next_user: u64,
    /// True if the guest is paused until the host's disk has room.
    is_paused: bool,
    /// True if the guest is paused while it is saved.
    is_held: bool,
}

impl Runtime {
    fn is_empty(&self) -> bool {
        let nothing_under_way =
            self.boot.is_none() && self.grace.is_none() && self.successor.is_none();
        nothing_under_way
            && self.died.is_none()
            && self.users.is_empty()
            && !self.keeps
            && !self.gives_up
            && !self.is_paused
            && !self.is_held
    }
}

/// The [`Runtime`] of every VM, behind one leaf lock. Empty entries are removed.
#[derive(Clone)]
pub(super) struct Runtimes {
    map: Arc<Mutex<HashMap<VmId, Runtime>>>,
}

impl Runtimes {
    pub(super) fn new() -> Self {
        Self {
            map: Arc::new(Mutex::new(Rank::Runtimes, HashMap::default())),
        }
    }

    fn with<T>(&self, vm: &VmId, change: impl FnOnce(&mut Runtime) -> T) -> T {
        let mut map = self.map.lock();
        let runtime = map.entry(vm.clone()).or_default();
        let result = change(runtime);
        if runtime.is_empty() {
            map.remove(vm);
        }
        result
    }

    pub(super) fn begin_boot(&self, vm: &VmId, cancel: Cancel) {
        self.with(vm, |r| {
            r.boot = Some(cancel);
            (r.died, r.gives_up) = (None, false);
        });
    }

    pub(super) fn begin_stop(&self, vm: &VmId, grace: Cancel) {
        self.with(vm, |r| r.grace = Some(grace));
    }

    /// Forgets the boot or stop of an operation that releases the VM. Returns why the boot failed
    /// and which operation follows.
    pub(super) fn end(&self, vm: &VmId) -> (Option<BootEnd>, Option<Successor>) {
        self.with(vm, |r| {
            (r.boot, r.gives_up) = (None, false);
            r.grace = None;
            (r.died.take(), r.successor.take())
        })
    }

    pub(super) fn cancel_boot(&self, vm: &VmId, cause: CancelCause) {
        let token = self.with(vm, |r| r.boot.clone());
        if let Some(token) = token {
            token.cancel(cause);
        }
    }

    /// Cancels a boot that has failed and records why, unless the boot was cancelled earlier,
    /// because the earlier cause counts. Does nothing if the boot has given up. Returns false if no
    /// boot is in progress.
    pub(super) fn boot_died(&self, vm: &VmId, how: BootEnd) -> bool {
        let cause = how.cause();
        let (token, gives_up) = self.with(vm, |r| {
            if r.boot.as_ref().is_some_and(|boot| !boot.is_cancelled()) {
                r.died = Some(how);
            }
            (r.boot.clone(), r.gives_up)
        });
        // A token fires only once, so a boot that was cancelled earlier keeps its cause.
        gives_up || token.map(|token| token.cancel(cause)).is_some()
    }

    /// Forgets a boot that has failed and is about to kill its VMM, so that the end of the VMM is
    /// not recorded as the cause.
    pub(super) fn give_up_boot(&self, vm: &VmId) {
        self.with(vm, |r| (r.boot, r.gives_up) = (None, true));
    }

    pub(super) fn shorten_stop(&self, vm: &VmId) {
        let token = self.with(vm, |r| r.grace.clone());
        if let Some(token) = token {
            token.cancel(CancelCause::Forced);
        }
    }

    pub(super) fn set_keep(&self, vm: &VmId, keeps: bool) {
        self.with(vm, |r| r.keeps = keeps);
    }

    /// Returns true if the stop that has ended keeps a VM with `rm`. Resets the flag for later
    /// stops.
    pub(super) fn take_keep(&self, vm: &VmId) -> bool {
        self.with(vm, |r| std::mem::take(&mut r.keeps))
    }

    /// Returns the operation in the successor slot, with its verb.
    pub(super) fn successor(&self, vm: &VmId) -> Option<(Verb, OpId)> {
        self.with(vm, |r| {
            r.successor.as_ref().map(|s| (s.verb, s.op.id().clone()))
        })
    }

    /// Puts a successor in the slot and returns the replaced successor, if there was one.
    pub(super) fn set_successor(&self, vm: &VmId, successor: Successor) -> Option<Successor> {
        self.with(vm, |r| r.successor.replace(successor))
    }

    /// Returns the number of entries, which is 0 if no VM has anything in progress.
    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn len(&self) -> usize {
        self.map.lock().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_cancelled_together_and_leave_nothing() {
        let runtimes = Runtimes::new();
        let vm = VmId::random();
        let (a, b) = (Cancel::try_new().unwrap(), Cancel::try_new().unwrap());
        let users = [
            runtimes.join(&vm, Use::Session, a.clone()),
            runtimes.join(&vm, Use::Transfer, b.clone()),
        ];
        runtimes.cancel_users(&vm, &CancelCause::VmStopped);
        assert_eq!(
            (a.cause(), b.cause()),
            (Some(&CancelCause::VmStopped), Some(&CancelCause::VmStopped))
        );
        drop(users);
        assert_eq!(runtimes.len(), 0);
    }

    #[test]
    fn pause_ends_transfers_and_boots_but_not_sessions() {
        let runtimes = Runtimes::new();
        let vm = VmId::random();
        let token = || Cancel::try_new().unwrap();
        let (session, transfer, boot) = (token(), token(), token());
        let users = [
            runtimes.join(&vm, Use::Session, session.clone()),
            runtimes.join(&vm, Use::Transfer, transfer.clone()),
        ];
        runtimes.begin_boot(&vm, boot.clone());
        runtimes.set_paused(&vm, true);
        assert!(runtimes.is_paused(&vm));
        let full = Some(&CancelCause::HostDiskFull);
        assert_eq!(
            (session.cause(), transfer.cause(), boot.cause()),
            (None, full, full)
        );
        assert_eq!(runtimes.end(&vm).0, Some(BootEnd::HostDiskFull));
        drop(users);
        runtimes.set_paused(&vm, false);
        assert_eq!(runtimes.len(), 0);
    }
}
