//! Tracks the transfers and sessions that use a guest, so that a stop of its VM can cancel them.

use super::Runtimes;
use crate::ids::VmId;
use crate::locks::{Cancel, CancelCause};

/// How a guest is being used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// A command or a connection. It continues when a paused guest is resumed.
    Session,
    Transfer,
    /// The daemon watches something in the guest.
    Watch,
}

/// A transfer or session in a VM's cancel set. It leaves the set when this is dropped.
pub(crate) struct User {
    runtimes: Runtimes,
    vm: VmId,
    id: u64,
}

impl Drop for User {
    fn drop(&mut self) {
        self.runtimes.with(&self.vm, |r| {
            r.users.remove(&self.id);
        });
    }
}

impl Runtimes {
    /// Adds a session or transfer to the VM's cancel set. Call this with the VM's lock held, after
    /// checking the VM's state.
    pub(crate) fn join(&self, vm: &VmId, kind: Use, cancel: Cancel) -> User {
        let id = self.with(vm, |r| {
            r.next_user += 1;
            r.users.insert(r.next_user, (kind, cancel));
            r.next_user
        });
        User {
            runtimes: self.clone(),
            vm: vm.clone(),
            id,
        }
    }

    /// Cancels every transfer and session of the VM.
    pub(crate) fn cancel_users(&self, vm: &VmId, cause: &CancelCause) {
        // The newest user is cancelled first, because a user that waits for an older user must be
        // cancelled before its turn comes.
        let tokens: Vec<_> = self.with(vm, |r| {
            r.users
                .values()
                .rev()
                .map(|(_, token)| token.clone())
                .collect()
        });
        for token in tokens {
            token.cancel(cause.clone());
        }
    }

    /// Cancels the daemon's own watches of guests. A closing daemon lets transfers finish, but need
    /// not wait for that.
    pub(crate) fn cancel_watches(&self, cause: &CancelCause) {
        let tokens: Vec<Cancel> = {
            let map = self.map.lock();
            map.values()
                .flat_map(|r| r.users.values())
                .filter(|(kind, _)| *kind == Use::Watch)
                .map(|(_, token)| token.clone())
                .collect()
        };
        for token in tokens {
            token.cancel(cause.clone());
        }
    }

    /// Cancels every transfer, session and boot of every VM.
    pub(crate) fn cancel_everything(&self, cause: &CancelCause) {
        let tokens: Vec<_> = {
            let map = self.map.lock();
            map.values()
                .flat_map(|r| {
                    r.users
                        .values()
                        .map(|(_, token)| token)
                        .chain(&r.boot)
                        .cloned()
                        .collect::<Vec<_>>()
                })
                .collect()
        };
        for token in tokens {
            token.cancel(cause.clone());
        }
    }
}
