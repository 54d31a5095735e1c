//! The name server on the bridge's address: `NAME.vm` and the subnet's reverse zone from the daemon, the rest forwarded.

use crate::error::Result;
use std::net::{IpAddr, Ipv4Addr};

/// What the daemon knows. Called from the server's threads, at most one call at a time for each connection and one for all
/// datagrams; must not block for long.
pub trait Names: Send + Sync {
    /// The address of the VM with this name (valid, lower case, without `.vm`) if `asker` may know it: a guest's address, or the
    /// host's own.
    fn address(&self, name: &str, asker: IpAddr) -> Option<Ipv4Addr>;

    /// The name, without `.vm`, of the VM with this address, if `asker` may know it.
    fn name(&self, address: Ipv4Addr, asker: IpAddr) -> Option<String>;
}

/// A running name server. Ends, and waits for its threads, when dropped.
pub struct Server {}

impl Server {
    /// Ends it and waits for its threads.
    pub fn stop(self) -> Result<()> {
        todo!()
    }
}
