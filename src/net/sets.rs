//! The sets and maps that hold the guests and their published ports. `rules.rs` creates them and
//! contains the rules that use them. This module only builds scripts and parses nft's answers.

use super::names::Names;
use super::{Access, Guest};
use crate::api::port::{Port, Protocol};
use crate::error::{Error, Kind, Result};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr};

/// The set of (tap, MAC, address) in the `bridge` table.
pub(super) const GUESTS: &str = "guests";
/// The same for IPv6. A guest has two elements, for its address and for its link-local address.
pub(super) const GUESTS_IPV6: &str = "guests6";
/// The set of taps of guests with a network, in the `bridge` table. Only these guests may reach
/// each other.
pub(super) const OPEN: &str = "open";
/// The set of taps whose guests have a limit on what they receive, in the `bridge` table. Each
/// element has its own limit.
pub(super) const RECEIVING: &str = "receiving";
/// The set of taps whose guests have a limit on what they send, in the `bridge` table.
pub(super) const SENDING: &str = "sending";
/// The number of bytes that may pass at once in addition to one second's worth
/// (net/netfilter/nft_limit.c in Linux). This is enough for a few of the largest frames, which have
/// 64 KiB with segmentation offload.
pub(super) const BURST_BYTES: u64 = 256 << 10;
/// The set of addresses that may reach the outside, in the `inet` table.
pub(super) const NAT: &str = "nat";
pub(super) const NAT_IPV6: &str = "nat6";
/// The maps of published ports, from (address, protocol, port) on the host to (address, port) of a
/// guest. The second map is for ports on all addresses of the host. An element's comment is the tag
/// of its VM.
pub(super) const PUBLISHED: &str = "published";
pub(super) const PUBLISHED_ANY: &str = "published_any";

/// An element of the guests sets, as read from the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Element {
    pub tap: String,
    pub mac: String,
    pub address: IpAddr,
}

/// An element of the maps of published ports, as read from the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Published {
    /// The VM's tag, which is empty if something else added the element.
    pub tag: String,
    /// The guest's address.
    pub address: Ipv4Addr,
    pub port: Port,
}

impl Element {
    /// Returns the elements of a guest.
    pub(super) fn all_of(tap: &str, guest: &Guest) -> Vec<Self> {
        let mac = guest.lease.mac;
        let ipv6 = guest.lease.ipv6.iter();
        let ipv6 = ipv6.flat_map(|ipv6| [ipv6.address.into(), mac.link_local().into()]);
        std::iter::once(guest.lease.address.into())
            .chain(ipv6)
            .map(|address| Self {
                tap: tap.to_owned(),
                mac: mac.to_string(),
                address,
            })
            .collect()
    }
}

/// Builds the scripts that change the elements of the sets.
#[derive(Clone, Debug)]
pub(super) struct Sets {
    table: String,
}

impl Sets {
    pub(super) fn new(names: &Names) -> Self {
        Self {
            table: names.table(),
        }
    }

    /// Returns the script that adds a guest's elements. Adding them twice is not an error.
    pub(super) fn add(&self, tap: &str, guest: &Guest) -> String {
        crate::locks::may_block("file access");
        let elements = Element::all_of(tap, guest);
        let mut script: String = elements.iter().map(|e| self.element("add", e)).collect();
        if guest.access == Access::Nat {
            script += &self.open("add", tap);
            script.extend(guest.lease.addresses().map(|a| self.nat("add", a)));
        }
        script + &self.rates(tap, guest)
    }

    /// Returns the script that replaces the rate limits of a guest.
    pub(super) fn rates(&self, tap: &str, guest: &Guest) -> String {
        let of = |set: &str, rate: Option<u64>| {
            let limit = rate.map(|rate| {
                format!(
                    "add element bridge {} {set} {{ \"{tap}\" limit rate over {rate} bytes/second burst {BURST_BYTES} bytes }}\n",
                    self.table
                )
            });
            self.no_rate(set, tap) + &limit.unwrap_or_default()
        };
        of(RECEIVING, guest.rx_bytes_per_s) + &of(SENDING, guest.tx_bytes_per_s)
    }

