//! Connect, see who answers, authenticate; and the wait for a guest that boots.

use super::channel::Step;
use super::wire::Shared;
use crate::error::{Error, Kind, Result};
use crate::guest::Target;
use crate::guest::wait::Wait;
use crate::locks::Cancel;
use nix::poll::{PollFd, PollFlags};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Connecting, the key exchange and the authentication of one command.
const DIAL_TIMEOUT: Duration = Duration::from_secs(20);
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
/// A server that answers and refuses our key so often will not change its mind.
const AUTH_REFUSALS_MAX: u32 = 5;

const KEX: &str = "curve25519-sha256,curve25519-sha256@libssh.org,ecdh-sha2-nistp256,ecdh-sha2-nistp384,ecdh-sha2-nistp521";
const CIPHERS: &str = "chacha20-poly1305@openssh.com,aes128-gcm@openssh.com,aes256-gcm@openssh.com,aes128-ctr,aes256-ctr";
/// Ours is of the first kind; the others only so that a changed key is seen as one.
const HOST_KEYS: &str = "ssh-ed25519,ecdsa-sha2-nistp256,rsa-sha2-512,rsa-sha2-256";

fn unavailable(what: impl std::fmt::Display, target: &Target) -> Error {
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

/// Connects and authenticates. `wait` is the caller's; its deadline may lie behind ours.
pub(super) fn dial(target: &Target, wait: &Wait<'_>) -> Result<Rc<Shared>> {
    let wait = wait.tighten(Instant::now() + DIAL_TIMEOUT);
    let dialled = begin_connect(target.addr).map_err(|e| unavailable(e, target)).and_then(|socket| {
        // The socket is made; a token that fired meanwhile is seen by this poll, which does not consume it.
        wait.poll(&[PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], None)?;
        match socket.take_error() {
            Ok(None) => authenticate(socket, target, &wait),
            Ok(Some(e)) | Err(e) => Err(unavailable(e, target)),
        }
    });
    dialled.map_err(|e| match e.kind() {
        Kind::Timeout if wait.is_tightened() => unavailable(format!("no answer within {} s", DIAL_TIMEOUT.as_secs()), target),
        _ => e,
    })
}

/// Repeats a step of libssh2, moving bytes, until it is done.
pub(super) fn drive<T>(shared: &Rc<Shared>, wait: &Wait<'_>, mut step: impl FnMut() -> Step<T>) -> Result<T, Stopped> {
    loop {
        let done = step();
        shared.flush();
        if let Some(done) = done.map_err(Stopped::Ssh)? {
            return Ok(done);
        }
        wait.check().map_err(Stopped::Ended)?;
        if shared.fill() || shared.has_more() {
            continue;
        }
        if shared.ended() {
            return Err(Stopped::Lost);
        }
        wait.poll(shared.poll_fd().as_slice(), None).map_err(Stopped::Ended)?;
    }
}

/// Why a step did not come to its end.
pub(super) enum Stopped {
    Ssh(ssh2::Error),
    /// The peer ended the connection.
    Lost,
    /// What [`Wait`] says.
    Ended(Error),
}

impl Stopped {
    pub fn at_dial(self, doing: &str, target: &Target) -> Error {
        match self {
            Stopped::Ssh(e) => unavailable(format!("{doing}: {}", e.message().escape_debug()), target),
            Stopped::Lost => unavailable(format!("{doing}: the connection ended"), target),
            Stopped::Ended(e) => e,
        }
    }
}

/// A call of the crate as a step.
pub(super) fn as_step<T>(result: Result<T, ssh2::Error>) -> Step<T> {
    match result {
        Ok(v) => Ok(Some(v)),
        Err(e) if e.code() == ssh2::ErrorCode::Session(libssh2_sys::LIBSSH2_ERROR_EAGAIN) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Banner, key exchange, the host's key compared, our key accepted.
fn authenticate(socket: TcpStream, target: &Target, wait: &Wait<'_>) -> Result<Rc<Shared>> {
    let shared = Shared::new(socket)?;
    let session = &shared.session;
    for (kind, prefs) in [
        (ssh2::MethodType::Kex, KEX),
        (ssh2::MethodType::CryptCs, CIPHERS),
        (ssh2::MethodType::CryptSc, CIPHERS),
        (ssh2::MethodType::HostKey, HOST_KEYS),
    ] {
        session.borrow().method_pref(kind, prefs).map_err(|e| Error::internal("choose ssh algorithms").with_source(e))?;
    }
    drive(&shared, wait, || as_step(session.borrow_mut().handshake())).map_err(|e| e.at_dial("greet its SSH server", target))?;
    if session.borrow().host_key().is_none_or(|(blob, _)| blob != target.host_key) {
        return Err(Error::new(
            Kind::HostKeyMismatch,
            format!("the guest at {} has another host key than its VM was given", target.addr),
        )
        .hint("the VM's identity changed: delete it and create it again (fcctl rm -f {vm})"));
    }
    let log_in = || as_step(session.borrow().userauth_pubkey_memory(&target.user, None, &target.private_key, None));
    drive(&shared, wait, log_in).map_err(|e| match e {
        Stopped::Ssh(e) => {
            unavailable(format!("log in as {}: {REFUSED_KEY} ({})", target.user, e.message().escape_debug()), target)
        }
        other => other.at_dial("log in", target),
    })?;
    Ok(shared)
}

const REFUSED_KEY: &str = "its SSH server refuses our key";

struct Probe {
    socket: TcpStream,
    born: Instant,
}

/// Probes until a server has accepted our key. `boot_timeout` at the deadline, with what stood in the way last.
pub(super) fn wait_ready(target: &Target, deadline: Instant, cancel: &Cancel) -> Result<()> {
    let wait = Wait::new(cancel).deadline(Some(deadline));
    let mut last = "it does not answer".to_owned();
    match probe_until_ready(target, &wait, &mut last) {
        Err(e) if e.kind() == Kind::Timeout => {
            Err(Error::new(Kind::BootTimeout, format!("wait for the guest's SSH server at {}: {last}", target.addr))
                .hint("see what the guest says: fcctl logs {vm}"))
        }
        other => other,
    }
}

fn probe_until_ready(target: &Target, wait: &Wait<'_>, last: &mut String) -> Result<()> {
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
        let Some(answer) = poll_probes(&mut probes, wait, until)? else { continue };
        match answer {
            Ok(socket) => match authenticate(socket, target, &wait.tighten(Instant::now() + DIAL_TIMEOUT)) {
                Ok(_session) => return Ok(()),
                Err(e) if matches!(e.kind(), Kind::GuestUnavailable | Kind::Timeout) => {
                    refusals += u32::from(e.message().contains(REFUSED_KEY));
                    if refusals >= AUTH_REFUSALS_MAX {
                        return Err(e);
                    }
                    *last = e.message().to_owned();
                    next = Instant::now() + PROBE_INTERVAL;
                }
                Err(e) => return Err(e),
            },
            Err(e) => {
                *last = e;
                next = next.min(Instant::now() + REFUSED_PAUSE);
            }
        }
    }
}

/// The first probe that says something (taken out, ready to be greeted) or that failed (taken out, with why).
fn poll_probes(probes: &mut Vec<Probe>, wait: &Wait<'_>, until: Option<Instant>) -> Result<Option<Result<TcpStream, String>>> {
    let fds: Vec<_> = probes.iter().map(|p| PollFd::new(p.socket.as_fd(), PollFlags::POLLIN)).collect();
    let ready = wait.poll(&fds, until)?;
    let Some(at) = ready.iter().position(|ready| *ready) else { return Ok(None) };
    let probe = probes.remove(at);
    let (peeked, _) = match rustix::net::recv(&probe.socket, &mut [0u8; 1][..], RecvFlags::PEEK) {
        Ok(peeked) => peeked,
        Err(e) => return Ok(Some(Err(std::io::Error::from(e).to_string()))),
    };
    Ok(Some(if peeked > 0 { Ok(probe.socket) } else { Err("it hung up before its banner".to_owned()) }))
}
