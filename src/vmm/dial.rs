//! Connects to the sockets of a VMM.

use crate::error::{Error, Kind, Result};
use crate::host::process::Process;
use crate::host::wait::{WaitResult, cancelled, wait_any};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::PollFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The shortest wait before trying again to connect to a socket that the VMM has not created yet.
/// Most sockets exist after about ten milliseconds.
const RETRY_MIN: Duration = Duration::from_millis(1);
const RETRY_MAX: Duration = Duration::from_millis(16);

/// The deadline of a wait, and the token that can end it earlier.
#[derive(Clone, Copy)]
pub(super) struct Deadline<'a> {
    pub at: Instant,
    pub cancel: &'a Cancel,
}

/// Connects to a socket in the VMM's `run/` directory once it exists. Checks that the VMM itself
/// listens on the socket, because a guest that controls the VMM could put a symbolic link there.
/// Returns None if the process has exited.
pub(super) fn connect(
    dir: &OwnedFd,
    name: &str,
    process: &Process,
    deadline: Deadline<'_>,
) -> Result<Option<UnixStream>> {
    let doing = || format!("connect to {name} of the VMM");
    // This path is shorter than the limit of 108 bytes, and none of its directories can be
    // replaced.
    let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
    let address = SocketAddrUnix::new(path.as_str()).map_err(|e| Error::io(doing(), e))?;
    let mut retry = RETRY_MIN;
    let begun = Instant::now();
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| Error::io(doing(), e))?;
        use rustix::io::Errno;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {
                let peer = rustix::net::sockopt::socket_peercred(&socket)
                    .map_err(|e| Error::io(doing(), e))?;
                let pid = peer.pid.as_raw_nonzero().get();
                if pid.cast_unsigned() == process.identity().pid {
                    return Ok(Some(socket.into()));
                }
                return Err(Error::new(
                    Kind::Denied,
                    format!("{}: process {pid} listens there", doing()),
                ));
            }
            // The socket does not exist yet, is left from an earlier start, or its queue is full.
            Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(Error::io(doing(), e)),
        }
        // Wait for a tenth of the time that has passed, which keeps the added delay small.
        retry = retry.max(begun.elapsed() / 10).min(RETRY_MAX);
        let until = deadline.at.min(Instant::now() + retry);
        match wait_any(&[(process.fd(), PollFlags::POLLIN)], until, deadline.cancel)
            .map_err(|e| Error::io(doing(), e))?
        {
            WaitResult::Ready => return Ok(None),
            WaitResult::Cancelled => return Err(cancelled(&doing(), deadline.cancel)),
            WaitResult::Deadline if until == deadline.at => {
                return Err(Error::new(
                    Kind::Timeout,
                    format!("{}: the deadline has passed", doing()),
                ));
            }
            WaitResult::Deadline => {}
        }
    }
}
