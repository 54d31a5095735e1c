//! Connecting to a guest, and the wait for one that boots. No byte that it sends is read here: whoever logs in does that.

use super::Target;
use super::wait::Wait;
use crate::error::{Error, Kind, Result};
use nix::poll::{PollFd, PollFlags};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Connecting, the key exchange, the authentication and the start of one command.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(20);
/// Between two probes of a guest that boots. QEMU's user-mode network accepts at once and then loses what it sent
/// to a guest without a network, so a probe that is not answered soon is not waited for (research, qemu-guests 2).
/// Each costs a booting guest the start of a process, so the interval grows: an eighth of the time that the wait has
/// taken so far, within these. About two probes are on their way at any time.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);
const PROBE_INTERVAL_MAX: Duration = Duration::from_secs(1);
/// How long a probe waits for the banner: a quarter of that time, within these. A slow guest is so given time, and a
/// fast one is found soon.
const PROBE_PATIENCE_MIN: Duration = Duration::from_millis(250);
const PROBE_PATIENCE_MAX: Duration = Duration::from_secs(3);
const PROBES_MAX: usize = 8;
/// After a refused connection.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);
/// A server that answers and refuses our key, or breaks whoever talks to it, will not change its mind after so often.
const REFUSALS_MAX: u32 = 5;

/// No session with the guest came about.
pub fn unavailable(what: impl std::fmt::Display, target: &Target) -> Error {
    Error::new(Kind::GuestUnavailable, format!("reach the guest at {}: {what}", target.addr))
        .hint("see whether the VM still runs (fcctl ps) and what it says (fcctl logs {vm})")
}

/// Begins to connect. Ready to write when it is connected or has failed.
fn begin_connect(addr: SocketAddr) -> std::io::Result<TcpStream> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    match rustix::net::connect(&fd, &addr) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(e) => return Err(e.into()),
    }
    let socket = TcpStream::from(fd);
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// A connected socket, which does not block.
pub fn connect(target: &Target, wait: &Wait<'_>) -> Result<TcpStream> {
    let socket = begin_connect(target.addr).map_err(|e| unavailable(e, target))?;
    // The socket is made; a token that fired meanwhile is seen by this poll, which does not consume it.
    wait.poll(&[PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], None)?;
    match socket.take_error() {
        Ok(None) => Ok(socket),
        Ok(Some(e)) | Err(e) => Err(unavailable(e, target)),
    }
}

/// How an attempt to log in ended.
pub enum LogIn {
    Accepted,
    /// The guest does not want us, or broke the helper; it may be a matter of time, but not often.
    Refused(Error),
    /// The guest is not there yet.
    NotYet(Error),
}

struct Probe {
    socket: TcpStream,
    born: Instant,
}

/// Probes until `log_in` has been accepted by a guest that answers. `boot_timeout` at the deadline, with what stood in the
/// way last.
pub fn wait_ready(target: &Target, wait: &Wait<'_>, log_in: &mut dyn FnMut(TcpStream) -> Result<LogIn>) -> Result<()> {
    let mut last = "it does not answer".to_owned();
    match probe_until_ready(target, wait, log_in, &mut last) {
        Err(e) if e.kind() == Kind::Timeout => {
            Err(Error::new(Kind::BootTimeout, format!("wait for the guest's SSH server at {}: {last}", target.addr))
                .hint("see what the guest says: fcctl logs {vm}"))
        }
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
        let patience = (waited / 4).clamp(PROBE_PATIENCE_MIN, PROBE_PATIENCE_MAX);
        probes.retain(|p| now.duration_since(p.born) < patience);
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
        let until = probes.iter().map(|p| p.born + patience).chain([next]).min();
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

/// The first probe that says something (taken out, ready to be greeted) or that failed (taken out, with why).
fn poll_probes(probes: &mut Vec<Probe>, wait: &Wait<'_>, until: Option<Instant>) -> Result<Option<Result<TcpStream, String>>> {
    let fds: Vec<_> = probes.iter().map(|p| PollFd::new(p.socket.as_fd(), PollFlags::POLLIN)).collect();
    let ready = wait.poll(&fds, until)?;
    let Some(at) = ready.iter().position(|ready| *ready) else { return Ok(None) };
    let probe = probes.remove(at);
    // Whether there is a byte; which one is nobody's business here.
    let (peeked, _) = match rustix::net::recv(&probe.socket, &mut [0u8; 1][..], RecvFlags::PEEK) {
        Ok(peeked) => peeked,
        Err(e) => return Ok(Some(Err(std::io::Error::from(e).to_string()))),
    };
    Ok(Some(if peeked > 0 { Ok(probe.socket) } else { Err("it hung up before its banner".to_owned()) }))
}
