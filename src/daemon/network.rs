//! Networks of VMs: their addresses on the bridge, the names that guests can look up, and the
//! repair of bridge and rules every minute. Without a bridge, most of this does nothing.

use super::core::Core;
use super::host_view::HostView;
use crate::api::daemon::Check;
use crate::api::vm::{self, VmState};
use crate::config;
use crate::disk::{Network as SeedNetwork, NetworkIpv6};
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use crate::host::Credentials;
use crate::locks::Cancel;
use crate::locks::Mutex;
use crate::net::{Access, Guest, Lease, LeaseIpv6, Mac, Net, dns};
use crate::store::{State, Store, TapFact, VmRow};
use crate::vmm::Driver;
use crate::vmm::GuestNetwork;
use crate::vmm::devices::{self, TUN};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

pub(super) fn open(
    config: &config::Network,
    store: &Store,
    commands: &Arc<dyn Commands>,
    cancel: &Cancel,
) -> Result<Option<Net>> {
    if !config.is_bridge() {
        return Ok(None);
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::new(
            Kind::InvalidConfig,
            "driver = \"bridge\" under [network] needs root",
        )
        .hint("set driver = \"user\", or run fcd as root"));
    }
    Net::open(config, store.install_id(), commands.clone(), cancel).map(Some)
}

pub(super) fn checks(host: &HostView<'_>) -> Vec<Check> {
    if !host.config.network.is_bridge() {
        return vec![user_mode(
            host.config.qemu.isolated,
            user_mode_ipv6(host.config).is_some(),
        )];
    }
    let mut all = vec![tun(
        host.vmm.capabilities().makes_device_nodes,
        devices::exists(TUN),
        devices::access(TUN),
    )];
    all.extend(crate::net::checks(
        &host.config.network,
        host.commands,
        host.cancel,
    ));
    all
}

/// Checks whether VMMs can attach to taps. If the jailer gives each VMM a device node, the mode of
/// the host's node does not matter. Opening the host's node to a group is safe, because a user can
/// attach only to taps of their own uid.
fn tun(
    vmms_have_own_nodes: bool,
    exists: std::result::Result<(), String>,
    access: devices::Access,
) -> Check {
    const ID: &str = "network-tun";
    match (exists, access) {
        (Err(why), _) => Check::fail(ID, why, "modprobe tun"),
        (Ok(()), _) if vmms_have_own_nodes => {
            Check::ok(ID, format!("{TUN} exists; each jail has its own node"))
        }
        (Ok(()), Ok(_)) => Check::ok(
            ID,
            format!("VMMs can open {TUN}; each VMM can attach only to its own tap"),
        ),
        (Ok(()), Err(why)) => Check::fail(ID, why, &devices::open_to_group(TUN)),
    }
}

/// Describes the user-mode network of guests that have IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UserModeIpv6 {
    /// True if the host has a resolver with an IPv6 address.
    has_resolver: bool,
}

/// Decides whether guests with user-mode networking have IPv6. Returns None if they do not.
pub(super) fn user_mode_ipv6(config: &config::Config) -> Option<UserModeIpv6> {
    let wanted = config.network.ipv6 == config::Ipv6::Auto
        && !config.network.is_bridge()
        && !config.qemu.isolated;
    (wanted && crate::net::host_has_ipv6()).then(|| UserModeIpv6 {
        has_resolver: crate::net::host_has_ipv6_resolver(),
    })
}

fn user_mode(isolated: bool, ipv6: bool) -> Check {
    const ID: &str = "guest-network";
    if isolated {
        return Check::ok(
            ID,
            "user-mode: guests can reach nothing, and only their SSH and published ports can be reached",
        );
    }
    let fix = "to cut guests off from every network: isolated = true under [qemu], or --net none for one VM; \
               as root, driver = \"bridge\" under [network] gives each VM an address and blocks its access to services of the host";
    let (kind, gateways) = if ipv6 {
        ("user-mode with IPv6", "10.0.2.2 or fec0::2")
    } else {
        ("user-mode", "10.0.2.2")
    };
    Check::warn(
        ID,
        format!(
            "{kind}: a guest that connects to {gateways} reaches services on this host's loopback"
        ),
        fix,
    )
}

/// Manages the networks of VMs. With user-mode networking, most methods do nothing.
#[derive(Clone)]
pub(super) struct Networks {
    pub(super) core: Core,
    pub(super) vmm: Arc<dyn Driver>,
    /// The bridge; `None` with user-mode networking.
    pub(super) net: Option<Arc<Net>>,
    pub(super) name_server: Arc<Mutex<Option<dns::Server>>>,
    pub(super) config: config::Network,
    /// Set if guests with user-mode networking have IPv6.
    pub(super) user_mode_ipv6: Option<UserModeIpv6>,
    /// The number of uids reserved for VMs.
    pub(super) vm_uids: u32,
    pub(super) helper_uid: u32,
}

