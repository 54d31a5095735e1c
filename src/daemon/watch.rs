//! Watches VMMs. If a VMM dies without a request, the row records its death and the users of the
//! guest are cancelled. The watch also records when a VMM stops responding and when it responds
//! again.

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

/// How long to pause between two attempts to record a death.
const RETRY_PERIOD: Duration = Duration::from_millis(250);

/// The result of an attempt to record a death.
enum Death {
    /// The death is recorded, or needs no record. `rm` is true if the VM must be deleted now.
    Recorded { rm: bool },
    /// The boot has ended, but the row does not say how yet. It has given up, or the store has
    /// refused its commit, which it makes again.
    Unsettled,
}

impl Lifecycle {
    /// Begins to watch a VMM: its exit, whether it answers, and whether it has paused the guest.
    pub(super) fn watch(&self, row: &VmRow, identity: &Identity) -> Result<()> {
        let (lifecycle, vm, generation) = (self.clone(), row.id.clone(), row.generation);
        let report = Box::new(move |event| match event {
            GuestEvent::Paused(is_paused) => lifecycle.runtimes.set_paused(&vm, is_paused),
            GuestEvent::Answered => lifecycle.recovery.adopter.adoptions.note_answer(&vm),
            GuestEvent::Unresponsive(is_unresponsive) => {
                lifecycle.set_responsive(&vm, generation, !is_unresponsive)
            }
        });
        self.vmm
            .watch_guest(&self.core.vm_dir(&row.id), identity, report)?;
        self.watch_end(row, identity)
    }

    /// Begins to watch only for the VMM's exit, without talking to it.
    pub(super) fn watch_end(&self, row: &VmRow, identity: &Identity) -> Result<()> {
        let (lifecycle, vm, generation) = (self.clone(), row.id.clone(), row.generation);
        self.vmm.processes().watch(
            &self.core.vm_dir(&row.id),
            identity,
            Box::new(move |end| {
                // The driver's thread must not wait for a lock or a disk.
                let inner = lifecycle.clone();
                if let Err(e) = lifecycle.core.spawn(&format!("died-{vm}"), move || {
                    inner.vmm_died(&vm, generation, &end)
                }) {
                    log::error!("start a thread for the death of a VMM: {e}");
                }
            }),
        )
    }

    /// Watches a VM's VMM again if the row says `running` and the VMM has exited. While a stop or a
    /// delete that the store has undone was in progress, its death was not recorded.
    pub(super) fn report_missed_death(&self, vm: &VmId) {
        let row = self.core.row(vm).ok();
        let running = row.filter(|row| row.state == VmState::Running);
        let Some((row, identity)) = running.and_then(|row| {
            let identity = row.identity.clone()?;
            Some((row, identity))
        }) else {
            return;
        };
        if !self.vmm.processes().is_alive(&identity)
            && let Err(e) = self.watch_end(&row, &identity)
        {
            log::warn!("record the death of the VMM of VM {vm}: {e}");
        }
    }

    /// Records on another thread whether the VMM responds.
    fn set_responsive(&self, vm: &VmId, generation: u64, responds: bool) {
        let (lifecycle, vm) = (self.clone(), vm.clone());
        let started = self.core.spawn(&format!("responsive-{vm}"), move || {
            if let Err(e) = lifecycle.record_responsive(&vm, generation, responds) {
                log::warn!("record whether the VMM of VM {vm} responds: {e}");
            }
        });
        if let Err(e) = started {
            log::error!("start a thread to record whether a VMM responds: {e}");
        }
    }

    fn record_responsive(&self, vm: &VmId, generation: u64, responds: bool) -> Result<()> {
        let guard = self.core.locks.vm.lock(vm);
        let Some(row) = self.core.store.read(|s| s.vm(vm).map(|r| (**r).clone())) else {
            return Ok(());
        };
        // A VMM cannot respond while it saves its guest.
        let is_saved = !responds && self.runtimes.is_held(vm);
        if is_saved
            || row.generation != generation
            || row.state != VmState::Running
            || row.unresponsive != responds
        {
            return Ok(());
        }
        let ((), ticket) = self.core.change(true, |tx| {
            tx.update_vm(&guard, |r| r.unresponsive = !responds)
        })?;
        drop(guard);
        log::warn!(
            "the VMM of VM {} {}",
            row.name,
            if responds {
                "responds again"
            } else {
                "does not respond"
            }
        );
        self.core.wait_durable(ticket)?;
        if responds {
            self.unreconciled.adopt_late(&row)
        } else {
            Ok(())
        }
    }

