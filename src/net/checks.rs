//! The network checks of `fcctl doctor`. They find out whether the host has everything that bridged
//! networking needs, and whether something blocks it. They change nothing.

use super::bridge;
use super::ipv6::{self, Forwarding};
use super::links::{Link, Route, parse_ipv6_routes, parse_links, parse_routes};
use super::tools::{ip_json, nft_json, run};
use crate::api::daemon::Check;
use crate::config::{Ipv6, Network as Config};
use crate::error::{Error, Kind, Result};
use crate::host::command::find_program;
use crate::host::plural::count;
use crate::host::{Command, Commands};
use crate::locks::Cancel;
use serde::Deserialize;
use std::path::Path;
use std::time::Duration;

/// The file that lists the tables of legacy iptables, whose rules `nft` does not show.
const LEGACY_TABLES: &str = "/proc/net/ip_tables_names";
const LEGACY_DEADLINE: Duration = Duration::from_secs(10);

/// Runs the checks for a configuration with bridged networking. A daemon need not be running.
pub fn checks(config: &Config, commands: &dyn Commands, cancel: &Cancel) -> Vec<Check> {
    let mut all = vec![rights(config)];
    let missing: Vec<_> = ["ip", "nft"]
        .into_iter()
        .filter(|p| find_program(Path::new(p)).is_none())
        .collect();
    if !missing.is_empty() {
        all.push(Check::fail(
            "network-tools",
            format!("{} is not installed", missing.join(" and ")),
            "apt install iproute2 nftables",
        ));
        return all;
    }
    let host = Host {
        config,
        commands,
        cancel,
    };
    let looks = [
        ("network-bridge", host.bridge()),
        ("network-subnet", host.subnet()),
        ("network-forwarding", host.forwarding()),
        ("network-ipv6", host.ipv6()),
    ];
    for (id, looked) in looks {
        all.extend(looked.unwrap_or_else(|e| {
            vec![Check::fail(
                id,
                e.to_string(),
                e.hint_text().unwrap_or("run fcctl doctor as root"),
            )]
        }));
    }
    all.extend(names(config));
    all
}

/// True if systemd-resolved runs on this host and can be configured with `resolvectl`.
pub(super) fn has_resolved() -> bool {
    crate::locks::may_block("file access");
    Path::new("/run/systemd/resolve/stub-resolv.conf").exists()
        && find_program(Path::new("resolvectl")).is_some()
}

fn rights(config: &Config) -> Check {
    if nix::unistd::geteuid().is_root() {
        return Check::ok(
            "network",
            format!(
                "bridge {}, guests in {}, masqueraded by nftables",
                config.bridge, config.subnet
            ),
        );
    }
    Check::fail(
        "network",
        "the configured bridge driver needs fcd to run as root",
        "driver = \"user\" under [network]",
    )
}

struct Host<'a> {
    config: &'a Config,
    commands: &'a dyn Commands,
    cancel: &'a Cancel,
}

