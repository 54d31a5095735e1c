//! A VM's tap on the bridge, with its rules. The VM's tag in the alias of the tap identifies it. In
//! user mode there is no tap.

use super::{Boot, BootStep, Resource, Resources, Span};
use crate::error::{Error, Kind, Result};
use crate::store::{TapFact, VmRow};

pub(super) struct Tap;

impl BootStep for Tap {
    fn stage(&self) -> &'static str {
        "connect the network"
    }

    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        let fact = match &resources.networks.net {
            Some(net) => {
                let guest = resources.networks.guest(&boot.row, net)?;
                let uid = boot
                    .spec
                    .credentials
                    .map_or_else(|| nix::unistd::geteuid().as_raw(), |own| own.uid);
                let tap = net.take(&guest, uid, boot.cancel)?;
                Some(TapFact {
                    name: tap.name,
                    address: guest.lease.address,
                    address6: guest.lease.ipv6.map(|ipv6| ipv6.address),
                })
            }
            None if boot.row.shape.rates.limits_network() => {
                return Err(crate::daemon::network::no_rate_in_user_mode());
            }
            None if boot.row.tap.is_none() => return Ok(()),
            None => None,
        };
        // There is no need to wait for this change: the next change cannot be durable without it.
        resources
            .core
            .change_row(&boot.row.id, false, |r| r.tap = fact)?
            .detach();
        boot.row = resources.core.row(&boot.row.id)?;
        boot.spec = resources
            .specs
            .boot_spec(boot.restore, &boot.row, boot.image);
        Ok(())
    }
}

impl Resource for Tap {
    fn kind(&self) -> &'static str {
        "tap"
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, resources: &Resources, row: &VmRow) -> Option<String> {
        resources
            .networks
            .net
            .as_ref()
            .map(|_| resources.core.tag(row).to_string())
    }
    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        match &resources.networks.net {
            Some(net) => net.release(name),
            None => Err(Error::new(
                Kind::Host,
                format!("remove the tap of {name}: fcd now uses user-mode networking"),
            )
            .hint("start fcd once with driver = \"bridge\" under [network]")),
        }
    }

    fn found(&self, resources: &Resources) -> Result<Vec<String>> {
        resources
            .networks
            .net
            .as_ref()
            .map_or_else(|| Ok(Vec::new()), |net| net.list())
    }
}
