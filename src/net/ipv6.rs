//! IPv6 on the bridge. It is off if the host has none.
//!
//! Guests have static addresses and no link to each other: each address has a prefix of 128 bits,
//! and everything goes to the bridge's address. Therefore a guest only needs to find the bridge
//! (neighbor solicitations), and no other message of neighbor discovery passes its tap. The bridge
//! has no link-local address and sends no router advertisements.

use super::Names;
use super::links::{Ipv6Route, parse_ipv6_routes};
use super::tools::Tools;
use crate::config::{Ipv6, Ipv6Network, Ipv6Subnet, Network as Config};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use std::io::ErrorKind;

const SETTINGS: &str = "/proc/sys/net/ipv6/conf";
/// The arguments of `ip` that list the routes.
pub(super) const ROUTES: [&str; 4] = ["-6", "-details", "route", "show"];

/// Returns the network of the guests, or None if they have no IPv6 because of the configuration or
/// because the host has none. The bridge's own address counts, too, so running guests keep IPv6 if
/// the daemon starts again while the host has no other address.
pub(super) fn network(config: &Config, names: &Names) -> Option<Ipv6Network> {
    if config.ipv6 == Ipv6::Off || !super::host_has_ipv6() {
        return None;
    }
    Some(match config.ipv6_subnet {
        Ipv6Subnet::Auto => Ipv6Network::of_installation(names.number()),
        Ipv6Subnet::Fixed(network) => network,
    })
}

/// Checks that no other interface has a route into the network.
///
/// # Errors
/// `conflict`, with the setting to change.
pub(super) fn require_free(bridge: &str, network: Ipv6Network, routes: &[Ipv6Route]) -> Result<()> {
    let is_in_it = |r: &&Ipv6Route| {
        r.prefix >= Ipv6Network::PREFIX && network.contains(r.base) && r.dev != bridge
    };
    let Some(taken) = routes.iter().find(is_in_it) else {
        return Ok(());
    };
    let message = format!(
        "create bridge {bridge}: the guests' subnet {network} contains {}/{}, which is routed to {}",
        taken.base, taken.prefix, taken.dev
    );
    Err(Error::new(Kind::Conflict, message)
        .hint("set another subnet: ipv6_subnet = ... under [network]"))
}

/// Turns IPv6 on or off on the bridge.
pub(super) fn set_on_bridge(bridge: &str, on: bool) -> Result<()> {
    set(bridge, "disable_ipv6", if on { "0" } else { "1" })?;
    if on {
        // The bridge is the router, and its address is its own.
        for setting in ["accept_ra", "accept_dad", "autoconf", "accept_redirects"] {
            set(bridge, setting, "0")?;
        }
    }
    Ok(())
}

/// Changes a setting of an interface. A setting that does not exist is left alone, because the
/// kernel has no IPv6 then.
fn set(interface: &str, setting: &str, value: &str) -> Result<()> {
    crate::locks::may_block("file access");
    let path = format!("{SETTINGS}/{interface}/{setting}");
    let io = |e| Error::io(format!("write {path}"), e);
    match std::fs::read_to_string(&path) {
        Ok(text) if text.trim() == value => Ok(()),
        Ok(_) => std::fs::write(&path, value).map_err(io),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(format!("read {path}"), e)),
    }
}

/// The state of IPv6 forwarding on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Forwarding {
    On,
    /// Forwarding is off. It would not help, because the host has no default route.
    NoRoute,
    Off,
    /// Forwarding is off. If it were on, the host would lose routes over this interface, and
    /// perhaps its address, because a kernel that forwards ignores router advertisements.
    Unsafe(String),
}

/// Returns the state of forwarding, given the host's routes.
pub(super) fn forwarding(routes: &[Ipv6Route]) -> Result<Forwarding> {
    crate::locks::may_block("file access");
    let path = forwarding_path();
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(format!("read {path}"), e))?;
    if text.trim() != "0" {
        return Ok(Forwarding::On);
    }
    let depends = |dev: &str| {
        // 2 accepts router advertisements also while forwarding. With 0, something else than the
        // kernel handles them.
        std::fs::read_to_string(format!("{SETTINGS}/{dev}/accept_ra"))
            .is_ok_and(|text| text.trim() == "1")
    };
    let at_risk = routes.iter().find(|r| r.is_advertised && depends(&r.dev));
    Ok(match at_risk {
        Some(route) => Forwarding::Unsafe(route.dev.clone()),
        None if routes.iter().all(|r| r.prefix > 0) => Forwarding::NoRoute,
        None => Forwarding::Off,
    })
}

/// Turns IPv6 forwarding on if guests can use it and the host loses nothing. Returns the state
/// before.
pub(super) fn ensure_forwarding(tools: &Tools, cancel: &Cancel) -> Result<Forwarding> {
    crate::locks::may_block("file access");
    let before = forwarding(&parse_ipv6_routes(&tools.ip_json(&ROUTES, cancel)?)?)?;
    if before == Forwarding::Off {
        let path = forwarding_path();
        std::fs::write(&path, "1").map_err(|e| {
            Error::io(format!("turn on IPv6 forwarding: write {path}"), e)
                .hint("sysctl -w net.ipv6.conf.all.forwarding=1")
        })?;
    }
    Ok(before)
}

fn forwarding_path() -> String {
    format!("{SETTINGS}/all/forwarding")
}

/// Describes [`Forwarding::Unsafe`].
pub(super) fn risk(dev: &str) -> String {
    format!(
        "IPv6 forwarding is off, so guests do not reach the outside over IPv6; with it on, this host would lose its routes over {dev}, which router advertisements announce"
    )
}

/// Returns the command after which forwarding is safe.
pub(super) fn remedy(dev: &str) -> String {
    format!("sysctl -w net.ipv6.conf.{dev}.accept_ra=2")
}
