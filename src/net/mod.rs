//! The network of VMs when the daemon is root: one bridge, a tap for each VM, rules in fcd's own
//! nftables tables, and a name server on the bridge's address.
//!
//! ```text
//! guest ── tap ──────────────── bridge fcbr0 ───────────────────── masquerade ── outside
//!          isolated port,       has the subnet's first address
//!          owned by VMM's uid
//!
//! table bridge fcd_<install>    on the taps: only the lease's MAC and addresses, only IPv4, ARP
//!                               and, if it is configured, IPv6 (see `ipv6.rs`)
//! table inet fcd_<install>      from the bridge: only DNS and echo on the host, nothing
//!                               link-local, no other guest; with `--net none` no forwarding
//! ```
//!
//! A restarted daemon finds everything by name. The bridge has the alias `fc-<install>`, a spare
//! tap has `fc-<install>-tap`, and a VM's tap has the VM's tag. The names of both tables contain
//! the installation's id. Anything with another name is never touched. Every function is
//! idempotent.
//!
//! A VM's address follows from its slot, so a lease needs no row, and an address is not reused
//! before its VM is deleted. A tap gets its alias first, so that a restarted daemon can find it.
//! Then it gets its owner and its elements in the sets, and it joins the bridge last. Therefore a
//! guest is never on the bridge without rules, and a tap without elements passes no packets.
//!
//! Published ports are two maps in the inet table whose elements carry the VM's tag as a comment.
//! They work while the daemon is down. While the daemon runs, it also binds the ports, so that no
//! other program binds one and receives nothing. Ports on 127.0.0.1 need `route_localnet` on the
//! bridge; the rules drop everything that a guest sends to an address of the host.
//!
//! If something deletes fcd's rules or taps, `mend` restores them, at start and every minute. fcd
//! never changes other firewalls, but `checks.rs` reports those that block forwarding.

mod bridge;
mod checks;
mod conntrack;
pub mod dns;
mod forward;
pub mod gone;
mod host_ipv6;
mod ipv6;
mod lease;
mod links;
mod names;
mod present;
mod rules;
mod sets;
mod taps;
#[cfg(test)]
mod tests;
mod tools;
mod tun;

pub use checks::checks;
pub use forward::{free_port, require_free_ports};
pub use host_ipv6::{host_has_ipv6, host_has_ipv6_resolver};
pub use lease::{Access, Guest, Lease, LeaseIpv6, Mac};
pub use links::received_and_sent;

use crate::config::{Ipv6Network, Network as Config};
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::{Command, Commands};
use crate::locks::{Cancel, Mutex, Rank};
use crate::sched::HashMap;
use crate::undo::Undo;
use ipv6::Forwarding;
use links::{Link, parse_links};
use names::Names;
use rules::Rules;
use sets::{Element, Sets};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use taps::Pool;
use tools::Tools;

const RESOLV_CONF: &str = "/etc/resolv.conf";
const RESOLVED_DEADLINE: Duration = Duration::from_secs(5);

/// A VM's tap, attached to the bridge and owned by its VMM's uid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// The interface's name, `fc<install>-<number>`. A number is reused only after 9998 other taps
    /// have been created.
    pub name: String,
}

/// Deletes the conntrack entries that `is_stale` selects, such as those of an earlier guest. A
/// failure is only logged, because the entries expire when they are idle.
fn forget_flows(is_stale: &dyn Fn(&conntrack::Flow) -> bool) {
    match conntrack::forget(is_stale) {
        Ok(0) => {}
        Ok(count) => {
            log::debug!("network: deleted {count} conntrack entries of an earlier guest or port")
        }
        Err(e) => log::warn!(
            "network: {e}; packets of old connections may reach a new guest until the entries expire"
        ),
    }
}

/// The bridge, its taps and its rules.
pub struct Net {
    config: Config,
    /// The IPv6 network of the guests, or None if they have no IPv6.
    ipv6: Option<Ipv6Network>,
    names: Names,
    rules: Rules,
    sets: Sets,
    tools: Tools,
    pool: Arc<Pool>,
    /// The connected guests with the names of their taps, by tag.
    guests: Mutex<HashMap<String, (String, Guest)>>,
    /// The ports published for each guest, by tag.
    forwards: Mutex<HashMap<String, forward::Forwards>>,
}

