//! Turns a connected socket into a session: checks the host key, authenticates, starts a command.

use super::channel::{Channel, Step};
use super::wire::Shared;
use crate::api::exec::Pty;
use crate::error::Error;
use crate::guest::wait::Wait;
use std::net::TcpStream;
use std::rc::Rc;

const KEX: &str = "curve25519-sha256,curve25519-sha256@libssh.org,ecdh-sha2-nistp256,ecdh-sha2-nistp384,ecdh-sha2-nistp521";
const CIPHERS: &str = "chacha20-poly1305@openssh.com,aes128-gcm@openssh.com,aes256-gcm@openssh.com,aes128-ctr,aes256-ctr";
/// The accepted types of host keys. Our guests have host keys of the first type. The other types
/// are listed so that a changed key is reported as `host_key_mismatch`.
const HOST_KEYS: &str = "ssh-ed25519,ecdsa-sha2-nistp256,rsa-sha2-512,rsa-sha2-256";
/// Maximum number of bytes from a server before a command runs. A login needs a few KiB. libssh2
/// buffers some of what arrives, so more is treated as a flood.
const LOGIN_BYTES_MAX: u64 = 1024 * 1024;

/// The user, the key and the expected host key of a login.
pub(crate) struct Identity<'a> {
    pub user: &'a str,
    /// The private key in OpenSSH format.
    pub private_key: &'a str,
    /// The only accepted host key.
    pub host_key: &'a [u8],
}

/// The reason why a session could not be established.
#[derive(Debug)]
pub(crate) enum LogInError {
    HostKeyMismatch,
    /// The login failed. Contains libssh2's message.
    KeyRefused(String),
    Unavailable(String),
    /// The [`Wait`] has ended.
    Ended,
}

/// The reason why a step failed.
enum StepError {
    Ssh(ssh2::Error),
    /// The peer closed the connection.
    Lost,
    Flood,
    Ended,
}

impl StepError {
    fn at(self, doing: &str) -> LogInError {
        match self {
            StepError::Ssh(e) => LogInError::Unavailable(format!("{doing}: {}", e.message())),
            StepError::Lost => LogInError::Unavailable(format!("{doing}: the connection ended")),
            StepError::Flood => LogInError::Unavailable(format!(
                "{doing}: it sent more than {LOGIN_BYTES_MAX} bytes"
            )),
            StepError::Ended => LogInError::Ended,
        }
    }
}

/// Repeats a libssh2 step, and moves bytes in between, until the step is done.
fn drive<T>(
    shared: &Rc<Shared>,
    wait: &Wait<'_>,
    mut step: impl FnMut() -> Step<T>,
) -> Result<T, StepError> {
    loop {
        let done = step();
        shared.flush();
        if let Some(done) = done.map_err(StepError::Ssh)? {
            return Ok(done);
        }
        wait.check().map_err(|_| StepError::Ended)?;
        if shared.received() > LOGIN_BYTES_MAX {
            return Err(StepError::Flood);
        }
        if shared.fill() || shared.has_more() {
            continue;
        }
        if shared.ended() {
            return Err(StepError::Lost);
        }
        wait.poll(shared.poll_fd().as_slice(), None)
            .map_err(|_| StepError::Ended)?;
    }
}

/// Converts a result of the ssh2 crate to a step.
fn as_step<T>(result: Result<T, ssh2::Error>) -> Step<T> {
    match result {
        Ok(v) => Ok(Some(v)),
        Err(e) if e.code() == ssh2::ErrorCode::Session(libssh2_sys::LIBSSH2_ERROR_EAGAIN) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Exchanges banners and keys, compares the host key and authenticates. The socket must not block.
pub(in crate::guest) fn log_in(
    socket: TcpStream,
    who: &Identity<'_>,
    wait: &Wait<'_>,
) -> Result<Rc<Shared>, LogInError> {
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
    drive(&shared, wait, || as_step(session.borrow_mut().handshake()))
        .map_err(|e| e.at("greet its SSH server"))?;
    if session
        .borrow()
        .host_key()
        .is_none_or(|(blob, _)| blob != who.host_key)
    {
        return Err(LogInError::HostKeyMismatch);
    }
    let log_in = || {
        as_step(
            session
                .borrow()
                .userauth_pubkey_memory(who.user, None, who.private_key, None),
        )
    };
    drive(&shared, wait, log_in).map_err(|e| match e {
        StepError::Ssh(e) => LogInError::KeyRefused(e.message().to_owned()),
        other => other.at("log in"),
    })?;
    Ok(shared)
}

/// Opens a channel and starts a command in it.
pub(in crate::guest) fn start(
    shared: &Rc<Shared>,
    pty: Option<&Pty>,
    command: &[u8],
    wait: &Wait<'_>,
) -> Result<Channel, LogInError> {
    let at = |doing: &'static str| move |e: StepError| e.at(doing);
    let mut channel =
        drive(shared, wait, || Channel::open(shared)).map_err(at("open a channel"))?;
    if let Some(pty) = pty {
        drive(shared, wait, || channel.request_pty(pty)).map_err(at("ask for a terminal"))?;
    }
    drive(shared, wait, || channel.exec(command)).map_err(at("start the command"))?;
    Ok(channel)
}