impl Host<'_> {
    fn run(&self, command: &Command) -> Result<Vec<u8>> {
        run(self.commands, command, self.cancel)
    }

    fn bridge(&self) -> Result<Vec<Check>> {
        let links = parse_links(&self.run(&ip_json(&["-details", "link", "show"]))?)?;
        Ok(vec![bridge_check(&self.config.bridge, &links)])
    }

    fn subnet(&self) -> Result<Vec<Check>> {
        let routes = parse_routes(&self.run(&ip_json(&[
            "-4", "-details", "route", "show", "table", "all",
        ]))?)?;
        Ok(vec![subnet_check(self.config, &routes)])
    }

    fn forwarding(&self) -> Result<Vec<Check>> {
        const ID: &str = "network-forwarding";
        let mut all = Vec::new();
        if !bridge::forwards()? {
            all.push(Check::ok(
                ID,
                "IPv4 forwarding is off; fcd turns it on when it starts",
            ));
        }
        let chains = parse_chains(&self.run(&nft_json(&["list", "chains"]))?)?;
        let mut text_of = |family: &str, table: &str| {
            let out = self.run(&Command::new("nft").args(["list", "table", family, table]));
            out.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        };
        for (found, fix) in blockers(&chains, &self.config.bridge, &mut text_of)? {
            all.push(Check::warn(ID, found, &fix));
        }
        all.extend(self.legacy());
        if all.is_empty() {
            all.push(Check::ok(
                ID,
                "IPv4 forwarding is on, and no rules were found that drop guests' packets",
            ));
        }
        Ok(all)
    }

    fn ipv6(&self) -> Result<Vec<Check>> {
        const ID: &str = "network-ipv6";
        if self.config.ipv6 == Ipv6::Off {
            return Ok(Vec::new());
        }
        let check = if super::host_has_ipv6() {
            let routes = parse_ipv6_routes(&self.run(&ip_json(&ipv6::ROUTES))?)?;
            match ipv6::forwarding(&routes)? {
                Forwarding::On => Check::ok(ID, "guests have IPv6, masqueraded by nftables"),
                Forwarding::Off => {
                    Check::ok(ID, "IPv6 forwarding is off; fcd turns it on when it starts")
                }
                Forwarding::NoRoute => Check::ok(
                    ID,
                    "guests have IPv6, but this host has no IPv6 route to the outside",
                ),
                Forwarding::Unsafe(dev) => Check::warn(ID, ipv6::risk(&dev), &ipv6::remedy(&dev)),
            }
        } else {
            Check::ok(
                ID,
                "guests have no IPv6, because this host has no IPv6 address",
            )
        };
        Ok(vec![check])
    }

    fn legacy(&self) -> Option<Check> {
        crate::locks::may_block("file access");
        let tables = std::fs::read_to_string(LEGACY_TABLES).ok()?;
        tables.lines().find(|t| *t == "filter")?;
        find_program(Path::new("iptables-legacy"))?;
        let out = self
            .run(
                &Command::new("iptables-legacy")
                    .arg("-S")
                    .deadline(LEGACY_DEADLINE),
            )
            .ok()?;
        let (bridge, rules) = (
            &self.config.bridge,
            String::from_utf8_lossy(&out).into_owned(),
        );
        let drops = rules
            .lines()
            .any(|l| matches!(l, "-P FORWARD DROP" | "-P FORWARD REJECT"));
        let fix = format!(
            "iptables-legacy -I FORWARD -i {bridge} -j ACCEPT; iptables-legacy -I FORWARD -o {bridge} -j ACCEPT"
        );
        (drops && !rules.contains(bridge.as_str())).then(|| {
            Check::warn(
                "network-forwarding",
                "iptables-legacy drops forwarded packets, including those of guests",
                &fix,
            )
        })
    }
}

fn bridge_check(name: &str, links: &[Link]) -> Check {
    const ID: &str = "network-bridge";
    match links.iter().find(|l| l.name == name) {
        None => Check::ok(ID, format!("fcd will create bridge {name} when it starts")),
        Some(l)
            if l.is_kind("bridge") && (l.alias().starts_with("fc-") || l.alias().is_empty()) =>
        {
            Check::ok(ID, format!("bridge {name} exists"))
        }
        Some(l) => {
            let kind = l.linkinfo.info_kind.as_deref().unwrap_or("device");
            let found = format!(
                "fcd did not create the existing {kind} {name} (alias {:?})",
                l.alias()
            );
            Check::fail(ID, found, "set another name: bridge = ... under [network]")
        }
    }
}

fn subnet_check(config: &Config, routes: &[Route]) -> Check {
    const ID: &str = "network-subnet";
    let other = routes
        .iter()
        .find(|r| r.dev != config.bridge && config.subnet.overlaps(r.base, r.prefix));
    match other {
        None => Check::ok(
            ID,
            format!(
                "{} is free for guests: room for {}",
                config.subnet,
                count(config.subnet.guests_max().into(), "VM")
            ),
        ),
        Some(r) => {
            let found = format!(
                "{} overlaps {}/{} on {}: guests or that network are unreachable",
                config.subnet, r.base, r.prefix, r.dev
            );
            Check::warn(ID, found, "set another subnet = ... under [network]")
        }
    }
}

