//! A server without a socket file, for simulations. Everything after accept(2) is the same.

use super::accept;
use super::peer::Peer;
use super::registry::Registry;
use super::{Handler, Limits, Server};
use crate::error::{Error, Result};
use crate::locks::{Cancel, Mutex, Rank};
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

pub struct DirectServer {
    server: Server,
    handler: Arc<dyn Handler>,
}

impl Deref for DirectServer {
    type Target = Server;
    fn deref(&self) -> &Server {
        &self.server
    }
}

impl DirectServer {
    pub fn new(limits: Limits, handler: Arc<dyn Handler>) -> Result<Self> {
        let stop = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        let server = Server {
            registry: Arc::new(Registry::new(limits)),
            stop,
            acceptor: Mutex::new(Rank::Connections, None),
        };
        Ok(Self { server, handler })
    }

    /// Connects a caller. Returns its end of the connection.
    pub fn connect(&self, peer: Peer) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair().map_err(|e| Error::io("make a socket", e))?;
        let Server { registry, stop, .. } = &self.server;
        accept::start(registry, &self.handler, stop, &Arc::new(ours), peer)?;
        Ok(theirs)
    }
}