    /// Returns the script that removes a rate limit. Deleting a missing element fails, so the
    /// script adds it first.
    fn no_rate(&self, set: &str, tap: &str) -> String {
        let element = format!("element bridge {} {set} {{ \"{tap}\" }}\n", self.table);
        format!("add {element}delete {element}")
    }

    /// Returns the script that removes these elements. Missing elements are not an error.
    pub(super) fn remove(&self, guests: &[Element], nat: &[IpAddr]) -> String {
        crate::locks::may_block("file access");
        let mut script = String::new();
        for element in guests {
            script += &self.element("add", element);
            script += &self.element("delete", element);
            script += &self.open("add", &element.tap);
            script += &self.open("delete", &element.tap);
            script += &[RECEIVING, SENDING]
                .map(|set| self.no_rate(set, &element.tap))
                .concat();
        }
        for address in nat {
            script += &self.nat("add", *address);
            script += &self.nat("delete", *address);
        }
        script
    }

    fn element(&self, verb: &str, e: &Element) -> String {
        let set = if e.address.is_ipv4() {
            GUESTS
        } else {
            GUESTS_IPV6
        };
        format!(
            "{verb} element bridge {} {set} {{ \"{}\" . {} . {} }}\n",
            self.table, e.tap, e.mac, e.address
        )
    }

    fn open(&self, verb: &str, tap: &str) -> String {
        format!(
            "{verb} element bridge {} {OPEN} {{ \"{tap}\" }}\n",
            self.table
        )
    }

    fn nat(&self, verb: &str, address: IpAddr) -> String {
        let set = if address.is_ipv4() { NAT } else { NAT_IPV6 };
        format!("{verb} element inet {} {set} {{ {address} }}\n", self.table)
    }

    /// Returns the script that publishes a port. Publishing the same port again is not an error.
    pub(super) fn publish(&self, p: &Published) -> String {
        let (map, key) = Self::key(&p.port);
        let Port { guest_port, .. } = p.port;
        format!(
            "add element inet {} {map} {{ {key} comment \"{}\" : {} . {guest_port} }}\n",
            self.table, p.tag, p.address
        )
    }

    /// Returns the script that unpublishes a port. The script fails if the port is not published.
    pub(super) fn unpublish(&self, p: &Published) -> String {
        let (map, key) = Self::key(&p.port);
        format!("delete element inet {} {map} {{ {key} }}\n", self.table)
    }

    fn key(port: &Port) -> (&'static str, String) {
        let rest = format!("{} . {}", port.protocol.name(), port.host_port);
        if port.host_addr.is_unspecified() {
            (PUBLISHED_ANY, rest)
        } else {
            (PUBLISHED, format!("{} . {rest}", port.host_addr))
        }
    }

    pub(super) fn list_published(&self) -> [[&str; 5]; 2] {
        [PUBLISHED, PUBLISHED_ANY].map(|map| ["list", "map", "inet", self.table.as_str(), map])
    }

    /// Lists [`GUESTS`] or [`GUESTS_IPV6`].
    pub(super) fn list_guests(&self, set: &'static str) -> [&str; 5] {
        ["list", "set", "bridge", &self.table, set]
    }

    /// Lists [`NAT`] or [`NAT_IPV6`].
    pub(super) fn list_nat(&self, set: &'static str) -> [&str; 5] {
        ["list", "set", "inet", &self.table, set]
    }
}

/// Returns the elements in the answer to [`Sets::list_guests`]. Elements that fcd did not create
/// are skipped.
pub(super) fn parse_guests(json: &[u8]) -> Result<Vec<Element>> {
    let element = |value: &Value| {
        let parts = value.get("concat")?.as_array()?;
        let [tap, mac, address] = parts.as_slice() else {
            return None;
        };
        Some(Element {
            tap: tap.as_str()?.into(),
            mac: mac.as_str()?.into(),
            address: address.as_str()?.parse().ok()?,
        })
    };
    Ok(elements(json)?.iter().filter_map(element).collect())
}

/// Returns the elements in the answer to [`Sets::list_nat`].
pub(super) fn parse_nat(json: &[u8]) -> Result<Vec<IpAddr>> {
    Ok(elements(json)?
        .iter()
        .filter_map(|v| v.as_str()?.parse().ok())
        .collect())
}

