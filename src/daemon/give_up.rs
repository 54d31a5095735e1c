//! Handles VMs that have used up their crash budget (`recovery.rs`, `adoption.rs`).

use super::reconcile::Reconciler;
use super::records::Record;
use super::rules::is_at_rest;
use super::{adoption, records, recovery};
use crate::api::vm::VmState;
use crate::error::Result;
use crate::store::VmRow;
use crate::vmm::Identity;

impl Reconciler {
    /// Marks a VM as unresponsive instead of adopting it. Its guest keeps running. The daemon
    /// notices when the VMM ends but does not talk to it.
    pub(super) fn leave_unadopted(&self, row: &VmRow, identity: &Identity) -> Result<()> {
        let deaths = self.adopter.deaths(&row.id);
        let reason = format!(
            "{}, so it is not adopted; a stop or a delete kills its VMM",
            adoption::times(deaths)
        );
        log::error!("VM {}: {reason}", row.name);
        let guard = self.core.locks.vm.lock(&row.id);
        let ((), ticket) = self.core.change(true, |tx| {
            records::write(
                tx,
                &adoption::name(&row.id),
                Record {
                    deaths,
                    is_under_way: false,
                    is_left_alone: true,
                },
            );
            tx.update_vm(&guard, |r| {
                if (r.generation, r.state) == (row.generation, VmState::Running) {
                    (r.reason, r.unresponsive) = (Some(reason), true);
                }
            })
        })?;
        drop(guard);
        self.core.wait_durable_in_time(&ticket)?;
        self.lifecycle.watch_end(row, identity)
    }

    /// Gives up on a VM if its crash budget is used up. Returns true if the VM must not be resumed.
    pub(super) fn gave_up(&self, row: &VmRow) -> Result<bool> {
        let record = self
            .core
            .store
            .read(|s| records::read(s, &recovery::name(&row.id)));
        let deaths = record.deaths_at_start();
        let gives_up = match row.state {
            VmState::Stopping => deaths > 1,
            // A delete does not ask the guest to shut down, so a second attempt would be like the
            // first.
            VmState::Deleting => deaths > 0,
            VmState::Created | VmState::Stopped | VmState::Failed => {
                record.is_under_way || record.is_left_alone
            }
            VmState::Starting | VmState::Running => false,
        };
        if gives_up {
            self.give_up(row, deaths, is_at_rest(row.state))?;
        }
        Ok(gives_up)
    }

    /// Marks the VM as failed and, unless `leaves_alone` is set, cleans up after it. The state is
    /// written first: if the clean-up kills the daemon, the next daemon must not find anything to
    /// resume.
    fn give_up(&self, row: &VmRow, deaths: u32, leaves_alone: bool) -> Result<()> {
        let reason = format!("{}, so it is not resumed again", recovery::times(deaths));
        log::error!("VM {}: {reason}", row.name);
        self.recovery.attempts.note(&row.id);
        let record = Record {
            deaths,
            is_under_way: !leaves_alone,
            is_left_alone: leaves_alone,
        };
        let guard = self.core.locks.vm.lock(&row.id);
        let ((), ticket) = self.core.change(true, |tx| {
            records::write(tx, &recovery::name(&row.id), record);
            tx.update_vm(&guard, |r| {
                // `identity` stays, so that a stop or delete can kill the VMM.
                (r.state, r.reason) = (VmState::Failed, Some(reason));
                (r.op, r.intent) = (None, None);
            })
        })?;
        drop(guard);
        self.core.wait_durable_in_time(&ticket)?;
        if leaves_alone {
            return Ok(());
        }
        self.end_leftover(row)?;
        let guard = self.core.locks.vm.lock(&row.id);
        let ((), ticket) = self.core.change(true, |tx| {
            recovery::end(tx, &row.id);
            tx.update_vm(&guard, |r| (r.identity, r.ssh_addr) = (None, None))
        })?;
        drop(guard);
        self.core.wait_durable_in_time(&ticket)
    }
}
