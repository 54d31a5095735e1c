//! Pauses guests while they are saved.

use super::controls::Controls;
use super::core::Core;
use super::runtime::Runtimes;
use super::vmms::Vmms;
use crate::api::vm::VmState;
use crate::error::{Error, Result};
use crate::ids::VmId;
use crate::locks::Cancel;
use crate::store::VmRow;
use std::time::Duration;

/// How long to pause between two attempts to resume a guest.
const RESUME_PERIOD: Duration = Duration::from_millis(250);

/// Keeps a guest paused while it is saved. When this is dropped, the guest resumes unless its owner
/// has paused it.
pub(super) struct HoldGuard {
    holder: GuestHolder,
    vm: VmId,
    generation: u64,
}

impl Drop for HoldGuard {
    fn drop(&mut self) {
        self.holder.runtimes.hold(&self.vm, false);
        let Err(e) = self.holder.resume(&self.vm, self.generation) else {
            return;
        };
        log::warn!("resume VM {}: {e}; retrying", self.vm);
        let (holder, vm, generation) = (self.holder.clone(), self.vm.clone(), self.generation);
        let retried = self.holder.core.spawn(&format!("resume-{vm}"), move || {
            // The loop ends when the guest has resumed or its VMM has exited. If the daemon closes
            // first, the next daemon resumes the guest.
            while holder.vmm_is_alive(&vm, generation) && holder.resume(&vm, generation).is_err() {
                if holder.core.sleep(RESUME_PERIOD) {
                    return;
                }
            }
        });
        if let Err(e) = retried {
            log::error!("resume VM {}: {e}", self.vm);
        }
    }
}

/// Pauses guests while they are saved. Afterwards, resumes each guest unless its owner has paused
/// it.
#[derive(Clone)]
pub(super) struct GuestHolder {
    pub core: Core,
    pub controls: Controls,
    pub vmms: Vmms,
    pub runtimes: Runtimes,
}

impl GuestHolder {
    /// Pauses the guest until the guard is dropped, even if its owner asks to resume it.
    pub(super) fn hold(&self, row: &VmRow) -> Result<HoldGuard> {
        let held = HoldGuard {
            holder: self.clone(),
            vm: row.id.clone(),
            generation: row.generation,
        };
        self.runtimes.hold(&row.id, true);
        self.controls
            .apply_pause_by(&row.id, row.generation, &self.core.closing)?;
        Ok(held)
    }

    /// Pauses or resumes the guest, as its owner last requested. Always resumes a guest that must
    /// shut down.
    fn resume(&self, vm: &VmId, generation: u64) -> Result<()> {
        // This also runs while the daemon closes, because the guest must not stay paused until the
        // next daemon starts.
        let never = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        let row = self.core.row(vm)?;
        match &row.identity {
            Some(identity)
                if row.generation == generation
                    && row.state == VmState::Stopping
                    && !self.runtimes.is_paused(vm) =>
            {
                self.vmms.vm(&row, identity)?.resume(&never)
            }
            _ => self.controls.apply_pause_by(vm, generation, &never),
        }
    }

    fn vmm_is_alive(&self, vm: &VmId, generation: u64) -> bool {
        self.core
            .row(vm)
            .is_ok_and(|row| row.generation == generation && self.vmms.identity(&row).is_some())
    }
}
