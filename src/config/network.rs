//! The section `[network]`: how guests reach the network, and how they are reached.

use super::ipv6_subnet::Ipv6Subnet;
use super::section::{Value, choices, section};
use crate::error::{Error, Kind, Result};
use crate::host::text::quoted;
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// Longest name of an interface, without the terminating NUL (IFNAMSIZ, netdevice(7)).
pub const INTERFACE_NAME_LEN_MAX: usize = 15;
/// The largest network has 65,533 guests, the smallest 5.
const PREFIX_MIN: u8 = 16;
const PREFIX_MAX: u8 = 29;
const TAPS_AHEAD_MAX: usize = 64;

choices! {
    /// How a guest is connected to the network.
    pub enum NetworkDriver {
        /// The same as `user`, also for root: a bridge changes the host, so fcd creates one only on
        /// request.
        Auto = "auto",
        /// A bridge with a tap device for each VM, and NAT. The daemon must be root.
        Bridge = "bridge",
        /// QEMU's user-mode network. It needs no privileges.
        User = "user",
    }
}

choices! {
    /// Decides whether guests have IPv6.
    pub enum Ipv6 {
        /// Guests have IPv6 if the host has an IPv6 address other than link-local ones when fcd
        /// starts.
        Auto = "auto",
        /// Guests have no IPv6.
        Off = "off",
    }
}

section! {
    /// How guests reach the network and how they are reached. See `fcctl help networking`.
    pub struct Network {
        /// The kind of network.
        driver: NetworkDriver = NetworkDriver::Auto,
        /// IPv6 in guests.
        ipv6: Ipv6 = Ipv6::Auto,
        /// Name of the bridge. fcd creates it, and never touches one that it did not create.
        bridge: String = "fcbr0".to_owned(),
        /// Addresses of the guests. The first one is the bridge's.
        subnet: Subnet = Subnet { base: Ipv4Addr::new(10, 89, 0, 0), prefix: 24 },
        /// IPv6 addresses of the guests on the bridge: `auto` for a network that is derived from
        /// the installation's id, or a network in fd00::/8 with a prefix of 64 bits.
        ipv6_subnet: Ipv6Subnet = Ipv6Subnet::Auto,
        /// Lets guests reach each other.
        allow_between_vms: bool = false,
        /// Answers `NAME.vm` on the bridge's address and forwards other questions to the host's
        /// resolvers.
        dns: bool = true,
        /// Tap devices that are kept ready for the next VMs.
        taps_ahead: usize = 4,
    }
}

impl Network {
    /// True if VMs get taps on a bridge.
    pub fn is_bridge(&self) -> bool {
        self.driver == NetworkDriver::Bridge
    }

    /// # Errors
    /// `invalid_config`.
    pub fn validate(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::new(Kind::InvalidConfig, what.to_owned()));
        let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let name = self.bridge.as_bytes();
        let begins_well = name.first().is_some_and(u8::is_ascii_lowercase);
        if !begins_well || name.len() > INTERFACE_NAME_LEN_MAX || !name.iter().all(|b| is_plain(*b))
        {
            return bad(
                "network.bridge must be 1 to 15 characters from a-z, 0-9 and -, and begin with a letter",
            );
        }
        if self.taps_ahead > TAPS_AHEAD_MAX {
            return bad("network.taps_ahead must be at most 64");
        }
        Ok(())
    }
}

/// An IPv4 network, written `10.89.0.0/24`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String")]
pub struct Subnet {
    base: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// Returns the network address, which no guest gets.
    pub fn base(self) -> Ipv4Addr {
        self.base
    }

    /// Returns the length of the prefix in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// Returns the bridge's own address, which is the first one.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) + 1)
    }

    fn size(self) -> u32 {
        1 << (32 - self.prefix)
    }

    /// Returns how many guests fit. Every address is for a guest except the network's, the
    /// gateway's and the broadcast address.
    pub fn guests_max(self) -> u32 {
        self.size() - 3
    }

    /// Returns the address of the guest in slot `slot`, counted from 0, or None if the network is
    /// too small.
    pub fn guest(self, slot: u32) -> Option<Ipv4Addr> {
        (slot < self.guests_max()).then(|| Ipv4Addr::from(u32::from(self.base) + 2 + slot))
    }

    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & !(self.size() - 1) == u32::from(self.base)
    }

    /// True if the two networks share an address. `prefix` may be anything up to 32.
    pub fn overlaps(self, base: Ipv4Addr, prefix: u8) -> bool {
        let shorter = self.prefix.min(prefix.min(32));
        let mask = u32::MAX.checked_shl(32 - u32::from(shorter)).unwrap_or(0);
        u32::from(self.base) & mask == u32::from(base) & mask
    }
}