/// A chain, as `nft --json list chains` prints it. A chain without a hook is only reached by jumps.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Chain {
    family: String,
    table: String,
    name: String,
    hook: Option<String>,
    policy: Option<String>,
}

fn parse_chains(json: &[u8]) -> Result<Vec<Chain>> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Item {
        chain: Option<Chain>,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct All {
        nftables: Vec<Item>,
    }
    let all: All = serde_json::from_slice(json)
        .map_err(|e| Error::new(Kind::Host, "read the chains of nftables").with_source(e))?;
    Ok(all
        .nftables
        .into_iter()
        .filter_map(|item| item.chain)
        .collect())
}

type TextOf<'a> = dyn FnMut(&str, &str) -> Result<String> + 'a;

/// Finds chains in other tables that drop packets by default. Skips tables that mention the bridge.
/// Returns a description of each problem and how to fix it.
fn blockers(
    chains: &[Chain],
    bridge: &str,
    text_of: &mut TextOf<'_>,
) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for chain in chains
        .iter()
        .filter(|c| matches!(c.family.as_str(), "ip" | "inet"))
    {
        let Some(hook @ ("forward" | "input")) = chain.hook.as_deref() else {
            continue;
        };
        // firewalld rejects packets in its last rule, not by its policy.
        let drops = chain.policy.as_deref() == Some("drop") || chain.table == "firewalld";
        if chain.table.starts_with("fcd_")
            || !drops
            || text_of(&chain.family, &chain.table)?.contains(&format!("\"{bridge}\""))
        {
            continue;
        }
        let of_table = |prefix: &str| {
            chains
                .iter()
                .any(|c| c.table == chain.table && c.name.starts_with(prefix))
        };
        let what = if hook == "forward" {
            "packets from guests to the outside"
        } else {
            "queries from guests to the name server"
        };
        let Chain {
            family,
            table,
            name,
            ..
        } = chain;
        let (who, fix) = if chain.table == "firewalld" {
            let fix = format!(
                "firewall-cmd --permanent --zone=trusted --add-interface={bridge}; firewall-cmd --reload"
            );
            ("firewalld".to_owned(), fix)
        } else if of_table("ufw-") && hook == "forward" {
            (
                "ufw".to_owned(),
                format!("ufw route allow in on {bridge}; ufw route allow out on {bridge}"),
            )
        } else if of_table("ufw-") {
            ("ufw".to_owned(), format!("ufw allow in on {bridge}"))
        } else if of_table("DOCKER-USER") && hook == "forward" {
            let accept = |way: &str| format!("iptables -I DOCKER-USER {way} {bridge} -j ACCEPT");
            (
                "docker".to_owned(),
                format!("{}; {}", accept("-i"), accept("-o")),
            )
        } else {
            let accept = |way: &str| {
                format!("nft insert rule {family} {table} {name} {way} {bridge} accept")
            };
            let fix = if hook == "forward" {
                format!("{}; {}", accept("iifname"), accept("oifname"))
            } else {
                accept("iifname")
            };
            ("a firewall".to_owned(), fix)
        };
        let entry = (
            format!("{who} drops {what}: chain {name} of table {family} {table}"),
            fix,
        );
        if !found.contains(&entry) {
            found.push(entry);
        }
    }
    Ok(found)
}

