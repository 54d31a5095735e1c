//! Published ports of guests on the bridge. The address translation lives in our nftables table, so
//! it works while the daemon is down. While the daemon runs, it also binds each port, so that no
//! program on the host binds a port on which it would never receive anything.

use super::conntrack::Flow;
use super::forget_flows;
use super::sets::{self, Published};
use super::{Guest, Net};
use crate::api::port::{Port, Protocol};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The published ports of one VM. A VM without ports has an entry, too, so that `mend` removes
/// rules that it should not have.
#[derive(Default)]
pub(super) struct Forwards {
    published: Vec<Published>,
    /// Sockets that are bound to the ports and do nothing else.
    sockets: HashMap<Port, Arc<OwnedFd>>,
}

/// Binds these ports without listening on them. They are reserved while the descriptors are open.
///
/// # Errors
/// `port_taken`, `denied`, or `invalid_argument` if the address does not belong to this host.
pub(super) fn reserve(ports: &[Port]) -> Result<HashMap<Port, Arc<OwnedFd>>> {
    ports
        .iter()
        .map(|port| bind(port, false).map(|(fd, _)| (*port, Arc::new(fd))))
        .collect()
}

/// Checks that a server could listen on these ports now. Ports of connections that have just ended
/// count as free.
///
/// # Errors
/// Fails like [`reserve`].
pub fn require_free_ports(ports: &[Port]) -> Result<()> {
    ports.iter().try_for_each(|port| bind(port, true).map(drop))
}

/// Returns this port with a number that is free on the host.
pub fn free_port(port: &Port) -> Result<Port> {
    let (_, host_port) = bind(
        &Port {
            host_port: 0,
            ..*port
        },
        false,
    )?;
    Ok(Port { host_port, ..*port })
}

fn bind(port: &Port, as_server: bool) -> Result<(OwnedFd, u16)> {
    crate::locks::may_block("socket");
    let doing = || format!("forward port {port} to the guest");
    let io = |e: rustix::io::Errno| Error::io(doing(), std::io::Error::from(e));
    let kind = match port.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = rustix::net::socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, None)
        .map_err(io)?;
    if as_server && port.protocol == Protocol::Tcp {
        // See socket(7). Reserved ports must not have this option: two sockets with it may share a
        // port.
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true).map_err(io)?;
    }
    let at = SocketAddr::V4(SocketAddrV4::new(port.host_addr, port.host_port));
    rustix::net::bind(&socket, &at).map_err(|e| refused(port, e))?;
    let bound = rustix::net::getsockname(&socket).map_err(io)?;
    let number = SocketAddr::try_from(bound)
        .map_err(|_| Error::internal(format!("{}: the socket has no address", doing())))?
        .port();
    Ok((socket, number))
}

fn refused(port: &Port, e: rustix::io::Errno) -> Error {
    use rustix::io::Errno;
    let doing = format!("forward port {port} to the guest");
    match e {
        Errno::ADDRINUSE => {
            let list = if port.protocol == Protocol::Tcp {
                "-tanp"
            } else {
                "-uanp"
            };
            Error::new(
                Kind::PortTaken,
                format!("{doing}: a program on this host uses it"),
            )
            .hint(format!(
                "find it with ss {list} sport = :{}",
                port.host_port
            ))
        }
        Errno::ADDRNOTAVAIL => Error::invalid(format!(
            "{doing}: {} is not an address of this host",
            port.host_addr
        ))
        .hint("list the addresses with ip -4 address, or use 0.0.0.0 for all of them"),
        Errno::ACCESS => Error::new(
            Kind::Denied,
            format!("{doing}: fcd is not allowed to bind it"),
        )
        .hint("use a port from 1024 up"),
        e => Error::io(doing, std::io::Error::from(e)),
    }
}

