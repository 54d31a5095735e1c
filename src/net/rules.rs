//! Builds the nftables rules as scripts for `nft -f -`, without doing any I/O.
//!
//! There are two tables, both named `fcd_<install>`, and no script ever names another one. The
//! `bridge` table lets a frame from one of our taps pass only if it has the MAC and the address of
//! its lease. The `inet` table keeps guests away from the host and from each other, and masquerades
//! them. The rules are the same for all VMs. Each VM is an element of some sets, so adding a VM is
//! a small transaction.
//!
//! The rules recognise answers by `ct direction reply` and not only by their state. Otherwise a
//! guest whose network was taken away could keep using a connection that it opened before.

use super::names::Names;
use super::sets::{
    GUESTS, GUESTS_IPV6, NAT, NAT_IPV6, OPEN, PUBLISHED, PUBLISHED_ANY, RECEIVING, SENDING,
};
use crate::config::{Ipv6Network, Network as Config, Subnet};
use std::fmt::Write as _;

/// The number of queries per second that one guest may send to the name server. The rules drop
/// further queries, before they fill the server's socket buffer and displace those of other guests.
const QUESTIONS_PER_S_MAX: u32 = 1000;

/// Matches the only messages of neighbor discovery that guests may send.
const FIND_BRIDGE: &str = "icmpv6 type nd-neighbor-solicit accept";
/// The types of ICMPv6 messages that hosts on a link use among themselves: multicast listeners,
/// neighbor discovery, and their extensions (IANA's ICMPv6 parameters).
const LINK_TYPES: &str = "{ 130-137, 141-143, 148-149, 151-153 }";
/// Link-local and multicast addresses, and the networks of the metadata services of clouds: Oracle,
/// AWS, Google and Scaleway.
const NEVER_IPV6: &str =
    "{ fe80::/10, ff00::/8, fd00:c1::/32, fd00:ec2::/32, fd20:ce::/32, fd00:42::42 }";

/// Returns the rules for the frames of guests that are neither IPv4 nor ARP. A guest may look for
/// the bridge, and send from its own address. It may not answer solicitations, because no one else
/// is on its link; so it cannot claim the address of another guest or of the bridge. A message that
/// is hidden behind a fragment header has the guest's own address as its source, but router
/// advertisements and redirects are only valid from link-local addresses (RFC 4861, 6.1.2 and 8.1).
fn ipv6_from_tap(network: Ipv6Network) -> [String; 4] {
    let own = format!("iifname . ether saddr . ip6 saddr @{GUESTS_IPV6}");
    let bridge = format!(
        "ip6 daddr {{ {}, {} }}",
        network.gateway(),
        network.solicited_gateway()
    );
    [
        // This also drops frames with a VLAN tag of any kind. For some of the matches below, nft
        // looks behind such a tag, but not for all.
        "ether type != ip6 drop".to_owned(),
        format!("{own} {bridge} {FIND_BRIDGE}"),
        format!("icmpv6 type {LINK_TYPES} drop"),
        format!("ip6 saddr {network} {own} accept"),
    ]
}

/// The settings that the rules depend on.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    table: String,
    tap_prefix: String,
    bridge: String,
    subnet: Subnet,
    /// None if guests have no IPv6.
    ipv6: Option<Ipv6Network>,
    allow_between_vms: bool,
}

impl Rules {
    pub(super) fn new(names: &Names, config: &Config, ipv6: Option<Ipv6Network>) -> Self {
        Self {
            table: names.table(),
            tap_prefix: names.tap_prefix(),
            bridge: config.bridge.clone(),
            subnet: config.subnet,
            ipv6,
            allow_between_vms: config.allow_between_vms,
        }
    }

    /// Returns the script that sets up both tables. Elements of the sets are kept, so running VMs
    /// are not interrupted.
    pub(super) fn apply(&self) -> String {
        let mut script = String::new();
        self.bridge_table(&mut script);
        self.inet_table(&mut script);
        script
    }

