//! Who may see what: root and the owner. To anybody else a VM does not exist.

use super::Daemon;
use crate::api::vm::{Vm, VmBrief, VmState, WorkspaceInfo};
use crate::error::{Error, Kind, Result};
use crate::ids::{ID_LEN, VmId};
use crate::locks::CancelCause;
use crate::store::{Seen, State, VmRow, WorkspaceRow};
use serde::{Serialize, Serializer};
use std::borrow::Cow;
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
        vm.reason = self.reason(vm.state, &vm.id).or(vm.reason);
        vm
    }

    /// The reason that replaces the row's.
    fn reason(&self, state: VmState, vm: &VmId) -> Option<String> {
        let is_paused = state == VmState::Running && self.runtimes.is_paused(vm);
        is_paused.then(|| format!("paused: {}", CancelCause::HostDiskFull))
    }

    /// The members of [`Daemon::view`] that a long list needs.
    pub(super) fn brief<'a>(&self, seen: &'a Seen) -> VmBrief<'a> {
        let row = &*seen.row;
        let reason = self.reason(row.state, &row.id).map(Cow::Owned);
        VmBrief {
            id: Cow::Borrowed(&row.id),
            name: Cow::Borrowed(&row.name),
            state: row.state,
            reason: reason.or(row.reason.as_deref().map(Cow::Borrowed)),
            image: Cow::Borrowed(&row.image),
            vcpus: row.vcpus,
            mem_mib: row.mem_mib,
            created_at: row.created_at,
            unresponsive: is_unresponsive(row),
            paused: is_paused(row),
            workspace: seen.workspace.as_deref().map(workspace_info),
        }
    }
}

/// One VM in a list. Its view is built when it is serialised, because a brief one borrows from the rows.
pub(super) struct Listed<'a> {
    pub daemon: &'a Daemon,
    pub seen: Seen,
    pub is_brief: bool,
}

impl Serialize for Listed<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        if self.is_brief {
            return self.daemon.brief(&self.seen).serialize(serializer);
        }
        self.daemon.with_pause(view(&self.seen.row, self.seen.workspace.as_deref())).serialize(serializer)
    }
}

fn is_unresponsive(row: &VmRow) -> bool {
    row.unresponsive && matches!(row.state, VmState::Running | VmState::Stopping)
}

fn is_paused(row: &VmRow) -> bool {
    row.paused && row.state == VmState::Running
}

fn workspace_info(row: &WorkspaceRow) -> WorkspaceInfo {
    WorkspaceInfo {
        guest_path: row.guest_path.clone(),
        workdir: row.workdir.clone(),
        state: row.state,
        readonly: row.readonly,
        entries: row.entries,
        bytes: row.bytes,
        prepared_at: row.prepared_at,
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
        unresponsive: is_unresponsive(row),
        paused: is_paused(row),
        balloon_mib: row.balloon_mib.filter(|_| row.state == VmState::Running),
        workspace: workspace.map(workspace_info),
    }
}
