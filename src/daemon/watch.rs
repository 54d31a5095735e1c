//! A VMM that dies by itself: the row says so, whoever used the guest hears it.

use super::access::Caller;
use super::lifecycle::{Lifecycle, LifecycleRequest};
use super::runtime::BootEnd;
use super::transitions::Verb;
use crate::api::vm::VmState;
use crate::error::Result;
use crate::ids::VmId;
use crate::locks::CancelCause;
use crate::store::VmRow;
use crate::vmm::{End, GuestEvent, Identity};
use std::time::Duration;

/// Between two tries to write it down.
const RETRY_PERIOD: Duration = Duration::from_millis(250);

impl Lifecycle {
    /// From now on the death of this VMM is seen.
    pub(super) fn watch(&self, row: &VmRow, identity: &Identity) -> Result<()> {
        let (lifecycle, vm, generation) = (self.clone(), row.id.clone(), row.generation);
        let report = Box::new(move |event| match event {
            GuestEvent::Paused(is_paused) => lifecycle.runtimes.set_paused(&vm, is_paused),
            GuestEvent::Answered => lifecycle.recovery.adopter.adoptions.note_answer(&vm),
            GuestEvent::Unresponsive(is_so) => lifecycle.vmm_answers(&vm, generation, !is_so),
        });
        self.vmm.watch_guest(&self.core.vm_dir(&row.id), identity, report)?;
        self.watch_end(row, identity)
    }

    /// The same without a word from the VMM or to it.
    pub(super) fn watch_end(&self, row: &VmRow, identity: &Identity) -> Result<()> {
        let (lifecycle, vm, generation) = (self.clone(), row.id.clone(), row.generation);
        self.vmm.watch(
            &self.core.vm_dir(&row.id),
            identity,
            Box::new(move |end| {
                // The driver's thread must not wait for a lock or a disk.
                let inner = lifecycle.clone();
                if let Err(e) = lifecycle.core.spawn(&format!("died-{vm}"), move || inner.vmm_died(&vm, generation, &end)) {
                    log::error!("a vmm died and nobody could look: {e}");
                }
            }),
        )
    }

    /// The driver's thread must not wait for a lock or a disk.
    fn vmm_answers(&self, vm: &VmId, generation: u64, answers: bool) {
        let (lifecycle, vm) = (self.clone(), vm.clone());
        let noted = self.core.spawn(&format!("answers-{vm}"), move || {
            if let Err(e) = lifecycle.record_answers(&vm, generation, answers) {
                log::warn!("record whether the vmm of {vm} answers: {e}");
            }
        });
        if let Err(e) = noted {
            log::error!("a vmm answers or does not, and nobody could look: {e}");
        }
    }

    fn record_answers(&self, vm: &VmId, generation: u64, answers: bool) -> Result<()> {
        let guard = self.core.locks.vm.lock(vm);
        let Some(row) = self.core.store.read(|s| s.vm(vm).map(|r| (**r).clone())) else { return Ok(()) };
        // One that is being saved answers when that is done.
        let is_saved = !answers && self.runtimes.is_held(vm);
        if is_saved || row.generation != generation || row.state != VmState::Running || row.unresponsive != answers {
            return Ok(());
        }
        let ((), ticket) = self.core.change(true, |tx| tx.update_vm(&guard, |r| r.unresponsive = !answers))?;
        drop(guard);
        log::warn!("the VMM of VM {} {}", row.name, if answers { "answers again" } else { "does not answer" });
        self.core.wait_durable(ticket)?;
        if answers { self.looks.adopt_late(&row) } else { Ok(()) }
    }

    fn vmm_died(&self, vm: &VmId, generation: u64, end: &End) {
        let _label = crate::locks::operation_scope(format!("vmm died {vm}"));
        let row = self.core.row(vm).ok().filter(|row| end.is_unseen() && row.generation == generation);
        let by_disk = row.and_then(|row| self.vmms.unseen_end(&row));
        let end = by_disk.as_ref().unwrap_or(end);
        loop {
            match self.record_death(vm, generation, end) {
                Ok(rm) => {
                    if rm {
                        self.delete_unasked(vm);
                    }
                    return;
                }
                Err(e) => log::warn!("record the death of the vmm of {vm}: {e}"),
            }
            if self.core.sleep(RETRY_PERIOD) {
                return;
            }
        }
    }

    /// Whether the VM is to be deleted now.
    fn record_death(&self, vm: &VmId, generation: u64, end: &End) -> Result<bool> {
        let guard = self.core.locks.vm.lock(vm);
        let Some(row) = self.core.store.read(|s| s.vm(vm).map(|r| (**r).clone())) else { return Ok(false) };
        if row.generation != generation {
            return Ok(false);
        }
        match row.state {
            VmState::Starting => {
                self.runtimes.boot_died(guard.key(), BootEnd::VmmDied(end.clone()));
                return Ok(false);
            }
            VmState::Running => {}
            // A stop or a delete is under way and expects it.
            _ => return Ok(false),
        }
        let state = if end.is_orderly() { VmState::Stopped } else { VmState::Failed };
        let (rm, reason, cause) = (row.rm, end.to_string(), CancelCause::VmmEnded(end.to_string()));
        let ((), ticket) = self.core.change(true, |tx| {
            tx.update_vm(&guard, |row| {
                (row.state, row.reason) = (state, Some(reason));
                (row.identity, row.ssh_addr) = (None, None);
            })
        })?;
        self.core.note(&row, Some(ticket.seq()), None, || super::history::What::Died { state });
        self.runtimes.cancel_users(guard.key(), &cause);
        drop(guard);
        self.core.wait_durable(ticket)?;
        // The VMM has exited: what it had may be used again. What fails is tried again by the next
        // sweep.
        if let Err(e) = self.resources.release_boot(vm, generation) {
            log::warn!("clean up after the vmm of {vm}: {e}");
        }
        Ok(rm)
    }

    /// Deletes an `rm` VM on the daemon's own account. Somebody else may be at it already.
    pub(super) fn delete_unasked(&self, vm: &VmId) {
        let root = Caller { uid: 0, gid: 0, pid: 0 };
        let ask = LifecycleRequest { verb: Verb::DeleteForce, method: "vm.delete", timeout: None, restore: None };
        if let Err(e) = self.request(&root, vm.as_str(), &ask) {
            log::info!("delete {vm}, which was to be removed: {e}");
        }
    }
}
