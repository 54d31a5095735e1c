//! Finds and removes the network of a removed installation: taps without an attached process, its
//! bridge if nothing else is connected to it, and its tables. All of these are found by the
//! installation's id, like the network of this installation.

use super::links::Link;
use super::names::Names;
use super::tools::{Tools, nft_json};
use super::{all_links, bridge};
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use serde::Deserialize;
use std::sync::Arc;

/// The flag of an interface that has a process or a peer at its other end (if.h).
const HAS_CARRIER: &str = "LOWER_UP";

/// The network that an installation has left behind, at the time of [`look`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    pub taps: Vec<String>,
    pub bridges: Vec<String>,
    /// The family and name of each table, as nft prints them: `inet fcd_1a2b3c4d`.
    pub tables: Vec<String>,
    /// True if something still uses the network. Nothing may be removed in this case.
    pub is_in_use: bool,
}

/// Returns the network of installation `install` in this network namespace, also while VMs use it.
pub fn all(install: &str, commands: &Arc<dyn Commands>) -> Result<Leftovers> {
    let (names, tools) = (Names::of(install)?, Tools::new(commands.clone())?);
    let links = all_links(&tools, tools.never())?;
    with_tables(&names, &tools, named_links(&names, &links))
}

/// Searches this network namespace for the network of installation `install`.
pub fn look(install: &str, commands: &Arc<dyn Commands>) -> Result<Leftovers> {
    let (names, tools) = (Names::of(install)?, Tools::new(commands.clone())?);
    let links = all_links(&tools, tools.never())?;
    let left = of_links(&names, &links);
    if left.is_in_use {
        return Ok(left);
    }
    with_tables(&names, &tools, left)
}

fn with_tables(names: &Names, tools: &Tools, left: Leftovers) -> Result<Leftovers> {
    let tables = tools.run(&nft_json(&["list", "tables"]), tools.never())?;
    Ok(Leftovers {
        tables: parse_tables(&tables, &names.table())?,
        ..left
    })
}

/// Removes the network that [`look`] found. Removes the rules last, so that no tap exists without
/// them.
pub fn remove(left: &Leftovers, commands: &Arc<dyn Commands>) -> Result<()> {
    let tools = Tools::new(commands.clone())?;
    let links: Vec<String> = left
        .taps
        .iter()
        .chain(&left.bridges)
        .map(|name| format!("link delete dev {name}"))
        .collect();
    if !links.is_empty() {
        tools.ip_batch_all(&links)?;
    }
    let tables: String = left
        .tables
        .iter()
        .map(|table| format!("add table {table}\ndelete table {table}\n"))
        .collect();
    if tables.is_empty() {
        Ok(())
    } else {
        tools.nft(&tables, tools.never())
    }
}

fn is_tap(names: &Names, l: &Link) -> bool {
    let has_our_alias =
        l.alias().is_empty() || l.alias() == names.spare() || names.is_tag(l.alias());
    l.is_kind("tun") && names.tap_number(&l.name).is_some() && has_our_alias
}

/// Returns the installation's links, without its tables.
fn named_links(names: &Names, links: &[Link]) -> Leftovers {
    let of = |is_ours: &dyn Fn(&Link) -> bool| {
        let ours = links.iter().filter(|l| is_ours(l));
        ours.map(|l| l.name.clone()).collect()
    };
    Leftovers {
        taps: of(&|l| is_tap(names, l)),
        bridges: of(&|l| bridge::is_ours(names, l)),
        ..Leftovers::default()
    }
}

fn of_links(names: &Names, links: &[Link]) -> Leftovers {
    let is_tap = |l: &Link| is_tap(names, l);
    let taps: Vec<&Link> = links.iter().filter(|l| is_tap(l)).collect();
    let bridges: Vec<&Link> = links.iter().filter(|l| bridge::is_ours(names, l)).collect();
    let is_port = |l: &Link| {
        l.master
            .as_ref()
            .is_some_and(|master| bridges.iter().any(|bridge| bridge.name == *master))
    };
    let is_in_use = taps
        .iter()
        .any(|l| l.flags.iter().any(|f| f == HAS_CARRIER))
        || links.iter().any(|l| is_port(l) && !is_tap(l));
    if is_in_use {
        return Leftovers {
            is_in_use,
            ..Leftovers::default()
        };
    }
    named_links(names, links)
}

#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    table: Option<Table>,
}

#[derive(Deserialize)]
struct Table {
    family: String,
    name: String,
}

