//! The name server on the bridge's address. The daemon answers for `NAME.vm` and for the subnet's
//! reverse zone. Other queries are forwarded to the host's resolvers unchanged.
//!
//! Guests are hostile, so the daemon never parses a byte from them. A confined helper process with
//! its own uid does that (see `host::confine`).
//!
//! ```text
//! guests       daemon, thread "dns"                    helper (own uid, confined)
//!   UDP ────── supervisor: receives, sends ── channel ── datagrams ──┐ packet, zone: parse
//!   TCP ────── accepts, passes the connection ────────── connections ┘ queries, write answers
//!                ├ gatekeeper: open queries, what is allowed │
//!                ├ Names: names and addresses of VMs         │
//!                └ upstream: sockets to resolvers ───────────┴── the host's resolvers
//! ```
//!
//! - [`supervisor`] is the daemon's only thread for the name server. It owns the helper, passes
//!   each datagram to it unread and with a ticket, and sends the answer to the client that the
//!   ticket stands for. If the helper exits or breaks the protocol, the supervisor starts another
//!   one after a growing delay. Open queries are lost then, and clients repeat them.
//! - [`gatekeeper`] decides what the helper may do: look up a name for a client with an open query,
//!   get a socket to one of the host's resolvers, or answer. The helper never chooses an address to
//!   send to.
//! - [`helper`] is the other process, with one thread and one `poll`. It opens no sockets itself,
//!   so it can reach only the resolvers and connections that the daemon passed to it.
//!
//! All resources that a guest can use are bounded. The numbers of open queries, connections,
//! queries per connection and remembered clients are limited, every client has a rate limit, and
//! every wait has a deadline and ends when the server stops.

#[cfg(feature = "fuzz")]
pub mod fuzz;
mod gatekeeper;
pub mod helper;
mod limit;
mod protocol;
mod supervisor;
#[cfg(test)]
pub(crate) mod tests;
mod upstream;

use crate::config::Subnet;
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::thread;
use crate::locks::{Cancel, CancelCause};
use crate::sched::JoinHandle;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use supervisor::Supervisor;

pub use helper::NAME;
pub use upstream::PORT;

/// The addresses of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    pub ipv4: Ipv4Addr,
    /// None if the VM has no IPv6.
    pub ipv6: Option<Ipv6Addr>,
}

impl From<Ipv4Addr> for Addresses {
    fn from(ipv4: Ipv4Addr) -> Self {
        Self { ipv4, ipv6: None }
    }
}

/// The daemon's names of VMs. The server's thread calls these methods one at a time. They must not
/// block for long.
pub trait Names: Send + Sync {
    /// Returns the addresses of the VM with this name (valid, lower case, without `.vm`) if
    /// `client` may know them. `client` is the address of a guest or of the host.
    fn addresses(&self, name: &str, client: IpAddr) -> Option<Addresses>;

    /// Returns the name, without `.vm`, of the VM with this address, if `client` may know it.
    fn name(&self, address: Ipv4Addr, client: IpAddr) -> Option<String>;
}

/// The settings of a name server.
pub struct Setup {
    pub listen: SocketAddr,
    /// The addresses that are served, for which the server also answers reverse queries.
    pub subnet: Subnet,
    pub names: Arc<dyn Names>,
    /// The file that lists the host's resolvers, and the port to send queries to.
    pub resolv_conf: PathBuf,
    pub upstream_port: u16,
    /// The user that the helper runs as, or None if the daemon is unprivileged, because then the
    /// helper runs as the daemon's user.
    pub owner: Option<Credentials>,
}

/// A running name server. Dropping this value stops the server and waits for its thread.
pub struct Server {
    cancel: Cancel,
    thread: Option<JoinHandle<()>>,
    health: Arc<Health>,
}

impl Server {
    /// Starts a name server on its own thread.
    ///
    /// # Errors
    /// `conflict` if something else listens on the address.
    pub fn start(setup: Setup) -> Result<Self> {
        Self::start_with(NAME, setup)
    }

    fn start_with(helper: &'static str, setup: Setup) -> Result<Self> {
        crate::locks::may_block("socket");
        let at = setup.listen;
        let doing = || format!("serve names on {at}");
        let bind = |e: std::io::Error| {
            match e.kind() {
            std::io::ErrorKind::AddrInUse => Error::new(Kind::Conflict, format!("{}: something else listens on it", doing()))
                .hint(format!(
                    "find it with ss -lnup sport = :{} and move it to another address, or set dns = false under [network]",
                    at.port()
                )),
            _ => Error::io(doing(), e),
        }
        };
        let socket = UdpSocket::bind(at).map_err(bind)?;
        let listener = TcpListener::bind(at).map_err(bind)?;
        socket
            .set_nonblocking(true)
            .and_then(|()| listener.set_nonblocking(true))
            .map_err(|e| Error::io(doing(), e))?;
        let cancel = Cancel::try_new().map_err(|e| Error::io(doing(), e))?;
        let health = Arc::new(Health::default());
        let supervisor = Supervisor::new(
            (socket, listener),
            setup,
            helper,
            health.clone(),
            cancel.clone(),
        );
        let thread = thread::spawn("dns", move || supervisor.run())?;
        Ok(Self {
            cancel,
            thread: Some(thread),
            health,
        })
    }

    /// Describes the helper's failures since it was last healthy, for `fcctl doctor`. Returns None
    /// if there are none.
    pub fn trouble(&self) -> Option<String> {
        let failures = self.health.failures.load(Ordering::Relaxed);
        let times = if failures == 1 {
            "once".to_owned()
        } else {
            format!("{failures} times in a row")
        };
        (failures > 0).then(|| {
            format!("the name server's helper process has exited {times} and was restarted")
        })
    }

    /// Stops the server and waits for its thread.
    ///
    /// # Errors
    /// `internal` if the thread panicked.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.cancel.cancel(CancelCause::Finished);
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(Error::internal("serve names: its thread panicked")),
            Some(Ok(())) | None => Ok(()),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            log::error!("{e}");
        }
    }
}

/// The state of the helper process.
#[derive(Debug, Default)]
struct Health {
    /// The number of helpers in a row that exited before [`supervisor::HEALTHY_AFTER`].
    failures: AtomicU32,
    /// The pid of the current or the last helper, or 0 if none has started yet.
    pid: AtomicU32,
}

impl Health {
    fn started(&self, pid: u32) {
        self.pid.store(pid, Ordering::Relaxed);
    }

    /// Counts an exit and returns the number of exits in a row.
    fn ended(&self) -> u32 {
        self.failures
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1)
    }

    fn is_well(&self) {
        self.failures.store(0, Ordering::Relaxed);
    }
}
