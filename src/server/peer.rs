//! Identifies the process at the other end of a connection.

use crate::error::{Error, Result};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::os::unix::net::UnixStream;

/// The credentials of the process that connected (SO_PEERCRED). Use the pid in logs only, because
/// it may have been reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
    pub pid: i32,
}

impl Peer {
    pub(super) fn of(socket: &UnixStream) -> Result<Peer> {
        let c = getsockopt(socket, PeerCredentials)
            .map_err(|e| Error::io("read the credentials of a caller", e))?;
        Ok(Peer {
            uid: c.uid(),
            gid: c.gid(),
            pid: c.pid(),
        })
    }
}
