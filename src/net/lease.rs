//! What a guest has of the network: pure functions of the subnet and the VM's slot.

use crate::config::Subnet;
use crate::error::{Error, Kind, Result};
use std::fmt;
use std::net::Ipv4Addr;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// `02:fc` (locally administered) and the IPv4 address: the same address always has the same.
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

/// How far a guest's network reaches: `--net`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Outwards through the host's address, and names.
    #[default]
    Nat,
    /// Nowhere; only what the host itself opens to the guest, as SSH, works.
    None,
}

/// A guest's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    pub address: Ipv4Addr,
    /// Length of the subnet's prefix, in bits.
    pub prefix: u8,
    /// The bridge, which is also the name server.
    pub gateway: Ipv4Addr,
    pub mac: Mac,
}

impl Lease {
    /// # Errors
    /// `exhausted` when the subnet has no address for this slot.
    pub fn of(subnet: Subnet, slot: u32) -> Result<Self> {
        let address = subnet.guest(slot).ok_or_else(|| {
            let message = format!("lease an address: network {subnet} has room for {} VMs only", subnet.guests_max());
            Error::new(Kind::Exhausted, message).hint("delete VMs (fcctl rm), or set a larger subnet under [network]")
        })?;
        Ok(Self { address, prefix: subnet.prefix(), gateway: subnet.gateway(), mac: Mac::of(address) })
    }
}

/// A VM as the network sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// `fc-<install>-<vm>-<generation>`: the alias of its tap. a-z, 0-9 and - only.
    pub tag: String,
    pub lease: Lease,
    pub access: Access,
    /// What it may receive in a second, where the network limits that.
    pub rx_bytes_per_s: Option<u64>,
    pub tx_bytes_per_s: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_has_its_address_and_mac() {
        let subnet: Subnet = "10.89.0.0/24".parse().unwrap();
        let lease = Lease::of(subnet, 3).unwrap();
        assert_eq!(lease.address, Ipv4Addr::new(10, 89, 0, 5));
        assert_eq!((lease.gateway, lease.prefix), (Ipv4Addr::new(10, 89, 0, 1), 24));
        assert_eq!(lease.mac.to_string(), "02:fc:0a:59:00:05");
        assert_eq!(Lease::of(subnet, 253).unwrap_err().kind(), Kind::Exhausted);
    }

    #[test]
    fn no_two_slots_share_an_address_or_a_mac() {
        let subnet: Subnet = "10.89.0.0/24".parse().unwrap();
        let mut seen = std::collections::HashSet::new();
        for slot in 0..subnet.guests_max() {
            let lease = Lease::of(subnet, slot).unwrap();
            assert!(seen.insert(lease.mac) && subnet.contains(lease.address) && lease.address != lease.gateway);
            assert_eq!(lease.mac.0[0] & 3, 2, "unicast and locally administered");
        }
    }
}
