//! The transport below ureq: a socket that is polled together with the cancel token. It has
//! deadlines and a minimum rate, and goes through the tunnel of a proxy if there is one.

use super::dial::{Dial, Reach, Target};
use super::proxy::{Proxies, Proxy};
use super::settings::Limits;
use super::url::{Origin, Url};
use crate::error::{Error, Kind, Result};
use crate::host::wait::{WaitResult, cancelled, set_nonblocking, wait_any};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::PollFlags;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::time::Duration as UreqDuration;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};

const INPUT_BYTES: usize = 128 * 1024;
const OUTPUT_BYTES: usize = 16 * 1024;
/// The size limit of a proxy's reply to CONNECT.
const TUNNEL_REPLY_BYTES_MAX: usize = 16 * 1024;
/// How often sending may start a new rate window. This is limited, because a peer can make TLS
/// send.
const WINDOWS_MAX: u32 = 1000;

/// The settings and the deadline that all connections of a client share.
pub(super) struct Network {
    pub(super) dial: Arc<dyn Dial>,
    pub(super) proxies: Proxies,
    pub(super) limits: Limits,
    pub(super) cancel: Cancel,
    /// The time at which [`Limits::total`] has passed.
    pub(super) end: Instant,
    /// The hosts that may be on loopback: the registry and its token servers.
    pub(super) local_hosts: Vec<String>,
}

impl Network {
    fn connect(&self, origin: &Origin, deadline: Instant) -> Result<TcpStream> {
        let deadline = deadline.min(self.end);
        match self.proxies.choose(origin)? {
            None => {
                let is_local = self.local_hosts.contains(&origin.host);
                let target = Target {
                    host: origin.host.clone(),
                    port: origin.port,
                    reach: if is_local {
                        Reach::Loopback
                    } else {
                        Reach::Network
                    },
                };
                self.dial.dial(&target, deadline, &self.cancel)
            }
            Some(proxy) => {
                let target = Target {
                    host: proxy.host.clone(),
                    port: proxy.port,
                    reach: Reach::Everything,
                };
                let stream = self.dial.dial(&target, deadline, &self.cancel)?;
                self.tunnel(stream, &proxy, origin, deadline)
                    .map_err(|e| e.context(format!("use the proxy {target}")))
            }
        }
    }

    /// Requests a tunnel from a proxy.
    fn tunnel(
        &self,
        stream: TcpStream,
        proxy: &Proxy,
        origin: &Origin,
        deadline: Instant,
    ) -> Result<TcpStream> {
        let at = format!("{}:{}", origin.host, origin.port);
        let mut request = format!("CONNECT {at} HTTP/1.1\r\nHost: {at}\r\n");
        if let Some(value) = &proxy.authorization {
            request += &format!("Proxy-Authorization: {}\r\n", value.reveal());
        }
        request += "\r\n";
        let mut socket = Socket::new(stream, self)?;
        socket.write_all(request.as_bytes(), deadline)?;
        let mut reply = Vec::new();
        // Read byte by byte, because everything after the header belongs to the tunnel.
        while !reply.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            let n = socket.read(&mut byte, deadline)?;
            if n == 0 || reply.len() == TUNNEL_REPLY_BYTES_MAX {
                return Err(lost("the proxy did not make a tunnel"));
            }
            reply.push(byte[0]);
        }
        match tunnel_status(&reply) {
            Some(200..=299) => Ok(socket.stream),
            Some(407) => Err(
                Error::new(Kind::RegistryDenied, "the proxy requires a password")
                    .hint("set HTTPS_PROXY to http://USER:PASSWORD@HOST:PORT"),
            ),
            Some(status) => Err(lost(&format!(
                "the proxy refused {at} with status {status}"
            ))),
            None => Err(lost("the proxy does not speak HTTP")),
        }
    }
}

/// Returns the status of a proxy's reply.
pub(super) fn tunnel_status(reply: &[u8]) -> Option<u16> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(reply) {
        Ok(httparse::Status::Complete(_)) => response.code,
        _ => None,
    }
}

fn lost(why: &str) -> Error {
    Error::new(Kind::RegistryUnreachable, why)
}

/// Measures a connection's rate over the time that fcd waits for it. The time that a slow reader
/// spends between its reads does not count against the peer.
struct Pace {
    waited: Duration,
    bytes: u64,
    windows: u32,
}