    fn vmm_died(&self, vm: &VmId, generation: u64, end: &End) {
        let _label = crate::locks::operation_scope(format!("VMM died {vm}"));
        let row = self
            .core
            .row(vm)
            .ok()
            .filter(|row| end.is_unseen() && row.generation == generation);
        let by_disk = row.and_then(|row| self.vmms.unseen_end(&row));
        let end = by_disk.as_ref().unwrap_or(end);
        loop {
            match self.record_death(vm, generation, end) {
                Ok(Death::Recorded { rm }) => {
                    if rm {
                        self.delete_unasked(vm);
                    }
                    return;
                }
                Ok(Death::Unsettled) => {}
                Err(e) => log::warn!("record the death of the VMM of VM {vm}: {e}"),
            }
            if self.core.sleep(RETRY_PERIOD) {
                return;
            }
        }
    }

    /// Records the death, unless it belongs to an earlier boot or an operation in progress expects
    /// it. The death of a booting VMM is recorded for the boot.
    fn record_death(&self, vm: &VmId, generation: u64, end: &End) -> Result<Death> {
        let expected = Ok(Death::Recorded { rm: false });
        let guard = self.core.locks.vm.lock(vm);
        let Some(row) = self.core.store.read(|s| s.vm(vm).map(|r| (**r).clone())) else {
            return expected;
        };
        if row.generation != generation {
            return expected;
        }
        match row.state {
            VmState::Starting => {
                let died = BootEnd::VmmDied(end.clone());
                return if self.runtimes.boot_died(guard.key(), died) {
                    expected
                } else {
                    Ok(Death::Unsettled)
                };
            }
            VmState::Running => {}
            // A stop or delete is in progress and expects the death.
            _ => return expected,
        }
        let state = if end.is_orderly() {
            VmState::Stopped
        } else {
            VmState::Failed
        };
        let (rm, reason, cause) = (
            row.rm,
            end.to_string(),
            CancelCause::VmmEnded(end.to_string()),
        );
        let ((), ticket) = self.core.change(true, |tx| {
            tx.update_vm(&guard, |row| {
                (row.state, row.reason) = (state, Some(reason));
                (row.identity, row.ssh_addr) = (None, None);
                row.forget_listeners();
            })
        })?;
        self.core.note(&row, Some(ticket.seq()), None, || {
            super::history::What::Died { state }
        });
        self.runtimes.cancel_users(guard.key(), &cause);
        drop(guard);
        self.core.wait_durable(ticket)?;
        // The VMM has exited, so its resources can be released. The next sweep retries what fails.
        if let Err(e) = self.resources.release_boot(vm, generation) {
            log::warn!("clean up after the VMM of VM {vm}: {e}");
        }
        Ok(Death::Recorded { rm })
    }

    /// Begins to delete an `rm` VM without a request of a user. An error is only logged, because
    /// another operation may already be deleting the VM.
    pub(super) fn delete_unasked(&self, vm: &VmId) {
        if let Err(e) = self.request_unasked(vm, Verb::DeleteForce, "vm.delete") {
            log::info!("delete VM {vm}, which is marked for deletion: {e}");
        }
    }

    /// Begins to start a VM that a reboot of the host has ended, as its owner wanted. An error is
    /// only logged, because a user may have claimed the VM in the meantime.
    pub(super) fn start_unasked(&self, vm: &VmId) {
        match self.request_unasked(vm, Verb::Start, "vm.start") {
            Ok(()) => log::info!("VM {vm} starts again, because the host was rebooted"),
            Err(e) => log::warn!("start VM {vm} again after the host's reboot: {e}"),
        }
    }

    fn request_unasked(&self, vm: &VmId, verb: Verb, method: &'static str) -> Result<()> {
        let root = Caller {
            uid: 0,
            gid: 0,
            pid: 0,
        };
        let request = LifecycleRequest {
            verb,
            method,
            timeout: None,
            restore: None,
        };
        self.request(&root, vm.as_str(), &request).map(drop)
    }
}
