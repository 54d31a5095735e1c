//! From a connected socket to a session: see who answers, authenticate, start a command.

use super::channel::{Channel, Step};
use super::wire::Shared;
use crate::api::exec::Pty;
use crate::error::Error;
use crate::guest::wait::Wait;
use std::net::TcpStream;
use std::rc::Rc;

const KEX: &str = "curve25519-sha256,curve25519-sha256@libssh.org,ecdh-sha2-nistp256,ecdh-sha2-nistp384,ecdh-sha2-nistp521";
const CIPHERS: &str = "chacha20-poly1305@openssh.com,aes128-gcm@openssh.com,aes256-gcm@openssh.com,aes128-ctr,aes256-ctr";
/// Ours is of the first kind; the others only so that a changed key is seen as one.
const HOST_KEYS: &str = "ssh-ed25519,ecdsa-sha2-nistp256,rsa-sha2-512,rsa-sha2-256";
/// Most bytes from a server until a command runs. It needs a few KiB; more is a flood, of which libssh2 keeps a part.
const LOGIN_BYTES_MAX: u64 = 1024 * 1024;

/// Who logs in, and to whom.
pub struct Identity<'a> {
    pub user: &'a str,
    /// OpenSSH format.
    pub private_key: &'a str,
    /// The only host key that is accepted.
    pub host_key: &'a [u8],
}

/// Why there is no session.
#[derive(Debug)]
pub enum LogInError {
    HostKeyMismatch,
    /// With the server's words.
    KeyRefused(String),
    Unavailable(String),
    /// [`Wait`] says that nobody wants one any more.
    Ended,
}

/// Why a step did not come to its end.
enum Stopped {
    Ssh(ssh2::Error),
    /// The peer ended the connection.
    Lost,
    Flood,
    Ended,
}

impl Stopped {
    fn at(self, doing: &str) -> LogInError {
        match self {
            Stopped::Ssh(e) => LogInError::Unavailable(format!("{doing}: {}", e.message())),
            Stopped::Lost => LogInError::Unavailable(format!("{doing}: the connection ended")),
            Stopped::Flood => LogInError::Unavailable(format!("{doing}: it sent more than {LOGIN_BYTES_MAX} bytes")),
            Stopped::Ended => LogInError::Ended,
        }
    }
}

/// Repeats a step of libssh2, moving bytes, until it is done.
fn drive<T>(shared: &Rc<Shared>, wait: &Wait<'_>, mut step: impl FnMut() -> Step<T>) -> Result<T, Stopped> {
    loop {
        let done = step();
        shared.flush();
        if let Some(done) = done.map_err(Stopped::Ssh)? {
            return Ok(done);
        }
        wait.check().map_err(|_| Stopped::Ended)?;
        if shared.received() > LOGIN_BYTES_MAX {
            return Err(Stopped::Flood);
        }
        if shared.fill() || shared.has_more() {
            continue;
        }
        if shared.ended() {
            return Err(Stopped::Lost);
        }
        wait.poll(shared.poll_fd().as_slice(), None).map_err(|_| Stopped::Ended)?;
    }
}

/// A call of the crate as a step.
fn as_step<T>(result: Result<T, ssh2::Error>) -> Step<T> {
    match result {
        Ok(v) => Ok(Some(v)),
        Err(e) if e.code() == ssh2::ErrorCode::Session(libssh2_sys::LIBSSH2_ERROR_EAGAIN) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Banner, key exchange, the host's key compared, our key accepted. The socket does not block.
pub(in crate::guest) fn log_in(socket: TcpStream, who: &Identity<'_>, wait: &Wait<'_>) -> Result<Rc<Shared>, LogInError> {
    let unavailable = |e: Error| LogInError::Unavailable(e.to_string());
    let shared = Shared::new(socket).map_err(unavailable)?;
    let session = &shared.session;
    for (kind, prefs) in [
        (ssh2::MethodType::Kex, KEX),
        (ssh2::MethodType::CryptCs, CIPHERS),
        (ssh2::MethodType::CryptSc, CIPHERS),
        (ssh2::MethodType::HostKey, HOST_KEYS),
    ] {
        let chosen = session.borrow().method_pref(kind, prefs);
        chosen.map_err(|e| LogInError::Unavailable(format!("choose ssh algorithms: {e}")))?;
    }
    drive(&shared, wait, || as_step(session.borrow_mut().handshake())).map_err(|e| e.at("greet its SSH server"))?;
    if session.borrow().host_key().is_none_or(|(blob, _)| blob != who.host_key) {
        return Err(LogInError::HostKeyMismatch);
    }
    let log_in = || as_step(session.borrow().userauth_pubkey_memory(who.user, None, who.private_key, None));
    drive(&shared, wait, log_in).map_err(|e| match e {
        Stopped::Ssh(e) => LogInError::KeyRefused(e.message().to_owned()),
        other => other.at("log in"),
    })?;
    Ok(shared)
}

/// Opens a channel and starts a command there.
pub(in crate::guest) fn start(
    shared: &Rc<Shared>,
    pty: Option<&Pty>,
    command: &[u8],
    wait: &Wait<'_>,
) -> Result<Channel, LogInError> {
    let at = |doing: &'static str| move |e: Stopped| e.at(doing);
    let mut channel = drive(shared, wait, || Channel::open(shared)).map_err(at("open a channel"))?;
    if let Some(pty) = pty {
        drive(shared, wait, || channel.request_pty(pty)).map_err(at("ask for a terminal"))?;
    }
    drive(shared, wait, || channel.exec(command)).map_err(at("start the command"))?;
    Ok(channel)
}
