//! Ports of the host that lead to guests on the bridge: address translation in our own table, so that they stand while the daemon
//! does not run. While it does, it has each port bound, so that no program of the host's takes one that would get nothing.

use super::conntrack::Flow;
use super::forget_flows;
use super::rules::{self, Published};
use super::{Guest, Net};
use crate::api::port::{Port, Protocol};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;

/// What one VM has.
pub(super) struct Forwards {
    published: Vec<Published>,
    /// Bound, and nothing else.
    _places: Vec<OwnedFd>,
}

/// Takes these ports for as long as the descriptors are open, without listening on them.
///
/// # Errors
/// `port_taken`, `denied`, `invalid_argument` for an address that is not this host's.
pub fn reserve(ports: &[Port]) -> Result<Vec<OwnedFd>> {
    ports.iter().map(|port| bind(port, false).map(|(fd, _)| fd)).collect()
}

/// Whether a server could listen on them now, which does not mind a connection that has just ended.
///
/// # Errors
/// As of [`reserve`].
pub fn look(ports: &[Port]) -> Result<()> {
    ports.iter().try_for_each(|port| bind(port, true).map(drop))
}

/// This port with a number that nothing on the host has now.
pub fn free_port(port: &Port) -> Result<Port> {
    let (_, host_port) = bind(&Port { host_port: 0, ..*port }, false)?;
    Ok(Port { host_port, ..*port })
}

fn bind(port: &Port, as_server: bool) -> Result<(OwnedFd, u16)> {
    crate::locks::require_memory_only("socket");
    let doing = || format!("forward port {port} to the guest");
    let io = |e: rustix::io::Errno| Error::io(doing(), std::io::Error::from(e));
    let kind = match port.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = rustix::net::socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, None).map_err(io)?;
    if as_server && port.protocol == Protocol::Tcp {
        // socket(7). Not for what is kept: two that have this option may both have the port.
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true).map_err(io)?;
    }
    let at = SocketAddr::V4(SocketAddrV4::new(port.host_addr, port.host_port));
    rustix::net::bind(&socket, &at).map_err(|e| refused(port, e))?;
    let bound = rustix::net::getsockname(&socket).map_err(io)?;
    let number =
        SocketAddr::try_from(bound).map_err(|_| Error::internal(format!("{}: the socket has no address", doing())))?.port();
    Ok((socket, number))
}

fn refused(port: &Port, e: rustix::io::Errno) -> Error {
    use rustix::io::Errno;
    let doing = format!("forward port {port} to the guest");
    match e {
        Errno::ADDRINUSE => {
            let list = if port.protocol == Protocol::Tcp { "-tanp" } else { "-uanp" };
            Error::new(Kind::PortTaken, format!("{doing}: a program on this host has it"))
                .hint(format!("see which: ss {list} sport = :{}", port.host_port))
        }
        Errno::ADDRNOTAVAIL => Error::invalid(format!("{doing}: {} is no address of this host", port.host_addr))
            .hint("see the addresses with ip -4 address; 0.0.0.0 is all of them"),
        Errno::ACCESS => Error::new(Kind::Denied, format!("{doing}: fcd may not have it")).hint("take a port from 1024 on"),
        e => Error::io(doing, std::io::Error::from(e)),
    }
}

impl Net {
    /// Leads these ports to the guest. What the VM had before is replaced. After an error nothing of it is left, or [`Net::unforward`]
    /// finds it.
    pub fn forward(&self, guest: &Guest, ports: &[Port], cancel: &Cancel) -> Result<()> {
        self.unforward(&guest.tag)?;
        let places = reserve(ports)?;
        self.allow_loopback(ports)?;
        let published = published(guest, ports);
        // What somebody left in their places.
        let stale = self.published()?.into_iter().filter(|p| published.iter().any(|new| new.port.overlaps(&p.port)));
        let mut script: String = stale.map(|p| self.rules.unpublish(&p)).collect();
        script.extend(published.iter().map(|p| self.rules.publish(p)));
        self.tools.nft(&script, cancel).map_err(|e| e.context(format!("forward ports to {}", guest.tag)))?;
        // What goes to them already was not translated when it began.
        forget_flows(&|flow| ports.iter().any(|port| goes_to(flow, port)));
        self.forwards.lock().insert(guest.tag.clone(), Forwards { published, _places: places });
        Ok(())
    }

    /// After a restart of the daemon: the rules stand, the ports are taken again.
    pub fn adopt_forwards(&self, guest: &Guest, ports: &[Port]) {
        let places = reserve(ports).unwrap_or_else(|e| {
            log::warn!("network: {}: {e}", guest.tag);
            Vec::new()
        });
        self.forwards.lock().insert(guest.tag.clone(), Forwards { published: published(guest, ports), _places: places });
    }

