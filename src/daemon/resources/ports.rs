//! Ports of the host that lead into a guest: on the bridge rules with the VM's tag; in user mode the VMM has them itself.

use super::{HostView, Resource, Span};
use crate::api::daemon::Check;
use crate::daemon::Daemon;
use crate::daemon::boot::Boot;
use crate::error::{Error, Kind, Result};
use crate::net;
use crate::store::VmRow;

pub(super) struct Ports;

impl Resource for Ports {
    fn kind(&self) -> &'static str {
        "ports"
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, daemon: &Daemon, row: &VmRow) -> Option<String> {
        daemon.net.as_ref().filter(|_| !row.ports.is_empty()).map(|_| daemon.tag(row))
    }
    fn doing(&self) -> &'static str {
        "forward the ports"
    }

    fn acquire(&self, daemon: &Daemon, boot: &mut Boot<'_>) -> Result<()> {
        if boot.row.ports.is_empty() {
            return Ok(());
        }
        match &daemon.net {
            Some(net) => {
                let guest = daemon.guest(&boot.row, net)?;
                net.forward(&guest, &boot.row.ports, &boot.claim.cancel)
            }
            // Only looked at: the VMM takes them, and says less well why it cannot.
            None => net::require_free_ports(&boot.row.ports),
        }
    }

    fn release(&self, daemon: &Daemon, name: &str) -> Result<()> {
        match &daemon.net {
            Some(net) => net.unforward(name),
            None => Err(Error::new(Kind::Host, format!("remove the ports of {name}: fcd runs with user-mode networking now"))
                .hint("start fcd once with driver = \"bridge\" under [network]")),
        }
    }

    fn found(&self, daemon: &Daemon) -> Result<Vec<String>> {
        daemon.net.as_ref().map_or_else(|| Ok(Vec::new()), net::Net::forwarded)
    }

    fn checks(&self, host: &HostView<'_>) -> Vec<Check> {
        const ID: &str = "ports";
        let first = crate::daemon::ports::unprivileged_from();
        let below = match (host.config.network.is_bridge(), first) {
            (_, 0) => String::new(),
            (true, _) => format!("; those below {first} by root alone"),
            (false, _) => format!("; those below {first} only on a bridge"),
        };
        vec![Check::ok(ID, format!("ports of this host can be forwarded to guests (-p){below}"))]
    }
}
