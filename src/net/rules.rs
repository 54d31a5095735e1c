//! The nftables rules, as scripts for `nft -f -`. Pure.
//!
//! There are two tables, both named `fcd_<install>`, and no script ever names another one. The
//! `bridge` table lets a frame from one of our taps pass only if it has the MAC and the address of
//! its lease. The `inet` table keeps guests away from the host and from each other, and masquerades
//! them. The rules are the same for all VMs. A VM is an element of some sets, so adding one is a
//! small transaction.
//!
//! Answers are recognised by `ct direction reply` and not only by their state. Otherwise a guest
//! whose network was taken away could keep using a connection that it opened before.

use super::names::Names;
use super::{Access, Guest};
use crate::api::port::{Port, Protocol};
use crate::config::{Network as Config, Subnet};
use crate::error::{Error, Kind, Result};
use serde_json::Value;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// The set of (tap, MAC, address) in the `bridge` table.
const GUESTS: &str = "guests";
/// The set of taps of guests with a network, in the `bridge` table. Only those may reach each other
/// at all.
const OPEN: &str = "open";
/// The sets of taps with a rate limit for what the guest receives and sends, in the `bridge` table.
/// Each element has its own limit.
const RECEIVING: &str = "receiving";
const SENDING: &str = "sending";
/// How many bytes may pass at once on top of a second's worth (the kernel's
/// net/netfilter/nft_limit.c). This is room for a few of the largest frames, which have 64 KiB with
/// segmentation offload.
const BURST_BYTES: u64 = 256 << 10;
/// The set of addresses that may reach the outside, in the `inet` table.
const NAT: &str = "nat";
/// The maps of published ports, from (address, protocol, port) on the host to (address, port) of a
/// guest. The second map is for ports on all addresses of the host. An element's comment is the tag
/// of its VM.
const PUBLISHED: &str = "published";
const PUBLISHED_ANY: &str = "published_any";
/// Queries per second that one guest may send to the name server. More are dropped here, before
/// they fill the server's socket buffer and crowd out those of other guests.
const QUESTIONS_PER_S_MAX: u32 = 1000;

/// The settings that the rules depend on.
#[derive(Clone, Debug)]
pub struct Rules {
    table: String,
    tap_prefix: String,
    bridge: String,
    subnet: Subnet,
    allow_between_vms: bool,
}

/// An element of the guests set, as read from the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    pub tap: String,
    pub mac: String,
    pub address: Ipv4Addr,
}

/// An element of the maps of published ports, as read from the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The VM's tag. Empty if something else added the element.
    pub tag: String,
    /// The guest's address.
    pub address: Ipv4Addr,
    pub port: Port,
}

impl Element {
    pub fn of(tap: &str, guest: &Guest) -> Self {
        Self { tap: tap.to_owned(), mac: guest.lease.mac.to_string(), address: guest.lease.address }
    }
}

impl Rules {
    pub fn new(names: &Names, config: &Config) -> Self {
        Self {
            table: names.table(),
            tap_prefix: names.tap_prefix(),
            bridge: config.bridge.clone(),
            subnet: config.subnet,
            allow_between_vms: config.allow_between_vms,
        }
    }

    /// Returns the script that sets up both tables. Elements of the sets are kept, so running VMs
    /// are not interrupted.
    pub fn apply(&self) -> String {
        let mut script = String::new();
        self.bridge_table(&mut script);
        self.inet_table(&mut script);
        script
    }

    fn chain(&self, script: &mut String, family: &str, name: &str, hook: Option<&str>, rules: &[String]) {
        let table = &self.table;
        let hook = hook.map(|h| format!(" {{ type {h}; policy accept; }}")).unwrap_or_default();
        let _ = writeln!(script, "add chain {family} {table} {name}{hook}\nflush chain {family} {table} {name}");
        for rule in rules {
            let _ = writeln!(script, "add rule {family} {table} {name} {rule}");
        }
    }

