//! Converts a row of the store to the VM that a caller sees.

use crate::api::image::short_digest;
use crate::api::port::AutoPorts;
use crate::api::vm::{Vm, VmBrief, VmState};
use crate::store::{Seen, State, TapFact, VmRow, WorkspaceRow};
use std::borrow::Cow;

/// Returns the full view of a row, with the VM's workspace from the store.
pub(super) fn view_of(state: &State, row: &VmRow) -> Vm {
    view(row, state.workspace(&row.id).map(|w| &**w))
}

/// Builds the full API view of a VM from its row and the row of its workspace.
pub(super) fn view(row: &VmRow, workspace: Option<&WorkspaceRow>) -> Vm {
    Vm {
        id: row.id.clone(),
        name: row.name.clone(),
        owner_uid: row.owner_uid,
        state: row.state,
        reason: row.reason.clone(),
        image: row.shape.image.said_by(row.owner_uid),
        image_digest: row.shape.image_digest.clone(),
        kernel: row.shape.kernel.clone(),
        init: row.shape.init,
        vcpus: row.shape.vcpus,
        mem_mib: row.shape.mem_mib,
        disk_bytes: row.shape.disk_bytes,
        work_disk_bytes: row.shape.work_disk_bytes,
        disk_bytes_per_s: row.shape.rates.disk_bytes_per_s,
        disk_ops_per_s: row.shape.rates.disk_ops_per_s,
        net_rx_bytes_per_s: row.shape.rates.net_rx_bytes_per_s,
        net_tx_bytes_per_s: row.shape.rates.net_tx_bytes_per_s,
        net: row.shape.net,
        ports: row.ports.clone(),
        auto_ports: row.auto_ports.clone(),
        pending: row.pending.clone(),
        rm: row.rm,
        restart: row.restart,
        created_at: row.created_at,
        started_at: row.started_at,
        op: row.op.clone(),
        pid: row.identity.as_ref().map(|i| i.pid),
        ip: tap_of_running(row).map(|tap| tap.address),
        ip6: tap_of_running(row).and_then(|tap| tap.address6),
        ssh_addr: row.ssh_addr,
        driver: row.driver.clone(),
        disk_driver: row.disk_driver.clone(),
        synced: row.synced,
        unresponsive: is_unresponsive(row),
        paused: is_paused(row),
        balloon_mib: row.balloon_mib.filter(|_| row.state == VmState::Running),
        workspace: workspace.map(|w| w.info.clone()),
        host_name: row.host_name.clone(),
        dns: row.dns.clone(),
        commands: row.shape.commands.clone(),
        labels: row.shape.labels.clone(),
    }
}

/// Returns the members of [`view`] that a long list needs.
pub(super) fn brief(seen: &Seen) -> VmBrief<'_> {
    let row = &*seen.row;
    let digest = row.shape.image_digest.as_deref();
    VmBrief {
        id: Cow::Borrowed(&row.id),
        name: Cow::Borrowed(&row.name),
        state: row.state,
        reason: row.reason.as_deref().map(Cow::Borrowed),
        image: Cow::Owned(row.shape.image.said_by(row.owner_uid)),
        short_digest: digest.map(|digest| Cow::Borrowed(short_digest(digest))),
        vcpus: row.shape.vcpus,
        mem_mib: row.shape.mem_mib,
        disk_bytes: row.shape.disk_bytes,
        created_at: row.created_at,
        unresponsive: is_unresponsive(row),
        paused: is_paused(row),
        ports: Cow::Borrowed(&row.ports),
        ip: tap_of_running(row).map(|tap| tap.address),
        ip6: tap_of_running(row).and_then(|tap| tap.address6),
        refused_ports: AutoPorts::refused_ports(row.auto_ports.as_ref()),
        workspace: seen.workspace.as_ref().map(|w| w.info.clone()),
        labels: row.shape.labels.clone(),
    }
}

/// Returns the guest's tap, with its addresses on the bridge, while the guest may be up.
fn tap_of_running(row: &VmRow) -> Option<&TapFact> {
    let may_be_up = matches!(row.state, VmState::Running | VmState::Stopping);
    row.tap.as_ref().filter(|_| may_be_up)
}

fn is_unresponsive(row: &VmRow) -> bool {
    row.unresponsive && matches!(row.state, VmState::Running | VmState::Stopping)
}

fn is_paused(row: &VmRow) -> bool {
    row.paused && row.state == VmState::Running
}
