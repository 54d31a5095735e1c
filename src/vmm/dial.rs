//! Connecting to a VMM's own sockets.

use crate::error::{Error, Kind, Result};
use crate::host::process::Process;
use crate::host::wait::{WaitResult, cancelled, wait_any};
use crate::locks::Cancel;
use nix::poll::PollFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Between two tries to connect to a socket that the VMM has yet to make: most have it after some ten milliseconds.
const RETRY_MIN: Duration = Duration::from_millis(1);
const RETRY_MAX: Duration = Duration::from_millis(16);

/// How long, and who may end it.
#[derive(Clone, Copy)]
pub struct Patience<'a> {
    pub deadline: Instant,
    pub cancel: &'a Cancel,
}

/// Connects to a socket of the VMM's in its `run/` directory, once it is there, and makes sure that it is the
/// VMM's: a symbolic link put there by somebody who took the VMM over leads nowhere. None: the process has exited.
pub fn connect(dir: &OwnedFd, name: &str, process: &Process, patience: Patience<'_>) -> Result<Option<UnixStream>> {
    let doing = || format!("connect to {name} of the VMM");
    // No path limit (108 bytes) this way, and no directory to be swapped on the way.
    let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
    let address = SocketAddrUnix::new(path.as_str()).map_err(|e| Error::io(doing(), e))?;
    let mut retry = RETRY_MIN;
    let begun = Instant::now();
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|e| Error::io(doing(), e))?;
        use rustix::io::Errno;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {
                let peer = rustix::net::sockopt::socket_peercred(&socket).map_err(|e| Error::io(doing(), e))?;
                let pid = peer.pid.as_raw_nonzero().get();
                if pid.cast_unsigned() == process.identity().pid {
                    return Ok(Some(socket.into()));
                }
                return Err(Error::new(Kind::Denied, format!("{}: process {pid} listens there", doing())));
            }
            // Not there yet, a socket of an earlier life, or a queue that is full.
            Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(Error::io(doing(), e)),
        }
        // Not in steps as long as the wait was so far, but a tenth of it.
        retry = retry.max(begun.elapsed() / 10).min(RETRY_MAX);
        let until = patience.deadline.min(Instant::now() + retry);
        match wait_any(&[(process.fd(), PollFlags::POLLIN)], until, patience.cancel).map_err(|e| Error::io(doing(), e))? {
            WaitResult::Ready => return Ok(None),
            WaitResult::Cancelled => return Err(cancelled(&doing(), patience.cancel)),
            WaitResult::Deadline if until == patience.deadline => {
                return Err(Error::new(Kind::Timeout, format!("{}: not in time", doing())));
            }
            WaitResult::Deadline => {}
        }
    }
}
