//! What an installation that is gone has left of its network: taps to which no process is attached, its bridge without
//! other ports, and its tables. All of it is found by the installation's id, as one's own is.

use super::links::Link;
use super::names::Names;
use super::tools::{Tools, nft_json};
use super::{all_links, bridge};
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use serde::Deserialize;
use std::sync::Arc;

/// Of an interface with somebody at its other end (if.h).
const HAS_CARRIER: &str = "LOWER_UP";

/// What is left, as it was when this was looked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Left {
    pub taps: Vec<String>,
    pub bridges: Vec<String>,
    /// As nft names them: `inet fcd_1a2b3c4d`.
    pub tables: Vec<String>,
    /// Somebody uses it, so it is not what it seems to be, and nothing of it may be removed.
    pub is_in_use: bool,
}

/// Looks at this network namespace.
pub fn look(install: &str, commands: &Arc<dyn Commands>) -> Result<Left> {
    let (names, tools) = (Names::of(install)?, Tools::new(commands.clone())?);
    let links = all_links(&tools, tools.never())?;
    let left = of_links(&names, &links);
    if left.is_in_use {
        return Ok(left);
    }
    let tables = tools.run(&nft_json(&["list", "tables"]), tools.never())?;
    Ok(Left { tables: parse_tables(&tables, &names.table())?, ..left })
}

/// Removes what [`look`] found. The rules last: there is no instant in which a tap is there without them.
pub fn remove(left: &Left, commands: &Arc<dyn Commands>) -> Result<()> {
    let tools = Tools::new(commands.clone())?;
    let links: Vec<String> = left.taps.iter().chain(&left.bridges).map(|name| format!("link delete dev {name}")).collect();
    if !links.is_empty() {
        tools.ip_batch_all(&links)?;
    }
    let tables: String = left.tables.iter().map(|table| format!("add table {table}\ndelete table {table}\n")).collect();
    if tables.is_empty() { Ok(()) } else { tools.nft(&tables, tools.never()) }
}

fn of_links(names: &Names, links: &[Link]) -> Left {
    let has_our_alias = |l: &Link| l.alias().is_empty() || l.alias() == names.waiting() || names.is_tag(l.alias());
    let is_tap = |l: &Link| l.is_kind("tun") && names.tap_number(&l.name).is_some() && has_our_alias(l);
    let taps: Vec<&Link> = links.iter().filter(|l| is_tap(l)).collect();
    let bridges: Vec<&Link> = links.iter().filter(|l| bridge::is_ours(names, l)).collect();
    let is_port = |l: &Link| l.master.as_ref().is_some_and(|master| bridges.iter().any(|bridge| bridge.name == *master));
    let is_in_use =
        taps.iter().any(|l| l.flags.iter().any(|f| f == HAS_CARRIER)) || links.iter().any(|l| is_port(l) && !is_tap(l));
    if is_in_use {
        return Left { is_in_use, ..Left::default() };
    }
    let named = |links: Vec<&Link>| links.into_iter().map(|l| l.name.clone()).collect();
    Left { taps: named(taps), bridges: named(bridges), tables: Vec::new(), is_in_use }
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

/// Those of `nft --json list tables` that have this name.
fn parse_tables(json: &[u8], name: &str) -> Result<Vec<String>> {
    let listing: Listing =
        serde_json::from_slice(json).map_err(|e| Error::new(Kind::Host, "read the tables of this host").with_source(e))?;
    let ours = listing.nftables.into_iter().filter_map(|item| item.table).filter(|table| table.name == name);
    Ok(ours.map(|table| format!("{} {}", table.family, table.name)).collect())
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
    fn tables_are_read_by_their_whole_name() {
        // nftables 1.0.6.
        let json = br#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"table": {"family": "bridge", "name": "fcd_0000000b", "handle": 3}},
            {"table": {"family": "inet", "name": "fcd_0000000b", "handle": 4}}, {"table": {"family": "inet", "name": "fcd_0000000bc", "handle": 5}},
            {"table": {"family": "ip", "name": "filter", "handle": 6}}]}"#;
        assert_eq!(parse_tables(json, "fcd_0000000b").unwrap(), ["bridge fcd_0000000b", "inet fcd_0000000b"]);
        assert_eq!(parse_tables(b"no json", "x").unwrap_err().kind(), Kind::Host);
    }

    /// Another installation in the same network namespace lives on as it is.
    #[test]
    fn network_of_a_gone_installation_goes_and_the_other_one_stays() {
        if !is_root() {
            return;
        }
        let lab = Lab::new(&config());
        lab.await_taps(2);
        let guest = lab.guest(0, Access::Nat);
        lab.take(&guest);
        lab.await_taps(2);
        let commands: Arc<dyn Commands> = Arc::new(HostCommands);
        let other =
            crate::config::Network { bridge: "fcbr1".into(), subnet: "10.90.0.0/24".parse().unwrap(), taps_ahead: 0, ..config() };
        let net = lab.host.run(|| Net::open(&other, OTHER, commands.clone(), &Cancel::try_new().unwrap())).unwrap();
        let tag = format!("fc-{OTHER}-0123456789ab-1");
        let lost = crate::net::Guest { tag, lease: net.lease(0).unwrap(), ..guest };
        let tap = lab.host.run(|| net.take(&lost, 4711, &Cancel::try_new().unwrap())).unwrap();
        // Its daemon is killed, and its VM with it.
        std::mem::forget(net);
        let all =
            || lab.host.sh("ip -o link show type tun | cut -d: -f2; ip -o link show type bridge | cut -d: -f2; nft list ruleset");
        let census = || (lab.census().replace(" fcbr1", "").replace(&format!("{} ", tap.name), ""), lab.elements());
        let (everything, ours) = (all(), census());
        let look = || lab.host.run(|| look(OTHER, &commands)).unwrap();
        let found = Left {
            taps: vec![tap.name.clone()],
            bridges: vec!["fcbr1".into()],
            tables: vec![format!("bridge fcd_{OTHER}"), format!("inet fcd_{OTHER}")],
            is_in_use: false,
        };
        let in_use = Left { is_in_use: true, ..Left::default() };
        // A VMM that nobody finds, or a port that somebody else has put there.
        let vmm = lab.host.run(|| tun::connect(&tap.name)).unwrap();
        assert_eq!(look(), in_use);
        drop(vmm);
        lab.host.sh("ip link add mine type veth peer name yours; ip link set mine master fcbr1");
        assert_eq!(look(), in_use);
        lab.host.sh("ip link delete mine");
        let sorted = |mut left: Left| {
            left.tables.sort();
            left
        };
        assert_eq!(sorted(look()), found);
        assert_eq!(all(), everything, "a look changes nothing");
        lab.host.run(|| remove(&look(), &commands)).unwrap();
        assert_eq!(look(), Left::default());
        assert_eq!(census(), ours);
        assert!(!all().contains(OTHER) && all().contains(INSTALL));
        // Nothing is left to remove.
        lab.host.run(|| remove(&look(), &commands)).unwrap();
    }
}