    fn bridge_table(&self, script: &mut String) {
        let (table, taps) = (&self.table, &self.tap_prefix);
        let _ = writeln!(script, "add table bridge {table}");
        let _ = writeln!(script, "add set bridge {table} {GUESTS} {{ type ifname . ether_addr . ipv4_addr; }}");
        let _ = writeln!(script, "add set bridge {table} {OPEN} {{ type ifname; }}");
        for set in [RECEIVING, SENDING] {
            // nft requires a default limit for the set. It is never used, because every element has
            // its own.
            let _ = writeln!(script, "add set bridge {table} {set} {{ type ifname; limit rate over 1 bytes/second; }}");
        }
        let from_tap = [
            format!("iifname @{SENDING} drop"),
            "ether type 8021q drop".to_owned(),
            format!("ether type ip iifname . ether saddr . ip saddr @{GUESTS} accept"),
            format!(
                "ether type arp iifname . ether saddr . arp saddr ip @{GUESTS} iifname . arp saddr ether . arp saddr ip @{GUESTS} accept"
            ),
            // This also drops IPv6, which guests do not have.
            "drop".to_owned(),
        ];
        self.chain(script, "bridge", "from_tap", None, &from_tap);
        // Bridge ports are isolated as well, unless guests may reach each other.
        let between = format!("iifname \"{taps}*\" oifname \"{taps}*\"");
        let mut forward = vec![format!("{between} drop")];
        if self.allow_between_vms {
            forward.insert(0, format!("{between} iifname @{OPEN} oifname @{OPEN} accept"));
        }
        self.chain(script, "bridge", "between", Some("filter hook forward priority -200"), &forward);
        // This runs before any other table sees the frame. A spare tap is in no set, so nothing
        // passes it.
        let hook = "filter hook prerouting priority -400";
        self.chain(script, "bridge", "ports", Some(hook), &[format!("iifname \"{taps}*\" jump from_tap")]);
        let hook = "filter hook postrouting priority 0";
        self.chain(script, "bridge", "to_tap", Some(hook), &[format!("oifname @{RECEIVING} drop")]);
    }

    fn inet_table(&self, script: &mut String) {
        let (table, bridge, subnet) = (&self.table, &self.bridge, self.subnet);
        let gateway = subnet.gateway();
        let _ = writeln!(script, "add table inet {table}");
        let _ = writeln!(script, "add set inet {table} {NAT} {{ type ipv4_addr; }}");
        let _ =
            writeln!(script, "add set inet {table} asking {{ type ipv4_addr; flags dynamic,timeout; timeout 60s; size 65536; }}");
        let text = |rules: &[&str]| rules.iter().map(|r| (*r).to_owned()).collect::<Vec<_>>();
        let mut of_host = vec![format!("meta l4proto {{ tcp, udp }} th dport 53 ip daddr {gateway} accept")];
        of_host.extend([format!("icmp type echo-request ip daddr {gateway} accept"), "drop".to_owned()]);
        self.chain(script, "inet", "of_host", None, &of_host);
        let from_guest = [
            "meta nfproto ipv6 drop",
            "ip daddr 169.254.0.0/16 drop",
            "ct state established,related ct direction reply accept",
            "ip saddr != @nat drop",
            &format!(
                "udp dport 53 update @asking {{ ip saddr limit rate over {QUESTIONS_PER_S_MAX}/second burst {QUESTIONS_PER_S_MAX} packets }} drop"
            ),
            "fib daddr type local jump of_host",
            "fib daddr type { broadcast, multicast } drop",
        ];
        self.chain(script, "inet", "from_guest", None, &text(&from_guest));
        // This runs after connection tracking but before any address translation, so that the
        // rules see the destination that the guest chose and not what another table made of it.
        let hook = "filter hook prerouting priority -150";
        self.chain(script, "inet", "arriving", Some(hook), &[format!("iifname \"{bridge}\" jump from_guest")]);
        let to_host = [
            // Only guests and this host may use the name server.
            format!("iifname != {{ \"lo\", \"{bridge}\" }} ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 drop"),
            format!("iifname != \"{bridge}\" accept"),
            "ct state established,related ct direction reply accept".to_owned(),
            "jump of_host".to_owned(),
        ];
        self.chain(script, "inet", "to_host", Some("filter hook input priority 0"), &to_host);
        let between = if self.allow_between_vms { "ip saddr @nat ip daddr @nat accept" } else { "drop" };
        let forward = [
            format!("iifname \"{bridge}\" oifname \"{bridge}\" {between}"),
            format!("iifname \"{bridge}\" oifname \"{bridge}\" drop"),
            format!("iifname \"{bridge}\" ip saddr @{NAT} accept"),
            format!("iifname \"{bridge}\" drop"),
            format!("oifname \"{bridge}\" ip daddr @{NAT} ct state established,related accept"),
            // Packets to a published port of the guest.
            format!("oifname \"{bridge}\" ip daddr @{NAT} ct status dnat accept"),
            format!("oifname \"{bridge}\" drop"),
        ];
        self.chain(script, "inet", "forward", Some("filter hook forward priority 0"), &forward);
        self.published(script);
        let leaving = [
            format!("oifname != \"{bridge}\" ip saddr @{NAT} masquerade"),
            // The host's own connections to a published loopback port. The guest could not answer
            // 127.0.0.1.
            format!("oifname \"{bridge}\" ip saddr 127.0.0.0/8 ct status dnat masquerade"),
        ];
        self.chain(script, "inet", "leaving", Some("nat hook postrouting priority 100"), &leaving);
    }