    fn chain(
        &self,
        script: &mut String,
        family: &str,
        name: &str,
        hook: Option<&str>,
        rules: &[String],
    ) {
        let table = &self.table;
        let hook = hook
            .map(|h| format!(" {{ type {h}; policy accept; }}"))
            .unwrap_or_default();
        let _ = writeln!(
            script,
            "add chain {family} {table} {name}{hook}\nflush chain {family} {table} {name}"
        );
        for rule in rules {
            let _ = writeln!(script, "add rule {family} {table} {name} {rule}");
        }
    }

    fn bridge_table(&self, script: &mut String) {
        let (table, taps) = (&self.table, &self.tap_prefix);
        let _ = writeln!(script, "add table bridge {table}");
        let _ = writeln!(
            script,
            "add set bridge {table} {GUESTS} {{ type ifname . ether_addr . ipv4_addr; }}"
        );
        let _ = writeln!(script, "add set bridge {table} {OPEN} {{ type ifname; }}");
        for set in [RECEIVING, SENDING] {
            // nft requires a default limit for the set. The default is never used, because every
            // element has its own limit.
            let _ = writeln!(
                script,
                "add set bridge {table} {set} {{ type ifname; limit rate over 1 bytes/second; }}"
            );
        }
        if self.ipv6.is_some() {
            let _ = writeln!(script, "{}", self.ipv6_sets()[0]);
        }
        let mut from_tap = vec![
            format!("iifname @{SENDING} drop"),
            "ether type 8021q drop".to_owned(),
            format!("ether type ip iifname . ether saddr . ip saddr @{GUESTS} accept"),
            format!(
                "ether type arp iifname . ether saddr . arp saddr ip @{GUESTS} iifname . arp saddr ether . arp saddr ip @{GUESTS} accept"
            ),
        ];
        from_tap.extend(self.ipv6.iter().flat_map(|network| ipv6_from_tap(*network)));
        // This also drops IPv6 if guests have none.
        from_tap.push("drop".to_owned());
        self.chain(script, "bridge", "from_tap", None, &from_tap);
        // Bridge ports are isolated as well, unless guests may reach each other.
        let between = format!("iifname \"{taps}*\" oifname \"{taps}*\"");
        let mut forward = vec![format!("{between} drop")];
        if self.allow_between_vms {
            forward.insert(
                0,
                format!("{between} iifname @{OPEN} oifname @{OPEN} accept"),
            );
        }
        self.chain(
            script,
            "bridge",
            "between",
            Some("filter hook forward priority -200"),
            &forward,
        );
        // This runs before any other table sees the frame. A spare tap is in no set, so nothing
        // passes it.
        let hook = "filter hook prerouting priority -400";
        self.chain(
            script,
            "bridge",
            "ports",
            Some(hook),
            &[format!("iifname \"{taps}*\" jump from_tap")],
        );
        let hook = "filter hook postrouting priority 0";
        self.chain(
            script,
            "bridge",
            "to_tap",
            Some(hook),
            &[format!("oifname @{RECEIVING} drop")],
        );
    }

