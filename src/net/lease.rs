//! Computes the addresses of a guest from the subnet and the VM's slot, without doing any I/O.

use crate::config::Subnet;
use crate::error::{Error, Kind, Result};
use crate::host::plural::count;
use std::fmt;
use std::net::Ipv4Addr;

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
}

impl Lease {
    /// Returns the addresses for this slot of the subnet.
    ///
    /// # Errors
    /// `exhausted` when the subnet has no address for this slot.
    pub fn of(subnet: Subnet, slot: u32) -> Result<Self> {
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
        let lease = Lease::of(subnet, 3).unwrap();
        assert_eq!(lease.address, Ipv4Addr::new(10, 89, 0, 5));
        assert_eq!(
            (lease.gateway, lease.prefix),
            (Ipv4Addr::new(10, 89, 0, 1), 24)
        );
        assert_eq!(lease.mac.to_string(), "02:fc:0a:59:00:05");
        assert_eq!(Lease::of(subnet, 253).unwrap_err().kind(), Kind::Exhausted);
    }

    #[test]
    fn leases_of_all_slots_are_distinct() {
        let subnet: Subnet = "10.89.0.0/24".parse().unwrap();
        let mut seen = std::collections::HashSet::new();
        for slot in 0..subnet.guests_max() {
            let lease = Lease::of(subnet, slot).unwrap();
            assert!(
                seen.insert(lease.mac)
                    && subnet.contains(lease.address)
                    && lease.address != lease.gateway
            );
            assert_eq!(lease.mac.0[0] & 3, 2, "unicast and locally administered");
        }
    }
}