    /// The maps and rules of published ports, for packets that arrive and for those that the host
    /// sends.
    fn published(&self, script: &mut String) {
        let table = &self.table;
        let (key, target) = ("inet_proto . inet_service", "ipv4_addr . inet_service");
        let _ = writeln!(script, "add map inet {table} {PUBLISHED} {{ type ipv4_addr . {key} : {target}; }}");
        let _ = writeln!(script, "add map inet {table} {PUBLISHED_ANY} {{ type {key} : {target}; }}");
        let rules = [
            format!("dnat ip to ip daddr . meta l4proto . th dport map @{PUBLISHED}"),
            format!("fib daddr type local dnat ip to meta l4proto . th dport map @{PUBLISHED_ANY}"),
        ];
        // Only this host may use ports on its loopback. The kernel would drop such packets from
        // outside later, but only if
        // their destination is still a loopback address, so they must not be translated here.
        let not_from_outside = ["iifname != \"lo\" ip daddr 127.0.0.0/8 return".to_owned()];
        let arriving = [&not_from_outside[..], &rules].concat();
        self.chain(script, "inet", "published_in", Some("nat hook prerouting priority -100"), &arriving);
        self.chain(script, "inet", "published_own", Some("nat hook output priority -100"), &rules);
    }

    /// Adds a guest's elements. Adding them twice is not an error.
    pub fn add(&self, tap: &str, guest: &Guest) -> String {
        let mut script = self.element("add", &Element::of(tap, guest));
        if guest.access == Access::Nat {
            script += &self.open("add", tap);
            script += &self.nat("add", guest.lease.address);
        }
        script + &self.rates(tap, guest)
    }

