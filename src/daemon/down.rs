//! The work of stop and delete operations.

use super::guest_scripts::Layout;
use super::lifecycle::{Claim, Lifecycle, Outcome};
use super::resources;
use super::transitions::Verb;
use crate::api::vm::{Init, Synced};
use crate::error::Result;
use crate::guest::io::VecSink;
use crate::guest::{ExecSpec, Streams};
use crate::image::CTRL_ALT_DEL_SINCE;
use crate::sched::Instant;
use crate::store::VmRow;
use crate::vmm::Identity;
use std::time::Duration;

const SYNCED: &[u8] = b"synced\n";
/// The shortest default timeout for an image's own init, which ends one service after the other.
const INIT_STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// How much of the shutdown command's output is kept.
const OUTPUT_BYTES_MAX: usize = 4096;

impl Lifecycle {
    /// Stops the VM. Unless the verb forces the stop, asks the guest to sync and shut down, and
    /// waits for it. Then ends the VMM, if it still runs, and releases the resources of the boot.
    pub(super) fn shut_down(&self, claim: &Claim) -> Outcome {
        let row = match self.core.row(&claim.vm) {
            Ok(row) => row,
            Err(e) => return Outcome::StillThere(e),
        };
        let Some(identity) = self.vmms.identity(&row) else {
            // The VMM has exited. If the first half of a restart ended it, the row records whether
            // the guest was synced.
            return match self.resources.release_boot(&row.id, row.generation) {
                Ok(()) => Outcome::Ended {
                    synced: row.synced.unwrap_or(Synced::No),
                },
                Err(e) => Outcome::StillThere(e),
            };
        };
        let synced = if matches!(claim.verb, Verb::StopForce | Verb::Kill) {
            Synced::No
        } else {
            self.shut_down_guest(claim, &row, &identity)
        };
        claim.op().progress("end the VMM");
        match self
            .vmms
            .kill_vmm(&identity)
            .and_then(|()| self.resources.release_boot(&row.id, row.generation))
        {
            Ok(()) => Outcome::Ended { synced },
            Err(e) => Outcome::StillThere(e),
        }
    }

    fn shut_down_guest(&self, claim: &Claim, row: &VmRow, identity: &Identity) -> Synced {
        if row.unresponsive {
            log::info!(
                "VM {} is not asked to shut down, because its VMM does not respond",
                row.name
            );
            return Synced::No;
        }
        if let Some(why) = self.recovery.recovery_note(&row.id) {
            log::warn!("VM {}: {why}", row.name);
            return Synced::No;
        }
        self.controls.resume_for_stop(row, identity);
        let timeout = claim.timeout.unwrap_or_else(|| {
            let usual = Duration::from_secs(self.core.limits.stop_timeout_s);
            match row.shape.init {
                Init::Fcd => usual,
                Init::Image => usual.max(INIT_STOP_TIMEOUT),
            }
        });
        let now = Instant::now();
        let deadline = now + timeout;
        let takes_key = row.guest_version >= CTRL_ALT_DEL_SINCE;
        claim.op().progress("sync and shut down the guest");
        let ssh_deadline = if takes_key {
            now + timeout / 2
        } else {
            deadline
        };
        if self.shut_down_over_ssh(claim, row, timeout, ssh_deadline) {
            let exited = self
                .vmm
                .processes()
                .wait_exit(identity, deadline, &claim.cancel);
            let has_exited = exited.unwrap_or_else(|e| {
                log::warn!("wait for the VMM of {}: {e}", row.name);
                false
            });
            // fcd's own init ends all processes and syncs within seconds. Under another init,
            // services keep writing until they have ended, even after the guest has reported that
            // it synced.
            return match row.shape.init {
                Init::Image if !has_exited => Synced::Timeout,
                _ => Synced::Yes,
            };
        }
        if takes_key && self.press_key(claim, row, identity, deadline) {
            Synced::Yes
        } else {
            Synced::Timeout
        }
    }

    /// Runs the shutdown command over SSH. Returns true once the guest has reported that its data
    /// is on its disks. The guest shuts down shortly afterwards, at the latest after `limit`.
    fn shut_down_over_ssh(
        &self,
        claim: &Claim,
        row: &VmRow,
        limit: Duration,
        deadline: Instant,
    ) -> bool {
        let mut output = VecSink::new(OUTPUT_BYTES_MAX);
        let asked = self.guests.script_target(row).and_then(|target| {
            let spec = ExecSpec {
                command: Layout::of(row).shutdown_command(limit),
                deadline: Some(deadline),
                ..ExecSpec::default()
            };
            let streams = Streams {
                stdout: Some(&mut output),
                ..Streams::default()
            };
            self.transport.exec(&target, &spec, streams, &claim.cancel)
        });
        // The shutdown breaks the connection, so an error does not matter if the guest reported
        // that it had synced.
        let is_synced = output.bytes.starts_with(SYNCED);
        if !is_synced {
            log::info!("VM {} did not sync when asked: {asked:?}", row.name);
        }
        is_synced
    }

    /// Presses Ctrl-Alt-Del, for a guest that cannot be reached over SSH: its init then syncs and
    /// shuts down. Returns true if the guest has shut down by the deadline. Returns false at once
    /// if the VM has no keyboard or the stop has been cut short.
    fn press_key(
        &self,
        claim: &Claim,
        row: &VmRow,
        identity: &Identity,
        deadline: Instant,
    ) -> bool {
        if claim.cancel.is_cancelled() {
            return false;
        }
        claim.op().progress("press Ctrl-Alt-Del");
        let capabilities = self.vmm.capabilities_of(identity);
        if !capabilities.is_some_and(|c| c.has_keyboard) {
            return false;
        }
        let pressed = self
            .vmms
            .vm(row, identity)
            .and_then(|vm| vm.press_ctrl_alt_del(&claim.cancel));
        let has_exited = pressed.and_then(|()| {
            self.vmm
                .processes()
                .wait_exit(identity, deadline, &claim.cancel)
        });
        has_exited.unwrap_or_else(|e| {
            log::warn!("press Ctrl-Alt-Del for VM {}: {e}", row.name);
            false
        })
    }

    /// Ends the VMM and removes the VM's files. The commit removes the row.
    pub(super) fn remove(&self, claim: &Claim) -> Outcome {
        match self.try_remove(claim) {
            Ok(()) => Outcome::Deleted,
            Err(e) => Outcome::StillThere(e),
        }
    }

    fn try_remove(&self, claim: &Claim) -> Result<()> {
        let row = self.core.row(&claim.vm)?;
        if let Some(identity) = self.vmms.identity(&row) {
            claim.op().progress("end the VMM");
            self.vmms.kill_vmm(&identity)?;
        }
        claim.op().progress("release its resources");
        self.resources.release_life(&row.id)?;
        // The directory may come from an earlier version, which had no ledger.
        resources::forget_directory(&self.resources, &row)
    }
}