impl Net {
    /// Creates the bridge and the rules if they are missing, turns IPv4 forwarding on if it is off
    /// (and logs that), removes the spare taps of an earlier daemon, and starts creating new ones.
    /// Taps and rules of running VMs are left as they are.
    ///
    /// # Errors
    /// `conflict` if the bridge's name or the subnet is used by something else; nothing has been
    /// created then. Other failures are `command_missing`, `command_failed` and `host`.
    pub fn open(
        config: &Config,
        install: &str,
        commands: Arc<dyn Commands>,
        cancel: &Cancel,
    ) -> Result<Self> {
        let names = Names::of(install)?;
        let tools = Tools::new(commands)?;
        let ipv6 = ipv6::network(config, &names);
        let (rules, sets) = (Rules::new(&names, config, ipv6), Sets::new(&names));
        let links = all_links(&tools, cancel)?;
        let routes = tools.ip_json(&["-4", "-details", "route", "show", "table", "all"], cancel)?;
        bridge::require_free(&names, config, &links, &links::parse_routes(&routes)?)?;
        if let Some(network) = ipv6 {
            let routes = tools.ip_json(&ipv6::ROUTES, cancel)?;
            let routes = links::parse_ipv6_routes(&routes)?;
            ipv6::require_free(&config.bridge, network, &routes)?;
        }
        let last = links
            .iter()
            .filter_map(|l| names.tap_number(&l.name))
            .max()
            .unwrap_or(0);
        let pool = Pool::new(names.clone(), tools.clone(), config.taps_ahead, last)?;
        let guests = Mutex::new(Rank::Taps, HashMap::default());
        let forwards = Mutex::new(Rank::Taps, HashMap::default());
        let net = Self {
            config: config.clone(),
            ipv6,
            names,
            rules,
            sets,
            tools,
            pool,
            guests,
            forwards,
        };
        // A tap without an alias is left from a daemon that ended before it could set one.
        let is_leftover = |l: &&Link| {
            l.alias() == net.names.spare() || (l.alias().is_empty() && is_our_tap(&net.names, l))
        };
        net.pool.remove(
            &links
                .iter()
                .filter(is_leftover)
                .map(|l| l.name.clone())
                .collect::<Vec<_>>(),
        );
        // Rules come first, so that no guest is ever on the bridge without them.
        net.tools
            .nft(&net.rules.apply_first(), cancel)
            .map_err(|e| e.context("set the rules of guests"))?;
        for done in bridge::ensure(&net.names, (config, ipv6), &links, &net.tools, cancel)? {
            log::info!("network: {done}");
        }
        if bridge::ensure_forwarding()? {
            log::info!(
                "network: turned IPv4 forwarding on because guests need it to reach the outside"
            );
        }
        match net.ensure_ipv6_forwarding(cancel) {
            Some(Forwarding::Off) => log::info!("network: turned IPv6 forwarding on"),
            Some(Forwarding::Unsafe(dev)) => log::warn!(
                "network: {}; to allow it: {}",
                ipv6::risk(&dev),
                ipv6::remedy(&dev)
            ),
            _ => {}
        }
        net.pool.refill();
        Ok(net)
    }

    /// Returns the addresses of the VM in this slot.
    ///
    /// # Errors
    /// `exhausted` when the subnet has no address for this slot.
    pub fn lease(&self, slot: u32) -> Result<Lease> {
        Lease::of(self.config.subnet, self.ipv6, slot)
    }

    /// Gives a VM a tap, from the spare taps if possible. The tap first gets the VM's tag as its
    /// alias, so that [`Net::list`] and [`Net::release`] find it. Then it gets its owner and its
    /// rules, and it joins the bridge last. This takes about ten milliseconds.
    ///
    /// An existing tap with the same tag is replaced. After an error the tap has been removed, or
    /// [`Net::release`] can remove it.
    ///
    /// Runs host commands, so no lock may be held.
    pub fn take(&self, guest: &Guest, uid: u32, cancel: &Cancel) -> Result<Tap> {
        let taken = self
            .try_take(guest, uid, cancel)
            .map_err(|e| e.context(format!("give {} a tap", guest.tag)));
        self.pool.refill();
        taken
    }

