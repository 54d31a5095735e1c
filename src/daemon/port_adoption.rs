//! Makes the VMM of an adopted VM forward the ports of its row.

use super::controls::Controls;
use super::port_changes::{identity, without};
use crate::api::port::Protocol;
use crate::error::Result;
use crate::store::VmRow;

impl Controls {
    /// Makes the VMM of an adopted VM forward the ports of the row, because the earlier daemon may
    /// have died while it changed them. A missing port that cannot be forwarded is removed from the
    /// row: the call that added it was never answered.
    pub(super) fn adopt_ports(&self, row: &VmRow) {
        if row.tap.is_some() {
            return;
        }
        // If a call is changing the ports, that call makes the VMM match the row.
        let Some(_claim) = self.port_claims.try_claim(&row.id) else {
            return;
        };
        if let Err(e) = self
            .core
            .row(&row.id)
            .and_then(|row| self.match_ports(&row))
        {
            log::warn!("set the ports of VM {} again: {e}", row.name);
        }
    }

    fn match_ports(&self, row: &VmRow) -> Result<()> {
        let vm = self.vmms.vm(row, identity(row)?)?;
        let closing = &self.core.closing;
        let mut there = vm.forwarded(closing)?;
        // The port of the guest's SSH server is not a published port.
        there.retain(|port| {
            port.protocol == Protocol::Udp
                || row.ssh_addr != Some((port.host_addr, port.host_port).into())
        });
        let (missing, extra) = (without(&row.ports, &there), without(&there, &row.ports));
        if !extra.is_empty() {
            vm.forward(&[], &extra, closing)?;
        }
        let mut lost = Vec::new();
        for port in missing {
            if let Err(e) = self.open_ports(row, &[port]) {
                log::warn!("VM {} no longer publishes port {port}: {e}", row.name);
                lost.push(port);
            }
        }
        if !lost.is_empty() {
            self.take_back(row, &lost);
        }
        Ok(())
    }
}
