//! The name server on the bridge's address: `NAME.vm` and the subnet's reverse zone from the daemon, the rest forwarded to
//! the host's own resolvers, bytes as they are.
//!
//! Guests are hostile, so no byte of theirs is parsed in the daemon: a helper process does that, confined and with a uid of
//! its own (`host::confine`).
//!
//! ```text
//! guests      daemon, thread "dns"                       helper (own uid, confined)
//!   UDP ────── supervisor: receives, sends ── channel ─── datagrams ──┐ packet, zone: read questions, write answers
//!   TCP ────── accepts, passes the connection ─────────── connections ┘
//!                ├ desk: who has asked, what is allowed     │
//!                ├ Names: who is called what                │
//!                └ upstream: sockets to resolvers ──────────┴── the host's resolvers
//! ```
//!
//! - [`supervisor`] is the daemon's one thread. It owns the helper, passes each datagram on unread together with a ticket, and
//!   sends the answer that comes back to whoever the ticket stands for. If the helper ends, or breaks the protocol, it starts
//!   another one, after a pause that grows; questions under way are lost, and are asked again.
//! - [`desk`] decides what the helper may do: a lookup for an asker who has just asked, a socket to a resolver of the host, an
//!   answer. It never names an address to send to.
//! - [`helper`] is the other process: one thread, one `poll`. It makes no socket and has no name server's port: it can reach
//!   the resolvers that it has sockets to, the connections that it was given, and nobody else.
//!
//! Nothing grows with what guests send: questions under way, connections, queries of a connection and askers remembered are
//! bounded, each asker has a rate, and each wait has a deadline and ends when the server does.

mod desk;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod helper;
mod limit;
mod protocol;
mod supervisor;
#[cfg(test)]
pub(crate) mod tests;
mod upstream;

use crate::config::Subnet;
use crate::error::{Error, Kind, Result};
use crate::host::confine::Owner;
use crate::host::thread;
use crate::locks::Cancel;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use supervisor::Supervisor;

pub use helper::NAME;
pub use upstream::PORT;

/// What the daemon knows. Called from the server's thread, one call at a time; must not block for long.
pub trait Names: Send + Sync {
    /// The address of the VM with this name (valid, lower case, without `.vm`) if `asker` may know it: a guest's address, or the
    /// host's own.
    fn address(&self, name: &str, asker: IpAddr) -> Option<Ipv4Addr>;

    /// The name, without `.vm`, of the VM with this address, if `asker` may know it.
    fn name(&self, address: Ipv4Addr, asker: IpAddr) -> Option<String>;
}

/// What a server is told.
pub struct Setup {
    pub listen: SocketAddr,
    /// Who may ask, and the reverse zone.
    pub subnet: Subnet,
    pub names: Arc<dyn Names>,
    /// Where the host's resolvers are named, and the port that they are asked at.
    pub resolv_conf: PathBuf,
    pub upstream_port: u16,
    /// Whom the helper runs as; none: as the daemon, which has no privilege then.
    pub owner: Option<Owner>,
}

/// A running name server. Ends, and waits for its thread, when dropped.
pub struct Server {
    cancel: Cancel,
    thread: Option<JoinHandle<()>>,
    health: Arc<Health>,
}

impl Server {
    /// # Errors
    /// `conflict`: something else listens there.
    pub fn start(setup: Setup) -> Result<Self> {
        Self::start_with(NAME, setup)
    }

    fn start_with(helper: &'static str, setup: Setup) -> Result<Self> {
        let at = setup.listen;
        let doing = || format!("serve names on {at}");
        let bind = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::AddrInUse => Error::new(Kind::Conflict, format!("{}: something else listens there", doing()))
                .hint(format!(
                    "see what it is (ss -lnup sport = :{}) and keep it off that address, or set dns = false under [network]",
                    at.port()
                )),
            _ => Error::io(doing(), e),
        };
        let socket = UdpSocket::bind(at).map_err(bind)?;
        let listener = TcpListener::bind(at).map_err(bind)?;
        socket.set_nonblocking(true).and_then(|()| listener.set_nonblocking(true)).map_err(|e| Error::io(doing(), e))?;
        let cancel = Cancel::try_new().map_err(|e| Error::io(doing(), e))?;
        let health = Arc::new(Health::default());
        let supervisor = Supervisor::new((socket, listener), setup, helper, health.clone(), cancel.clone());
        let thread = thread::spawn("dns", move || supervisor.run())?;
        Ok(Self { cancel, thread: Some(thread), health })
    }

    /// What `doctor` says while helpers keep ending.
    pub fn trouble(&self) -> Option<String> {
        let failures = self.health.failures.load(Ordering::Relaxed);
        let times = if failures == 1 { "once".to_owned() } else { format!("{failures} times in a row") };
        (failures > 0).then(|| format!("the name server's helper process has ended {times}; another one is started each time"))
    }

    /// Ends it and waits for its thread.
    ///
    /// # Errors
    /// `internal`: the thread panicked.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.cancel.cancel("the name server ends");
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

/// How the helpers do.
#[derive(Debug, Default)]
struct Health {
    /// Helpers in a row that ended before they had lived for a while.
    failures: AtomicU32,
    /// The helper that runs, or the last that ran; 0 before the first.
    pid: AtomicU32,
}

impl Health {
    fn started(&self, pid: u32) {
        self.pid.store(pid, Ordering::Relaxed);
    }

    /// Returns how many have ended in a row.
    fn ended(&self) -> u32 {
        self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1)
    }

    fn is_well(&self) {
        self.failures.store(0, Ordering::Relaxed);
    }
}