    /// Takes the ports with this tag back; gone already is ok. Ignores cancellation.
    pub fn unforward(&self, tag: &str) -> Result<()> {
        drop(self.forwards.lock().remove(tag));
        if !self.names.is_tag(tag) {
            return Err(Error::internal(format!("take ports back: {tag:?} is no tag of a VM's")));
        }
        let script: String = self.published()?.iter().filter(|p| p.tag == tag).map(|p| self.rules.unpublish(p)).collect();
        if script.is_empty() {
            return Ok(());
        }
        self.tools.nft(&script, self.tools.never()).map_err(|e| e.context(format!("take back the ports of {tag}")))
    }

    /// The tags of the VMs that have ports.
    pub fn forwarded(&self) -> Result<Vec<String>> {
        let mut tags: Vec<_> = self.published()?.into_iter().map(|p| p.tag).filter(|tag| self.names.is_tag(tag)).collect();
        tags.sort();
        tags.dedup();
        Ok(tags)
    }

    fn published(&self) -> Result<Vec<Published>> {
        let mut all = Vec::new();
        for list in self.rules.list_published() {
            if let Some(json) = self.listed(&list)? {
                all.extend(rules::parse_published(&json)?);
            }
        }
        Ok(all)
    }

    /// Puts right what others did. Says what it mended.
    pub(super) fn mend_forwards(&self) -> Result<Vec<String>> {
        let wanted: Vec<Published> = self.forwards.lock().values().flat_map(|f| f.published.clone()).collect();
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        self.allow_loopback(&wanted.iter().map(|p| p.port).collect::<Vec<_>>())?;
        let there = self.published()?;
        let missing: Vec<_> = wanted.into_iter().filter(|p| !there.contains(p)).collect();
        if missing.is_empty() {
            return Ok(Vec::new());
        }
        let script: String = missing.iter().map(|p| self.rules.publish(p)).collect();
        self.tools.nft(&script, self.tools.never())?;
        // Taken back meanwhile: then they go again.
        let current: Vec<Published> = self.forwards.lock().values().flat_map(|f| f.published.clone()).collect();
        let late: String = missing.iter().filter(|p| !current.contains(p)).map(|p| self.rules.unpublish(p)).collect();
        if !late.is_empty() {
            self.tools.nft(&late, self.tools.never())?;
        }
        Ok(missing.iter().map(|p| format!("forwarded port {} to {} again", p.port, p.tag)).collect())
    }

    /// What the host sends from 127.0.0.1 may leave by the bridge, where it is masqueraded (kernel, ip-sysctl: route_localnet). Guests do not
    /// reach the host's loopback by it: the rules drop what they send to an address of the host's.
    fn allow_loopback(&self, ports: &[Port]) -> Result<()> {
        let needs = |address: Ipv4Addr| address.is_loopback() || address.is_unspecified();
        if !ports.iter().any(|port| needs(port.host_addr)) {
            return Ok(());
        }
        let path = format!("/proc/sys/net/ipv4/conf/{}/route_localnet", self.config.bridge);
        std::fs::write(&path, "1").map_err(|e| Error::io(format!("let ports of the loopback lead to guests: write {path}"), e))
    }
}

fn goes_to(flow: &Flow, port: &Port) -> bool {
    let protocol = match port.protocol {
        Protocol::Tcp => libc::IPPROTO_TCP,
        Protocol::Udp => libc::IPPROTO_UDP,
    };
    let to = flow.original;
    i32::from(to.protocol) == protocol
        && to.destination_port == port.host_port
        && (port.host_addr.is_unspecified() || port.host_addr == to.destination)
}

fn published(guest: &Guest, ports: &[Port]) -> Vec<Published> {
    ports.iter().map(|&port| Published { tag: guest.tag.clone(), address: guest.lease.address, port }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    fn port(host_port: u16, protocol: Protocol) -> Port {
        Port { host_addr: Ipv4Addr::LOCALHOST, host_port, guest_port: 80, protocol }
    }

    #[test]
    fn a_port_that_a_program_has_is_named() {
        let (tcp, udp) = (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        for (taken, protocol) in [(tcp.local_addr(), Protocol::Tcp), (udp.local_addr(), Protocol::Udp)] {
            let taken = port(taken.unwrap().port(), protocol);
            let e = reserve(&[taken]).unwrap_err();
            assert_eq!((e.kind(), look(&[taken]).unwrap_err().kind()), (Kind::PortTaken, Kind::PortTaken));
            assert!(e.to_string().contains(&taken.to_string()) && e.hint_text().unwrap().starts_with("see which: ss -"), "{e}");
        }
    }

    #[test]
    fn what_is_reserved_is_nobody_elses() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let free = free_port(&port(0, protocol)).unwrap();
            assert_ne!(free.host_port, 0);
            look(&[free]).unwrap();
            let places = reserve(&[free]).unwrap();
            let again = match protocol {
                Protocol::Tcp => TcpListener::bind((free.host_addr, free.host_port)).map(drop),
                Protocol::Udp => UdpSocket::bind((free.host_addr, free.host_port)).map(drop),
            };
            assert_eq!(again.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
            drop(places);
        }
    }

    #[test]
    fn an_address_of_somebody_else_is_refused() {
        let e = reserve(&[Port { host_addr: [192, 0, 2, 77].into(), ..port(8080, Protocol::Tcp) }]).unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidArgument);
    }
}
