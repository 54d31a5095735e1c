//! Parses the interfaces, addresses and routes that `ip` prints.

use crate::error::{Error, Kind, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Link {
    #[serde(rename = "ifname")]
    pub name: String,
    #[serde(rename = "ifalias")]
    pub alias: Option<String>,
    /// The MAC address.
    pub address: Option<String>,
    /// The bridge that the interface belongs to.
    pub master: Option<String>,
    pub flags: Vec<String>,
    pub linkinfo: Info,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Info {
    /// The kind of a virtual interface, such as `bridge`, `tun` or `veth`, or None for hardware.
    pub info_kind: Option<String>,
    pub info_slave_data: SlaveData,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct SlaveData {
    pub isolated: bool,
}

impl Link {
    pub(super) fn is_kind(&self, kind: &str) -> bool {
        self.linkinfo.info_kind.as_deref() == Some(kind)
    }

    pub(super) fn is_up(&self) -> bool {
        self.flags.iter().any(|f| f == "UP")
    }

    /// Returns an empty string if there is no alias. The kernel does not distinguish the two.
    pub(super) fn alias(&self) -> &str {
        self.alias.as_deref().unwrap_or_default()
    }
}

/// Parses the output of `ip -json -details link show`, with or without a filter.
pub(super) fn parse_links(json: &[u8]) -> Result<Vec<Link>> {
    let links: Vec<Link> = parse("the interfaces", json)?;
    // `ip` prints an empty object for an interface that a filter leaves out.
    Ok(links.into_iter().filter(|l| !l.name.is_empty()).collect())
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Addressed {
    addr_info: Vec<Address>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Address {
    local: Option<IpAddr>,
    prefixlen: u8,
    scope: String,
}

/// Parses the output of `ip -json address show dev X` into addresses and prefix lengths. Link-local
/// addresses are left out.
pub(super) fn parse_addresses(json: &[u8]) -> Result<Vec<(IpAddr, u8)>> {
    let links: Vec<Addressed> = parse("the addresses", json)?;
    let all = links.into_iter().flat_map(|l| l.addr_info);
    let all = all.filter(|a| a.scope != "link" || matches!(a.local, Some(IpAddr::V4(_))));
    Ok(all.filter_map(|a| Some((a.local?, a.prefixlen))).collect())
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Neighbour {
    dst: Option<IpAddr>,
}

/// Parses the output of `ip -json neighbour show` into addresses.
pub(super) fn parse_neighbours(json: &[u8]) -> Result<Vec<IpAddr>> {
    let all: Vec<Neighbour> = parse("the neighbours", json)?;
    Ok(all.into_iter().filter_map(|n| n.dst).collect())
}

/// A route to a network, but not a default route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub base: Ipv4Addr,
    pub prefix: u8,
    pub dev: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RouteLine {
    dst: String,
    dev: Option<String>,
    r#type: Option<String>,
    protocol: Option<String>,
    /// The seconds until the route is removed.
    expires: Option<i64>,
}

/// An IPv6 route. The prefix of a default route is 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ipv6Route {
    pub base: Ipv6Addr,
    pub prefix: u8,
    pub dev: String,
    /// True if the route comes from router advertisements.
    pub is_advertised: bool,
}

/// Parses the output of `ip -json -6 -details route show`. Routes that reject packets are left out.
pub(super) fn parse_ipv6_routes(json: &[u8]) -> Result<Vec<Ipv6Route>> {
    let lines: Vec<RouteLine> = parse("the routes", json)?;
    let route = |line: RouteLine| {
        let (base, prefix) = match line.dst.split_once('/') {
            _ if line.dst == "default" => (Ipv6Addr::UNSPECIFIED, 0),
            Some((base, prefix)) => (base.parse().ok()?, prefix.parse().ok()?),
            None => (line.dst.parse().ok()?, 128),
        };
        let dev = line
            .dev
            .filter(|_| line.r#type.is_none_or(|t| t == "unicast"))?;
        // The route to a prefix that was advertised is one of the kernel's own, but it expires.
        let is_advertised = line.protocol.as_deref() == Some("ra") || line.expires.is_some();
        Some(Ipv6Route {
            base,
            prefix,
            dev,
            is_advertised,
        })
    };
    Ok(lines.into_iter().filter_map(route).collect())
}

/// Parses the output of `ip -json -4 -details route show table all`. Broadcast and default routes
/// are left out.
pub(super) fn parse_routes(json: &[u8]) -> Result<Vec<Route>> {
    let lines: Vec<RouteLine> = parse("the routes", json)?;
    let route = |line: RouteLine| {
        if line
            .r#type
            .as_deref()
            .is_some_and(|t| !matches!(t, "unicast" | "local"))
        {
            return None;
        }
        let (base, prefix) = match line.dst.split_once('/') {
            Some((base, prefix)) => (base.parse().ok()?, prefix.parse().ok()?),
            None => (line.dst.parse().ok()?, 32),
        };
        (prefix > 0).then(|| Route {
            base,
            prefix,
            dev: line.dev.unwrap_or_default(),
        })
    };
    Ok(lines.into_iter().filter_map(route).collect())
}

fn parse<T: DeserializeOwned + Default>(what: &str, json: &[u8]) -> Result<T> {
    if json.trim_ascii().is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(json)
        .map_err(|e| Error::new(Kind::Host, format!("read {what} of this host")).with_source(e))
}

/// Returns the bytes that an interface has received and sent, or None if they cannot be read. Does
/// not read sysfs, which shows the network namespace in which it was mounted.
pub fn received_and_sent(interface: &str) -> Option<(u64, u64)> {
    crate::locks::may_block("file access");
    parse_counters(
        &std::fs::read_to_string("/proc/thread-self/net/dev").ok()?,
        interface,
    )
}

/// Returns the first and the ninth number of the interface's line in /proc/net/dev, or None if
/// there is no such line.
fn parse_counters(dev: &str, interface: &str) -> Option<(u64, u64)> {
    let line = dev
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    let numbers: Vec<&str> = line.split_whitespace().collect();
    Some((
        numbers.first()?.parse().ok()?,
        numbers.get(8)?.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_parsed() {
        // This is shortened output of iproute2 6.1.
        let json = br#"[{},{"ifindex":1,"ifname":"lo","flags":["LOOPBACK","UP"],"link_type":"loopback","address":"00:00:00:00:00:00"},
            {"ifindex":3,"ifname":"fc1a2b3c4d-1","flags":["NO-CARRIER","BROADCAST","UP"],"master":"fcbr0","address":"2e:ff:60:3f:bd:90",
            "linkinfo":{"info_kind":"tun","info_data":{"type":"tap"},"info_slave_kind":"bridge","info_slave_data":{"isolated":true}},
            "ifalias":"fc-1a2b3c4d-tap"}]"#;
        let links = parse_links(json).unwrap();
        assert_eq!(links.len(), 2);
        assert!(links[0].is_up() && !links[0].is_kind("tun") && links[0].alias().is_empty());
        let tap = &links[1];
        assert!(tap.is_kind("tun") && tap.is_up() && tap.linkinfo.info_slave_data.isolated);
        assert_eq!(
            (tap.alias(), tap.master.as_deref()),
            ("fc-1a2b3c4d-tap", Some("fcbr0"))
        );
        assert_eq!(parse_links(b"").unwrap(), []);
        assert_eq!(parse_links(b"no json").unwrap_err().kind(), Kind::Host);
    }

    #[test]
    fn addresses_are_parsed() {
        let json =
            br#"[{"ifname":"fcbr0","addr_info":[{"family":"inet","local":"10.89.0.1","prefixlen":24,"scope":"global"}]},{}]"#;
        assert_eq!(
            parse_addresses(json).unwrap(),
            [(Ipv4Addr::new(10, 89, 0, 1).into(), 24)]
        );
    }

    #[test]
    fn routes_are_parsed() {
        let json = br#"[{"type":"unicast","dst":"default","gateway":"192.0.2.1","dev":"eth0"},
            {"type":"unicast","dst":"10.0.0.0/8","dev":"wg0"},{"type":"local","dst":"192.0.2.7","dev":"eth0","table":"local"},
            {"type":"broadcast","dst":"10.255.255.255","dev":"wg0"},{"dst":"172.17.0.0/16","dev":"docker0"}]"#;
        let routes = parse_routes(json).unwrap();
        let shown: Vec<_> = routes
            .iter()
            .map(|r| format!("{}/{} {}", r.base, r.prefix, r.dev))
            .collect();
        assert_eq!(
            shown,
            [
                "10.0.0.0/8 wg0",
                "192.0.2.7/32 eth0",
                "172.17.0.0/16 docker0"
            ]
        );
    }

    #[test]
    fn ipv6_routes_are_parsed() {
        let json = br#"[{"type":"unicast","dst":"default","gateway":"fe80::1","dev":"eth0","protocol":"ra"},
            {"type":"unreachable","dst":"default","dev":"lo"},{"type":"unicast","dst":"fd00:0:0:7::/64","dev":"wg0"},
            {"dst":"fd00:0:0:8::/64","dev":"eth0","protocol":"kernel","metric":256,"expires":2591989},
            {"dst":"fd00::9","dev":"wg1"},{"type":"unreachable","dst":"fd00::/8","dev":"lo"}]"#;
        let found = parse_ipv6_routes(json).unwrap();
        let text: String = found
            .iter()
            .map(|r| format!("{}/{} {} {}\n", r.base, r.prefix, r.dev, r.is_advertised))
            .collect();
        expect_test::expect![[r#"
            ::/0 eth0 true
            fd00:0:0:7::/64 wg0 false
            fd00:0:0:8::/64 eth0 true
            fd00::9/128 wg1 false
        "#]]
        .assert_eq(&text);
    }

    #[test]
    fn counters_are_parsed() {
        let dev = "Inter-|   Receive\n face |bytes    packets\n    lo: 1 2 3 4 5 6 7 8 9 10\nfc1a2b3c4d-1:  11 2 3 4 5 6 7 8 99 10 11\n";
        assert_eq!(parse_counters(dev, "fc1a2b3c4d-1"), Some((11, 99)));
        assert_eq!(
            (parse_counters(dev, "lo"), parse_counters(dev, "fc1a2b3c4d")),
            (Some((1, 9)), None)
        );
    }
}
