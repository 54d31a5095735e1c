//! Checks and picks host ports for VMs. A port belongs to one VM from the moment it is in the VM's
//! row until it is removed or the VM is deleted. Each start checks whether another program on the
//! host uses the port.

use super::access::Caller;
use super::network::Networks;
use crate::api::port::Port;
use crate::api::vm::Net;
use crate::error::{Error, Kind, Result};
use crate::net;
use crate::store::State;

/// The maximum number of published ports per VM.
pub(super) const PORTS_MAX: usize = 64;
/// The most attempts to pick ports. Another VM may take a picked port before it is in the row.
pub(super) const PORT_TRIES_MAX: u32 = 16;
/// How many free ports of the host are tried. A port that is free on the host may belong to a VM
/// that does not run.
const PICK_TRIES_MAX: u32 = 64;
/// The file with the first port that needs no privilege (ip(7)).
const UNPRIVILEGED: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
const UNPRIVILEGED_DEFAULT: u16 = 1024;

/// Returns the first port that needs no privilege on this host.
pub(super) fn unprivileged_from() -> u16 {
    crate::locks::may_block("file access");
    let text = std::fs::read_to_string(UNPRIVILEGED).unwrap_or_default();
    text.trim().parse().unwrap_or(UNPRIVILEGED_DEFAULT)
}

impl Networks {
    /// Checks the ports of a request, but not whether they belong to other VMs.
    pub(super) fn check_ports(&self, caller: &Caller, network: Net, ports: &[Port]) -> Result<()> {
        if ports.len() > PORTS_MAX {
            return Err(Error::invalid(format!(
                "{} ports: a VM may have at most {PORTS_MAX}",
                ports.len()
            ))
            .hint("use -p less often"));
        }
        if !ports.is_empty() && network == Net::None {
            return Err(without_network());
        }
        for (i, port) in ports.iter().enumerate() {
            self.check_port(caller, port)?;
            if port.host_port != 0 && ports[..i].iter().any(|other| other.overlaps(port)) {
                return Err(Error::invalid(format!("port {port} is given twice"))
                    .hint("use each host port once"));
            }
        }
        Ok(())
    }

    fn check_port(&self, caller: &Caller, port: &Port) -> Result<()> {
        if port.guest_port == 0 {
            return Err(
                Error::invalid("guest port 0: use 1 to 65535").hint("for example -p 8080:80")
            );
        }
        if port.host_addr.is_multicast() || port.host_addr.is_broadcast() {
            return Err(
                Error::invalid(format!("{} is not an address of a host", port.host_addr))
                    .hint("for example -p 127.0.0.1:8080:80"),
            );
        }
        let first = unprivileged_from();
        if port.host_port == 0 || port.host_port >= first {
            return Ok(());
        }
        if caller.uid != 0 {
            return Err(Error::new(
                Kind::Denied,
                format!("forward port {port}: ports below {first} need root"),
            )
            .hint(format!(
                "use one from {first} on, for example -p 8080:{}",
                port.guest_port
            )));
        }
        if self.net.is_none() {
            return Err(Error::new(
                Kind::Unsupported,
                format!("forward port {port}: ports below {first} need root, and VMMs do not run as root"),
            )
            .hint("use a higher one, or set driver = \"bridge\" under [network]"));
        }
        Ok(())
    }

    /// Picks the ports that the request leaves open, and refuses ports that belong to another VM.
    /// Another VM may still take one of them before the row exists: see [`require_free`].
    pub(super) fn settle_ports(&self, asked: &[Port]) -> Result<Vec<Port>> {
        let taken: Vec<Port> = self
            .core
            .store
            .read(|s| s.vms().flat_map(|row| row.ports.clone()).collect());
        let is_taken = |port: &Port| taken.iter().any(|other| other.overlaps(port));
        if let Some(port) = asked.iter().find(|p| p.host_port != 0 && is_taken(p)) {
            return Err(taken_by_another(port));
        }
        let mut settled = asked.to_vec();
        for i in 0..settled.len() {
            if settled[i].host_port == 0 {
                settled[i] = pick(&settled[i], &|port| {
                    is_taken(port) || settled.iter().any(|other| other.overlaps(port))
                })?;
            }
        }
        Ok(settled)
    }
}

pub(super) fn without_network() -> Error {
    Error::invalid("forward ports to a VM without a network").hint("leave out -p or --net none")
}

/// Refuses ports that belong to a VM.
pub(super) fn require_free(state: &State, ports: &[Port]) -> Result<()> {
    let is_taken = |port: &&Port| {
        state
            .vms()
            .any(|row| row.ports.iter().any(|other| other.overlaps(port)))
    };
    ports
        .iter()
        .find(is_taken)
        .map_or(Ok(()), |port| Err(taken_by_another(port)))
}

fn taken_by_another(port: &Port) -> Error {
    Error::new(
        Kind::PortTaken,
        format!("port {port} belongs to another VM"),
    )
    .hint(format!(
        "use another one, or let fcd choose one: -p {}",
        port.guest_port
    ))
}

fn pick(port: &Port, is_taken: &dyn Fn(&Port) -> bool) -> Result<Port> {
    for _ in 0..PICK_TRIES_MAX {
        let free = net::free_port(port)?;
        if !is_taken(&free) {
            return Ok(free);
        }
    }
    Err(Error::new(
        Kind::Exhausted,
        format!("find a free port of {}", port.host_addr),
    )
    .hint("choose one, for example -p 8080:80"))
}
