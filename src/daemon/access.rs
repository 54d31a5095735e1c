//! Who may see what: root and the owner. To anybody else a VM does not exist.

use super::Daemon;
use crate::api::vm::{Vm, VmState};
use crate::error::{Error, Kind, Result};
use crate::ids::{ID_LEN, VmId};
use crate::locks::CancelCause;
use crate::store::{State, VmRow, WorkspaceRow};
use std::sync::Arc;

/// Shortest prefix of an id that is taken for one.
pub(super) const PREFIX_LEN_MIN: usize = 2;
/// How many VMs an error names when the beginning of an id fits several.
const AMBIGUOUS_SHOWN_MAX: usize = 4;

/// The peer of a connection, from its credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    /// For logs only: it may be another process by now.
    pub pid: i32,
}

impl Caller {
    pub fn may_see(&self, owner_uid: u32) -> bool {
        self.uid == 0 || self.uid == owner_uid
    }
}

pub fn vm_not_found(text: &str) -> Error {
    let shown: String = text.chars().take(64).collect();
    Error::new(Kind::VmNotFound, format!("no VM {shown:?}")).hint("fcctl ps -a lists the VMs that are there")
}

/// Finds a VM by its name, its id, or the beginning of an id that fits one VM only. Uses the store's indexes: the cost
/// does not grow with the number of VMs.
pub fn find<'s>(state: &'s State, caller: &Caller, text: &'s str) -> Result<&'s VmRow> {
    let visible = |row: &&'s Arc<VmRow>| caller.may_see(row.owner_uid);
    if let Some(row) = state.vm_by_name_or_id(text).filter(visible) {
        return Ok(row);
    }
    if !(PREFIX_LEN_MIN..ID_LEN).contains(&text.len()) {
        return Err(vm_not_found(text));
    }
    let fits: Vec<_> = state.vms_by_id_prefix(text).filter(visible).take(AMBIGUOUS_SHOWN_MAX + 1).collect();
    match fits.as_slice() {
        [] => Err(vm_not_found(text)),
        [row] => Ok(row),
        many => Err(ambiguous(text, many)),
    }
}

fn ambiguous(text: &str, fits: &[&Arc<VmRow>]) -> Error {
    let ids: Vec<_> = fits.iter().take(AMBIGUOUS_SHOWN_MAX).map(|r| format!("{} ({})", r.id, r.name)).collect();
    let more = if fits.len() > AMBIGUOUS_SHOWN_MAX { " and more" } else { "" };
    Error::new(Kind::AmbiguousPrefix, format!("{text:?} fits several VMs: {}{more}", ids.join(", ")))
        .hint("give the name or more of the id")
}

impl Daemon {
    /// The VM that `text` names, if the caller may see it.
    pub fn resolve(&self, caller: &Caller, text: &str) -> Result<VmRow> {
        self.store.read(|s| find(s, caller, text).cloned())
    }

    /// The row as it is now; gone meanwhile: not found.
    pub(super) fn row(&self, id: &VmId) -> Result<VmRow> {
        self.store.read(|s| s.vm(id).map(|r| (**r).clone())).ok_or_else(|| vm_not_found(id.as_str()))
    }

    /// The VM as its owner sees it.
    pub(super) fn view(&self, id: &VmId) -> Result<Vm> {
        let seen = self.store.read(|s| s.vm(id).map(|row| view_of(s, row)));
        seen.map(|vm| self.with_pause(vm)).ok_or_else(|| vm_not_found(id.as_str()))
    }

    /// That the guest stands still is in no row: it could not be written to a full disk.
    pub(super) fn with_pause(&self, mut vm: Vm) -> Vm {
        if vm.state == VmState::Running && self.runtimes.is_paused(&vm.id) {
            vm.reason = Some(format!("paused: {}", CancelCause::HostDiskFull));
        }
        vm
    }
}

pub fn view_of(state: &State, row: &VmRow) -> Vm {
    view(row, state.workspace(&row.id).map(|w| &**w))
}

pub fn view(row: &VmRow, workspace: Option<&WorkspaceRow>) -> Vm {
    Vm {
        id: row.id.clone(),
        name: row.name.clone(),
        owner_uid: row.owner_uid,
        state: row.state,
        reason: row.reason.clone(),
        image: row.image.clone(),
        kernel: row.kernel.clone(),
        vcpus: row.vcpus,
        mem_mib: row.mem_mib,
        disk_bytes: row.disk_bytes,
        work_disk_bytes: row.work_disk_bytes,
        disk_bytes_per_s: row.rates.disk_bytes_per_s,
        disk_ops_per_s: row.rates.disk_ops_per_s,
        net_rx_bytes_per_s: row.rates.net_rx_bytes_per_s,
        net_tx_bytes_per_s: row.rates.net_tx_bytes_per_s,
        net: row.net,
        ports: row.ports.clone(),
        pending: row.pending.clone(),
        rm: row.rm,
        created_at: row.created_at,
        started_at: row.started_at,
        op: row.op.clone(),
        pid: row.identity.as_ref().map(|i| i.pid),
        ssh_addr: row.ssh_addr,
        driver: row.driver.clone(),
        disk_driver: row.disk_driver.clone(),
        synced: row.synced,
        unresponsive: row.unresponsive && matches!(row.state, VmState::Running | VmState::Stopping),
        paused: row.paused && row.state == VmState::Running,
        balloon_mib: row.balloon_mib.filter(|_| row.state == VmState::Running),
        workspace: workspace.map(|w| crate::api::vm::WorkspaceInfo {
            guest_path: w.guest_path.clone(),
            workdir: w.workdir.clone(),
            state: w.state,
            readonly: w.readonly,
            entries: w.entries,
            bytes: w.bytes,
            prepared_at: w.prepared_at,
        }),
    }
}
