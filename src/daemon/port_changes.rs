//! Publishes ports of existing VMs, and stops publishing them, also while the VMs run.
//!
//! The row of a VM lists the ports that belong to the VM, and no other VM can get them. So a new
//! port is written to the row before the VMM or the bridge forwards it, and a port is removed from
//! the row after they have stopped forwarding it. After a crash in between, a running VM differs
//! from its row, and the caller has not received an answer. The next daemon makes the VM match the
//! row when it adopts the VM ([`Controls::adopt_ports`] in user mode, [`crate::net::Net::mend`] on
//! the bridge).
//!
//! One call at a time changes a VM's ports ([`super::port_claims`]). A stop, a start or a deletion
//! does not wait for such a call. If the VM ends meanwhile, the change takes effect at its next
//! start.

use super::access::Caller;
use super::adjust::refused;
use super::controls::Controls;
use super::ports::{PORT_TRIES_MAX, PORTS_MAX, require_free};
use super::resources::intend_forwards;
use super::rules::is_at_rest;
use super::transitions::Verb;
use crate::api::port::{Port, RefusalCause, RefusedPort};
use crate::api::vm::{VmPortsReply, VmPortsRequest, VmState};
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::locks::KeyGuard;
use crate::net;
use crate::store::{Ticket, VmRow};
use crate::vmm::Identity;

/// Who changes the ports of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    Owner,
    /// The thread that follows the guest's listeners in the boot with this generation.
    Watch {
        generation: u64,
    },
}

/// How often a removal starts over because the VM was started or stopped meanwhile.
const ROUNDS_MAX: u32 = 8;

impl Controls {
    /// Publishes ports. Adds all of them or none.
    ///
    /// # Errors
    /// `port_taken` if a VM or a program on the host has one of them, `wrong_state` while the VM
    /// starts or stops, and the errors of `check_ports`.
    pub fn add_ports(&self, caller: &Caller, request: &VmPortsRequest) -> Result<VmPortsReply> {
        let found = self.find_for_ports(caller, request)?;
        self.add_ports_by(By::Owner, caller, &found, &request.ports)
    }

    pub(super) fn add_ports_by(
        &self,
        by: By,
        caller: &Caller,
        found: &VmRow,
        asked: &[Port],
    ) -> Result<VmPortsReply> {
        let _claim = self.port_claims.claim(found, &self.core.closing)?;
        let (row, ports) = self.add_to_row(by, caller, &found.id, asked)?;
        if row.state == VmState::Running
            && let Err(e) = self.open_ports(&row, &ports)
            && self.take_back(&row, &ports)
        {
            return Err(refused(
                e,
                &row,
                format!("publish ports of VM {}", row.name),
            ));
        }
        let vm = self.views.view(&row.id)?;
        Ok(VmPortsReply { vm, ports })
    }

    /// Stops publishing ports. Removes all of them or none.
    ///
    /// # Errors
    /// `invalid_argument` for a port that the VM does not have, `wrong_state` while the VM starts
    /// or stops.
    pub fn remove_ports(&self, caller: &Caller, request: &VmPortsRequest) -> Result<VmPortsReply> {
        let found = self.find_for_ports(caller, request)?;
        self.remove_ports_by(By::Owner, &found, &request.ports)
    }

    pub(super) fn remove_ports_by(
        &self,
        by: By,
        found: &VmRow,
        ports: &[Port],
    ) -> Result<VmPortsReply> {
        let _claim = self.port_claims.claim(found, &self.core.closing)?;
        for _ in 0..ROUNDS_MAX {
            let row = {
                let guard = self.core.locks.vm.lock(&found.id);
                let row = self.core.row(guard.key())?;
                self.may_change_ports_locked(&guard, &row)?;
                row
            };
            require_published(&row, ports)?;
            if row.state == VmState::Running
                && let Err(e) = self.close_ports(&row, ports)
                && self.still_runs(&row)
            {
                return Err(refused(e, &row, format!("change ports of VM {}", row.name)));
            }
            if self.remove_from_row(by, &row, ports)? {
                let vm = self.views.view(&row.id)?;
                return Ok(VmPortsReply {
                    vm,
                    ports: ports.to_vec(),
                });
            }
        }
        let text = format!("change ports of VM {}: it starts and stops", found.name);
        Err(Error::new(Kind::Busy, text).hint("try again in a moment"))
    }

    fn find_for_ports(&self, caller: &Caller, request: &VmPortsRequest) -> Result<VmRow> {
        let found = self.core.resolve(caller, &request.vm)?;
        if request.ports.is_empty() {
            return Err(Error::invalid(format!(
                "change ports of VM {}: no port is given",
                found.name
            ))
            .hint("for example 8080:80"));
        }
        self.unreconciled
            .ensure_reconciled(&found, Verb::Set, &self.core.closing)?;
        Ok(found)
    }

