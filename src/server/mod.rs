//! The Unix-socket server: newline-delimited JSON-RPC 2.0, with a thread per connection and one
//! call at a time on each.
//!
//! The server knows nothing about the calls, which a [`Handler`] answers. It limits the resources
//! of each caller. A line has at most [`FRAME_BYTES_MAX`] bytes, and the buffer for a line never
//! grows beyond that. A line must end within [`Limits::line`] after its first byte. A caller that
//! does not read its answer is dropped after [`Limits::write_stall`]. The total number of
//! connections and the number per uid are limited, and a connection above a limit gets a `busy`
//! line.
//!
//! # Errors on a connection
//! A connection stays usable after a complete line that fails because of bad JSON, an invalid
//! request, wrong descriptors or an error of the call. If a line is too long, late or cut off, or
//! if there are too many connections, the server sends an error line without an id and closes the
//! connection.

mod accept;
mod claim;
mod connection;
#[cfg(feature = "sim")]
mod direct;
mod dispatch;
mod line;
mod op_wait;
mod peer;
mod registry;
mod request;
mod run;
mod socket;
#[cfg(test)]
mod tests;

pub use connection::Connection;
#[cfg(feature = "sim")]
pub use direct::DirectServer;
#[cfg(any(test, feature = "fakes"))]
pub use peer::Peer;
pub use request::{CallError, CallResult, IncomingCall};
pub use run::{exit_status, print_doctor, run};
#[cfg(any(test, feature = "fakes"))]
pub use {dispatch::Dispatch, run::drain};

pub use crate::api::limits::{FDS_MAX, FRAME_BYTES_MAX};
use crate::error::{Error, Result};
use crate::host::thread;
use crate::locks::{Cancel, CancelCause, Mutex, Rank};
use crate::sched::Instant;
use crate::sched::JoinHandle;
use registry::Registry;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Answers calls, each on its connection's thread.
pub trait Handler: Send + Sync + 'static {
    /// Answers a call. If this panics, the caller gets `internal` and the connection stays open. No
    /// lock may be held on return.
    fn call(&self, call: IncomingCall<'_>, connection: &Connection) -> CallResult;
}

#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    pub connections_max: usize,
    pub connections_per_uid_max: usize,
    /// How many of `connections_max` are reserved for root.
    pub connections_root_reserved: usize,
    /// Time limit from the first byte of a line to its end.
    pub line: Duration,
    /// How long a connection may be idle before the first byte of a line.
    pub idle: Duration,
    /// Time limit for a caller to accept another byte of an answer.
    pub write_stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self::from(&crate::config::Limits::default())
    }
}

impl From<&crate::config::Limits> for Limits {
    fn from(l: &crate::config::Limits) -> Self {
        Self {
            connections_max: l.connections_max,
            connections_per_uid_max: l.connections_per_uid_max,
            connections_root_reserved: l.connections_root_reserved,
            line: Duration::from_secs(10),
            idle: Duration::from_secs(300),
            write_stall: Duration::from_secs(30),
        }
    }
}

/// A running server. Dropping it stops accepting and closes all connections.
pub struct Server {
    registry: Arc<Registry>,
    stop: Cancel,
    // The first call that stops the server takes this handle.
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// Creates the socket and begins to accept. The socket has mode 0660, and the group `fcd` if
    /// this process is root and the group exists. The last component of its directory is created if
    /// it is missing. A socket on which nothing listens is replaced. If systemd has passed a socket
    /// for this path, the server uses that socket.
    ///
    /// # Errors
    /// `busy` if something listens on the socket, `target_exists` if the path is not a socket of
    /// this user, or `host`.
    pub fn bind(path: &Path, limits: Limits, handler: Arc<dyn Handler>) -> Result<Server> {
        let socket = match socket::of_systemd(path, &|name| std::env::var(name).ok())? {
            Some(socket) => socket,
            None => socket::bind(path)?,
        };
        let stop =
            Cancel::try_new().map_err(|e| Error::io(format!("listen on {}", path.display()), e))?;
        let registry = Arc::new(Registry::new(limits));
        let acceptor = accept::Acceptor::new(socket, registry.clone(), handler, stop.clone())?;
        let thread = thread::spawn("accept", move || acceptor.run())?;
        Ok(Server {
            registry,
            stop,
            acceptor: Mutex::new(Rank::Connections, Some(thread)),
        })
    }

    /// Removes the socket, ends idle connections, and answers further calls with `shutting_down`.
    /// Calls in progress continue.
    pub fn stop_accepting(&self) {
        self.stop.cancel(CancelCause::Finished);
        let acceptor = self.acceptor.lock().take();
        if let Some(acceptor) = acceptor
            && acceptor.join().is_err()
        {
            log::error!("server: the accept thread panicked");
        }
        self.registry.end_idle();
    }

    /// Waits until all connections are closed, and returns how many are left at the deadline.
    /// [`Server::stop_accepting`] must be called first.
    pub fn drain(&self, deadline: Instant) -> usize {
        self.registry.wait_empty(deadline)
    }

    /// Shuts down all connections. Calls in progress see POLLHUP.
    pub fn hang_up(&self) {
        self.registry.hang_up();
    }

    /// Returns the number of connections.
    #[cfg(any(test, feature = "fakes"))]
    pub fn connections(&self) -> usize {
        self.registry.len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_accepting();
        self.hang_up();
    }
}
