//! The Unix-socket server: newline-delimited JSON-RPC 2.0, a thread per connection, one call in flight on each.
//!
//! It knows nothing of what is called: a [`Handler`] answers. What it promises whoever connects, and every other
//! caller meanwhile: a line is at most [`FRAME_BYTES_MAX`], and no more is ever allocated for one; a line that was begun
//! ends within [`Limits::line`]; a caller that does not read is dropped after [`Limits::write_stall`]; connections are
//! limited in all and per uid, and beyond that one gets a `busy` line.
//!
//! # A connection after an error
//! It stays usable after a line that ended: bad JSON, an invalid request, wrong descriptors, a failed call. It is closed,
//! after an error line without id, when the line is too long, late or cut off, or when there is no room.

mod accept;
mod claim;
mod connection;
mod dispatch;
mod line;
mod request;
mod run;
mod socket;
#[cfg(test)]
mod tests;

pub use connection::{Connection, Peer};
pub use dispatch::Dispatch;
pub use request::{CallError, CallResult, IncomingCall, KEY_LEN_MAX};
pub use run::{drain, exit_status, print_doctor, run};

pub use crate::api::frame::{FDS_MAX, FRAME_BYTES_MAX};
use crate::error::{Error, Result};
use crate::host::thread;
use crate::locks::{Cancel, CancelCause, Mutex, Rank};
use accept::Registry;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Answers calls, each on its connection's thread.
pub trait Handler: Send + Sync + 'static {
    /// A panic is answered as `internal`, and the connection lives on. No lock may be held at the end.
    fn call(&self, call: IncomingCall<'_>, connection: &Connection) -> CallResult;
}

#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    pub connections_max: usize,
    pub connections_per_uid_max: usize,
    /// Of `connections_max`, kept back for root.
    pub connections_root_reserved: usize,
    /// From the first byte of a line to its end.
    pub line: Duration,
    /// Without a call.
    pub idle: Duration,
    /// Without a byte taken by a caller who is being answered.
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

/// A server that runs. Dropped, it stops accepting and hangs up on everyone.
pub struct Server {
    registry: Arc<Registry>,
    stop: Cancel,
    // Taken by whoever stops.
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// Makes the socket (0660; the group `fcd`, where there is one and we are root) and begins to accept. The last
    /// component of its directory is made when it is missing; a socket that nobody listens on is replaced.
    ///
    /// # Errors
    /// `busy` when somebody listens there, `target_exists` when there is something else, `host`.
    pub fn bind(path: &Path, limits: Limits, handler: Arc<dyn Handler>) -> Result<Server> {
        let socket = socket::bind(path)?;
        let stop = Cancel::try_new().map_err(|e| Error::io(format!("listen on {}", path.display()), e))?;
        let registry = Arc::new(Registry::new(limits));
        let acceptor = accept::Acceptor::new(socket, registry.clone(), handler, stop.clone())?;
        let thread = thread::spawn("accept", move || acceptor.run())?;
        Ok(Server { registry, stop, acceptor: Mutex::new(Rank::Connections, Some(thread)) })
    }

    /// Removes the socket, ends idle connections, and answers further calls on the others with `shutting_down`. Calls in
    /// flight go on.
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

    /// Waits until all connections are gone and says how many are left at the deadline. Call
    /// [`Server::stop_accepting`] first.
    pub fn drain(&self, deadline: Instant) -> usize {
        self.registry.wait_empty(deadline)
    }

    /// Hangs up on everyone; calls in flight see POLLHUP.
    pub fn hang_up(&self) {
        self.registry.hang_up();
    }

    /// Connections now.
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
