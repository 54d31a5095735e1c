//! After a start of the daemon: what an earlier one left is adopted, finished or taken back. Run twice it
//! changes nothing. A live healthy VMM is never killed; what is not ours is never touched.

use super::lifecycle::Claim;
use super::transitions::Verb;
use super::{Daemon, KILL_DEADLINE};
use crate::api::vm::VmState;
use crate::error::{Error, Result};
use crate::ids::VmId;
use crate::store::VmRow;
use std::time::Instant;

impl Daemon {
    /// Looks at every VM; each may be changed again as soon as it was looked at.
    pub fn reconcile(&self) {
        // Not those made since the daemon opened: they are this daemon's.
        let ids: Vec<VmId> = self.unlooked.lock().iter().cloned().collect();
        for id in ids {
            if let Err(e) = self.reconcile_vm(&id) {
                log::error!("reconcile vm {id}: {e}");
            }
            self.unlooked.lock().remove(&id);
        }
        if let Err(e) = self.remove_orphaned_directories() {
            log::error!("reconcile the state directory: {e}");
        }
    }

    fn reconcile_vm(&self, id: &VmId) -> Result<()> {
        let _label = crate::locks::operation_scope(format!("reconcile {id}"));
        let row = self.row(id)?;
        match row.state {
            VmState::Running => self.adopt_or_fail(&row)?,
            VmState::Starting => {
                self.end_leftover(&row)?;
                let before = if row.started_at.is_none() { VmState::Created } else { VmState::Stopped };
                self.put_at_rest(&row, before, "the daemon was restarted while it booted")?;
            }
            VmState::Stopping => return self.resume(&row, Verb::Stop),
            VmState::Deleting => return self.resume(&row, Verb::DeleteForce),
            VmState::Created | VmState::Stopped | VmState::Failed => self.end_leftover(&row)?,
        }
        if row.rm {
            // Its holder's connection died with the earlier daemon.
            self.unlooked.lock().remove(id);
            self.delete_unasked(id);
        }
        Ok(())
    }

    fn adopt_or_fail(&self, row: &VmRow) -> Result<()> {
        let known = row.identity.clone();
        if let Some(identity) = &known
            && identity.boot_id != crate::host::process::boot_id()?
        {
            return self.put_at_rest(row, VmState::Stopped, "the host was rebooted");
        }
        let Some(identity) = self.identity(row) else {
            return self.put_at_rest(row, VmState::Failed, "the vmm died while the daemon did not run");
        };
        let adopted = self.images.get(&row.image).and_then(|image| self.vmm.adopt(&self.spec(row, &image), &identity));
        match adopted {
            Ok(running) => {
                self.watch(row, &running.identity)?;
                let adopted = (Some(running.identity), Some(running.ssh_addr));
                if adopted == (row.identity.clone(), row.ssh_addr) {
                    // Most often, and then a full disk does not matter.
                    return Ok(());
                }
                let ((), ticket) = self.store.change(|tx| tx.update_vm(&row.id, |r| (r.identity, r.ssh_addr) = adopted))?;
                self.wait_durable(ticket)
            }
            // It lives, so it is not killed; the user sees that it cannot be reached.
            Err(e) => {
                log::warn!("adopt the vmm of {}: {e}", row.name);
                let reason = format!("its vmm runs but could not be adopted: {e}");
                let ((), ticket) = self.store.change(|tx| tx.update_vm(&row.id, |r| r.reason = Some(reason)))?;
                self.wait_durable(ticket)?;
                self.watch(row, &identity)
            }
        }
    }

    /// A VMM that runs for a VM that should have none.
    fn end_leftover(&self, row: &VmRow) -> Result<()> {
        match self.identity(row) {
            Some(identity) => self.vmm.kill(&identity, Instant::now() + KILL_DEADLINE),
            None => Ok(()),
        }
    }

    fn put_at_rest(&self, row: &VmRow, state: VmState, reason: &str) -> Result<()> {
        let guard = self.locks.vm.lock(&row.id);
        let ((), ticket) = self.change(true, |tx| {
            tx.update_vm(guard.key(), |r| {
                r.state = state;
                r.reason = Some(reason.to_owned());
                (r.op, r.intent, r.identity, r.ssh_addr) = (None, None, None, None);
            })
        })?;
        drop(guard);
        self.wait_durable(ticket)
    }

    /// A stop or a delete that was under way is finished by an operation of the daemon's own.
    fn resume(&self, row: &VmRow, verb: Verb) -> Result<()> {
        let op = self.begin_own_op("reconcile", Some(row.id.clone()), row.owner_uid)?;
        let guard = self.locks.vm.lock(&row.id);
        let (id, op_row) = (op.id().clone(), op.op());
        let ((), ticket) = self.change(true, |tx| {
            tx.put_op(op_row);
            tx.update_vm(guard.key(), |r| r.op = Some(id))
        })?;
        self.arm_locked(&guard, &op, row.state, verb);
        drop(guard);
        let (vm, cancel) = (row.id.clone(), op.cancel().clone());
        let claim =
            Claim { daemon: self.clone(), vm, op: Some(op), state: row.state, verb, timeout: None, cancel, ticket: Some(ticket) };
        self.begin(claim).map(drop)
    }

    /// Directories of VMs that have no row: a delete that was cut off after its row had gone.
    fn remove_orphaned_directories(&self) -> Result<()> {
        let vms = self.config.state_dir.join(super::VMS_DIR);
        let entries = match std::fs::read_dir(&vms) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(format!("list {}", vms.display()), e)),
        };
        for entry in entries.flatten() {
            let id = entry.file_name().to_str().and_then(|n| n.parse::<VmId>().ok());
            // What has no id for a name is not ours.
            let Some(id) = id else { continue };
            if self.store.read(|s| s.vm(&id).is_none()) {
                log::info!("remove the leftover directory of vm {id}");
                std::fs::remove_dir_all(entry.path()).map_err(|e| Error::io(format!("remove {}", entry.path().display()), e))?;
            }
        }
        Ok(())
    }
}
