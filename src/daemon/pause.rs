//! Pauses and resumes VMs. Paused is a member of the running VM's row, not a state. The row is
//! changed first. Then the driver is called until the guest matches the row. So if two callers
//! change the row at once, the later change wins, regardless of the order in which the driver
//! answers.

use super::access::Caller;
use super::controls::Controls;
use super::transitions::Verb;
use crate::api::vm::{Vm, VmState};
use crate::disk::Method;
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::locks::Cancel;
use crate::store::{Ticket, VmRow};

impl Controls {
    /// Stops the guest's vCPUs and keeps its memory. Succeeds if the VM is paused already.
    pub fn pause_vm(&self, caller: &Caller, vm: &str) -> Result<Vm> {
        self.set_wanted(caller, vm, true)
    }

    pub fn resume_vm(&self, caller: &Caller, vm: &str) -> Result<Vm> {
        self.set_wanted(caller, vm, false)
    }

    fn set_wanted(&self, caller: &Caller, vm: &str, is_paused: bool) -> Result<Vm> {
        let row = self.core.resolve(caller, vm)?;
        self.unreconciled
            .ensure_reconciled(&row, Verb::Guest, &self.core.closing)?;
        let (row, ticket) = {
            let guard = self.core.locks.vm.lock(&row.id);
            let row = self.core.row(guard.key())?;
            self.core.allow_locked(&guard, &row, Verb::Guest)?;
            if row.unresponsive {
                return Err(Error::new(
                    Kind::GuestUnavailable,
                    format!("VM {}: its VMM does not respond", row.name),
                )
                .hint(format!(
                    "wait until it responds (fcctl events), or run fcctl stop --force {}",
                    row.name
                )));
            }
            let ((), ticket) = self
                .core
                .change(false, |tx| tx.update_vm(&guard, |r| r.paused = is_paused))?;
            (row, ticket)
        };
        self.core.wait_durable(ticket)?;
        if let Err(e) = self.apply_pause(&row.id, row.generation) {
            self.undo_pause(&row, is_paused);
            return Err(e.context(format!(
                "{} VM {}",
                if is_paused { "pause" } else { "resume" },
                row.name
            )));
        }
        self.views.view(&row.id)
    }

    /// Restores the row after the driver failed, unless the row has been changed again since.
    fn undo_pause(&self, before: &VmRow, wanted: bool) {
        let undone = self.core.change_row(&before.id, true, |r| {
            if r.generation == before.generation && r.paused == wanted {
                r.paused = before.paused;
            }
        });
        if let Err(e) = undone.map(Ticket::detach) {
            log::warn!("undo the pause of VM {}: {e}", before.name);
        }
    }

    /// Calls the driver until the guest matches the row. A guest is also paused while the host has
    /// no room for its disk.
    ///
    /// Does nothing while a save holds the guest, because the save applies the row when it releases
    /// the guest.
    pub(super) fn apply_pause(&self, vm: &VmId, generation: u64) -> Result<()> {
        if self.runtimes.is_held(vm) {
            return Ok(());
        }
        self.apply_pause_by(vm, generation, &self.core.closing)
    }

    pub(super) fn apply_pause_by(&self, vm: &VmId, generation: u64, cancel: &Cancel) -> Result<()> {
        let mut applied = None;
        loop {
            let row = self.core.row(vm)?;
            let (true, Some(identity)) = (
                row.generation == generation && row.state == VmState::Running,
                &row.identity,
            ) else {
                // If a stop has begun since the driver paused the guest, the guest must run so that
                // it can shut down.
                if applied == Some(true) && row.generation == generation {
                    row.identity
                        .as_ref()
                        .map_or(Ok(()), |i| self.vmms.vm(&row, i)?.resume(cancel))?;
                }
                return Ok(());
            };
            let wanted = row.paused || self.runtimes.is_paused(vm) || self.runtimes.is_held(vm);
            if applied == Some(wanted) {
                return Ok(());
            }
            let running = self.vmms.vm(&row, identity)?;
            if wanted {
                running.pause(cancel)?;
            } else {
                running.resume(cancel)?;
            }
            applied = Some(wanted);
        }
    }

    /// Applies the row to an adopted VM, because the earlier daemon may have died before it called
    /// the driver. Guests on device-mapper snapshots are resumed by the space monitor (`room.rs`).
    pub(super) fn adopt_pause(&self, row: &VmRow) {
        if !row.paused && self.specs.disk_method(row) == Some(Method::DmSnapshot) {
            return;
        }
        if let Err(e) = self.apply_pause(&row.id, row.generation) {
            log::warn!("pause or resume VM {}: {e}", row.name);
        }
    }

    /// Resumes a guest that is paused on request or for a save, so that it can shut down.
    pub(super) fn resume_for_stop(&self, row: &VmRow, identity: &crate::vmm::Identity) {
        // A guest that is paused because the host has no room stays paused, because it would lose
        // its disk if it ran.
        if !(row.paused || self.runtimes.is_held(&row.id)) || self.runtimes.is_paused(&row.id) {
            return;
        }
        let resumed = self
            .vmms
            .vm(row, identity)
            .and_then(|vm| vm.resume(&self.core.closing));
        if let Err(e) = resumed {
            log::warn!("resume VM {} so that it can shut down: {e}", row.name);
        }
    }
}