impl Net {
    /// Publishes exactly these ports to the guest. Ports that the VM had before and keeps are not
    /// interrupted. After an error, the VM has the ports that it had before; if the rules could not
    /// be restored, [`Net::mend`] restores them.
    pub fn forward(&self, guest: &Guest, ports: &[Port], cancel: &Cancel) -> Result<()> {
        let (tag, wanted) = (&guest.tag, published(guest, ports));
        let (mut sockets, had) = self.forwards.lock().get(tag).map_or_else(
            || (HashMap::new(), Vec::new()),
            |f| (f.sockets.clone(), f.published.clone()),
        );
        sockets.retain(|port, _| ports.contains(port));
        let is_new = |port: &&Port| !had.iter().any(|p| p.port == **port);
        let new: Vec<Port> = ports.iter().filter(is_new).copied().collect();
        sockets.extend(reserve(&new)?);
        self.allow_loopback(ports)?;
        // Insert the entry before the rules, because `mend` removes rules that are missing from
        // their VM's entry.
        let entry = Forwards {
            published: wanted.clone(),
            sockets,
        };
        let former = self.forwards.lock().insert(tag.clone(), entry);
        if let Err(e) = self.publish_exactly(tag, &wanted, cancel) {
            let had = former.as_ref().map(|f| f.published.clone());
            let failed = match former {
                Some(former) => self.forwards.lock().insert(tag.clone(), former),
                None => self.forwards.lock().remove(tag),
            };
            drop(failed);
            let restored = self.publish_exactly(tag, &had.unwrap_or_default(), self.tools.never());
            if let Err(again) = restored {
                log::warn!("network: restore the ports of {tag}: {again}");
            }
            return Err(e.context(format!("forward ports to {tag}")));
        }
        // Packets of existing connections are not translated for a new port, and are still
        // translated for a removed one, until the conntrack entries are deleted.
        let gone = had.iter().map(|p| p.port).filter(|p| !ports.contains(p));
        let changed: Vec<Port> = new.into_iter().chain(gone).collect();
        forget_flows(&|flow| changed.iter().any(|port| goes_to(flow, port)));
        Ok(())
    }

    /// Changes the rules of a VM to exactly `wanted`. Also removes other elements for the same
    /// ports, such as those of an earlier daemon.
    fn publish_exactly(&self, tag: &str, wanted: &[Published], cancel: &Cancel) -> Result<()> {
        let there = self.published()?;
        let is_stale = |p: &&Published| {
            let is_in_the_way = wanted.iter().any(|new| new.port.overlaps(&p.port));
            (p.tag == tag || is_in_the_way) && !wanted.contains(p)
        };
        let stale = there.iter().filter(is_stale);
        let mut script: String = stale.map(|p| self.sets.unpublish(p)).collect();
        let missing = wanted.iter().filter(|p| !there.contains(p));
        script.extend(missing.map(|p| self.sets.publish(p)));
        if script.is_empty() {
            return Ok(());
        }
        self.tools.nft(&script, cancel)
    }

    /// Reserves the ports of a running VM after a restart of the daemon. The rules are still in
    /// place. Ports that cannot be reserved are only logged.
    pub fn adopt_forwards(&self, guest: &Guest, ports: &[Port]) {
        let sockets = reserve(ports).unwrap_or_else(|e| {
            log::warn!("network: {}: {e}", guest.tag);
            HashMap::new()
        });
        let entry = Forwards {
            published: published(guest, ports),
            sockets,
        };
        let former = self.forwards.lock().insert(guest.tag.clone(), entry);
        drop(former);
    }

    /// Removes the published ports of the VM with this tag. Succeeds if there are none. Ignores
    /// cancellation.
    pub fn unforward(&self, tag: &str) -> Result<()> {
        let former = self.forwards.lock().remove(tag);
        drop(former);
        if !self.names.is_tag(tag) {
            return Err(Error::internal(format!(
                "unpublish ports: {tag:?} is not a VM's tag"
            )));
        }
        let script: String = self
            .published()?
            .iter()
            .filter(|p| p.tag == tag)
            .map(|p| self.sets.unpublish(p))
            .collect();
        if script.is_empty() {
            return Ok(());
        }
        self.tools
            .nft(&script, self.tools.never())
            .map_err(|e| e.context(format!("unpublish the ports of {tag}")))
    }

    /// Returns the tags of the VMs that have published ports.
    pub fn forwarded(&self) -> Result<Vec<String>> {
        let mut tags: Vec<_> = self
            .published()?
            .into_iter()
            .map(|p| p.tag)
            .filter(|tag| self.names.is_tag(tag))
            .collect();
        tags.sort();
        tags.dedup();
        Ok(tags)
    }

    fn published(&self) -> Result<Vec<Published>> {
        let mut all = Vec::new();
        for list in self.sets.list_published() {
            if let Some(json) = self.tools.nft_list(&list)? {
                all.extend(sets::parse_published(&json)?);
            }
        }
        Ok(all)
    }