impl Value for Subnet {}

impl Serialize for Subnet {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::new(
                Kind::InvalidConfig,
                format!("network.subnet {} is not valid: {why}", quoted(text)),
            )
            .hint("write it as 10.89.0.0/24")
        };
        let (base, prefix) = text
            .split_once('/')
            .ok_or_else(|| bad("there is no / in it"))?;
        let base: Ipv4Addr = base.parse().map_err(|_| bad("it has no IPv4 address"))?;
        let prefix: u8 = prefix
            .parse()
            .map_err(|_| bad("the length of the prefix is not a number"))?;
        if !(PREFIX_MIN..=PREFIX_MAX).contains(&prefix) {
            return Err(bad("the prefix must be 16 to 29 bits long"));
        }
        let subnet = Self { base, prefix };
        if !subnet.contains(base) {
            return Err(bad("the address has bits beyond the prefix"));
        }
        let usable = !(base.is_loopback()
            || base.is_link_local()
            || base.is_multicast()
            || base.octets()[0] == 0)
            && base.octets()[0] < 240;
        if !usable {
            return Err(bad("these addresses are reserved for other purposes"));
        }
        Ok(subnet)
    }
}

impl TryFrom<String> for Subnet {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnet_assigns_addresses() {
        let subnet: Subnet = "10.89.0.0/24".parse().unwrap();
        assert_eq!(subnet.to_string(), "10.89.0.0/24");
        assert_eq!(subnet.gateway(), Ipv4Addr::new(10, 89, 0, 1));
        assert_eq!(subnet.guest(0), Some(Ipv4Addr::new(10, 89, 0, 2)));
        assert_eq!(subnet.guest(252), Some(Ipv4Addr::new(10, 89, 0, 254)));
        assert_eq!((subnet.guest(253), subnet.guest(u32::MAX)), (None, None));
        assert!(
            subnet.contains(Ipv4Addr::new(10, 89, 0, 255))
                && !subnet.contains(Ipv4Addr::new(10, 89, 1, 0))
        );
        let large: Subnet = "172.20.0.0/16".parse().unwrap();
        assert_eq!(
            large.guest(large.guests_max() - 1),
            Some(Ipv4Addr::new(172, 20, 255, 254))
        );
        assert_eq!("10.0.0.0/29".parse::<Subnet>().unwrap().guests_max(), 5);
    }

    #[test]
    fn subnet_invalid_is_rejected() {
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/",
            "10.0.0.0/8",
            "10.0.0.0/30",
            "10.0.0.1/24",
            "10.0.0/24",
            "127.0.0.0/16",
            "169.254.0.0/24",
            "224.0.0.0/24",
            "0.0.0.0/24",
            "255.255.0.0/24",
            "fd00::/64",
            "10.0.0.0/99999",
        ] {
            assert_eq!(
                bad.parse::<Subnet>().unwrap_err().kind(),
                Kind::InvalidConfig,
                "{bad}"
            );
        }
    }

    #[test]
    fn subnet_overlap_is_symmetric() {
        let subnet: Subnet = "10.89.0.0/24".parse().unwrap();
        let overlaps = |text: &str| {
            let (base, prefix) = text.split_once('/').unwrap();
            subnet.overlaps(base.parse().unwrap(), prefix.parse().unwrap())
        };
        assert!(
            overlaps("10.0.0.0/8")
                && overlaps("10.89.0.128/25")
                && overlaps("10.89.0.7/32")
                && overlaps("0.0.0.0/0")
        );
        assert!(!overlaps("10.89.1.0/24") && !overlaps("192.168.0.0/16"));
    }

    #[test]
    fn bridge_name_is_validated() {
        let with = |name: &str| {
            Network {
                bridge: name.to_owned(),
                ..Network::default()
            }
            .validate()
        };
        for good in ["fcbr0", "b", "a-b", &"b".repeat(15)] {
            with(good).unwrap();
        }
        for bad in [
            "",
            "0",
            "-b",
            "a b",
            "a/b",
            "a\"b",
            "..",
            "ä",
            &"b".repeat(16),
        ] {
            assert_eq!(with(bad).unwrap_err().kind(), Kind::InvalidConfig, "{bad}");
        }
    }
}
