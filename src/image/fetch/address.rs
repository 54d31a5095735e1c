//! Decides which hosts and addresses a registry may direct fcd to.
//!
//! A registry chooses where its redirects and its token server are. It must not make fcd talk to
//! the services that only this host can reach.

use crate::error::{Error, Kind, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Returns why no connection may be made to an address, or None if a registry may have the address.
/// The metadata services of clouds are among the refused addresses.
fn why_refused(address: IpAddr) -> Option<&'static str> {
    match unwrapped(address) {
        IpAddr::V4(v4) if v4.is_link_local() => Some("link-local"),
        // On Linux this is another name of loopback.
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some("unspecified"),
        IpAddr::V4(v4) if v4.is_broadcast() || v4.is_multicast() => Some("multicast"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some("link-local"),
        IpAddr::V6(v6) if v6.is_unspecified() => Some("unspecified"),
        IpAddr::V6(v6) if v6.is_multicast() => Some("multicast"),
        IpAddr::V6(v6) if v6 == METADATA_V6 => Some("metadata"),
        _ => None,
    }
}

/// The IPv6 address of Amazon's metadata service. Its IPv4 address is link-local.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// Returns the IPv4 address that an IPv6 address contains, or the address itself if it contains
/// none.
fn unwrapped(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else {
        return address;
    };
    let octets = v6.octets();
    let is_nat64 = octets[..12] == [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0];
    // `::1` and `::` are not IPv4-compatible addresses.
    let is_compatible = octets[..12] == [0; 12] && octets[12] != 0;
    if is_nat64 || is_compatible {
        return Ipv4Addr::new(octets[12], octets[13], octets[14], octets[15]).into();
    }
    address.to_canonical()
}

/// Checks an address before a connection to it. Only a registry on loopback may direct fcd to
/// loopback.
pub(super) fn check(address: IpAddr, host: &str, loopback_allowed: bool) -> Result<()> {
    let why = match why_refused(address) {
        None if is_loopback_address(address) && !loopback_allowed => Some("loopback"),
        other => other,
    };
    match why {
        Some(why) => Err(Error::new(
            Kind::RegistryInvalid,
            format!("refuse to connect to {host}, because {address} is a {why} address"),
        )),
        None => Ok(()),
    }
}

fn is_loopback_address(address: IpAddr) -> bool {
    unwrapped(address).is_loopback()
}

/// Parses the host as an address. The brackets of an IPv6 address are optional.
pub(super) fn literal(host: &str) -> Option<IpAddr> {
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    bare.parse().ok()
}

/// True if the name or address alone shows that the host is this one. Makes no DNS lookup.
pub(super) fn is_loopback(host: &str) -> bool {
    match literal(host) {
        Some(address) => is_loopback_address(address),
        // Names below `localhost` do not count, because a resolver may ask DNS for them.
        None => host == "localhost",
    }
}

/// True for a lower-case name or a literal address. A name that ends with a number is refused,
/// because resolvers accept `127.1` and `0x7f000001` as addresses.
pub(super) fn is_host(host: &str) -> bool {
    if literal(host).is_some() {
        return true;
    }
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b))
    };
    let last = host.rsplit('.').next().unwrap_or_default();
    let is_number = last.starts_with(|c: char| c.is_ascii_digit())
        && (last.bytes().all(|b| b.is_ascii_digit()) || last.starts_with("0x"));
    host.len() <= 253 && host.split('.').all(is_label) && !is_number
}

#[cfg(test)]
mod unit {
    use super::*;

    #[track_caller]
    fn allowed(address: &str, loopback_allowed: bool) -> bool {
        check(address.parse().unwrap(), "host", loopback_allowed).is_ok()
    }

    #[test]
    fn metadata_addresses_are_refused_in_every_spelling() {
        for address in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "::a9fe:a9fe",
            "fe80::1",
            "febf::1",
            "fd00:ec2::254",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "224.0.0.1",
            "255.255.255.255",
            "ff02::1",
        ] {
            assert!(!allowed(address, true), "{address}");
        }
        for address in [
            "10.0.0.1",
            "192.168.1.1",
            "172.16.0.1",
            "93.184.216.34",
            "fd00::1",
        ] {
            assert!(allowed(address, false), "{address}");
        }
    }

    #[test]
    fn loopback_is_refused_unless_allowed() {
        for address in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
        ] {
            assert!(!allowed(address, false), "{address}");
            assert!(allowed(address, true), "{address}");
        }
    }

    #[test]
    fn loopback_names_are_recognized() {
        for host in ["localhost", "127.0.0.1", "127.1.2.3", "[::1]", "::1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.example.com",
            "a.localhost",
            "128.0.0.1",
            "notlocalhost",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn hosts_have_one_spelling() {
        for host in [
            "a",
            "a-b.example.com",
            "1password.com",
            "127.0.0.1",
            "[::1]",
            "4.example",
        ] {
            assert!(is_host(host), "{host}");
        }
        for host in [
            "",
            "a..b",
            ".a",
            "A.com",
            "a b",
            "127.1",
            "0x7f.1",
            "2130706433",
            "1.2.3.4.5",
            "0177.0.0.1",
            "a/b",
            "a@b",
            "a\r\nb",
            "[::1",
            "a.0x7f",
        ] {
            assert!(!is_host(host), "{host}");
        }
    }
}