    fn try_take(&self, guest: &Guest, uid: u32, cancel: &Cancel) -> Result<Tap> {
        if !self.names.is_tag(&guest.tag) || !self.config.subnet.contains(guest.lease.address) {
            return Err(Error::internal(format!(
                "{guest:?} is not a guest of this network"
            )));
        }
        let links = all_links(&self.tools, cancel)?;
        if links.iter().any(|l| l.alias() == guest.tag) {
            self.release(&guest.tag)?;
        }
        // Skip spare taps that something else has removed or changed.
        let is_fresh = |name: &String| {
            links
                .iter()
                .any(|l| l.name == *name && l.alias() == self.names.spare())
        };
        let name = match std::iter::from_fn(|| self.pool.pop()).find(is_fresh) {
            Some(name) => name,
            None => self.pool.make(cancel)?,
        };
        self.guests
            .lock()
            .insert(guest.tag.clone(), (name.clone(), guest.clone()));
        let mut undo = Undo::new();
        undo.push("remove the tap", || {
            // `release` finds a tap by its alias, so a tap without one must be removed by name.
            self.pool.remove(std::slice::from_ref(&name));
            self.release(&guest.tag)
        });
        self.tools.ip_batch(
            &[format!("link set dev {name} alias {}", guest.tag)],
            cancel,
        )?;
        tun::set_owner(&name, uid)?;
        self.tools.nft(&self.sets.add(&name, guest), cancel)?;
        // Delete the conntrack entries of the previous guest with this address.
        forget_flows(&|flow| guest.lease.addresses().any(|address| flow.is_of(address)));
        self.tools
            .ip_batch(&self.joining(&name, &guest.lease), cancel)?;
        undo.commit();
        Ok(Tap { name })
    }

    /// Returns the commands that put a tap on the bridge. The permanent neighbour entry saves the
    /// first connection an ARP exchange, and keeps other guests from answering for this address.
    fn joining(&self, tap: &str, lease: &Lease) -> Vec<String> {
        let bridge = &self.config.bridge;
        let isolated = if self.config.allow_between_vms {
            "off"
        } else {
            "on"
        };
        let neighbour = |address| {
            let mac = lease.mac;
            format!("neighbour replace {address} lladdr {mac} dev {bridge} nud permanent")
        };
        let mut lines = vec![
            format!("link set dev {tap} master {bridge}"),
            format!("link set dev {tap} type bridge_slave isolated {isolated}"),
            format!("link set dev {tap} up"),
        ];
        lines.extend(lease.addresses().map(neighbour));
        lines
    }

    /// Removes the tap with this tag and its rules. Succeeds if they do not exist. The VMM must
    /// have exited. Ignores cancellation.
    pub fn release(&self, tag: &str) -> Result<()> {
        self.guests.lock().remove(tag);
        if !self.names.is_tag(tag) {
            return Err(Error::internal(format!(
                "release a tap: {tag:?} is not a VM's tag"
            )));
        }
        self.remove_taps(&|l| l.alias() == tag)
            .map_err(|e| e.context(format!("remove the tap of {tag}")))
    }

