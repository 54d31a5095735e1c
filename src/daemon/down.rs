//! The work of a stop and of a delete.

use super::lifecycle::{Claim, Lifecycle, Outcome};
use super::resources;
use super::transitions::Verb;
use crate::api::vm::Synced;
use crate::error::Result;
use crate::guest::io::VecSink;
use crate::guest::{ExecSpec, Streams};
use crate::image::{CTRL_ALT_DEL_SINCE, SHUTDOWN_COMMAND};
use crate::store::VmRow;
use crate::vmm::Identity;
use std::time::{Duration, Instant};

const SYNCED: &[u8] = b"synced\n";
/// Most of what the shutdown command may print.
const OUTPUT_BYTES_MAX: usize = 4096;

impl Lifecycle {
    /// Asks the guest to sync and to go, waits for it, and ends the VMM when it has not gone in
    /// time.
    pub(super) fn shut_down(&self, claim: &Claim) -> Outcome {
        let row = match self.core.row(&claim.vm) {
            Ok(row) => row,
            Err(e) => return Outcome::StillThere(e),
        };
        let Some(identity) = self.vmms.identity(&row) else {
            // A restart's first half may have ended it already, and says how.
            return match self.resources.release_boot(&row.id, row.generation) {
                Ok(()) => Outcome::Ended { synced: row.synced.unwrap_or(Synced::No) },
                Err(e) => Outcome::StillThere(e),
            };
        };
        let synced =
            if matches!(claim.verb, Verb::StopForce | Verb::Kill) { Synced::No } else { self.ask_to_go(claim, &row, &identity) };
        claim.op().progress("end the vmm");
        match self.vmms.kill_vmm(&identity).and_then(|()| self.resources.release_boot(&row.id, row.generation)) {
            Ok(()) => Outcome::Ended { synced },
            Err(e) => Outcome::StillThere(e),
        }
    }

    fn ask_to_go(&self, claim: &Claim, row: &VmRow, identity: &Identity) -> Synced {
        if row.unresponsive {
            log::info!("vm {} is not asked to shut down: its vmm does not answer", row.name);
            return Synced::No;
        }
        if let Some(why) = self.recovery.recovery_note(&row.id) {
            log::warn!("VM {}: {why}", row.name);
            return Synced::No;
        }
        self.controls.wake_for_stop(row, identity);
        let timeout = claim.timeout.unwrap_or(Duration::from_secs(self.core.limits.stop_timeout_s));
        let now = Instant::now();
        let deadline = now + timeout;
        let takes_key = row.guest_version >= CTRL_ALT_DEL_SINCE;
        claim.op().progress("sync and shut down the guest");
        if self.tell_to_go(claim, row, if takes_key { now + timeout / 2 } else { deadline }) {
            if let Err(e) = self.vmm.wait_exit(identity, deadline, &claim.cancel) {
                log::warn!("wait for the vmm of {}: {e}", row.name);
            }
            return Synced::Yes;
        }
        if takes_key && self.press_key(claim, row, identity, deadline) { Synced::Yes } else { Synced::Timeout }
    }

    /// Over SSH. True once the guest has said that its data is on its disks; it goes a moment
    /// later.
    fn tell_to_go(&self, claim: &Claim, row: &VmRow, deadline: Instant) -> bool {
        let mut said = VecSink::new(OUTPUT_BYTES_MAX);
        let asked = self.guests.target(row).and_then(|target| {
            let spec = ExecSpec { command: SHUTDOWN_COMMAND.to_owned(), deadline: Some(deadline), ..ExecSpec::default() };
            let streams = Streams { stdout: Some(&mut said), ..Streams::default() };
            self.transport.exec(&target, &spec, streams, &claim.cancel)
        });
        // The connection breaks under the shutdown; what the guest had said until then counts.
        let is_synced = said.bytes.starts_with(SYNCED);
        if !is_synced {
            log::info!("vm {} did not sync when it was asked to: {asked:?}", row.name);
        }
        is_synced
    }

    /// For a guest that is not reached over SSH: its init syncs and goes at Ctrl-Alt-Del. True once
    /// it has gone by itself.
    fn press_key(&self, claim: &Claim, row: &VmRow, identity: &Identity, deadline: Instant) -> bool {
        if claim.cancel.is_cancelled() {
            return false;
        }
        claim.op().progress("press Ctrl-Alt-Del");
        let gone = match self.vmm.press_ctrl_alt_del(identity, &claim.cancel) {
            Ok(true) => self.vmm.wait_exit(identity, deadline, &claim.cancel),
            other => other,
        };
        gone.unwrap_or_else(|e| {
            log::warn!("press Ctrl-Alt-Del for vm {}: {e}", row.name);
            false
        })
    }

    /// Ends the VMM and removes the VM's files. The row goes at commit.
    pub(super) fn remove(&self, claim: &Claim) -> Outcome {
        match self.try_remove(claim) {
            Ok(()) => Outcome::Deleted,
            Err(e) => Outcome::StillThere(e),
        }
    }

    fn try_remove(&self, claim: &Claim) -> Result<()> {
        let row = self.core.row(&claim.vm)?;
        if let Some(identity) = self.vmms.identity(&row) {
            claim.op().progress("end the vmm");
            self.vmms.kill_vmm(&identity)?;
        }
        claim.op().progress("remove what it has");
        self.resources.release_life(&row.id)?;
        // Made by an earlier version, which kept no ledger.
        resources::forget_directory(&self.resources, &row)
    }
}
