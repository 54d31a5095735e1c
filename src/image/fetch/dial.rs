//! Makes connections for the client. The client itself has no sockets and no resolver.

use super::address;
use crate::error::{Error, Kind, Result};
use crate::host::thread::spawn;
use crate::host::wait::{WaitResult, cancelled, wait_any};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with};
use serde::{Deserialize, Serialize};
use std::io::PipeReader;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, channel};

/// How many addresses of a name are tried.
const ADDRESSES_MAX: usize = 8;

/// The addresses that a connection may go to. Link-local addresses are never among them, except for
/// a proxy, which the administrator names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// Every address, for a proxy.
    Everything,
    /// Every address of a registry, including loopback: for hosts that the user or the
    /// administrator named, and for loopback hosts that a registry on loopback names.
    Loopback,
    /// Every address of a registry except loopback, for all other hosts.
    Network,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// A name or an address. An IPv6 address is in brackets.
    pub host: String,
    pub port: u16,
    pub reach: Reach,
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Connects to a target until the deadline. An implementation checks each address that it has
/// resolved and then connects to that address, so a name cannot be resolved to another one in
/// between. Tests replace [`SystemDialer`].
pub trait Dial: Send + Sync {
    /// # Errors
    /// `registry_unreachable`, `registry_invalid` for an address out of reach, `cancelled`.
    fn dial(&self, target: &Target, deadline: Instant, cancel: &Cancel) -> Result<TcpStream>;
}

/// Dials with the host's resolver.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemDialer;

impl Dial for SystemDialer {
    fn dial(&self, target: &Target, deadline: Instant, cancel: &Cancel) -> Result<TcpStream> {
        let doing = format!("connect to {target}");
        let addresses = match address::literal(&target.host) {
            Some(ip) => vec![SocketAddr::new(ip, target.port)],
            None => resolve(target, deadline, cancel)?,
        };
        let mut last = unreachable(&doing, "the name has no address");
        for (n, address) in addresses.iter().enumerate() {
            check(address.ip(), target)?;
            // Each address gets an equal part of the time left.
            let now = Instant::now();
            let left = u32::try_from(addresses.len() - n).unwrap_or(1);
            let until = now + deadline.saturating_duration_since(now) / left;
            match connect_one(*address, &doing, until, cancel) {
                Ok(stream) => return Ok(stream),
                Err(e) if e.kind() == Kind::RegistryUnreachable => last = e,
                Err(e) => return Err(e),
            }
        }
        Err(last)
    }
}

fn check(ip: IpAddr, target: &Target) -> Result<()> {
    match target.reach {
        Reach::Everything => Ok(()),
        Reach::Loopback => address::check(ip, &target.host, true),
        Reach::Network => address::check(ip, &target.host, false),
    }
}

fn unreachable(doing: &str, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(Kind::RegistryUnreachable, doing)
        .with_source(why)
        .hint("check the name, the network and the proxy, then try again")
}

/// Resolves a name in a thread of its own, because the resolver can be neither cancelled nor given
/// a deadline. The thread ends when the resolver gives up.
fn resolve(target: &Target, deadline: Instant, cancel: &Cancel) -> Result<Vec<SocketAddr>> {
    let doing = format!("resolve {}", target.host);
    let (done, answer) = start_resolver(target)?;
    let result = wait_any(&[(done.as_fd(), PollFlags::POLLIN)], deadline, cancel)
        .map_err(|e| Error::io(&doing, e))?;
    match result {
        WaitResult::Cancelled => Err(cancelled(&doing, cancel)),
        WaitResult::Deadline => Err(unreachable(&doing, "the resolver does not answer")),
        WaitResult::Ready => match answer.try_recv() {
            Ok(Ok(addresses)) => Ok(addresses),
            Ok(Err(e)) => Err(unreachable(&doing, e)),
            Err(_) => Err(unreachable(&doing, "the resolver failed")),
        },
    }
}

type Answer = Receiver<std::io::Result<Vec<SocketAddr>>>;

/// Starts a resolver. The pipe reaches its end when the answer is available.
fn start_resolver(target: &Target) -> Result<(PipeReader, Answer)> {
    let (done, writer) = std::io::pipe().map_err(|e| Error::io("make a pipe", e))?;
    let (sender, answer) = channel();
    let at = (target.host.clone(), target.port);
    spawn("resolve", move || {
        let addresses = at
            .to_socket_addrs()
            .map(|all| all.take(ADDRESSES_MAX).collect());
        // The caller has stopped waiting if its deadline has passed.
        let _ = sender.send(addresses);
        drop(writer);
    })?;
    Ok((done, answer))
}

fn connect_one(
    address: SocketAddr,
    doing: &str,
    deadline: Instant,
    cancel: &Cancel,
) -> Result<TcpStream> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let failed = |e: std::io::Error| unreachable(doing, e);
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))
        .map_err(|e| failed(e.into()))?;
    match connect(&socket, &address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => {
            let result = wait_any(&[(socket.as_fd(), PollFlags::POLLOUT)], deadline, cancel)
                .map_err(|e| Error::io(doing, e))?;
            match result {
                WaitResult::Ready => {}
                WaitResult::Cancelled => return Err(cancelled(doing, cancel)),
                WaitResult::Deadline => return Err(failed(Errno::TIMEDOUT.into())),
            }
        }
        Err(e) => return Err(failed(e.into())),
    }
    let stream = TcpStream::from(socket);
    match stream.take_error() {
        Ok(None) => Ok(stream),
        Ok(Some(e)) | Err(e) => Err(failed(e)),
    }
}

#[cfg(test)]
mod unit {
    use super::*;
    use std::net::TcpListener;
    use std::time::Duration;

    fn dial(host: &str, port: u16, reach: Reach) -> Result<TcpStream> {
        let target = Target {
            host: host.into(),
            port,
            reach,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        SystemDialer.dial(&target, deadline, &Cancel::try_new().unwrap())
    }

    #[test]
    fn names_and_addresses_are_connected_to() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
            let stream = dial(host, port, Reach::Loopback).unwrap();
            assert_eq!(stream.peer_addr().unwrap().port(), port, "{host}");
        }
    }

    #[test]
    fn loopback_is_out_of_reach_of_network() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
            let e = dial(host, port, Reach::Network).unwrap_err();
            assert_eq!(e.kind(), Kind::RegistryInvalid, "{e:?}");
        }
        let e = dial("169.254.169.254", 80, Reach::Loopback).unwrap_err();
        assert_eq!(e.kind(), Kind::RegistryInvalid);
    }

    #[test]
    fn closed_port_is_unreachable() {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let e = dial("127.0.0.1", port, Reach::Loopback).unwrap_err();
        assert_eq!(e.kind(), Kind::RegistryUnreachable);
    }

    #[test]
    fn cancel_ends_a_dial_that_nobody_answers() {
        // A full backlog leaves the next connection unanswered.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let cancel = Cancel::try_new().unwrap();
        let deadline = Instant::now() + Duration::from_millis(100);
        let mut held = Vec::new();
        while let Ok(stream) = connect_one(at, "fill", deadline, &cancel) {
            held.push(stream);
            assert!(held.len() < 100, "the backlog is never full");
        }
        let handle = {
            let cancel = cancel.clone();
            spawn("dial", move || {
                let deadline = Instant::now() + Duration::from_secs(60);
                connect_one(at, "dial", deadline, &cancel)
            })
            .unwrap()
        };
        cancel.cancel(crate::locks::CancelCause::Requested);
        assert_eq!(handle.join().unwrap().unwrap_err().kind(), Kind::Cancelled);
    }
}
