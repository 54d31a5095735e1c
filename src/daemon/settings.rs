//! Implements `vm.rename` and `vm.set`. `vm.set` changes settings for the next start. It also
//! changes labels and, on request, the rates of a running VM at once.

use super::access::Caller;
use super::controls::Controls;
use super::rules::is_at_rest;
use super::rules::take_pending;
use crate::api::vm::{Pending, Restart, Vm, VmRenameRequest, VmSetRequest};
use crate::error::{Error, Kind, Result};
use crate::store::VmRow;

impl Controls {
    /// Changes settings. The settings of a running VM are pending until its next start, except that
    /// rates apply at once if the request says so.
    pub fn set(&self, caller: &Caller, request: &VmSetRequest) -> Result<Vm> {
        let row = self.core.resolve(caller, &request.vm)?;
        self.unreconciled.ensure_reconciled(
            &row,
            super::transitions::Verb::Set,
            &self.core.closing,
        )?;
        let rates = request.rates();
        if !changes_size(request) && !changes_at_once(request) && rates.is_empty() {
            return Err(
                Error::invalid(format!("set VM {}: nothing to set", row.name))
                    .hint("use --vcpus, --memory, --disk, --restart, --label, or a rate such as --disk-bps"),
            );
        }
        request
            .vcpus
            .map_or(Ok(()), |n| self.capacity.check_vcpus(n))?;
        request
            .mem_mib
            .map_or(Ok(()), |n| self.capacity.check_memory(n))?;
        self.check_rates(&rates)?;
        let (row, is_live, ticket) = {
            let guard = self.core.locks.vm.lock(&row.id);
            let row = self.core.row(guard.key())?;
            self.core
                .allow_locked(&guard, &row, super::transitions::Verb::Set)?;
            let disk_now = row
                .pending
                .as_ref()
                .and_then(|p| p.disk_bytes)
                .unwrap_or(row.shape.disk_bytes);
            request
                .disk_bytes
                .map_or(Ok(()), |n| self.capacity.check_disk(n, disk_now))?;
            let is_live = request.now && !is_at_rest(row.state);
            if is_live {
                self.may_adjust_locked(&guard, &row, request)?;
            }
            request.restart.map_or(Ok(()), |restart| {
                check_restart(restart, request.rm.unwrap_or(row.rm))
            })?;
            let labels = row
                .shape
                .labels
                .changed(&request.labels, &request.remove_labels)
                .map_err(|e| e.context(format!("set VM {}", row.name)))?;
            let ((), ticket) = self.core.store.change(|tx| {
                tx.update_vm(&guard, |row| {
                    apply(row, request, is_live);
                    row.shape.labels = labels;
                })
            })?;
            (row, is_live, ticket)
        };
        self.core.wait_durable(ticket)?;
        if is_live {
            self.adjust_rates(&row, &rates)?;
        }
        self.views.view(&row.id)
    }
}

impl Controls {
    /// Gives the VM another name. Nothing on the host is called by this name, so only the row
    /// changes.
    pub fn rename(&self, caller: &Caller, request: &VmRenameRequest) -> Result<Vm> {
        let row = self.core.resolve(caller, &request.vm)?;
        let ticket = {
            let guard = self.core.locks.vm.lock(&row.id);
            let row = self.core.row(guard.key())?;
            self.core
                .allow_locked(&guard, &row, super::transitions::Verb::Set)?;
            let name = request.name.clone();
            let changed = self
                .core
                .store
                .change(|tx| tx.update_vm(&guard, |row| row.name = name));
            changed.map_err(|e| match e.kind() {
                Kind::NameTaken => e
                    .context(format!("rename VM {}", row.name))
                    .hint("choose another name: fcctl ps -a lists yours"),
                _ => e,
            })?
        };
        self.core.wait_durable(ticket.1)?;
        self.views.view(&row.id)
    }
}

/// Refuses an automatic restart for a VM that is deleted when it ends.
pub(super) fn check_restart(restart: Restart, rm: bool) -> Result<()> {
    if rm && restart == Restart::Always {
        let text = "a VM that is deleted when it ends cannot restart";
        return Err(Error::invalid(text).hint("leave out --rm or --restart"));
    }
    Ok(())
}

/// True if the request changes something that takes effect only when the guest starts: vCPUs,
/// memory or disk size.
pub(super) fn changes_size(request: &VmSetRequest) -> bool {
    request.vcpus.is_some() || request.mem_mib.is_some() || request.disk_bytes.is_some()
}

fn changes_at_once(request: &VmSetRequest) -> bool {
    request.rm.is_some()
        || request.restart.is_some()
        || !request.labels.is_empty()
        || !request.remove_labels.is_empty()
}

/// Writes the settings into the row. For a VM at rest, vCPUs, memory and rates change at once; its
/// next start grows the disk.
fn apply(row: &mut VmRow, request: &VmSetRequest, is_live: bool) {
    row.rm = request.rm.unwrap_or(row.rm);
    row.restart = request.restart.unwrap_or(row.restart);
    let (rates, mut pending) = (request.rates(), row.pending.take().unwrap_or_default());
    pending.vcpus = request.vcpus.or(pending.vcpus);
    pending.mem_mib = request.mem_mib.or(pending.mem_mib);
    pending.disk_bytes = request.disk_bytes.or(pending.disk_bytes);
    if is_live {
        row.shape.rates = row.shape.rates.with(&rates);
        // The new rates replace pending ones.
        pending.rates = pending.rates.without(&rates);
    } else {
        pending.rates = rates.or(&pending.rates);
    }
    row.pending = Some(pending).filter(|p| *p != Pending::default());
    if is_at_rest(row.state) {
        take_pending(row);
    }
}
