//! The name server on the bridge's address: `NAME.vm` and the subnet's reverse zone from the daemon, the rest forwarded to
//! the host's own resolvers, bytes as they are.
//!
//! Guests are hostile. Datagrams are one thread's, which waits in one `poll` for everything; each TCP connection has a thread.
//! Nothing grows with what guests send: questions under way, connections, queries of a connection and askers remembered are
//! bounded, each asker has a rate, and each wait has a deadline and ends when the server does.

mod limit;
mod packet;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod upstream;
mod zone;

use crate::config::Subnet;
use crate::error::{Error, Kind, Result};
use crate::host::thread;
use crate::locks::Cancel;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

pub use upstream::PORT;

/// What the daemon knows. Called from the server's threads, at most one call at a time for each connection and one for all
/// datagrams; must not block for long.
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
}

/// A running name server. Ends, and waits for its threads, when dropped.
pub struct Server {
    cancel: Cancel,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// # Errors
    /// `conflict`: something else listens there.
    pub fn start(setup: Setup) -> Result<Self> {
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
        let setup = Arc::new(setup);
        // From here on an error ends what runs: by the drop.
        let mut server = Self { cancel: cancel.clone(), threads: Vec::new() };
        let datagrams = udp::Datagrams::new(socket, setup.clone(), cancel.clone());
        server.threads.push(thread::spawn("dns-udp", move || datagrams.run())?);
        let connections = tcp::Connections::new(listener, setup, cancel);
        server.threads.push(thread::spawn("dns-tcp", move || connections.run())?);
        Ok(server)
    }

    /// Ends it and waits for its threads.
    ///
    /// # Errors
    /// `internal`: a thread panicked.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.cancel.cancel("the name server ends");
        let panicked = self.threads.drain(..).map(JoinHandle::join).filter(Result::is_err).count();
        if panicked > 0 { Err(Error::internal("serve names: a thread panicked")) } else { Ok(()) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            log::error!("{e}");
        }
    }
}

/// Judges a packet; a panic of the daemon's own is a packet without an answer.
fn judge<'a>(setup: &Setup, packet: &'a [u8], asker: IpAddr) -> zone::Verdict<'a> {
    let judged = || zone::judge(packet, asker, setup.subnet, setup.names.as_ref());
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(judged)).unwrap_or_else(|_| {
        log::error!("a question for a name made the daemon panic");
        zone::Verdict::Drop
    })
}
