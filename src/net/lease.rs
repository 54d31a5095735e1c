//! Computes the addresses of a guest from the subnet and the VM's slot, without doing any I/O.

use crate::config::{Ipv6Network, Subnet};
use crate::error::{Error, Kind, Result};
use crate::host::plural::count;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Returns `02:fc` (locally administered) followed by the IPv4 address, so an IPv4 address
    /// always has the same MAC.
    pub fn of(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x02, 0xfc, a, b, c, d])
    }

    /// Returns the link-local address that the kernel of a guest gives an interface with this
    /// address (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        let id = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
        Ipv6Addr::from((0xfe80 << 112) | u128::from(u64::from_be_bytes(id)))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The hosts that a guest can reach (`--net`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// The guest reaches the name server, and outside hosts with the host's address.
    #[default]
    Nat,
    /// The guest reaches nothing. Only connections that the host opens, such as SSH, work.
    None,
}

/// A guest's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    pub address: Ipv4Addr,
    /// The length of the subnet's prefix, in bits.
    pub prefix: u8,
    /// The address of the bridge, where the name server listens.
    pub gateway: Ipv4Addr,
    pub mac: Mac,
    /// None if the guest has no IPv6.
    pub ipv6: Option<LeaseIpv6>,
}

/// A guest's IPv6 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseIpv6 {
    pub address: Ipv6Addr,
    /// The address of the bridge.
    pub gateway: Ipv6Addr,
}

impl LeaseIpv6 {
    /// The length of the prefix of a guest's address. No other address is on the guest's link.
    pub const PREFIX: u8 = 128;
}

impl Lease {
    /// Returns the addresses at which others reach the guest.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let ipv6 = self.ipv6.map(|ipv6| ipv6.address.into());
        std::iter::once(self.address.into()).chain(ipv6)
    }

    /// Returns the addresses for this slot of the subnet and of the IPv6 network, if there is one.
    ///
    /// # Errors
    /// `exhausted` when the subnet has no address for this slot.
    pub fn of(subnet: Subnet, ipv6: Option<Ipv6Network>, slot: u32) -> Result<Self> {
        let address = subnet.guest(slot).ok_or_else(|| {
            let message = format!(
                "lease an address: network {subnet} has room for only {}",
                count(subnet.guests_max().into(), "VM")
            );
            Error::new(Kind::Exhausted, message)
                .hint("delete VMs (fcctl rm), or set a larger subnet under [network]")
        })?;
        Ok(Self {
            address,
            prefix: subnet.prefix(),
            gateway: subnet.gateway(),
            mac: Mac::of(address),
            ipv6: ipv6.map(|network| LeaseIpv6 {
                address: network.guest(slot),
                gateway: network.gateway(),
            }),
        })
    }
}

/// A VM as the network sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// The VM's tag, `fc-<install>-<vm>-<generation>`, which is also the alias of its tap. It
    /// contains only a-z, 0-9 and `-`.
    pub tag: String,
    pub lease: Lease,
    pub access: Access,
    /// The maximum rate at which the guest receives, or None if nftables does not limit that rate.
    pub rx_bytes_per_s: Option<u64>,
    pub tx_bytes_per_s: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_of_slot_has_address_and_mac() {
        let subnet: Subnet = "10.89.0.0/24".parse().unwrap();
        let lease = Lease::of(subnet, None, 3).unwrap();
        assert_eq!(lease.address, Ipv4Addr::new(10, 89, 0, 5));
        assert_eq!(
            (lease.gateway, lease.prefix),
            (Ipv4Addr::new(10, 89, 0, 1), 24)
        );
        assert_eq!(lease.mac.to_string(), "02:fc:0a:59:00:05");
        assert_eq!(
            Lease::of(subnet, None, 253).unwrap_err().kind(),
            Kind::Exhausted
        );
    }

    #[test]
    fn lease_has_ipv6_address_of_slot() {
        let network = Ipv6Network::of_installation(0x1a2b_3c4d);
        let lease = Lease::of("10.89.0.0/24".parse().unwrap(), Some(network), 3).unwrap();
        let ipv6 = lease.ipv6.unwrap();
        assert_eq!(ipv6.address.to_string(), "fdfc:1a2b:3c4d::5");
        assert_eq!(ipv6.gateway.to_string(), "fdfc:1a2b:3c4d::1");
        assert_eq!(lease.mac.link_local().to_string(), "fe80::fc:aff:fe59:5");
    }

    #[test]
    fn leases_of_all_slots_are_distinct() {
        let subnet: Subnet = "10.89.0.0/24".parse().unwrap();
        let mut seen = std::collections::HashSet::new();
        for slot in 0..subnet.guests_max() {
            let lease = Lease::of(subnet, None, slot).unwrap();
            assert!(
                seen.insert(lease.mac)
                    && subnet.contains(lease.address)
                    && lease.address != lease.gateway
            );
            assert_eq!(lease.mac.0[0] & 3, 2, "unicast and locally administered");
        }
    }
}