    fn inet_table(&self, script: &mut String) {
        let (table, bridge, subnet) = (&self.table, &self.bridge, self.subnet);
        let gateway = subnet.gateway();
        let _ = writeln!(script, "add table inet {table}");
        let _ = writeln!(script, "add set inet {table} {NAT} {{ type ipv4_addr; }}");
        let _ = writeln!(
            script,
            "add set inet {table} asking {{ type ipv4_addr; flags dynamic,timeout; timeout 60s; size 65536; }}"
        );
        if self.ipv6.is_some() {
            let _ = writeln!(script, "{}", self.ipv6_sets()[1]);
        }
        let if_ipv6 = |rule: String| self.ipv6.is_some().then_some(rule);
        let mut of_host = vec![format!(
            "meta l4proto {{ tcp, udp }} th dport 53 ip daddr {gateway} accept"
        )];
        of_host.push(format!("icmp type echo-request ip daddr {gateway} accept"));
        let echo = |network: Ipv6Network| {
            let gateway = network.gateway();
            format!("icmpv6 type echo-request ip6 daddr {gateway} accept")
        };
        of_host.extend(self.ipv6.map(echo));
        of_host.push("drop".to_owned());
        self.chain(script, "inet", "of_host", None, &of_host);
        let mut from_guest = match self.ipv6 {
            None => vec!["meta nfproto ipv6 drop".to_owned()],
            Some(_) => vec![
                // The bridge table lets solicitations pass only to the bridge itself.
                FIND_BRIDGE.to_owned(),
                format!("ip6 daddr {NEVER_IPV6} drop"),
            ],
        };
        from_guest.extend([
            "ip daddr 169.254.0.0/16 drop".to_owned(),
            "ct state established,related ct direction reply accept".to_owned(),
            format!("ip saddr != @{NAT} drop"),
        ]);
        from_guest.extend(if_ipv6(format!("ip6 saddr != @{NAT_IPV6} drop")));
        from_guest.extend([
            format!(
                "udp dport 53 update @asking {{ ip saddr limit rate over {QUESTIONS_PER_S_MAX}/second burst {QUESTIONS_PER_S_MAX} packets }} drop"
            ),
            "fib daddr type local jump of_host".to_owned(),
            "fib daddr type { broadcast, multicast } drop".to_owned(),
        ]);
        self.chain(script, "inet", "from_guest", None, &from_guest);
        // This runs after connection tracking but before any address translation, so that the rules
        // see the destination that the guest chose, before another table translates it.
        let hook = "filter hook prerouting priority -150";
        self.chain(
            script,
            "inet",
            "arriving",
            Some(hook),
            &[format!("iifname \"{bridge}\" jump from_guest")],
        );
        let mut to_host = vec![
            // Only guests and this host may use the name server.
            format!(
                "iifname != {{ \"lo\", \"{bridge}\" }} ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 drop"
            ),
            format!("iifname != \"{bridge}\" accept"),
        ];
        to_host.extend(if_ipv6(FIND_BRIDGE.to_owned()));
        to_host.extend([
            "ct state established,related ct direction reply accept".to_owned(),
            "jump of_host".to_owned(),
        ]);
        self.chain(
            script,
            "inet",
            "to_host",
            Some("filter hook input priority 0"),
            &to_host,
        );
        let between = if self.allow_between_vms {
            "ip saddr @nat ip daddr @nat accept"
        } else {
            "drop"
        };
        let mut forward = vec![format!(
            "iifname \"{bridge}\" oifname \"{bridge}\" {between}"
        )];
        forward.extend(if_ipv6(format!("iifname \"{bridge}\" oifname \"{bridge}\" ip6 saddr @{NAT_IPV6} ip6 daddr @{NAT_IPV6} accept")).filter(|_| self.allow_between_vms));
        forward.extend([
            format!("iifname \"{bridge}\" oifname \"{bridge}\" drop"),
            format!("iifname \"{bridge}\" ip saddr @{NAT} accept"),
        ]);
        forward.extend(if_ipv6(format!(
            "iifname \"{bridge}\" ip6 saddr @{NAT_IPV6} accept"
        )));
        forward.extend([
            format!("iifname \"{bridge}\" drop"),
            format!("oifname \"{bridge}\" ip daddr @{NAT} ct state established,related accept"),
        ]);
        forward.extend(if_ipv6(format!(
            "oifname \"{bridge}\" ip6 daddr @{NAT_IPV6} ct state established,related accept"
        )));
        forward.extend([
            // This rule accepts packets to a published port of the guest.
            format!("oifname \"{bridge}\" ip daddr @{NAT} ct status dnat accept"),
            format!("oifname \"{bridge}\" drop"),
        ]);
        self.chain(
            script,
            "inet",
            "forward",
            Some("filter hook forward priority 0"),
            &forward,
        );
        self.published(script);
        let mut leaving = vec![
            format!("oifname != \"{bridge}\" ip saddr @{NAT} masquerade"),
            // This rule masquerades the host's own connections to a published loopback port,
            // because the guest could not answer 127.0.0.1.
            format!("oifname \"{bridge}\" ip saddr 127.0.0.0/8 ct status dnat masquerade"),
        ];
        leaving.extend(if_ipv6(format!(
            "oifname != \"{bridge}\" ip6 saddr @{NAT_IPV6} masquerade"
        )));
        self.chain(
            script,
            "inet",
            "leaving",
            Some("nat hook postrouting priority 100"),
            &leaving,
        );
    }

