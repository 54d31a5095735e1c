//! The bridge. fcd creates it if it is missing and repairs it, but never changes a bridge that
//! belongs to something else.

use super::ipv6;
use super::links::{Link, Route, parse_addresses, parse_neighbours};
use super::names::Names;
use super::tools::Tools;
use crate::config::{Ipv6Network, Network as Config};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use std::net::IpAddr;

const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// True if this interface is our bridge. It is recognised by its alias or, before that is set, by
/// its MAC address.
pub(super) fn is_ours(names: &Names, link: &Link) -> bool {
    let mac = names.bridge_mac().to_string();
    let is_new = link.alias().is_empty() && link.address.as_deref() == Some(&mac);
    link.is_kind("bridge") && (link.alias() == names.bridge() || is_new)
}

/// Checks that nothing else uses the bridge's name or the guests' subnet. Call this function before
/// anything is created. Once our bridge has the subnet, another route into it is not an error,
/// because the VMs are already there.
///
/// # Errors
/// `conflict`, with the settings to change.
pub(super) fn require_free(
    names: &Names,
    config: &Config,
    links: &[Link],
    routes: &[Route],
) -> Result<()> {
    let (name, subnet) = (&config.bridge, config.subnet);
    let found = links.iter().find(|l| l.name == *name);
    let foreign = found.filter(|l| !is_ours(names, l));
    let is_in_it = |r: &&Route| r.prefix >= subnet.prefix() && subnet.overlaps(r.base, r.prefix);
    let is_ours = |r: &&Route| foreign.is_none() && r.dev == *name;
    let has_it = routes.iter().filter(is_ours).any(|r| is_in_it(&r));
    let taken = routes
        .iter()
        .find(|r| is_in_it(r) && !is_ours(r))
        .filter(|_| !has_it);
    if foreign.is_none() && taken.is_none() {
        return Ok(());
    }
    let whose = foreign.map(|link| {
        let what = link.linkinfo.info_kind.as_deref().unwrap_or("device");
        format!(
            "fcd did not create the existing {what} {name} (alias {:?})",
            link.alias()
        )
    });
    let where_to = taken.map(|r| {
        format!(
            "the guests' subnet {subnet} contains {}/{}, which is routed to {}",
            r.base, r.prefix, r.dev
        )
    });
    let why: Vec<_> = whose.into_iter().chain(where_to).collect();
    let set = match (foreign.is_some(), taken.is_some()) {
        (true, false) => "another name: bridge = ...",
        (false, _) => "another subnet: subnet = ...",
        (true, true) => "another name and another subnet: bridge = ... and subnet = ...",
    };
    let message = format!("create bridge {name}: {}", why.join(", and "));
    Err(Error::new(Kind::Conflict, message).hint(format!("set {set} under [network]")))
}

/// Creates or repairs the bridge. Returns what it changed.
///
/// # Errors
/// `conflict` if an interface of this name is not ours.
pub(super) fn ensure(
    names: &Names,
    (config, network): (&Config, Option<Ipv6Network>),
    links: &[Link],
    tools: &Tools,
    cancel: &Cancel,
) -> Result<Vec<String>> {
    let (name, alias) = (&config.bridge, names.bridge());
    let doing = || format!("create bridge {name}");
    let mut done = Vec::new();
    let found = links.iter().find(|l| l.name == *name);
    if let Some(link) = found.filter(|l| !is_ours(names, l)) {
        let what = link.linkinfo.info_kind.as_deref().unwrap_or("device");
        let message = format!(
            "{}: fcd did not create the existing {what} {name} (alias {:?})",
            doing(),
            link.alias()
        );
        return Err(Error::new(Kind::Conflict, message)
            .hint("set another name: bridge = ... under [network]"));
    }
    if found.is_none() {
        let line = format!(
            "link add name {name} address {} type bridge forward_delay 0 stp_state 0",
            names.bridge_mac()
        );
        tools
            .ip_batch(&[line], cancel)
            .map_err(|e| e.context(doing()))?;
        done.push(format!("created bridge {name}"));
    }
    let mut lines = Vec::new();
    if found.is_none_or(|l| l.alias() != alias) {
        lines.push(format!(
            "link set dev {name} alias {alias} addrgenmode none"
        ));
    }
    if let Err(e) = ipv6::set_on_bridge(name, network.is_some()) {
        // The rules drop what guests may not send, with any settings.
        log::warn!("network: {e}");
    }
    let json = tools.ip_json(&["address", "show", "dev", name], cancel)?;
    let has = parse_addresses(&json)?;
    let ipv4 = (
        IpAddr::from(config.subnet.gateway()),
        config.subnet.prefix(),
    );
    let ipv6 = network.map(|n| (IpAddr::from(n.gateway()), Ipv6Network::PREFIX));
    let wanted: Vec<_> = std::iter::once(ipv4).chain(ipv6).collect();
    for (other, prefix) in has.iter().filter(|a| !wanted.contains(a)) {
        lines.push(format!("address delete {other}/{prefix} dev {name}"));
        done.push(format!("removed {other}/{prefix} from bridge {name}"));
    }
    for (own, prefix) in wanted.iter().filter(|a| !has.contains(a)) {
        lines.push(format!("address add {own}/{prefix} dev {name}"));
        done.push(format!("added address {own}/{prefix} to bridge {name}"));
    }
    if !found.is_some_and(Link::is_up) {
        lines.push(format!("link set dev {name} up"));
        done.push(format!("set bridge {name} up"));
    }
    if !lines.is_empty() {
        tools
            .ip_batch(&lines, cancel)
            .map_err(|e| e.context(doing()))?;
    }
    Ok(done)
}

/// True if this host forwards IPv4 packets.
pub(super) fn forwards() -> Result<bool> {
    crate::locks::may_block("file access");
    let text = std::fs::read_to_string(FORWARDING)
        .map_err(|e| Error::io(format!("read {FORWARDING}"), e))?;
    Ok(text.trim() != "0")
}

/// Turns IPv4 forwarding on if it is off. Returns true if it was off.
pub(super) fn ensure_forwarding() -> Result<bool> {
    crate::locks::may_block("file access");
    if forwards()? {
        return Ok(false);
    }
    std::fs::write(FORWARDING, "1").map_err(|e| {
        Error::io(format!("turn on IPv4 forwarding: write {FORWARDING}"), e)
            .hint("sysctl -w net.ipv4.ip_forward=1")
    })?;
    Ok(true)
}

/// Returns the addresses of the permanent neighbour entries on the bridge, which `Net::joining`
/// sets. Returns none if the bridge does not exist.
pub(super) fn neighbours(bridge: &str, tools: &Tools) -> Result<Vec<IpAddr>> {
    let args = ["neighbour", "show", "nud", "permanent", "dev", bridge];
    match tools.ip_json(&args, tools.never()) {
        Ok(json) => parse_neighbours(&json),
        // The bridge does not exist.
        Err(e) if e.kind() == Kind::CommandFailed => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}
