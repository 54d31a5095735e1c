//! Ports of the host that are forwarded into a guest. On the bridge, rules with the VM's tag
//! forward them. In user mode the VMM opens the ports itself.

use super::{Boot, BootStep, HostView, Resource, Resources, Span};
use crate::api::daemon::Check;
use crate::error::{Error, Kind, Result};
use crate::ids::Tag;
use crate::net;
use crate::store::{LedgerRow, Tx, VmRow};

const KIND: &str = "ports";

pub(super) struct Ports;

/// Adds a ledger row for the ports that the bridge forwards to a running VM, unless there is one.
pub(in crate::daemon) fn intend_forwards(tx: &mut Tx, row: &VmRow, tag: &Tag) {
    let is_there = |l: &LedgerRow| l.kind == KIND && l.name == tag.as_str();
    if !tx.ledger_of(&row.id).any(|l| is_there(l)) {
        tx.intend(Some(&row.id), row.generation, KIND, tag.as_str());
    }
}

impl BootStep for Ports {
    fn stage(&self) -> &'static str {
        "forward the ports"
    }

    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        if boot.row.ports.is_empty() {
            return Ok(());
        }
        match &resources.networks.net {
            Some(net) => {
                let guest = resources.networks.guest(&boot.row, net)?;
                net.forward(&guest, &boot.row.ports, boot.cancel)
            }
            // The VMM opens the ports. Check them here first, because the VMM's errors are less
            // clear.
            None => net::require_free_ports(&boot.row.ports),
        }
    }
}

impl Resource for Ports {
    fn kind(&self) -> &'static str {
        KIND
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, resources: &Resources, row: &VmRow) -> Option<String> {
        resources
            .networks
            .net
            .as_ref()
            .filter(|_| !row.ports.is_empty())
            .map(|_| resources.core.tag(row).to_string())
    }
    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        match &resources.networks.net {
            Some(net) => net.unforward(name),
            None => Err(Error::new(
                Kind::Host,
                format!("remove the ports of {name}: fcd now uses user-mode networking"),
            )
            .hint("start fcd once with driver = \"bridge\" under [network]")),
        }
    }

    fn found(&self, resources: &Resources) -> Result<Vec<String>> {
        resources
            .networks
            .net
            .as_ref()
            .map_or_else(|| Ok(Vec::new()), |net| net.forwarded())
    }
}

pub(super) fn checks(host: &HostView<'_>) -> Vec<Check> {
    const ID: &str = "ports";
    let first = crate::daemon::ports::unprivileged_from();
    let below = match (host.config.network.is_bridge(), first) {
        (_, 0) => String::new(),
        (true, _) => format!("; those below {first} only by root"),
        (false, _) => format!("; those below {first} need the bridge"),
    };
    vec![Check::ok(
        ID,
        format!("ports of this host can be forwarded to guests (-p){below}"),
    )]
}