    /// Restores missing port rules, and removes those that a VM should not have. Returns what it
    /// repaired.
    pub(super) fn mend_forwards(&self) -> Result<Vec<String>> {
        let wanted = self.wanted();
        if wanted.is_empty() && self.forwards.lock().is_empty() {
            return Ok(Vec::new());
        }
        self.allow_loopback(&wanted.iter().map(|p| p.port).collect::<Vec<_>>())?;
        let there = self.published()?;
        let missing: Vec<_> = wanted.into_iter().filter(|p| !there.contains(p)).collect();
        // Entries are inserted before their rules, and `there` was read before the entries are. A
        // rule that is missing from its VM's entry is therefore wrong.
        let unwanted = self.unwanted(&there);
        let mut script: String = unwanted.iter().map(|p| self.sets.unpublish(p)).collect();
        script.extend(missing.iter().map(|p| self.sets.publish(p)));
        if script.is_empty() {
            return Ok(Vec::new());
        }
        self.tools.nft(&script, self.tools.never())?;
        // `unforward` may have run since the elements were read. If so, remove these rules again.
        let current = self.wanted();
        let late: String = missing
            .iter()
            .filter(|p| !current.contains(p))
            .map(|p| self.sets.unpublish(p))
            .collect();
        if !late.is_empty() {
            self.tools.nft(&late, self.tools.never())?;
        }
        let restored = missing
            .iter()
            .map(|p| format!("restored the forwarding of port {} to {}", p.port, p.tag));
        let removed = unwanted
            .iter()
            .map(|p| format!("stopped forwarding port {} to {}", p.port, p.tag));
        Ok(restored.chain(removed).collect())
    }

    fn wanted(&self) -> Vec<Published> {
        let forwards = self.forwards.lock();
        let all = forwards.values().flat_map(|f| f.published.clone());
        all.collect()
    }

    /// Returns the rules of VMs that have an entry without these rules.
    fn unwanted(&self, there: &[Published]) -> Vec<Published> {
        let forwards = self.forwards.lock();
        let is_unwanted = |p: &&Published| {
            forwards
                .get(&p.tag)
                .is_some_and(|f| !f.published.contains(p))
        };
        there.iter().filter(is_unwanted).cloned().collect()
    }

    /// Lets packets that the host sends from 127.0.0.1 leave through the bridge, where they are
    /// masqueraded (kernel, ip-sysctl: `route_localnet`). Guests cannot use this to reach the
    /// host's loopback, because the rules drop what they send to an address of the host.
    fn allow_loopback(&self, ports: &[Port]) -> Result<()> {
        crate::locks::may_block("file access");
        let needs = |address: Ipv4Addr| address.is_loopback() || address.is_unspecified();
        if !ports.iter().any(|port| needs(port.host_addr)) {
            return Ok(());
        }
        let path = format!(
            "/proc/sys/net/ipv4/conf/{}/route_localnet",
            self.config.bridge
        );
        std::fs::write(&path, "1")
            .map_err(|e| Error::io(format!("forward loopback ports to guests: write {path}"), e))
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
        && (to.destination == IpAddr::from(port.host_addr)
            || port.host_addr.is_unspecified() && to.destination.is_ipv4())
}

fn published(guest: &Guest, ports: &[Port]) -> Vec<Published> {
    ports
        .iter()
        .map(|&port| Published {
            tag: guest.tag.clone(),
            address: guest.lease.address,
            port,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    fn port(host_port: u16, protocol: Protocol) -> Port {
        Port {
            host_addr: Ipv4Addr::LOCALHOST,
            host_port,
            guest_port: 80,
            protocol,
        }
    }

    #[test]
    fn reserve_taken_port_fails_and_names_it() {
        let (tcp, udp) = (
            TcpListener::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        for (taken, protocol) in [
            (tcp.local_addr(), Protocol::Tcp),
            (udp.local_addr(), Protocol::Udp),
        ] {
            let taken = port(taken.unwrap().port(), protocol);
            let e = reserve(&[taken]).unwrap_err();
            assert_eq!(
                (e.kind(), require_free_ports(&[taken]).unwrap_err().kind()),
                (Kind::PortTaken, Kind::PortTaken)
            );
            assert!(
                e.to_string().contains(&taken.to_string())
                    && e.hint_text().unwrap().starts_with("find it with ss -"),
                "{e}"
            );
        }
    }

    #[test]
    fn reserved_port_cannot_be_bound_by_others() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let free = free_port(&port(0, protocol)).unwrap();
            assert_ne!(free.host_port, 0);
            require_free_ports(&[free]).unwrap();
            let sockets = reserve(&[free]).unwrap();
            let again = match protocol {
                Protocol::Tcp => TcpListener::bind((free.host_addr, free.host_port)).map(drop),
                Protocol::Udp => UdpSocket::bind((free.host_addr, free.host_port)).map(drop),
            };
            assert_eq!(again.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
            drop(sockets);
        }
    }

    #[test]
    fn reserve_foreign_address_is_rejected() {
        let e = reserve(&[Port {
            host_addr: [192, 0, 2, 77].into(),
            ..port(8080, Protocol::Tcp)
        }])
        .unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidArgument);
    }
}