    pub(super) fn may_change_ports_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
    ) -> Result<()> {
        if is_at_rest(row.state) {
            return self.core.allow_locked(vm, row, Verb::Set);
        }
        self.require_responsive_locked(vm, row)?;
        if row.tap.is_some() && self.networks.net.is_none() {
            let text = format!(
                "change ports of VM {}: it runs on the bridge, and fcd now uses user-mode networking",
                row.name
            );
            return Err(Error::new(Kind::Unsupported, text)
                .hint(format!("restart it: fcctl restart {}", row.name)));
        }
        Ok(())
    }

    /// Picks the ports that the request leaves open, and adds all ports to the row. Returns the new
    /// row and the ports once they are durable.
    fn add_to_row(
        &self,
        by: By,
        caller: &Caller,
        vm: &VmId,
        asked: &[Port],
    ) -> Result<(VmRow, Vec<Port>)> {
        let mut tries = 0;
        loop {
            tries += 1;
            let row = self.core.row(vm)?;
            self.networks.check_ports(caller, row.shape.net, asked)?;
            require_new(&row, asked)?;
            let ports = self.networks.settle_ports(asked)?;
            match self.try_add_to_row(by, vm, &ports) {
                // Another VM may have taken a port that was picked.
                Err(e) if e.kind() == Kind::PortTaken && tries < PORT_TRIES_MAX => {}
                Err(e) => return Err(e),
                Ok((row, ticket)) => {
                    self.core.wait_durable(ticket)?;
                    return Ok((row, ports));
                }
            }
        }
    }

    fn try_add_to_row(&self, by: By, vm: &VmId, ports: &[Port]) -> Result<(VmRow, Ticket)> {
        let guard = self.core.locks.vm.lock(vm);
        let row = self.core.row(guard.key())?;
        self.may_change_ports_locked(&guard, &row)?;
        if let By::Watch { generation } = by {
            require_followed(&row, generation)?;
        }
        let on_bridge = row.state == VmState::Running && row.tap.is_some();
        let tag = self.core.tag(&row);
        self.core.change(false, |tx| {
            require_free(tx, ports)?;
            tx.update_vm(&guard, |row| add_by(by, row, ports))?;
            if on_bridge {
                // The VM may have been started without ports.
                intend_forwards(tx, &row, &tag);
            }
            let mut row = row;
            add_by(by, &mut row, ports);
            Ok(row)
        })
    }

    /// Forwards ports that are new in the row to the running guest.
    pub(super) fn open_ports(&self, row: &VmRow, ports: &[Port]) -> Result<()> {
        if row.tap.is_some() {
            return self.forward_on_bridge(row, &row.ports);
        }
        // Check the ports first, because the VMM's errors are less clear.
        net::require_free_ports(ports)?;
        let vm = self.vmms.vm(row, identity(row)?)?;
        let opened = vm.forward(ports, &[], &self.core.closing);
        if opened.as_ref().is_err_and(|e| e.kind() != Kind::VmmFailed) {
            // The VMM may have opened the ports although it did not answer in time.
            let _ = vm.forward(&[], ports, &self.core.closing);
        }
        opened
    }

    /// Stops forwarding ports that are still in the row.
    fn close_ports(&self, row: &VmRow, ports: &[Port]) -> Result<()> {
        if row.tap.is_some() {
            let left: Vec<Port> = without(&row.ports, ports);
            return self.forward_on_bridge(row, &left);
        }
        let vm = self.vmms.vm(row, identity(row)?)?;
        vm.forward(&[], ports, &self.core.closing)
    }

    fn forward_on_bridge(&self, row: &VmRow, ports: &[Port]) -> Result<()> {
        let Some(net) = &self.networks.net else {
            return Err(Error::internal("forward ports: there is no bridge"));
        };
        let guest = self.networks.guest(row, net)?;
        let forwarded = net.forward(&guest, ports, &self.core.closing);
        // A stop releases the ports after it has set the state to `stopping`. So a stop that has
        // begun meanwhile may have released them before they were forwarded.
        if !self.still_runs(row)
            && let Err(e) = net.unforward(&guest.tag)
        {
            log::warn!("release the ports of VM {}: {e}", row.name);
        }
        forwarded
    }

    /// True if the VM still runs in the boot that `row` describes.
    fn still_runs(&self, row: &VmRow) -> bool {
        self.core
            .row(&row.id)
            .is_ok_and(|now| now.generation == row.generation && now.state == VmState::Running)
    }

    /// Removes from the row the ports that could not be opened. Returns false if the boot has ended
    /// since. In that case the ports stay, and the next start opens them.
    pub(super) fn take_back(&self, before: &VmRow, ports: &[Port]) -> bool {
        let mut is_undone = false;
        let undone = self.core.change_row(&before.id, true, |row| {
            if row.generation == before.generation && row.state == VmState::Running {
                row.remove_ports(ports);
                is_undone = true;
            }
        });
        match undone {
            Ok(ticket) => ticket.detach(),
            Err(e) => {
                log::warn!("undo a change of VM {}: {e}", before.name);
                return true;
            }
        }
        is_undone
    }

    /// Removes ports from the row, durably. Returns false if the VM was started or stopped since
    /// `seen` was read. After an error, the ports still belong to the VM.
    fn remove_from_row(&self, by: By, seen: &VmRow, ports: &[Port]) -> Result<bool> {
        let removed = self.try_remove_from_row(by, seen, ports);
        if removed.is_err()
            && self.still_runs(seen)
            && let Err(e) = self.open_ports(seen, ports)
        {
            log::warn!("restore the ports of VM {}: {e}", seen.name);
        }
        removed
    }

    fn try_remove_from_row(&self, by: By, seen: &VmRow, ports: &[Port]) -> Result<bool> {
        let ((), ticket) = {
            let guard = self.core.locks.vm.lock(&seen.id);
            let now = self.core.row(guard.key())?;
            if (now.generation, now.state) != (seen.generation, seen.state) {
                return Ok(false);
            }
            self.core.change(false, |tx| {
                tx.update_vm(&guard, |row| remove_by(by, row, ports))
            })?
        };
        self.core.wait_durable(ticket).map(|()| true)
    }
}

