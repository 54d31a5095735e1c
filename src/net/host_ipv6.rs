//! Finds out whether this host has IPv6. It changes nothing.

use std::net::{IpAddr, Ipv6Addr};

/// The addresses of this network namespace's interfaces. The file does not exist if the kernel has
/// no IPv6.
const ADDRESSES: &str = "/proc/thread-self/net/if_inet6";

/// True if the host has an IPv6 address that other hosts could reach.
pub fn host_has_ipv6() -> bool {
    crate::locks::may_block("file access");
    std::fs::read_to_string(ADDRESSES).is_ok_and(|text| addresses(&text).any(is_reachable))
}

/// True if one of the host's resolvers has an IPv6 address.
pub fn host_has_ipv6_resolver() -> bool {
    crate::locks::may_block("file access");
    std::fs::read_to_string(super::RESOLV_CONF).is_ok_and(|text| has_ipv6_resolver(&text))
}

/// Parses the first word of each line, which is an address of 32 hexadecimal digits.
fn addresses(text: &str) -> impl Iterator<Item = Ipv6Addr> + '_ {
    let words = text.lines().filter_map(|l| l.split_whitespace().next());
    words.filter_map(|word| Some(u128::from_str_radix(word, 16).ok()?.into()))
}

fn is_reachable(address: Ipv6Addr) -> bool {
    !(address.is_loopback() || address.is_unspecified() || address.is_unicast_link_local())
}

fn has_ipv6_resolver(resolv_conf: &str) -> bool {
    let is_ipv6 = |line: &str| {
        let mut words = line.split_whitespace();
        // A link-local address has a zone, as in fe80::1%eth0.
        words.next() == Some("nameserver")
            && words
                .next()
                .and_then(|word| word.split('%').next())
                .is_some_and(|a| matches!(a.parse(), Ok(IpAddr::V6(_))))
    };
    resolv_conf.lines().any(is_ipv6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_with_only_loopback_and_link_local_addresses_has_no_ipv6() {
        let has = |text: &str| addresses(text).any(is_reachable);
        let local = "fe8000000000000000fc00fffe000001 04 40 20 80     eth0\n\
                     00000000000000000000000000000001 01 80 10 80       lo\n";
        assert!(!has("") && !has(local) && !has("no address\n"));
        let global = "20010db8000000000000000000000002 04 40 00 80     eth0\n";
        assert!(has(&format!("{local}{global}")));
        assert!(has(
            "fd000000000000000000000000000002 04 40 00 82     eth0\n"
        ));
    }

    #[test]
    fn ipv6_resolver_is_found() {
        assert!(!has_ipv6_resolver(
            "# nameserver ::1\nnameserver 192.0.2.1\nsearch example\noptions edns0\n"
        ));
        assert!(has_ipv6_resolver(
            "nameserver 192.0.2.1\nnameserver 2001:db8::53\n"
        ));
        assert!(has_ipv6_resolver("nameserver fe80::1%eth0\n"));
    }
}
