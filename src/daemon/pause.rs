//! Pause and resume: a member of the running VM's row, no state. The row says first how it should
//! be, then the driver is told, until what it was told last is what the row says: of two callers
//! the later one wins, whichever driver's answer comes last.

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
    /// The guest's vCPUs stand still, and its memory stays. So already: ok.
    pub fn pause_vm(&self, caller: &Caller, vm: &str) -> Result<Vm> {
        self.set_wanted(caller, vm, true)
    }

    pub fn resume_vm(&self, caller: &Caller, vm: &str) -> Result<Vm> {
        self.set_wanted(caller, vm, false)
    }

    fn set_wanted(&self, caller: &Caller, vm: &str, is_paused: bool) -> Result<Vm> {
        let row = self.core.resolve(caller, vm)?;
        self.looks.ensure_looked_at(&row, Verb::Guest, &self.core.closing)?;
        let (row, ticket) = {
            let guard = self.core.locks.vm.lock(&row.id);
            let row = self.core.row(guard.key())?;
            self.core.allow_locked(&guard, &row, Verb::Guest)?;
            if row.unresponsive {
                return Err(Error::new(Kind::GuestUnavailable, format!("vm {}: its vmm does not answer", row.name))
                    .hint(format!("wait until it does (fcctl events), or end it: fcctl stop --force {}", row.name)));
            }
            let ((), ticket) = self.core.change(false, |tx| tx.update_vm(&guard, |r| r.paused = is_paused))?;
            (row, ticket)
        };
        self.core.wait_durable(ticket)?;
        if let Err(e) = self.apply_pause(&row.id, row.generation) {
            self.take_back(&row, is_paused);
            return Err(e.context(format!("{} vm {}", if is_paused { "pause" } else { "resume" }, row.name)));
        }
        self.views.view(&row.id)
    }

    /// The driver did not do it: the row says so again, unless somebody has said otherwise since.
    fn take_back(&self, before: &VmRow, wanted: bool) {
        let undone = self.core.change_row(&before.id, true, |r| {
            if r.generation == before.generation && r.paused == wanted {
                r.paused = before.paused;
            }
        });
        if let Err(e) = undone.map(Ticket::detach) {
            log::warn!("take back that vm {} was to be paused: {e}", before.name);
        }
    }

    /// Tells the driver what the row says, and looks whether that is still what it says. A guest
    /// for which the host has no room stands still whatever its owner wants.
    ///
    /// Nothing is done while it is held: who holds it does this when it lets go.
    pub(super) fn apply_pause(&self, vm: &VmId, generation: u64) -> Result<()> {
        if self.runtimes.is_held(vm) {
            return Ok(());
        }
        self.apply_pause_by(vm, generation, &self.core.closing)
    }

    pub(super) fn apply_pause_by(&self, vm: &VmId, generation: u64, cancel: &Cancel) -> Result<()> {
        let mut told = None;
        loop {
            let row = self.core.row(vm)?;
            let (true, Some(identity)) = (row.generation == generation && row.state == VmState::Running, &row.identity) else {
                // A stop has begun meanwhile: the guest must run, so that it can shut down.
                if told == Some(true) && row.generation == generation {
                    row.identity.as_ref().map_or(Ok(()), |i| self.vmm.set_paused(&self.core.vm_dir(vm), i, false, cancel))?;
                }
                return Ok(());
            };
            let wanted = row.paused || self.runtimes.is_paused(vm) || self.runtimes.is_held(vm);
            if told == Some(wanted) {
                return Ok(());
            }
            self.vmm.set_paused(&self.core.vm_dir(vm), identity, wanted, cancel)?;
            told = Some(wanted);
        }
    }

    /// A daemon may have died between the row and the driver. Guests on snapshots are let go by who
    /// looks after their room.
    pub(super) fn adopt_pause(&self, row: &VmRow) {
        if !row.paused && self.specs.disk_method(row) == Some(Method::DmSnapshot) {
            return;
        }
        if let Err(e) = self.apply_pause(&row.id, row.generation) {
            log::warn!("pause or resume vm {}: {e}", row.name);
        }
    }

    /// A guest that is to shut down must run.
    pub(super) fn wake_for_stop(&self, row: &VmRow, identity: &crate::vmm::Identity) {
        // One for which the host has no room would lose its disk.
        if !(row.paused || self.runtimes.is_held(&row.id)) || self.runtimes.is_paused(&row.id) {
            return;
        }
        if let Err(e) = self.vmm.set_paused(&self.core.vm_dir(&row.id), identity, false, &self.core.closing) {
            log::warn!("let vm {} go on, so that it can shut down: {e}", row.name);
        }
    }
}