fn names(config: &Config) -> Option<Check> {
    let gateway = config.subnet.gateway();
    if !config.dns {
        return None;
    }
    if has_resolved() {
        return Some(Check::ok(
            "network-names",
            format!("systemd-resolved sends queries for NAME.vm to {gateway}"),
        ));
    }
    let mut check = Check::ok(
        "network-names",
        format!("{gateway} resolves NAME.vm for guests; this host is not configured to use it"),
    );
    check.fix = Some(format!(
        "install systemd-resolved, or in dnsmasq: server=/vm/{gateway}"
    ));
    Some(check)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::daemon::Severity;
    use expect_test::{Expect, expect};

    fn chain(family: &str, table: &str, name: &str, hook: Option<&str>, policy: &str) -> Chain {
        let own = str::to_owned;
        Chain {
            family: own(family),
            table: own(table),
            name: own(name),
            hook: hook.map(own),
            policy: Some(own(policy)),
        }
    }

    #[track_caller]
    fn check(chains: &[Chain], text: &str, expected: Expect) {
        let found = blockers(chains, "fcbr0", &mut |_, _| Ok(text.to_owned())).unwrap();
        let lines: Vec<_> = found
            .into_iter()
            .map(|(found, fix)| format!("{found}\n{fix}\n"))
            .collect();
        expected.assert_eq(&lines.concat());
    }

    #[test]
    fn blocker_of_forwarding_is_reported_with_owner_and_fix() {
        let docker = [
            chain("ip", "filter", "FORWARD", Some("forward"), "drop"),
            chain("ip", "filter", "DOCKER-USER", None, ""),
        ];
        check(
            &docker,
            "",
            expect![[r#"
            docker drops packets from guests to the outside: chain FORWARD of table ip filter
            iptables -I DOCKER-USER -i fcbr0 -j ACCEPT; iptables -I DOCKER-USER -o fcbr0 -j ACCEPT
        "#]],
        );
        check(&docker, "iifname \"fcbr0\" counter accept", expect![""]);
        let ufw = [
            chain("ip", "filter", "FORWARD", Some("forward"), "drop"),
            chain("ip", "filter", "INPUT", Some("input"), "drop"),
            chain("ip", "filter", "ufw-user-input", None, ""),
        ];
        check(
            &ufw,
            "",
            expect![[r#"
            ufw drops packets from guests to the outside: chain FORWARD of table ip filter
            ufw route allow in on fcbr0; ufw route allow out on fcbr0
            ufw drops queries from guests to the name server: chain INPUT of table ip filter
            ufw allow in on fcbr0
        "#]],
        );
        check(
            &[chain(
                "inet",
                "firewalld",
                "filter_FORWARD",
                Some("forward"),
                "accept",
            )],
            "",
            expect![[r#"
                firewalld drops packets from guests to the outside: chain filter_FORWARD of table inet firewalld
                firewall-cmd --permanent --zone=trusted --add-interface=fcbr0; firewall-cmd --reload
            "#]],
        );
        check(
            &[
                chain("inet", "mine", "fwd", Some("forward"), "drop"),
                chain("inet", "mine", "out", Some("output"), "drop"),
                chain("bridge", "b", "fwd", Some("forward"), "drop"),
                chain("inet", "fcd_1a2b3c4d", "forward", Some("forward"), "drop"),
                chain("inet", "open", "fwd", Some("forward"), "accept"),
            ],
            "",
            expect![[r#"
                a firewall drops packets from guests to the outside: chain fwd of table inet mine
                nft insert rule inet mine fwd iifname fcbr0 accept; nft insert rule inet mine fwd oifname fcbr0 accept
            "#]],
        );
    }

    #[test]
    fn subnet_used_by_other_device_warns() {
        let config = Config::default();
        let route = |dev: &str| Route {
            base: [10, 0, 0, 0].into(),
            prefix: 8,
            dev: dev.into(),
        };
        assert_eq!(
            subnet_check(&config, &[route("fcbr0")]).severity,
            Severity::Ok
        );
        let taken = subnet_check(&config, &[route("wg0")]);
        assert_eq!(taken.severity, Severity::Warn);
        assert!(taken.found.contains("10.0.0.0/8 on wg0"), "{}", taken.found);
    }

    #[test]
    fn bridge_with_foreign_alias_fails() {
        let link = |alias: &str| Link {
            name: "fcbr0".into(),
            alias: Some(alias.into()),
            linkinfo: super::super::links::Info {
                info_kind: Some("bridge".into()),
                ..Default::default()
            },
            ..Link::default()
        };
        assert_eq!(bridge_check("fcbr0", &[]).severity, Severity::Ok);
        assert_eq!(
            bridge_check("fcbr0", &[link("fc-1a2b3c4d")]).severity,
            Severity::Ok
        );
        assert_eq!(
            bridge_check("fcbr0", &[link("mine")]).severity,
            Severity::Fail
        );
    }
}
