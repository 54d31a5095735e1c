//! The host's resolvers, and sockets to them.

use super::gatekeeper::Kind;
use crate::host::command::read_bounded;
use crate::sched::Instant;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

pub const PORT: u16 = 53;
/// The maximum number of resolvers that are used from resolv.conf(5).
const SERVERS_MAX: usize = 3;
const FILE_BYTES_MAX: u64 = 64 * 1024;
/// How long the list of resolvers is cached.
const FRESH: Duration = Duration::from_secs(5);

/// The resolvers in resolv.conf(5). The file is read again when the cached list is too old.
pub(super) struct Upstreams {
    file: PathBuf,
    /// The name server's own address. It is skipped, because a query to it would loop.
    own: Ipv4Addr,
    port: u16,
    known: Option<(Vec<SocketAddr>, Instant)>,
}

impl Upstreams {
    pub(super) fn new(file: PathBuf, own: Ipv4Addr, port: u16) -> Self {
        Self {
            file,
            own,
            port,
            known: None,
        }
    }

    /// Opens a non-blocking socket to the first reachable resolver, starting with number `skip`.
    /// Returns None if no resolver is reachable. A TCP socket may still be connecting. Every query
    /// over UDP gets a new socket, so that a forger of answers has to guess its port as well.
    pub(super) fn open(&mut self, kind: Kind, skip: usize, now: Instant) -> Option<OwnedFd> {
        let servers = self.get(now);
        let count = servers.len();
        let open = match kind {
            Kind::Datagram => datagrams,
            Kind::Connection => connection,
        };
        servers
            .into_iter()
            .cycle()
            .skip(skip)
            .take(count)
            .find_map(open)
    }

    fn get(&mut self, now: Instant) -> Vec<SocketAddr> {
        crate::locks::may_block("file access");
        match &self.known {
            Some((servers, read)) if now.saturating_duration_since(*read) < FRESH => {
                servers.clone()
            }
            _ => {
                let bytes = std::fs::File::open(&self.file)
                    .and_then(|f| read_bounded(f, FILE_BYTES_MAX))
                    .unwrap_or_default();
                let servers = parse(&String::from_utf8_lossy(&bytes), self.own);
                let servers: Vec<_> = servers
                    .into_iter()
                    .map(|s| SocketAddr::new(s, self.port))
                    .collect();
                self.known = Some((servers.clone(), now));
                servers
            }
        }
    }
}

fn datagrams(server: SocketAddr) -> Option<OwnedFd> {
    crate::locks::may_block("socket");
    let any: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = std::net::UdpSocket::bind((any, 0)).ok()?;
    socket.set_nonblocking(true).ok()?;
    socket.connect(server).ok()?;
    Some(socket.into())
}

fn connection(server: SocketAddr) -> Option<OwnedFd> {
    let family = if server.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None).ok()?;
    match rustix::net::connect(&socket, &server) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Some(socket),
        Err(_) => None,
    }
}

fn parse(text: &str, own: Ipv4Addr) -> Vec<IpAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let server = (words.next() == Some("nameserver"))
            .then(|| words.next())
            .flatten()?;
        // Addresses with a scope such as "%eth0" are skipped.
        server
            .parse::<IpAddr>()
            .ok()
            .filter(|a| *a != IpAddr::V4(own) && !a.is_unspecified())
    };
    text.lines().filter_map(address).take(SERVERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_parsed() {
        let text = "# x\nsearch example\nnameserver 10.89.0.1\nnameserver 127.0.0.53\n nameserver ::1 # y\nnameserver\nnameserver x\n\
                    nameserver fe80::1%eth0\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n";
        let servers: Vec<_> = parse(text, Ipv4Addr::new(10, 89, 0, 1))
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(servers, ["127.0.0.53", "::1", "192.0.2.1"]);
    }

    #[test]
    fn missing_resolv_conf_has_no_resolvers() {
        assert!(
            Upstreams::new("/nonexistent".into(), Ipv4Addr::LOCALHOST, PORT)
                .get(Instant::now())
                .is_empty()
        );
    }
}