impl Networks {
    /// Returns the number of slots for VMs.
    pub(super) fn slots_max(&self) -> u32 {
        if self.net.is_none() {
            self.vm_uids
        } else {
            self.vm_uids.min(self.config.subnet.guests_max())
        }
    }

    /// Describes the VM for the bridge.
    pub(super) fn guest(&self, row: &VmRow, net: &Net) -> Result<Guest> {
        // During a boot the row may still name the VMM of an earlier start.
        let running = row
            .identity
            .as_ref()
            .filter(|_| row.state != VmState::Starting);
        let capabilities = running.map_or_else(
            || Some(self.vmm.capabilities()),
            |identity| self.vmm.capabilities_of(identity),
        );
        let limited_by_rules = !capabilities.is_some_and(|c| c.limits_network);
        let limit = |rate: Option<u64>| rate.filter(|_| limited_by_rules);
        Ok(Guest {
            tag: self.core.tag(row).to_string(),
            lease: lease(row, net)?,
            access: access(row),
            rx_bytes_per_s: limit(row.shape.rates.net_rx_bytes_per_s),
            tx_bytes_per_s: limit(row.shape.rates.net_tx_bytes_per_s),
        })
    }

    /// Returns the network for the VM's VMM, as it was when the VM was started.
    pub(super) fn guest_network(&self, row: &VmRow) -> GuestNetwork {
        match &row.tap {
            Some(tap) => GuestNetwork::Tap {
                name: tap.name.clone(),
                mac: Mac::of(tap.address).to_string(),
                address: tap.address,
            },
            None => GuestNetwork::UserMode {
                isolated: row.shape.net == vm::Net::None,
                ipv6: self.user_mode_ipv6.is_some(),
                ports: row.ports.clone(),
            },
        }
    }

    /// Returns the network configuration for the seed drive of the next start.
    pub(super) fn seed_network(&self, row: &VmRow) -> Result<SeedNetwork> {
        let with_own_dns = |network: SeedNetwork| match row.dns.is_empty() {
            true => network,
            false => SeedNetwork {
                dns: row.dns.clone(),
                ..network
            },
        };
        let Some(net) = &self.net else {
            let ipv6 = self
                .user_mode_ipv6
                .filter(|_| row.shape.net != vm::Net::None);
            return Ok(with_own_dns(match ipv6 {
                Some(UserModeIpv6 { has_resolver }) => {
                    SeedNetwork::user_mode_with_ipv6(has_resolver)
                }
                None => SeedNetwork::user_mode(),
            }));
        };
        let Lease {
            address,
            prefix,
            gateway,
            ipv6,
            ..
        } = lease(row, net)?;
        let out = access(row) == Access::Nat;
        let dns = if out && self.config.dns {
            vec![gateway.into()]
        } else {
            Vec::new()
        };
        Ok(with_own_dns(SeedNetwork {
            address: address.into(),
            prefix,
            gateway: out.then_some(gateway.into()),
            ipv6: ipv6.map(|ipv6| NetworkIpv6 {
                address: ipv6.address,
                prefix: LeaseIpv6::PREFIX,
                gateway: Some(ipv6.gateway),
            }),
            dns,
        }))
    }

    /// Takes over the tap, rules and forwards of a running VM after a restart of the daemon.
    pub(super) fn adopt_guest(&self, row: &VmRow) {
        let (Some(net), Some(tap)) = (&self.net, &row.tap) else {
            return;
        };
        let adopted = self.guest(row, net).and_then(|mut guest| {
            if guest.lease.address != tap.address {
                let message = format!("it keeps the address {} until its next start", tap.address);
                return Err(Error::new(Kind::Conflict, message).hint("network.subnet has changed"));
            }
            // The guest keeps what it was started with until its next start.
            guest.lease.ipv6 = guest
                .lease
                .ipv6
                .filter(|ipv6| tap.address6 == Some(ipv6.address));
            net.adopt(std::slice::from_ref(&guest))?;
            net.adopt_forwards(&guest, &row.ports);
            Ok(())
        });
        if let Err(e) = adopted {
            log::warn!("adopt the network of VM {}: {e}", row.name);
        }
    }

    pub(super) fn mend_network(&self) {
        let Some(net) = &self.net else { return };
        match net.mend() {
            Ok(done) => done.iter().for_each(|what| log::warn!("network: {what}")),
            Err(e) => log::warn!("restore the network: {e}; retrying every minute"),
        }
    }

    pub(super) fn serve_names(&self) -> Result<()> {
        let Some(net) = self.net.as_ref().filter(|_| self.config.dns) else {
            return Ok(());
        };
        let book = Book {
            store: self.core.store.clone(),
            gateway: self.config.subnet.gateway(),
        };
        let uid = self.helper_uid;
        let server = net.serve_names(Arc::new(book), Credentials { uid, gid: uid })?;
        *self.name_server.lock() = Some(server);
        Ok(())
    }