pub(super) fn identity(row: &VmRow) -> Result<&Identity> {
    row.identity
        .as_ref()
        .ok_or_else(|| Error::internal(format!("VM {} is running without a VMM", row.name)))
}

pub(super) fn without(ports: &[Port], others: &[Port]) -> Vec<Port> {
    let is_left = |port: &&Port| !others.contains(port);
    ports.iter().filter(is_left).copied().collect()
}

/// Refuses a forward for a listener of an earlier boot, or after the owner asked for no more.
fn require_followed(row: &VmRow, generation: u64) -> Result<()> {
    if row.generation == generation && row.state == VmState::Running && row.auto_ports.is_some() {
        return Ok(());
    }
    let text = format!("forward ports of VM {}: they are not followed", row.name);
    Err(Error::new(Kind::WrongState, text))
}

fn add_by(by: By, row: &mut VmRow, ports: &[Port]) {
    row.ports.extend(ports);
    if let (By::Watch { .. }, Some(auto)) = (by, &mut row.auto_ports) {
        auto.open.extend(ports);
    }
}

/// Removes ports. Those that the owner removes are not added again while their listeners last.
fn remove_by(by: By, row: &mut VmRow, ports: &[Port]) {
    if let (By::Owner, Some(auto)) = (by, &mut row.auto_ports) {
        let removed = auto.open.iter().filter(|port| ports.contains(port));
        auto.refused.extend(removed.map(|port| RefusedPort {
            guest_port: port.guest_port,
            cause: RefusalCause::Removed,
            reason: format!("port {port} was removed"),
        }));
    }
    row.remove_ports(ports);
}

/// Refuses more ports than a VM may have, and ports that the VM has already.
fn require_new(row: &VmRow, asked: &[Port]) -> Result<()> {
    let doing = || format!("publish ports of VM {}", row.name);
    if row.ports.len() + asked.len() > PORTS_MAX {
        let text = format!("{}: a VM may have at most {PORTS_MAX} ports", doing());
        let hint = format!("remove some: fcctl port rm {} PORT", row.name);
        return Err(Error::invalid(text).hint(hint));
    }
    let is_there =
        |port: &&Port| port.host_port != 0 && row.ports.iter().any(|other| other.overlaps(port));
    asked.iter().find(is_there).map_or(Ok(()), |port| {
        let text = format!("{}: it has port {port} already", doing());
        Err(Error::new(Kind::PortTaken, text).hint(format!("fcctl port {}", row.name)))
    })
}

/// Refuses ports that the VM does not have.
fn require_published(row: &VmRow, ports: &[Port]) -> Result<()> {
    ports
        .iter()
        .find(|port| !row.ports.contains(port))
        .map_or(Ok(()), |port| {
            let text = format!("VM {} does not publish port {port}", row.name);
            Err(Error::invalid(text).hint(format!("list its ports: fcctl port {}", row.name)))
        })
}
