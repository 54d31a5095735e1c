//! Connects to a guest and waits for a booting guest to answer. Nothing here reads a byte that the
//! guest sends; the helper that logs in does.

use super::Target;
use super::wait::Wait;
use crate::error::{Error, Kind, Result};
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

/// Deadline for the connection, the key exchange, the authentication and the start of one command.
pub(super) const DIAL_TIMEOUT: Duration = Duration::from_secs(20);
/// Shortest and longest interval between two probes of a booting guest. Between these limits, the
/// interval is an eighth of the time waited so far. QEMU's user-mode network accepts a connection
/// at once and loses what was sent if the guest has no network yet, so an unanswered probe is
/// abandoned. Each probe makes the booting guest start a process, so the interval grows. About two
/// probes are pending at any time.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);
const PROBE_INTERVAL_MAX: Duration = Duration::from_secs(1);
/// Shortest and longest time that a probe waits for the banner. Between these limits, that is a
/// quarter of the time waited so far. A slow guest gets enough time, and a fast guest is detected
/// early.
const PROBE_TIMEOUT_MIN: Duration = Duration::from_millis(250);
const PROBE_TIMEOUT_MAX: Duration = Duration::from_secs(3);
const PROBES_MAX: usize = 8;
/// Pause after a failed probe, for example after a refused connection.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);
/// Number of refused keys and failed helpers after which [`wait_ready`] gives up.
const REFUSALS_MAX: u32 = 5;

/// Builds the error of a session that could not be established.
pub(super) fn unavailable(what: impl std::fmt::Display, target: &Target) -> Error {
    Error::new(
        Kind::GuestUnavailable,
        format!("reach the guest at {}: {what}", target.addr),
    )
    .hint("check that the VM still runs (fcctl ps) and read its console (fcctl logs {vm})")
}

/// Starts a connection attempt on a non-blocking socket. The socket becomes writable when the
/// attempt has succeeded or failed.
fn begin_connect(addr: SocketAddr) -> std::io::Result<TcpStream> {
    let family = if addr.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let fd = rustix::net::socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    match rustix::net::connect(&fd, &addr) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(e) => return Err(e.into()),
    }
    let socket = TcpStream::from(fd);
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// Connects to the guest and returns the non-blocking socket. Returns `guest_unavailable` if the
/// guest cannot be reached, and the wait's error if the wait ends first.
pub(super) fn connect(target: &Target, wait: &Wait<'_>) -> Result<TcpStream> {
    let socket = begin_connect(target.addr).map_err(|e| unavailable(e, target))?;
    // Wait for the connection. The poll also notices a cancel token that fired earlier, and does
    // not reset that token.
    wait.poll(&[PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], None)?;
    match socket.take_error() {
        Ok(None) => Ok(socket),
        Ok(Some(e)) | Err(e) => Err(unavailable(e, target)),
    }
}

/// The outcome of an attempt to log in.
pub(super) enum LogIn {
    Accepted,
    /// The guest refuses our key, or made the helper fail. A booting guest may do so a few times.
    Refused(Error),
    /// The guest does not respond yet.
    NotYet(Error),
}

struct Probe {
    socket: TcpStream,
    born: Instant,
}

/// Probes the guest until it answers and `log_in` succeeds. At the deadline, returns `boot_timeout`
/// with the last obstacle. After [`REFUSALS_MAX`] refused logins, returns the error of the last
/// one.
pub(super) fn wait_ready(
    target: &Target,
    wait: &Wait<'_>,
    log_in: &mut dyn FnMut(TcpStream) -> Result<LogIn>,
) -> Result<()> {
    let mut last = "it does not respond".to_owned();
    match probe_until_ready(target, wait, log_in, &mut last) {
        Err(e) if e.kind() == Kind::Timeout => Err(Error::new(
            Kind::BootTimeout,
            format!("wait for the guest's SSH server at {}: {last}", target.addr),
        )
        .hint("read the guest's console: fcctl logs {vm}")),
        other => other,
    }
}

fn probe_until_ready(
    target: &Target,
    wait: &Wait<'_>,
    log_in: &mut dyn FnMut(TcpStream) -> Result<LogIn>,
    last: &mut String,
) -> Result<()> {
    let started = Instant::now();
    let mut probes: Vec<Probe> = Vec::new();
    let mut next = started;
    let mut refusals = 0;
    loop {
        wait.check()?;
        let now = Instant::now();
        let waited = now.duration_since(started);
        let timeout = (waited / 4).clamp(PROBE_TIMEOUT_MIN, PROBE_TIMEOUT_MAX);
        probes.retain(|p| now.duration_since(p.born) < timeout);
        if now >= next && probes.len() < PROBES_MAX {
            next = match begin_connect(target.addr) {
                Ok(socket) => {
                    probes.push(Probe { socket, born: now });
                    now + (waited / 8).clamp(PROBE_INTERVAL, PROBE_INTERVAL_MAX)
                }
                Err(e) => {
                    *last = e.to_string();
                    now + REFUSED_PAUSE
                }
            };
        }
        let until = probes.iter().map(|p| p.born + timeout).chain([next]).min();
        let answered = match poll_probes(&mut probes, wait, until)? {
            None => continue,
            Some(Ok(socket)) => log_in(socket)?,
            Some(Err(e)) => {
                *last = e;
                next = next.min(Instant::now() + REFUSED_PAUSE);
                continue;
            }
        };
        let e = match answered {
            LogIn::Accepted => return Ok(()),
            LogIn::Refused(e) => {
                refusals += 1;
                if refusals >= REFUSALS_MAX {
                    return Err(e);
                }
                e
            }
            LogIn::NotYet(e) => e,
        };
        *last = e.message().to_owned();
        next = Instant::now() + PROBE_INTERVAL;
    }
}

/// Waits until a probe has received something or has failed. Removes that probe from `probes`, and
/// returns its socket or the reason why it failed. Returns `None` if no probe is ready at `until`.
fn poll_probes(
    probes: &mut Vec<Probe>,
    wait: &Wait<'_>,
    until: Option<Instant>,
) -> Result<Option<Result<TcpStream, String>>> {
    let fds: Vec<_> = probes
        .iter()
        .map(|p| PollFd::new(p.socket.as_fd(), PollFlags::POLLIN))
        .collect();
    let ready = wait.poll(&fds, until)?;
    let Some(at) = ready.iter().position(|ready| *ready) else {
        return Ok(None);
    };
    let probe = probes.remove(at);
    // Peek, so that the byte stays in the socket for the helper.
    let (peeked, _) = match rustix::net::recv(&probe.socket, &mut [0u8; 1][..], RecvFlags::PEEK) {
        Ok(peeked) => peeked,
        Err(e) => return Ok(Some(Err(std::io::Error::from(e).to_string()))),
    };
    Ok(Some(if peeked > 0 {
        Ok(probe.socket)
    } else {
        Err("it hung up before sending its banner".to_owned())
    }))
}