    /// Appends the maps and rules of published ports to `script`, for packets that arrive and for
    /// those that the host sends.
    fn published(&self, script: &mut String) {
        let table = &self.table;
        let (key, target) = ("inet_proto . inet_service", "ipv4_addr . inet_service");
        let _ = writeln!(
            script,
            "add map inet {table} {PUBLISHED} {{ type ipv4_addr . {key} : {target}; }}"
        );
        let _ = writeln!(
            script,
            "add map inet {table} {PUBLISHED_ANY} {{ type {key} : {target}; }}"
        );
        let rules = [
            format!("dnat ip to ip daddr . meta l4proto . th dport map @{PUBLISHED}"),
            format!("fib daddr type local dnat ip to meta l4proto . th dport map @{PUBLISHED_ANY}"),
        ];
        // Only this host may use published ports on its loopback addresses. The kernel drops
        // packets from outside to such an address, but only after this chain, so their destination
        // must not be translated here.
        let not_from_outside = ["iifname != \"lo\" ip daddr 127.0.0.0/8 return".to_owned()];
        let arriving = [&not_from_outside[..], &rules].concat();
        self.chain(
            script,
            "inet",
            "published_in",
            Some("nat hook prerouting priority -100"),
            &arriving,
        );
        self.chain(
            script,
            "inet",
            "published_own",
            Some("nat hook output priority -100"),
            &rules,
        );
    }

    /// Returns the commands that add the sets of IPv6 to the two tables.
    fn ipv6_sets(&self) -> [String; 2] {
        let table = &self.table;
        [
            format!(
                "add set bridge {table} {GUESTS_IPV6} {{ type ifname . ether_addr . ipv6_addr; }}"
            ),
            format!("add set inet {table} {NAT_IPV6} {{ type ipv6_addr; }}"),
        ]
    }

    /// Returns the script of [`Self::apply`] for the first time in the daemon's life. If guests
    /// have no IPv6, it also removes the sets of an earlier daemon whose guests had it. Their
    /// elements would otherwise count again as soon as guests have IPv6 again, perhaps for other
    /// taps of the same names.
    pub(super) fn apply_first(&self) -> String {
        let mut script = self.apply();
        if self.ipv6.is_none() {
            let [guests, nat] = self.ipv6_sets();
            let table = &self.table;
            let _ = writeln!(
                script,
                "{guests}\ndelete set bridge {table} {GUESTS_IPV6}\n{nat}\ndelete set inet {table} {NAT_IPV6}"
            );
        }
        script
    }