impl Pace {
    fn restart(&mut self) {
        if self.windows < WINDOWS_MAX {
            self.windows += 1;
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
    }

    /// Counts a wait. Returns false if the peer is too slow.
    fn count(&mut self, waited: Duration, bytes: usize, limits: &Limits) -> bool {
        self.waited += waited;
        self.bytes += bytes as u64;
        if self.bytes >= limits.rate_bytes_min {
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
        self.waited < limits.rate_window
    }
}

/// A non-blocking stream whose waits end with the cancel token.
struct Socket {
    stream: TcpStream,
    cancel: Cancel,
    limits: Limits,
    end: Instant,
    pace: Pace,
}

impl Socket {
    fn new(stream: TcpStream, network: &Network) -> Result<Self> {
        let failed = |e| Error::io("set up a connection", e);
        set_nonblocking(&stream).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        Ok(Self {
            stream,
            cancel: network.cancel.clone(),
            limits: network.limits.clone(),
            end: network.end,
            pace: Pace {
                waited: Duration::ZERO,
                bytes: 0,
                windows: 0,
            },
        })
    }

    fn write_all(&mut self, mut bytes: &[u8], deadline: Instant) -> Result<()> {
        self.pace.restart();
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(lost("the connection was closed")),
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.wait(PollFlags::POLLOUT, deadline)?;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(lost("send a request").with_source(e)),
            }
        }
        Ok(())
    }

    /// Reads at least one byte. Returns 0 at the end of the stream.
    fn read(&mut self, into: &mut [u8], deadline: Instant) -> Result<usize> {
        let mut waited = Duration::ZERO;
        loop {
            match self.stream.read(into) {
                Ok(n) => {
                    return match self.pace.count(waited, n, &self.limits) || n == 0 {
                        true => Ok(n),
                        false => Err(self.too_slow()),
                    };
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    if !self.pace.count(Duration::ZERO, 0, &self.limits) {
                        return Err(self.too_slow());
                    }
                    let started = Instant::now();
                    self.wait(PollFlags::POLLIN, deadline)?;
                    waited += started.elapsed();
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(lost("receive a reply").with_source(e)),
            }
        }
    }

    fn too_slow(&self) -> Error {
        lost(&format!(
            "the connection delivered less than {} bytes in {:?}",
            self.limits.rate_bytes_min, self.limits.rate_window
        ))
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<()> {
        let doing = "talk to a registry";
        let idle = Instant::now() + self.limits.idle;
        let until = deadline.min(idle).min(self.end);
        let result = wait_any(&[(self.stream.as_fd(), flags)], until, &self.cancel)
            .map_err(|e| Error::io(doing, e))?;
        match result {
            WaitResult::Ready => Ok(()),
            WaitResult::Cancelled => Err(cancelled(doing, &self.cancel)),
            WaitResult::Deadline if until == self.end => {
                Err(Error::new(Kind::Timeout, "the pull took too long"))
            }
            WaitResult::Deadline => Err(lost("there was no answer in time")),
        }
    }
}

/// Opens connections for ureq.
pub(super) struct Sockets(pub(super) Arc<Network>);

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sockets")
    }
}

impl Connector<()> for Sockets {
    type Out = Polled;

    fn connect(
        &self,
        details: &ConnectionDetails,
        _chained: Option<()>,
    ) -> Result<Option<Polled>, ureq::Error> {
        let deadline = deadline_of(details.timeout);
        // The URL comes from a [`Url`] of this client.
        let url =
            Url::parse(&details.uri.to_string()).map_err(|e| ureq::Error::BadUri(e.to_string()))?;
        let connected = self.0.connect(&url.origin, deadline);
        let socket = connected
            .and_then(|stream| Socket::new(stream, &self.0))
            .map_err(into_ureq)?;
        Ok(Some(Polled {
            socket,
            buffers: LazyBuffers::new(INPUT_BYTES, OUTPUT_BYTES),
        }))
    }
}

/// Wraps an error so that it comes out of ureq and rustls again; see `reply::from_ureq`.
fn into_ureq(error: Error) -> ureq::Error {
    ureq::Error::Io(io::Error::other(error))
}

fn deadline_of(timeout: NextTimeout) -> Instant {
    match timeout.after {
        UreqDuration::Exact(after) => Instant::now() + after,
        // A distant deadline is enough, because every wait also has the deadlines for idleness and
        // for the whole pull.
        UreqDuration::NotHappening => Instant::now() + Duration::from_secs(24 * 3600),
    }
}

/// A connection that implements ureq's transport.
pub(super) struct Polled {
    socket: Socket,
    buffers: LazyBuffers,
}

impl fmt::Debug for Polled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Polled")
    }
}

impl Transport for Polled {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        let output = &self.buffers.output()[..amount];
        self.socket
            .write_all(output, deadline_of(timeout))
            .map_err(into_ureq)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let input = self.buffers.input_append_buf();
        let n = self
            .socket
            .read(input, deadline_of(timeout))
            .map_err(into_ureq)?;
        self.buffers.input_appended(n);
        Ok(n > 0)
    }

    fn is_open(&mut self) -> bool {
        // The peer sends nothing on a healthy idle connection. If the socket is readable, the peer
        // has closed it.
        !crate::host::wait::is_readable(&self.socket.stream)
    }
}

/// A resolver for ureq that resolves nothing, because the dialer does.
#[derive(Debug)]
pub(super) struct NoResolver;

impl Resolver for NoResolver {
    fn resolve(
        &self,
        _uri: &ureq::http::Uri,
        _config: &ureq::config::Config,
        _timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        Ok(self.empty())
    }
}