    /// Reports the state of the name server's helper process. Returns `None` if there is no name
    /// server.
    pub(super) fn name_server_check(&self) -> Option<Check> {
        const ID: &str = "name-server";
        let trouble = self.name_server.lock().as_ref().map(dns::Server::trouble)?;
        Some(match trouble {
            None => Check::ok(ID, "the name server's helper process is running"),
            Some(trouble) => Check::warn(
                ID,
                trouble,
                "see the daemon's log for the cause (name server: ...)",
            ),
        })
    }

    /// Stops the name server. The bridge, the rules and the taps of VMs stay.
    pub(super) fn close_network(&self) {
        let server = self.name_server.lock().take();
        if let Some(e) = server.and_then(|s| s.stop().err()) {
            log::error!("{e}");
        }
        if let Some(net) = &self.net {
            net.close();
        }
    }
}

/// Returns the addresses for the VM's next start. A VM without a network has no IPv6.
fn lease(row: &VmRow, net: &Net) -> Result<Lease> {
    let lease = net.lease(row.slot)?;
    let ipv6 = lease.ipv6.filter(|_| access(row) == Access::Nat);
    Ok(Lease { ipv6, ..lease })
}

fn access(row: &VmRow) -> Access {
    match row.shape.net {
        vm::Net::Nat => Access::Nat,
        vm::Net::None => Access::None,
    }
}

/// Looks up names and addresses of VMs that are starting, running or stopping. A guest can only
/// find VMs of its own owner. The host can find all VMs.
struct Book {
    store: Store,
    gateway: Ipv4Addr,
}

impl Book {
    fn find(
        &self,
        asker: IpAddr,
        is_it: impl Fn(&VmRow, &TapFact) -> bool,
    ) -> Option<(VmRow, TapFact)> {
        let is_host = asker == IpAddr::from(self.gateway) || asker.is_loopback();
        self.store.read(|s| {
            let owner = if is_host {
                None
            } else {
                Some(
                    up(s)
                        .find(|(_, tap)| IpAddr::from(tap.address) == asker)?
                        .0
                        .owner_uid,
                )
            };
            let mut seen = up(s).filter(|(row, _)| owner.is_none_or(|uid| uid == row.owner_uid));
            seen.find(|(row, tap)| is_it(row, tap))
                .map(|(row, tap)| (row.clone(), tap.clone()))
        })
    }
}

fn up(state: &State) -> impl Iterator<Item = (&VmRow, &TapFact)> {
    let is_up = |row: &&VmRow| {
        matches!(
            row.state,
            VmState::Starting | VmState::Running | VmState::Stopping
        )
    };
    state
        .vms()
        .map(|row| &**row)
        .filter(is_up)
        .filter_map(|row| Some((row, row.tap.as_ref()?)))
}

impl dns::Names for Book {
    fn addresses(&self, name: &str, asker: IpAddr) -> Option<dns::Addresses> {
        self.find(asker, |row, _| row.name.as_str() == name)
            .map(|(_, tap)| dns::Addresses {
                ipv4: tap.address,
                ipv6: tap.address6,
            })
    }

    fn name(&self, address: Ipv4Addr, asker: IpAddr) -> Option<String> {
        self.find(asker, |_, tap| tap.address == address)
            .map(|(row, _)| row.name.to_string())
    }
}

pub(super) fn no_rate_in_user_mode() -> Error {
    Error::new(Kind::Unsupported, "limit the network: user-mode networking has no rate limits").hint(
        "as root, set driver = \"bridge\" under [network], and restart the VM; or remove the rates: \
             fcctl vm set --net-rx-bps none --net-tx-bps none",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::daemon::Severity;

    #[test]
    fn user_mode_check_warns_of_host_loopback() {
        let check = user_mode(false, false);
        assert_eq!(
            (check.severity, user_mode(true, false).severity),
            (Severity::Warn, Severity::Ok)
        );
        assert!(!check.found.contains("fec0::2"));
        assert!(user_mode(false, true).found.contains("10.0.2.2 or fec0::2"));
    }

    #[test]
    fn tun_of_root_suits_jailed_vmms_and_fix_never_opens_it_to_all() {
        let closed = || Err(format!("{TUN} has mode 0600"));
        assert_eq!(tun(true, Ok(()), closed()).severity, Severity::Ok);
        let refused = tun(false, Ok(()), closed());
        assert_eq!(refused.severity, Severity::Fail);
        assert!(
            refused
                .fix
                .as_ref()
                .is_some_and(|fix| fix.contains("chmod 0660") && !fix.contains("666")),
            "{refused:?}"
        );
        assert_eq!(tun(false, Ok(()), Ok(vec![108])).severity, Severity::Ok);
        assert_eq!(
            tun(true, Err("there is none".into()), closed()).severity,
            Severity::Fail
        );
    }
}