    /// Removes the taps that `which` selects, and the rules of taps that do not exist.
    fn remove_taps(&self, which: &dyn Fn(&Link) -> bool) -> Result<()> {
        let never = self.tools.never();
        // These reads must happen in this order. A tap exists before its rules, so a rule is stale
        // if its tap is missing from a list of links that was read after the rules. A guest is in
        // `guests` before its rules are set, so read `guests` last.
        let present::Present { nat, elements, .. } = self.present()?;
        let links = all_links(&self.tools, never)?;
        let (gone, left): (Vec<&Link>, Vec<&Link>) = links.iter().partition(|l| which(l));
        let delete: Vec<_> = gone
            .iter()
            .map(|l| format!("link delete dev {}", l.name))
            .collect();
        if let Some(e) = Some(&delete)
            .filter(|d| !d.is_empty())
            .and_then(|d| self.tools.ip_batch_all(d).err())
        {
            // The taps may already have been removed by something else.
            let is_left = |l: &Link| gone.iter().any(|g| g.name == l.name);
            if all_links(&self.tools, never)?.iter().any(is_left) {
                return Err(e);
            }
        }
        let (live, stale): (Vec<Element>, Vec<Element>) = elements
            .into_iter()
            .partition(|e| left.iter().any(|l| l.name == e.tap));
        let known: Vec<IpAddr> = self
            .guests
            .lock()
            .values()
            .flat_map(|(_, guest)| guest.lease.addresses())
            .collect();
        let is_used = |address: &IpAddr| {
            known.contains(address) || live.iter().any(|e| e.address == *address)
        };
        let nat: Vec<_> = nat.into_iter().filter(|a| !is_used(a)).collect();
        if !stale.is_empty() || !nat.is_empty() {
            self.tools.nft(&self.sets.remove(&stale, &nat), never)?;
        }
        // A neighbour entry that cannot be deleted is harmless: the next guest with this address
        // gets the same one.
        let forget = bridge::neighbours(&self.config.bridge, &self.tools)?
            .into_iter()
            .filter(|a| !is_used(a));
        let forget: Vec<_> = forget
            .map(|a| format!("neighbour delete {a} dev {}", self.config.bridge))
            .collect();
        if !forget.is_empty() {
            let _ = self.tools.ip_batch_all(&forget);
        }
        Ok(())
    }

    /// Returns the tags of all VMs' taps on the host, without the spare taps.
    pub fn list(&self) -> Result<Vec<String>> {
        let links = all_links(&self.tools, self.tools.never())?;
        let mut tags: Vec<_> = links
            .iter()
            .map(Link::alias)
            .filter(|a| self.names.is_tag(a))
            .map(str::to_owned)
            .collect();
        tags.sort();
        tags.dedup();
        Ok(tags)
    }

    /// Records running guests that an earlier daemon connected. A guest whose tap is missing is
    /// logged and left out.
    pub fn adopt(&self, guests: &[Guest]) -> Result<()> {
        let links = all_links(&self.tools, self.tools.never())?;
        for guest in guests {
            match links.iter().find(|l| l.alias() == guest.tag) {
                Some(link) => {
                    self.guests
                        .lock()
                        .insert(guest.tag.clone(), (link.name.clone(), guest.clone()));
                }
                None => log::warn!("network: the tap of {} is gone", guest.tag),
            }
        }
        Ok(())
    }

    /// Repairs the bridge, IPv4 forwarding, the rules, the published ports and the taps of
    /// connected guests, because a restart of another firewall can flush all rules. Also removes
    /// the rules of taps that no longer exist, and refills the pool of spare taps. Returns a
    /// description of each repair.
    ///
    /// May run at any time after [`Net::adopt`]. The sweeper calls it every minute.
    pub fn mend(&self) -> Result<Vec<String>> {
        let never = self.tools.never();
        let mut done = Vec::new();
        let present = self.present()?;
        if !present.has_all_sets {
            done.push("restored the rules of guests".to_owned());
        }
        let guests: Vec<(String, Guest)> = self.guests.lock().values().cloned().collect();
        let mut script = self.rules.apply();
        for (tap, guest) in &guests {
            let is_in = present.has(tap, guest);
            script += &self.sets.add(tap, guest);
            if !is_in {
                done.push(format!("restored the rules of {}", guest.tag));
            }
        }
        self.tools.nft(&script, never)?;
        let links = all_links(&self.tools, never)?;
        done.extend(bridge::ensure(
            &self.names,
            (&self.config, self.ipv6),
            &links,
            &self.tools,
            never,
        )?);
        if bridge::ensure_forwarding()? {
            done.push("turned IPv4 forwarding on".to_owned());
        }
        if self.ensure_ipv6_forwarding(never) == Some(Forwarding::Off) {
            done.push("turned IPv6 forwarding on".to_owned());
        }
        done.extend(self.mend_forwards()?);
        for (tap, guest) in &guests {
            let is_off = |l: &Link| l.master.as_deref() != Some(&self.config.bridge) || !l.is_up();
            let is_there = |links: &[Link]| {
                links
                    .iter()
                    .any(|l| l.name == *tap && l.alias() == guest.tag && is_off(l))
            };
            if !is_there(&links) {
                continue;
            }
            match self.tools.ip_batch(&self.joining(tap, &guest.lease), never) {
                // The tap has been released since the check.
                Err(_) if !is_there(&all_links(&self.tools, never)?) => {}
                Err(e) => return Err(e),
                Ok(()) => done.push(format!("reattached {} to the bridge", guest.tag)),
            }
        }
        self.remove_taps(&|_| false)?;
        self.pool.refill();
        Ok(done)
    }