/// Returns the tables with this name from the output of `nft --json list tables`.
fn parse_tables(json: &[u8], name: &str) -> Result<Vec<String>> {
    let listing: Listing = serde_json::from_slice(json)
        .map_err(|e| Error::new(Kind::Host, "read the tables of this host").with_source(e))?;
    let ours = listing
        .nftables
        .into_iter()
        .filter_map(|item| item.table)
        .filter(|table| table.name == name);
    Ok(ours
        .map(|table| format!("{} {}", table.family, table.name))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostCommands;
    use crate::locks::Cancel;
    use crate::net::tests::lab::{INSTALL, Lab, config, is_root};
    use crate::net::{Access, Net, tun};

    const OTHER: &str = "0000000b";

    #[test]
    fn tables_are_matched_by_whole_name() {
        // This is output of nftables 1.0.6.
        let json = br#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"table": {"family": "bridge", "name": "fcd_0000000b", "handle": 3}},
            {"table": {"family": "inet", "name": "fcd_0000000b", "handle": 4}}, {"table": {"family": "inet", "name": "fcd_0000000bc", "handle": 5}},
            {"table": {"family": "ip", "name": "filter", "handle": 6}}]}"#;
        assert_eq!(
            parse_tables(json, "fcd_0000000b").unwrap(),
            ["bridge fcd_0000000b", "inet fcd_0000000b"]
        );
        assert_eq!(
            parse_tables(b"no json", "x").unwrap_err().kind(),
            Kind::Host
        );
    }

    /// Another installation in the same network namespace must not be affected.
    #[test]
    fn network_of_gone_installation_is_removed_and_other_stays() {
        if !is_root() {
            return;
        }
        let lab = Lab::new(&config());
        lab.await_taps(2);
        let guest = lab.guest(0, Access::Nat);
        lab.take(&guest);
        lab.await_taps(2);
        let commands: Arc<dyn Commands> = Arc::new(HostCommands);
        let other = crate::config::Network {
            bridge: "fcbr1".into(),
            subnet: "10.90.0.0/24".parse().unwrap(),
            taps_ahead: 0,
            ..config()
        };
        let net = lab
            .host
            .run(|| Net::open(&other, OTHER, commands.clone(), &Cancel::try_new().unwrap()))
            .unwrap();
        let tag = format!("fc-{OTHER}-0123456789ab-1");
        let lost = crate::net::Guest {
            tag,
            lease: net.lease(0).unwrap(),
            ..guest
        };
        let tap = lab
            .host
            .run(|| net.take(&lost, 4711, &Cancel::try_new().unwrap()))
            .unwrap();
        // Leave the network as if the installation's daemon and its VM had been killed.
        std::mem::forget(net);
        let all = || {
            lab.host.sh("ip -o link show type tun | cut -d: -f2; ip -o link show type bridge | cut -d: -f2; nft list ruleset")
        };
        let census = || {
            (
                lab.census()
                    .replace(" fcbr1", "")
                    .replace(&format!("{} ", tap.name), ""),
                lab.elements(),
            )
        };
        let (everything, ours) = (all(), census());
        let look = || lab.host.run(|| look(OTHER, &commands)).unwrap();
        let found = Leftovers {
            taps: vec![tap.name.clone()],
            bridges: vec!["fcbr1".into()],
            tables: vec![format!("bridge fcd_{OTHER}"), format!("inet fcd_{OTHER}")],
            is_in_use: false,
        };
        let in_use = Leftovers {
            is_in_use: true,
            ..Leftovers::default()
        };
        // A VMM that is attached to a tap, or a foreign bridge port, means that the network is in
        // use.
        let vmm = lab.host.run(|| tun::connect(&tap.name)).unwrap();
        assert_eq!(look(), in_use);
        let sorted = |mut left: Leftovers| {
            left.tables.sort();
            left
        };
        let whole = lab.host.run(|| super::all(OTHER, &commands)).unwrap();
        assert_eq!(sorted(whole), found);
        drop(vmm);
        lab.host
            .sh("ip link add mine type veth peer name yours; ip link set mine master fcbr1");
        assert_eq!(look(), in_use);
        lab.host.sh("ip link delete mine");
        assert_eq!(sorted(look()), found);
        assert_eq!(all(), everything, "`look` changes nothing");
        lab.host.run(|| remove(&look(), &commands)).unwrap();
        assert_eq!(look(), Leftovers::default());
        assert_eq!(census(), ours);
        assert!(!all().contains(OTHER) && all().contains(INSTALL));
        // Removing again succeeds.
        lab.host.run(|| remove(&look(), &commands)).unwrap();
    }
}