/// Returns the elements in one of the answers to [`Sets::list_published`].
pub(super) fn parse_published(json: &[u8]) -> Result<Vec<Published>> {
    let element = |pair: &Value| {
        let [key, target] = pair.as_array()?.as_slice() else {
            return None;
        };
        let tag = key
            .pointer("/elem/comment")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        let key = key
            .pointer("/elem/val")
            .unwrap_or(key)
            .get("concat")?
            .as_array()?;
        let (host_addr, rest) = match key.as_slice() {
            [address, rest @ ..] if rest.len() == 2 => (address.as_str()?.parse().ok()?, rest),
            rest => (Ipv4Addr::UNSPECIFIED, rest),
        };
        let [protocol, host_port] = rest else {
            return None;
        };
        let [address, guest_port] = target.get("concat")?.as_array()?.as_slice() else {
            return None;
        };
        let number = |v: &Value| v.as_u64().and_then(|n| u16::try_from(n).ok());
        let protocol = [Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .find(|p| protocol.as_str() == Some(p.name()))?;
        let port = Port {
            host_addr,
            host_port: number(host_port)?,
            guest_port: number(guest_port)?,
            protocol,
        };
        Some(Published {
            tag,
            address: address.as_str()?.parse().ok()?,
            port,
        })
    };
    Ok(elements(json)?.iter().filter_map(element).collect())
}

fn elements(json: &[u8]) -> Result<Vec<Value>> {
    let bad =
        |e: serde_json::Error| Error::new(Kind::Host, "read a set of nftables").with_source(e);
    let value: Value = serde_json::from_slice(json).map_err(bad)?;
    let all = value
        .get("nftables")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let set = all
        .filter_map(|v| v.get("set").or_else(|| v.get("map")))
        .find_map(|set| set.get("elem"));
    Ok(set.and_then(Value::as_array).cloned().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Network as Config;
    use crate::net::Lease;
    use expect_test::expect;

    fn sets() -> Sets {
        Sets::new(&Names::of("1a2b3c4d").unwrap())
    }

    fn guest(access: Access) -> Guest {
        let lease = Lease::of(Config::default().subnet, None, 3).unwrap();
        Guest {
            tag: "fc-1a2b3c4d-0123456789ab-1".into(),
            lease,
            access,
            rx_bytes_per_s: None,
            tx_bytes_per_s: None,
        }
    }

    #[test]
    fn elements_of_a_guest_are_formatted() {
        let nat = sets().add("fc1a2b3c4d-7", &guest(Access::Nat));
        expect![[r#"
            add element bridge fcd_1a2b3c4d guests { "fc1a2b3c4d-7" . 02:fc:0a:59:00:05 . 10.89.0.5 }
            add element bridge fcd_1a2b3c4d open { "fc1a2b3c4d-7" }
            add element inet fcd_1a2b3c4d nat { 10.89.0.5 }
            add element bridge fcd_1a2b3c4d receiving { "fc1a2b3c4d-7" }
            delete element bridge fcd_1a2b3c4d receiving { "fc1a2b3c4d-7" }
            add element bridge fcd_1a2b3c4d sending { "fc1a2b3c4d-7" }
            delete element bridge fcd_1a2b3c4d sending { "fc1a2b3c4d-7" }
        "#]]
        .assert_eq(&nat);
        let mut with_ipv6 = guest(Access::Nat);
        let network = crate::config::Ipv6Network::of_installation(0x1a2b_3c4d);
        with_ipv6.lease = Lease::of(Config::default().subnet, Some(network), 3).unwrap();
        let script = sets().add("fc1a2b3c4d-7", &with_ipv6);
        let only: String = script
            .lines()
            .filter(|l| !nat.contains(l))
            .map(|l| format!("{l}\n"))
            .collect();
        expect![[r#"
            add element bridge fcd_1a2b3c4d guests6 { "fc1a2b3c4d-7" . 02:fc:0a:59:00:05 . fdfc:1a2b:3c4d::5 }
            add element bridge fcd_1a2b3c4d guests6 { "fc1a2b3c4d-7" . 02:fc:0a:59:00:05 . fe80::fc:aff:fe59:5 }
            add element inet fcd_1a2b3c4d nat6 { fdfc:1a2b:3c4d::5 }
        "#]]
        .assert_eq(&only);
        let none = sets().add("fc1a2b3c4d-7", &guest(Access::None));
        assert!(
            none.starts_with(nat.lines().next().unwrap())
                && !none.contains(" open ")
                && !none.contains(" inet "),
            "{none}"
        );
        let limited = Guest {
            tx_bytes_per_s: Some(50 << 20),
            rx_bytes_per_s: Some(65_536),
            ..guest(Access::None)
        };
        expect![[r#"
            add element bridge fcd_1a2b3c4d receiving { "fc1a2b3c4d-7" }
            delete element bridge fcd_1a2b3c4d receiving { "fc1a2b3c4d-7" }
            add element bridge fcd_1a2b3c4d receiving { "fc1a2b3c4d-7" limit rate over 65536 bytes/second burst 262144 bytes }
            add element bridge fcd_1a2b3c4d sending { "fc1a2b3c4d-7" }
            delete element bridge fcd_1a2b3c4d sending { "fc1a2b3c4d-7" }
            add element bridge fcd_1a2b3c4d sending { "fc1a2b3c4d-7" limit rate over 52428800 bytes/second burst 262144 bytes }
        "#]]
        .assert_eq(&sets().rates("fc1a2b3c4d-7", &limited));
    }

    #[test]
    fn ports_are_read_back() {
        let json = br#"{"nftables": [{"metainfo": {}}, {"map": {"family": "inet", "name": "published", "table": "t",
            "type": ["ipv4_addr", "inet_proto", "inet_service"], "handle": 1, "map": "ipv4_addr . inet_service", "elem": [
            [{"elem": {"val": {"concat": ["127.0.0.1", "tcp", 8080]}, "comment": "fc-1-2-3"}}, {"concat": ["10.89.0.5", 80]}],
            [{"concat": ["udp", 53]}, {"concat": ["10.89.0.6", 5353]}], [7, 8], [{"concat": ["x", "y"]}, {"concat": []}], 9]}}]}"#;
        let port = |host_addr: [u8; 4], host_port, guest_port, protocol| Port {
            host_addr: host_addr.into(),
            host_port,
            guest_port,
            protocol,
        };
        let first = Published {
            tag: "fc-1-2-3".into(),
            address: [10, 89, 0, 5].into(),
            port: port([127, 0, 0, 1], 8080, 80, Protocol::Tcp),
        };
        let second = Published {
            tag: String::new(),
            address: [10, 89, 0, 6].into(),
            port: port([0, 0, 0, 0], 53, 5353, Protocol::Udp),
        };
        assert_eq!(parse_published(json).unwrap(), [first.clone(), second]);
        let sets = sets();
        expect![[r#"
            add element inet fcd_1a2b3c4d published { 127.0.0.1 . tcp . 8080 comment "fc-1-2-3" : 10.89.0.5 . 80 }
            delete element inet fcd_1a2b3c4d published { 127.0.0.1 . tcp . 8080 }
        "#]]
        .assert_eq(&(sets.publish(&first) + &sets.unpublish(&first)));
    }

    #[test]
    fn sets_are_read_back() {
        let json =
            br#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"set": {"family": "bridge", "name": "guests", "table": "t",
            "type": ["ifname", "ether_addr", "ipv4_addr"], "handle": 1,
            "elem": [{"concat": ["fc1a2b3c4d-1", "02:fc:0a:59:00:05", "10.89.0.5"]}, {"concat": ["x"]}, 7]}}]}"#;
        let element = Element {
            tap: "fc1a2b3c4d-1".into(),
            mac: "02:fc:0a:59:00:05".into(),
            address: Ipv4Addr::new(10, 89, 0, 5).into(),
        };
        assert_eq!(parse_guests(json).unwrap(), [element]);
        assert_eq!(
            parse_guests(br#"{"nftables": [{"set": {"name": "guests"}}]}"#).unwrap(),
            []
        );
        assert_eq!(
            parse_nat(br#"{"nftables": [{"set": {"elem": ["10.89.0.5"]}}]}"#).unwrap(),
            [IpAddr::from([10, 89, 0, 5])]
        );
        assert!(parse_nat(b"").is_err());
    }
}
