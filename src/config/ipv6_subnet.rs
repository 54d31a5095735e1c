//! The IPv6 addresses of guests on the bridge.

use super::section::Value;
use crate::error::{Error, Kind, Result};
use crate::host::text::quoted;
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

/// The number of the first guest's address. The lowest addresses are the network's and the
/// bridge's.
const FIRST_GUEST: u32 = 2;

/// The setting `ipv6_subnet`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String")]
pub enum Ipv6Subnet {
    /// A network that is derived from the installation's id.
    Auto,
    Fixed(Ipv6Network),
}

/// A network of unique local addresses (RFC 4193) with a prefix of 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6Network {
    base: Ipv6Addr,
}

impl Ipv6Network {
    pub const PREFIX: u8 = 64;

    /// Returns the network of an installation, whose id has eight hexadecimal digits.
    pub fn of_installation(id: u32) -> Self {
        let [high, low] = [id >> 16, id & 0xffff].map(|half| half as u16);
        Self {
            base: Ipv6Addr::new(0xfdfc, high, low, 0, 0, 0, 0, 0),
        }
    }

    /// Returns the bridge's own address.
    pub fn gateway(self) -> Ipv6Addr {
        self.host(1)
    }

    /// Returns the multicast address that solicitations for the bridge's address go to (RFC 4291,
    /// 2.7.1).
    pub fn solicited_gateway(self) -> Ipv6Addr {
        let [.., a, b, c] = self.gateway().octets();
        let low = u128::from(u32::from_be_bytes([0xff, a, b, c]));
        ((0xff02 << 112) | (1 << 32) | low).into()
    }

    /// Returns the address of the guest in slot `slot`, counted from 0.
    pub fn guest(self, slot: u32) -> Ipv6Addr {
        self.host(u128::from(slot) + u128::from(FIRST_GUEST))
    }

    fn host(self, number: u128) -> Ipv6Addr {
        (u128::from(self.base) | number).into()
    }

    pub fn contains(self, address: Ipv6Addr) -> bool {
        self.overlaps(address, Self::PREFIX)
    }

    /// True if the two networks share an address. `prefix` may be anything up to 128.
    pub fn overlaps(self, base: Ipv6Addr, prefix: u8) -> bool {
        let shorter = u32::from(Self::PREFIX.min(prefix.min(128)));
        let mask = u128::MAX.checked_shl(128 - shorter).unwrap_or(0);
        u128::from(self.base) & mask == u128::from(base) & mask
    }
}

impl fmt::Display for Ipv6Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, Self::PREFIX)
    }
}

impl Value for Ipv6Subnet {}

impl Serialize for Ipv6Subnet {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Ipv6Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(network) => network.fmt(f),
        }
    }
}

impl FromStr for Ipv6Subnet {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            let message = format!("network.ipv6_subnet {} is not valid: {why}", quoted(text));
            Error::new(Kind::InvalidConfig, message)
                .hint("write \"auto\" or a network such as fd12:3456:789a::/64")
        };
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let (base, prefix) = text
            .split_once('/')
            .ok_or_else(|| bad("it is not \"auto\" or a network; ipv6 = \"off\" turns IPv6 off"))?;
        let base: Ipv6Addr = base.parse().map_err(|_| bad("it has no IPv6 address"))?;
        if prefix.parse() != Ok(Ipv6Network::PREFIX) {
            return Err(bad("the prefix must be 64 bits long"));
        }
        if base.octets()[0] != 0xfd {
            return Err(bad("it must be in fd00::/8, whose addresses are local"));
        }
        let is_base = u128::from(base) & u128::from(u64::MAX) == 0;
        if !is_base {
            return Err(bad("the address has bits beyond the prefix"));
        }
        Ok(Self::Fixed(Ipv6Network { base }))
    }
}

impl TryFrom<String> for Ipv6Subnet {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_assigns_addresses() {
        let network = Ipv6Network::of_installation(0x1a2b_3c4d);
        assert_eq!(network.to_string(), "fdfc:1a2b:3c4d::/64");
        assert_eq!(network.gateway().to_string(), "fdfc:1a2b:3c4d::1");
        assert_eq!(network.solicited_gateway().to_string(), "ff02::1:ff00:1");
        assert_eq!(network.guest(3).to_string(), "fdfc:1a2b:3c4d::5");
        assert!(network.contains(network.guest(u32::MAX)));
        assert!(!network.contains("fdfc:1a2b:3c4d:1::5".parse().unwrap()));
        assert!(network.overlaps("fd00::".parse().unwrap(), 8));
        assert!(network.overlaps("::".parse().unwrap(), 0));
        assert!(network.overlaps(network.guest(0), 128));
        assert!(!network.overlaps("fd00::".parse().unwrap(), 48));
    }

    #[test]
    fn subnet_round_trips_and_invalid_ones_are_rejected() {
        for good in ["auto", "fd12:3456:789a::/64", "fd00:0:0:7::/64"] {
            assert_eq!(good.parse::<Ipv6Subnet>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "on",
            "off",
            "fd00::",
            "fd00::/",
            "fd00::/48",
            "fd00::1/64",
            "2001:db8::/64",
            "fec0::/64",
            "10.89.0.0/24",
        ] {
            let e = bad.parse::<Ipv6Subnet>().unwrap_err();
            assert_eq!(e.kind(), Kind::InvalidConfig, "{bad}");
        }
    }
}
