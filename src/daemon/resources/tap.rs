//! A VM's tap on the bridge, with its rules; nothing in user mode. Found again by the VM's tag in its alias.

use super::{HostView, Resource, Span};
use crate::api::daemon::Check;
use crate::daemon::Daemon;
use crate::daemon::boot::Boot;
use crate::error::{Error, Kind, Result};
use crate::store::{TapFact, VmRow};

pub(super) struct Tap;

impl Resource for Tap {
    fn kind(&self) -> &'static str {
        "tap"
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, daemon: &Daemon, row: &VmRow) -> Option<String> {
        daemon.net.as_ref().map(|_| daemon.tag(row))
    }
    fn doing(&self) -> &'static str {
        "connect the network"
    }

    fn acquire(&self, daemon: &Daemon, boot: &mut Boot<'_>) -> Result<()> {
        let fact = match &daemon.net {
            Some(net) => {
                let guest = daemon.guest(&boot.row, net)?;
                let uid = boot.spec.credentials.map_or_else(|| nix::unistd::geteuid().as_raw(), |(uid, _)| uid);
                let tap = net.take(&guest, uid, &boot.claim.cancel)?;
                Some(TapFact { name: tap.name, address: guest.lease.address })
            }
            None if boot.row.rates.all()[2..].iter().any(Option::is_some) => {
                return Err(crate::daemon::adjust::no_rate_in_user_mode());
            }
            None if boot.row.tap.is_none() => return Ok(()),
            None => None,
        };
        // A fact, not an intent: the row of what follows is durable only with this one.
        daemon.change_row(&boot.row.id, false, |r| r.tap = fact)?.detach();
        boot.row = daemon.row(&boot.row.id)?;
        boot.spec = daemon.boot_spec(boot.claim, &boot.row, boot.image);
        Ok(())
    }

    fn release(&self, daemon: &Daemon, name: &str) -> Result<()> {
        match &daemon.net {
            Some(net) => net.release(name),
            None => Err(Error::new(Kind::Host, format!("remove the tap of {name}: fcd runs with user-mode networking now"))
                .hint("start fcd once with driver = \"bridge\" under [network]")),
        }
    }

    fn found(&self, daemon: &Daemon) -> Result<Vec<String>> {
        daemon.net.as_ref().map_or_else(|| Ok(Vec::new()), crate::net::Net::list)
    }

    fn checks(&self, host: &HostView<'_>) -> Vec<Check> {
        crate::daemon::network::checks(host)
    }
}
