//! Lets one call at a time change the ports of a VM. A claim is not a lock: a call holds it while
//! it talks to the VMM or to the host's packet filter, and no lifecycle operation waits for it.

use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::locks::{Cancel, Condvar, Mutex, Rank, Waited};
use crate::sched::{HashSet, Instant};
use crate::store::VmRow;
use std::time::Duration;

/// How long a call waits for another call that changes the ports of the same VM.
const CLAIM_DEADLINE: Duration = Duration::from_secs(30);

/// The VMs whose ports a call is changing.
pub(super) struct PortClaims {
    claimed: Mutex<HashSet<VmId>>,
    freed: Condvar,
}

/// The right to change the ports of a VM. It ends when this is dropped.
pub(super) struct PortClaim<'a> {
    claims: &'a PortClaims,
    vm: VmId,
}

impl Drop for PortClaim<'_> {
    fn drop(&mut self) {
        self.claims.claimed.lock().remove(&self.vm);
        self.claims.freed.notify_all();
    }
}

impl PortClaims {
    pub(super) fn new() -> Self {
        Self {
            claimed: Mutex::new(Rank::Runtimes, HashSet::default()),
            freed: Condvar::new(),
        }
    }

    /// Waits until no other call changes the VM's ports.
    ///
    /// # Errors
    /// `busy` at the deadline, `shutting_down` if `closing` fires.
    pub(super) fn claim(&self, row: &VmRow, closing: &Cancel) -> Result<PortClaim<'_>> {
        let deadline = Instant::now() + CLAIM_DEADLINE;
        let mut claimed = self.claimed.lock();
        let waited =
            self.freed
                .wait_while_cancellable(&mut claimed, deadline, closing, |claimed| {
                    claimed.contains(&row.id)
                });
        match waited {
            Waited::Done => {
                claimed.insert(row.id.clone());
                Ok(self.claimed_by_caller(&row.id))
            }
            Waited::Cancelled => Err(Error::new(
                Kind::ShuttingDown,
                "the daemon is shutting down",
            )),
            Waited::TimedOut => {
                let text = format!("another call is changing the ports of VM {}", row.name);
                Err(Error::new(Kind::Busy, text).hint("try again in a moment"))
            }
        }
    }

    /// Returns `None` if a call is changing the VM's ports.
    pub(super) fn try_claim(&self, vm: &VmId) -> Option<PortClaim<'_>> {
        let is_free = self.claimed.lock().insert(vm.clone());
        is_free.then(|| self.claimed_by_caller(vm))
    }

    fn claimed_by_caller(&self, vm: &VmId) -> PortClaim<'_> {
        PortClaim {
            claims: self,
            vm: vm.clone(),
        }
    }
}
