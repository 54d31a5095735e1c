//! Which ports of the host a new VM may have. A port is one VM's from its creation to its deletion;
//! whether something else on the host has it is seen at each start.

use super::access::Caller;
use super::network::Networks;
use crate::api::port::Port;
use crate::api::vm::Net;
use crate::error::{Error, Kind, Result};
use crate::net;
use crate::store::State;

/// Of one VM.
const PORTS_MAX: usize = 64;
/// Ports that the host has free and that turn out to be another VM's, which does not run.
const PICK_TRIES_MAX: u32 = 64;
/// ip(7): from here on ports are for everybody.
const UNPRIVILEGED: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
const UNPRIVILEGED_DEFAULT: u16 = 1024;

/// The first port that needs no privilege on this host.
pub(super) fn unprivileged_from() -> u16 {
    let text = std::fs::read_to_string(UNPRIVILEGED).unwrap_or_default();
    text.trim().parse().unwrap_or(UNPRIVILEGED_DEFAULT)
}

impl Networks {
    /// What can be said without looking at other VMs.
    pub(super) fn check_ports(&self, caller: &Caller, network: Net, ports: &[Port]) -> Result<()> {
        if ports.len() > PORTS_MAX {
            return Err(Error::invalid(format!("{} ports: a VM may have {PORTS_MAX}", ports.len())).hint("give fewer with -p"));
        }
        if !ports.is_empty() && network == Net::None {
            return Err(Error::invalid("forward ports to a VM without a network").hint("leave out either -p or --net none"));
        }
        for (i, port) in ports.iter().enumerate() {
            self.check_port(caller, port)?;
            if port.host_port != 0 && ports[..i].iter().any(|other| other.overlaps(port)) {
                return Err(Error::invalid(format!("port {port} is given twice")).hint("give each port of the host once"));
            }
        }
        Ok(())
    }

    fn check_port(&self, caller: &Caller, port: &Port) -> Result<()> {
        if port.guest_port == 0 {
            return Err(Error::invalid("port 0 of a guest: give 1 to 65535").hint("as in -p 8080:80"));
        }
        if port.host_addr.is_multicast() || port.host_addr.is_broadcast() {
            return Err(Error::invalid(format!("{} is no address of a host", port.host_addr)).hint("as in -p 127.0.0.1:8080:80"));
        }
        let first = unprivileged_from();
        if port.host_port == 0 || port.host_port >= first {
            return Ok(());
        }
        if caller.uid != 0 {
            return Err(Error::new(Kind::Denied, format!("forward port {port}: ports below {first} are root's"))
                .hint(format!("take one from {first} on, as in -p 8080:{}", port.guest_port)));
        }
        if self.net.is_none() {
            return Err(Error::new(
                Kind::Unsupported,
                format!("forward port {port}: VMMs, which do not run as root, get none below {first}"),
            )
            .hint("take a higher one, or set driver = \"bridge\" under [network]"));
        }
        Ok(())
    }

    /// Picks those that are left open, and refuses those that another VM has. Another VM may take
    /// them until the row is there: see [`require_free`].
    pub(super) fn settle_ports(&self, asked: &[Port]) -> Result<Vec<Port>> {
        let taken: Vec<Port> = self.core.store.read(|s| s.vms().flat_map(|row| row.ports.clone()).collect());
        let is_taken = |port: &Port| taken.iter().any(|other| other.overlaps(port));
        if let Some(port) = asked.iter().find(|p| p.host_port != 0 && is_taken(p)) {
            return Err(taken_by_another(port));
        }
        let mut settled = asked.to_vec();
        for i in 0..settled.len() {
            if settled[i].host_port == 0 {
                settled[i] = pick(&settled[i], &|port| is_taken(port) || settled.iter().any(|other| other.overlaps(port)))?;
            }
        }
        Ok(settled)
    }
}

/// Refuses ports that a VM has.
pub(super) fn require_free(state: &State, ports: &[Port]) -> Result<()> {
    let is_taken = |port: &&Port| state.vms().any(|row| row.ports.iter().any(|other| other.overlaps(port)));
    ports.iter().find(is_taken).map_or(Ok(()), |port| Err(taken_by_another(port)))
}

fn taken_by_another(port: &Port) -> Error {
    Error::new(Kind::PortTaken, format!("port {port} belongs to another VM"))
        .hint(format!("take another, or let one be picked: -p {}", port.guest_port))
}

fn pick(port: &Port, is_taken: &dyn Fn(&Port) -> bool) -> Result<Port> {
    for _ in 0..PICK_TRIES_MAX {
        let free = net::free_port(port)?;
        if !is_taken(&free) {
            return Ok(free);
        }
    }
    Err(Error::new(Kind::Exhausted, format!("find a free port of {}", port.host_addr)).hint("give one, as in -p 8080:80"))
}