    /// Limits what the guest with this tag receives and sends per second. Packets above the limit
    /// are dropped.
    ///
    /// Runs host commands, so no lock may be held.
    pub fn set_rates(
        &self,
        tag: &str,
        rx_bytes_per_s: Option<u64>,
        tx_bytes_per_s: Option<u64>,
    ) -> Result<()> {
        let doing = || format!("limit the network of {tag}");
        let guest = {
            let mut guests = self.guests.lock();
            guests.get_mut(tag).map(|(tap, guest)| {
                (guest.rx_bytes_per_s, guest.tx_bytes_per_s) = (rx_bytes_per_s, tx_bytes_per_s);
                (tap.clone(), guest.clone())
            })
        };
        let (tap, guest) =
            guest.ok_or_else(|| Error::new(Kind::Host, format!("{}: its tap is gone", doing())))?;
        self.tools
            .nft(&self.sets.rates(&tap, &guest), self.tools.never())
            .map_err(|e| e.context(doing()))
    }

    /// Returns the number of spare taps.
    #[cfg(test)]
    pub fn taps_ready(&self) -> usize {
        self.pool.ready()
    }

    /// Starts the name server on the bridge's address. If systemd-resolved runs on this host, it is
    /// configured to send queries for `.vm` to the name server. The helper process runs as `owner`.
    pub fn serve_names(
        &self,
        names: Arc<dyn dns::Names>,
        owner: Credentials,
    ) -> Result<dns::Server> {
        let bridge = &self.config.bridge;
        let gateway = self.config.subnet.gateway();
        let server = dns::Server::start(dns::Setup {
            listen: (gateway, dns::PORT).into(),
            subnet: self.config.subnet,
            names,
            resolv_conf: RESOLV_CONF.into(),
            upstream_port: dns::PORT,
            owner: Some(owner),
        })?;
        if checks::has_resolved() {
            for args in [
                vec!["dns", bridge, &gateway.to_string()],
                vec!["domain", bridge, "~vm"],
                vec!["default-route", bridge, "no"],
            ] {
                let command = Command::new("resolvectl")
                    .args(args)
                    .deadline(RESOLVED_DEADLINE);
                if let Err(e) = self.tools.run(&command, self.tools.never()) {
                    log::warn!("network: configure systemd-resolved for .vm: {e}");
                }
            }
        }
        Ok(server)
    }

    /// Removes the spare taps and waits for the threads that make them. The bridge, the rules and
    /// the taps of VMs stay.
    pub fn close(&self) {
        self.pool.close();
    }

    /// Removes everything that belongs to this installation, including the taps of VMs.
    #[cfg(test)]
    pub fn remove_all(&self) -> Result<()> {
        self.close();
        self.guests.lock().clear();
        self.forwards.lock().clear();
        self.remove_taps(&|l| {
            self.names.is_tag(l.alias())
                || l.alias() == self.names.spare()
                || is_our_tap(&self.names, l)
        })?;
        let links = all_links(&self.tools, self.tools.never())?;
        let bridges: Vec<_> = links
            .iter()
            .filter(|l| bridge::is_ours(&self.names, l))
            .collect();
        let delete: Vec<_> = bridges
            .iter()
            .map(|l| format!("link delete dev {}", l.name))
            .collect();
        if !delete.is_empty() {
            self.tools.ip_batch(&delete, self.tools.never())?;
        }
        self.tools.nft(&self.rules.remove_all(), self.tools.never())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.close();
    }
}

fn all_links(tools: &Tools, cancel: &Cancel) -> Result<Vec<Link>> {
    parse_links(&tools.ip_json(&["-details", "link", "show"], cancel)?)
}

fn is_our_tap(names: &Names, link: &Link) -> bool {
    link.is_kind("tun") && names.tap_number(&link.name).is_some()
}