    /// Returns the script that removes both tables. Missing tables are not an error.
    #[cfg(test)]
    pub(super) fn remove_all(&self) -> String {
        let table = &self.table;
        let of =
            |family: &str| format!("add table {family} {table}\ndelete table {family} {table}\n");
        of("bridge") + &of("inet")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::sets::Sets;
    use crate::net::{Access, Guest, Lease};
    use expect_test::expect;

    fn rules(allow_between_vms: bool) -> Rules {
        rules_with(allow_between_vms, None)
    }

    fn rules_with(allow_between_vms: bool, ipv6: Option<Ipv6Network>) -> Rules {
        let config = Config {
            allow_between_vms,
            ..Config::default()
        };
        Rules::new(&Names::of("1a2b3c4d").unwrap(), &config, ipv6)
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
    fn tables_have_expected_rules() {
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
    fn ipv6_adds_rules_and_keeps_those_of_ipv4() {
        let network = Ipv6Network::of_installation(0x1a2b_3c4d);
        for allow_between_vms in [false, true] {
            let (without, with) = (
                rules(allow_between_vms).apply(),
                rules_with(allow_between_vms, Some(network)).apply(),
            );
            let is_new = |l: &&str| !without.lines().any(|old| old == *l);
            let gone: Vec<_> = without
                .lines()
                .filter(|old| !with.lines().any(|l| l == *old))
                .collect();
            assert_eq!(
                gone,
                ["add rule inet fcd_1a2b3c4d from_guest meta nfproto ipv6 drop"]
            );
            let added: String = with
                .lines()
                .filter(is_new)
                .map(|l| format!("{l}\n"))
                .collect();
            if allow_between_vms {
                assert!(added.contains("forward iifname \"fcbr0\" oifname \"fcbr0\" ip6 saddr @nat6 ip6 daddr @nat6 accept"));
                continue;
            }
            expect![[r#"
                add set bridge fcd_1a2b3c4d guests6 { type ifname . ether_addr . ipv6_addr; }
                add rule bridge fcd_1a2b3c4d from_tap ether type != ip6 drop
                add rule bridge fcd_1a2b3c4d from_tap iifname . ether saddr . ip6 saddr @guests6 ip6 daddr { fdfc:1a2b:3c4d::1, ff02::1:ff00:1 } icmpv6 type nd-neighbor-solicit accept
                add rule bridge fcd_1a2b3c4d from_tap icmpv6 type { 130-137, 141-143, 148-149, 151-153 } drop
                add rule bridge fcd_1a2b3c4d from_tap ip6 saddr fdfc:1a2b:3c4d::/64 iifname . ether saddr . ip6 saddr @guests6 accept
                add set inet fcd_1a2b3c4d nat6 { type ipv6_addr; }
                add rule inet fcd_1a2b3c4d of_host icmpv6 type echo-request ip6 daddr fdfc:1a2b:3c4d::1 accept
                add rule inet fcd_1a2b3c4d from_guest icmpv6 type nd-neighbor-solicit accept
                add rule inet fcd_1a2b3c4d from_guest ip6 daddr { fe80::/10, ff00::/8, fd00:c1::/32, fd00:ec2::/32, fd20:ce::/32, fd00:42::42 } drop
                add rule inet fcd_1a2b3c4d from_guest ip6 saddr != @nat6 drop
                add rule inet fcd_1a2b3c4d to_host icmpv6 type nd-neighbor-solicit accept
                add rule inet fcd_1a2b3c4d forward iifname "fcbr0" ip6 saddr @nat6 accept
                add rule inet fcd_1a2b3c4d forward oifname "fcbr0" ip6 daddr @nat6 ct state established,related accept
                add rule inet fcd_1a2b3c4d leaving oifname != "fcbr0" ip6 saddr @nat6 masquerade
            "#]].assert_eq(&added);
        }
    }

    #[test]
    fn scripts_name_only_our_tables() {
        let sets = Sets::new(&Names::of("1a2b3c4d").unwrap());
        for script in [
            rules(true).apply(),
            rules(true).remove_all(),
            sets.add("fc1a2b3c4d-7", &guest(Access::Nat)),
        ] {
            for line in script.lines() {
                let words: Vec<_> = line.split(' ').collect();
                assert_eq!(words[3], "fcd_1a2b3c4d", "{line}");
                assert!(
                    !line.contains("flush table")
                        && !line.contains("flush ruleset")
                        && words[0] != "flush"
                        || words[1] == "chain"
                );
            }
        }
    }

    #[test]
    fn guests_reach_each_other_only_if_configured() {
        assert!(
            rules(false)
                .apply()
                .contains("iifname \"fcbr0\" oifname \"fcbr0\" drop")
        );
        assert!(
            rules(true)
                .apply()
                .contains("iifname \"fcbr0\" oifname \"fcbr0\" ip saddr @nat ip daddr @nat accept")
        );
    }
}