    /// Replaces the rate limits of a guest.
    pub fn rates(&self, tap: &str, guest: &Guest) -> String {
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

    /// Removes a rate limit. Deleting a missing element fails, so the script adds it first.
    fn no_rate(&self, set: &str, tap: &str) -> String {
        let element = format!("element bridge {} {set} {{ \"{tap}\" }}\n", self.table);
        format!("add {element}delete {element}")
    }

    /// Removes elements. Missing elements are not an error.
    pub fn remove(&self, guests: &[Element], nat: &[Ipv4Addr]) -> String {
        let mut script = String::new();
        for element in guests {
            script += &self.element("add", element);
            script += &self.element("delete", element);
            script += &self.open("add", &element.tap);
            script += &self.open("delete", &element.tap);
            script += &[RECEIVING, SENDING].map(|set| self.no_rate(set, &element.tap)).concat();
        }
        for address in nat {
            script += &self.nat("add", *address);
            script += &self.nat("delete", *address);
        }
        script
    }

    fn element(&self, verb: &str, e: &Element) -> String {
        format!("{verb} element bridge {} {GUESTS} {{ \"{}\" . {} . {} }}\n", self.table, e.tap, e.mac, e.address)
    }

    fn open(&self, verb: &str, tap: &str) -> String {
        format!("{verb} element bridge {} {OPEN} {{ \"{tap}\" }}\n", self.table)
    }

    fn nat(&self, verb: &str, address: Ipv4Addr) -> String {
        format!("{verb} element inet {} {NAT} {{ {address} }}\n", self.table)
    }

    /// Publishes a port. Publishing the same one again is not an error.
    pub fn publish(&self, p: &Published) -> String {
        let (map, key) = Self::key(&p.port);
        let Port { guest_port, .. } = p.port;
        format!("add element inet {} {map} {{ {key} comment \"{}\" : {} . {guest_port} }}\n", self.table, p.tag, p.address)
    }

    /// Fails if the port is not published.
    pub fn unpublish(&self, p: &Published) -> String {
        let (map, key) = Self::key(&p.port);
        format!("delete element inet {} {map} {{ {key} }}\n", self.table)
    }

    fn key(port: &Port) -> (&'static str, String) {
        let rest = format!("{} . {}", port.protocol.name(), port.host_port);
        if port.host_addr.is_unspecified() { (PUBLISHED_ANY, rest) } else { (PUBLISHED, format!("{} . {rest}", port.host_addr)) }
    }

    pub fn list_published(&self) -> [[&str; 5]; 2] {
        [PUBLISHED, PUBLISHED_ANY].map(|map| ["list", "map", "inet", self.table.as_str(), map])
    }

    /// Removes both tables. Missing tables are not an error.
    pub fn remove_all(&self) -> String {
        let table = &self.table;
        let of = |family: &str| format!("add table {family} {table}\ndelete table {family} {table}\n");
        of("bridge") + &of("inet")
    }

    pub fn list_guests(&self) -> [&str; 5] {
        ["list", "set", "bridge", &self.table, GUESTS]
    }

    pub fn list_nat(&self) -> [&str; 5] {
        ["list", "set", "inet", &self.table, NAT]
    }
}

/// The elements in the answer to [`Rules::list_guests`]; what is not of our making is passed over.
pub fn parse_guests(json: &[u8]) -> Result<Vec<Element>> {
    let element = |value: &Value| {
        let parts = value.get("concat")?.as_array()?;
        let [tap, mac, address] = parts.as_slice() else { return None };
        Some(Element { tap: tap.as_str()?.into(), mac: mac.as_str()?.into(), address: address.as_str()?.parse().ok()? })
    };
    Ok(elements(json)?.iter().filter_map(element).collect())
}

/// The elements in the answer to [`Rules::list_nat`].
pub fn parse_nat(json: &[u8]) -> Result<Vec<Ipv4Addr>> {
    Ok(elements(json)?.iter().filter_map(|v| v.as_str()?.parse().ok()).collect())
}

/// The elements in one of the answers to [`Rules::list_published`].
pub fn parse_published(json: &[u8]) -> Result<Vec<Published>> {
    let element = |pair: &Value| {
        let [key, target] = pair.as_array()?.as_slice() else { return None };
        let tag = key.pointer("/elem/comment").and_then(Value::as_str).unwrap_or_default().to_owned();
        let key = key.pointer("/elem/val").unwrap_or(key).get("concat")?.as_array()?;
        let (host_addr, rest) = match key.as_slice() {
            [address, rest @ ..] if rest.len() == 2 => (address.as_str()?.parse().ok()?, rest),
            rest => (Ipv4Addr::UNSPECIFIED, rest),
        };
        let [protocol, host_port] = rest else { return None };
        let [address, guest_port] = target.get("concat")?.as_array()?.as_slice() else { return None };
        let number = |v: &Value| v.as_u64().and_then(|n| u16::try_from(n).ok());
        let protocol = [Protocol::Tcp, Protocol::Udp].into_iter().find(|p| protocol.as_str() == Some(p.name()))?;
        let port = Port { host_addr, host_port: number(host_port)?, guest_port: number(guest_port)?, protocol };
        Some(Published { tag, address: address.as_str()?.parse().ok()?, port })
    };
    Ok(elements(json)?.iter().filter_map(element).collect())
}

fn elements(json: &[u8]) -> Result<Vec<Value>> {
    let bad = |e: serde_json::Error| Error::new(Kind::Host, "read a set of nftables").with_source(e);
    let value: Value = serde_json::from_slice(json).map_err(bad)?;
    let all = value.get("nftables").and_then(Value::as_array).into_iter().flatten();
    let set = all.filter_map(|v| v.get("set").or_else(|| v.get("map"))).find_map(|set| set.get("elem"));
    Ok(set.and_then(Value::as_array).cloned().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Lease;
    use expect_test::expect;

    fn rules(allow_between_vms: bool) -> Rules {
        let config = Config { allow_between_vms, ..Config::default() };
        Rules::new(&Names::of("1a2b3c4d").unwrap(), &config)
    }

    fn guest(access: Access) -> Guest {
        let lease = Lease::of(Config::default().subnet, 3).unwrap();
        Guest { tag: "fc-1a2b3c4d-0123456789ab-1".into(), lease, access, rx_bytes_per_s: None, tx_bytes_per_s: None }
    }

    #[test]
    fn the_tables() {
        expect![[r#"
            add table bridge fcd_1a2b3c4d
            add set bridge fcd_1a2b3c4d guests { type ifname . ether_addr . ipv4_addr; }
            add set bridge fcd_1a2b3c4d open { type ifname; }
            add set bridge fcd_1a2b3c4d receiving { type ifname; limit rate over 1 bytes/second; }
            add set bridge fcd_1a2b3c4d sending { type ifname; limit rate over 1 bytes/second; }
            add chain bridge fcd_1a2b3c4d from_tap
            flush chain bridge fcd_1a2b3c4d from_tap
            add rule bridge fcd_1a2b3c4d from_tap iifname @sending drop
            add rule bridge fcd_1a2b3c4d from_tap ether type 8021q drop
            add rule bridge fcd_1a2b3c4d from_tap ether type ip iifname . ether saddr . ip saddr @guests accept
            add rule bridge fcd_1a2b3c4d from_tap ether type arp iifname . ether saddr . arp saddr ip @guests iifname . arp saddr ether . arp saddr ip @guests accept
            add rule bridge fcd_1a2b3c4d from_tap drop
            add chain bridge fcd_1a2b3c4d between { type filter hook forward priority -200; policy accept; }
            flush chain bridge fcd_1a2b3c4d between
            add rule bridge fcd_1a2b3c4d between iifname "fc1a2b3c4d-*" oifname "fc1a2b3c4d-*" drop
            add chain bridge fcd_1a2b3c4d ports { type filter hook prerouting priority -400; policy accept; }
            flush chain bridge fcd_1a2b3c4d ports
            add rule bridge fcd_1a2b3c4d ports iifname "fc1a2b3c4d-*" jump from_tap
            add chain bridge fcd_1a2b3c4d to_tap { type filter hook postrouting priority 0; policy accept; }
            flush chain bridge fcd_1a2b3c4d to_tap
            add rule bridge fcd_1a2b3c4d to_tap oifname @receiving drop
            add table inet fcd_1a2b3c4d
            add set inet fcd_1a2b3c4d nat { type ipv4_addr; }
            add set inet fcd_1a2b3c4d asking { type ipv4_addr; flags dynamic,timeout; timeout 60s; size 65536; }
            add chain inet fcd_1a2b3c4d of_host
            flush chain inet fcd_1a2b3c4d of_host
            add rule inet fcd_1a2b3c4d of_host meta l4proto { tcp, udp } th dport 53 ip daddr 10.89.0.1 accept
            add rule inet fcd_1a2b3c4d of_host icmp type echo-request ip daddr 10.89.0.1 accept
            add rule inet fcd_1a2b3c4d of_host drop
            add chain inet fcd_1a2b3c4d from_guest
            flush chain inet fcd_1a2b3c4d from_guest
            add rule inet fcd_1a2b3c4d from_guest meta nfproto ipv6 drop
            add rule inet fcd_1a2b3c4d from_guest ip daddr 169.254.0.0/16 drop
            add rule inet fcd_1a2b3c4d from_guest ct state established,related ct direction reply accept
            add rule inet fcd_1a2b3c4d from_guest ip saddr != @nat drop
            add rule inet fcd_1a2b3c4d from_guest udp dport 53 update @asking { ip saddr limit rate over 1000/second burst 1000 packets } drop
            add rule inet fcd_1a2b3c4d from_guest fib daddr type local jump of_host
            add rule inet fcd_1a2b3c4d from_guest fib daddr type { broadcast, multicast } drop
            add chain inet fcd_1a2b3c4d arriving { type filter hook prerouting priority -150; policy accept; }
            flush chain inet fcd_1a2b3c4d arriving
            add rule inet fcd_1a2b3c4d arriving iifname "fcbr0" jump from_guest
            add chain inet fcd_1a2b3c4d to_host { type filter hook input priority 0; policy accept; }
            flush chain inet fcd_1a2b3c4d to_host
            add rule inet fcd_1a2b3c4d to_host iifname != { "lo", "fcbr0" } ip daddr 10.89.0.1 meta l4proto { tcp, udp } th dport 53 drop
            add rule inet fcd_1a2b3c4d to_host iifname != "fcbr0" accept
            add rule inet fcd_1a2b3c4d to_host ct state established,related ct direction reply accept
            add rule inet fcd_1a2b3c4d to_host jump of_host
            add chain inet fcd_1a2b3c4d forward { type filter hook forward priority 0; policy accept; }
            flush chain inet fcd_1a2b3c4d forward
            add rule inet fcd_1a2b3c4d forward iifname "fcbr0" oifname "fcbr0" drop
            add rule inet fcd_1a2b3c4d forward iifname "fcbr0" oifname "fcbr0" drop
            add rule inet fcd_1a2b3c4d forward iifname "fcbr0" ip saddr @nat accept
            add rule inet fcd_1a2b3c4d forward iifname "fcbr0" drop
            add rule inet fcd_1a2b3c4d forward oifname "fcbr0" ip daddr @nat ct state established,related accept
            add rule inet fcd_1a2b3c4d forward oifname "fcbr0" ip daddr @nat ct status dnat accept
            add rule inet fcd_1a2b3c4d forward oifname "fcbr0" drop
            add map inet fcd_1a2b3c4d published { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
            add map inet fcd_1a2b3c4d published_any { type inet_proto . inet_service : ipv4_addr . inet_service; }
            add chain inet fcd_1a2b3c4d published_in { type nat hook prerouting priority -100; policy accept; }
            flush chain inet fcd_1a2b3c4d published_in
            add rule inet fcd_1a2b3c4d published_in iifname != "lo" ip daddr 127.0.0.0/8 return
            add rule inet fcd_1a2b3c4d published_in dnat ip to ip daddr . meta l4proto . th dport map @published
            add rule inet fcd_1a2b3c4d published_in fib daddr type local dnat ip to meta l4proto . th dport map @published_any
            add chain inet fcd_1a2b3c4d published_own { type nat hook output priority -100; policy accept; }
            flush chain inet fcd_1a2b3c4d published_own
            add rule inet fcd_1a2b3c4d published_own dnat ip to ip daddr . meta l4proto . th dport map @published
            add rule inet fcd_1a2b3c4d published_own fib daddr type local dnat ip to meta l4proto . th dport map @published_any
            add chain inet fcd_1a2b3c4d leaving { type nat hook postrouting priority 100; policy accept; }
            flush chain inet fcd_1a2b3c4d leaving
            add rule inet fcd_1a2b3c4d leaving oifname != "fcbr0" ip saddr @nat masquerade
            add rule inet fcd_1a2b3c4d leaving oifname "fcbr0" ip saddr 127.0.0.0/8 ct status dnat masquerade
        "#]].assert_eq(&rules(false).apply());
    }

    #[test]
    fn no_table_but_ours_is_named() {
        for script in [rules(true).apply(), rules(true).remove_all(), rules(true).add("fc1a2b3c4d-7", &guest(Access::Nat))] {
            for line in script.lines() {
                let words: Vec<_> = line.split(' ').collect();
                assert_eq!(words[3], "fcd_1a2b3c4d", "{line}");
                assert!(
                    !line.contains("flush table") && !line.contains("flush ruleset") && words[0] != "flush"
                        || words[1] == "chain"
                );
            }
        }
    }

    #[test]
    fn between_vms() {
        assert!(rules(false).apply().contains("iifname \"fcbr0\" oifname \"fcbr0\" drop"));
        assert!(rules(true).apply().contains("iifname \"fcbr0\" oifname \"fcbr0\" ip saddr @nat ip daddr @nat accept"));
    }

    #[test]
    fn elements_of_a_vm() {
        let nat = rules(false).add("fc1a2b3c4d-7", &guest(Access::Nat));
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
        let none = rules(false).add("fc1a2b3c4d-7", &guest(Access::None));
        assert!(none.starts_with(nat.lines().next().unwrap()) && !none.contains(" open ") && !none.contains(" inet "), "{none}");
        let limited = Guest { tx_bytes_per_s: Some(50 << 20), rx_bytes_per_s: Some(65_536), ..guest(Access::None) };
        expect![[r#"
            add element bridge fcd_1a2b3c4d receiving { "fc1a2b3c4d-7" }
            delete element bridge fcd_1a2b3c4d receiving { "fc1a2b3c4d-7" }
            add element bridge fcd_1a2b3c4d receiving { "fc1a2b3c4d-7" limit rate over 65536 bytes/second burst 262144 bytes }
            add element bridge fcd_1a2b3c4d sending { "fc1a2b3c4d-7" }
            delete element bridge fcd_1a2b3c4d sending { "fc1a2b3c4d-7" }
            add element bridge fcd_1a2b3c4d sending { "fc1a2b3c4d-7" limit rate over 52428800 bytes/second burst 262144 bytes }
        "#]]
        .assert_eq(&rules(false).rates("fc1a2b3c4d-7", &limited));
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
        let second =
            Published { tag: String::new(), address: [10, 89, 0, 6].into(), port: port([0, 0, 0, 0], 53, 5353, Protocol::Udp) };
        assert_eq!(parse_published(json).unwrap(), [first.clone(), second]);
        let rules = rules(false);
        expect![[r#"
            add element inet fcd_1a2b3c4d published { 127.0.0.1 . tcp . 8080 comment "fc-1-2-3" : 10.89.0.5 . 80 }
            delete element inet fcd_1a2b3c4d published { 127.0.0.1 . tcp . 8080 }
        "#]]
        .assert_eq(&(rules.publish(&first) + &rules.unpublish(&first)));
    }

    #[test]
    fn sets_are_read_back() {
        let json =
            br#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"set": {"family": "bridge", "name": "guests", "table": "t",
            "type": ["ifname", "ether_addr", "ipv4_addr"], "handle": 1,
            "elem": [{"concat": ["fc1a2b3c4d-1", "02:fc:0a:59:00:05", "10.89.0.5"]}, {"concat": ["x"]}, 7]}}]}"#;
        let element =
            Element { tap: "fc1a2b3c4d-1".into(), mac: "02:fc:0a:59:00:05".into(), address: Ipv4Addr::new(10, 89, 0, 5) };
        assert_eq!(parse_guests(json).unwrap(), [element]);
        assert_eq!(parse_guests(br#"{"nftables": [{"set": {"name": "guests"}}]}"#).unwrap(), []);
        assert_eq!(parse_nat(br#"{"nftables": [{"set": {"elem": ["10.89.0.5"]}}]}"#).unwrap(), [Ipv4Addr::new(10, 89, 0, 5)]);
        assert!(parse_nat(b"").is_err());
    }
}
