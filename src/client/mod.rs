//! The blocking client. A [`Client`] is one connection with at most one call in flight
//! ([`InFlight`]); another thread can end the call with a [`Hangup`]. Errors are [`Failure`]s.
//!
//! This module does not print, read the environment or choose a socket; `cli` does.

mod connection;
mod failure;
#[cfg(test)]
pub(crate) mod fake;
mod list;
#[cfg(test)]
mod tests;

pub use failure::{ABSENT, Failure, Result};

use crate::api::daemon::ApiVersion;
use crate::api::frame::{Line, Note, Response};
use crate::api::{Call, VERSION_MAJOR, VERSION_MINOR};
use crate::error::{Error, Kind};
use connection::Connection;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use std::marker::PhantomData;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The deadline of a plain call. The daemon answers such a call from memory, so this is enough even
/// on a very busy host.
pub const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// The deadline of the `fcd.info` call after the connect.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// A connection to a daemon of a compatible version.
pub struct Client {
    connection: Connection,
    socket: PathBuf,
    warning: Option<String>,
}

/// The next message from the daemon in a `more` call.
#[derive(Debug)]
pub enum Event<R> {
    Note(Note),
    Reply(R),
}

/// A call that was sent but not yet answered. If it is dropped before the reply, the connection
/// cannot be used for further calls.
pub struct InFlight<'a, R> {
    client: &'a mut Client,
    id: u64,
    method: &'a str,
    reply: PhantomData<R>,
}

/// Closes a connection from another thread. The call in flight then fails, and the daemon sees a
/// hang-up.
#[derive(Debug)]
pub struct Hangup(std::os::unix::net::UnixStream);

impl Hangup {
    pub fn hang_up(&self) {
        // This fails only if the daemon has already closed the connection.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// The members of `fcd.info` that every version of the daemon sends.
#[derive(Deserialize)]
struct Hello {
    api: ApiVersion,
    #[serde(default)]
    version: String,
}

impl Client {
    /// Connects and compares versions. A compatible difference leaves a [`Client::warning`].
    ///
    /// # Errors
    /// `Failure::unreachable` if there is no daemon, and `version_mismatch`, which also counts as
    /// unreachable, if the major version differs.
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut client = Self::connect_again(socket)?;
        let params = RawValue::from_string("{}".to_owned()).expect("an object");
        let answer = client.call_raw("fcd.info", &params, HELLO_DEADLINE)?;
        let hello: Hello = serde_json::from_str(answer.get())
            .map_err(|e| protocol("read the daemon's version", e))?;
        client.warning = compare(hello.api, &hello.version)?;
        Ok(client)
    }

    /// Opens a second connection to a daemon whose version has been checked before.
    pub fn connect_again(socket: &Path) -> Result<Self> {
        Ok(Self {
            connection: Connection::open(socket)?,
            socket: socket.to_owned(),
            warning: None,
        })
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns a warning about a difference between the versions, if there is one that the user
    /// should know about.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// Returns a handle that closes this connection from another thread.
    pub fn hangup(&self) -> Result<Hangup> {
        Ok(Hangup(self.connection.try_clone()?))
    }

    /// Makes a call that the daemon answers immediately. Fails with `timeout` after
    /// [`CALL_DEADLINE`].
    pub fn call<C: Call>(&mut self, request: &C::Request) -> Result<C::Reply> {
        self.ask::<C>(request)?;
        self.answer::<C>()
    }

    fn ask<C: Call>(&mut self, request: &C::Request) -> Result<()> {
        self.send(C::METHOD, &raw(request)?, false, &[])?;
        self.connection.set_deadline(Some(CALL_DEADLINE))
    }

    fn answer<C: Call>(&mut self) -> Result<C::Reply> {
        self.flight::<C::Reply>(C::METHOD).finish(&mut |_| Ok(()))
    }

    /// Makes a call as [`Client::call`] does, and also returns the descriptor that comes with the
    /// answer. Returns `version_mismatch` if no descriptor came.
    pub fn call_for_fd<C: Call>(&mut self, request: &C::Request) -> Result<(C::Reply, OwnedFd)> {
        let reply = self.call::<C>(request)?;
        let missing = || {
            Error::new(
                Kind::VersionMismatch,
                format!("{}: no descriptor came with the answer", C::METHOD),
            )
        };
        let fd = self.connection.take_received().ok_or_else(missing)?;
        Ok((reply, fd))
    }

    /// Makes a call without a deadline. Notes go to `on_note`, whose error ends the call and the
    /// connection.
    pub fn call_more<C: Call>(
        &mut self,
        request: &C::Request,
        fds: &[BorrowedFd<'_>],
        on_note: &mut dyn FnMut(Note) -> Result<()>,
    ) -> Result<C::Reply> {
        self.begin::<C>(request, fds)?.finish(on_note)
    }

    /// Sends a `more` call. [`InFlight::next_event`] reads its notes and its reply.
    pub fn begin<C: Call>(
        &mut self,
        request: &C::Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<InFlight<'_, C::Reply>> {
        self.send(C::METHOD, &raw(request)?, true, fds)?;
        self.connection.set_deadline(None)?;
        Ok(self.flight(C::METHOD))
    }

    /// Calls any method with any parameters. Fails with `timeout` after `deadline`.
    pub fn call_raw(
        &mut self,
        method: &str,
        params: &RawValue,
        deadline: Duration,
    ) -> Result<Box<RawValue>> {
        self.send(method, params, false, &[])?;
        self.connection.set_deadline(Some(deadline))?;
        self.flight::<Box<RawValue>>(method).finish(&mut |_| Ok(()))
    }

    /// Calls any method with any parameters as a `more` call, without a deadline. Notes go to
    /// `on_note`, whose error ends the call and the connection.
    pub fn call_raw_more(
        &mut self,
        method: &str,
        params: &RawValue,
        on_note: &mut dyn FnMut(Note) -> Result<()>,
    ) -> Result<Box<RawValue>> {
        self.send(method, params, true, &[])?;
        self.connection.set_deadline(None)?;
        self.flight::<Box<RawValue>>(method).finish(on_note)
    }

    fn flight<'a, R>(&'a mut self, method: &'a str) -> InFlight<'a, R> {
        InFlight {
            id: self.connection.last_id(),
            client: self,
            method,
            reply: PhantomData,
        }
    }

    fn send(
        &mut self,
        method: &str,
        params: &RawValue,
        more: bool,
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        self.connection.send(method, params, more, fds)
    }
}

impl<R: serde::de::DeserializeOwned> InFlight<'_, R> {
    /// Reads the next note or the reply.
    ///
    /// # Errors
    /// The daemon's fault, `Failure::unreachable` if the connection broke, or `timeout`.
    pub fn next_event(&mut self) -> Result<Event<R>> {
        loop {
            let line = self.client.connection.read_line(self.method)?;
            match Line::<R>::parse(line) {
                Ok(None) => {}
                Ok(Some(Line::Note(note))) => return Ok(Event::Note(note)),
                Ok(Some(Line::Response(response))) => {
                    return self.accept(response).map(Event::Reply);
                }
                Err(e) => {
                    let line = line.to_owned();
                    return Err(self.unreadable(&line, e));
                }
            }
        }
    }

    /// Builds the error for a line that answers another call or has an unknown form.
    fn unreadable(&mut self, line: &[u8], e: serde_json::Error) -> Failure {
        if let Ok(Some(Line::Response(response))) = Line::<IgnoredAny>::parse(line)
            && let Err(other) = self.check_id(&response)
        {
            return other;
        }
        protocol(&format!("read the answer to {}", self.method), e)
    }

    /// Reads until the reply, and passes notes to `on_note`. If `on_note` fails, closes the
    /// connection and returns its error.
    pub fn finish(mut self, on_note: &mut dyn FnMut(Note) -> Result<()>) -> Result<R> {
        loop {
            match self.next_event()? {
                Event::Reply(reply) => return Ok(reply),
                Event::Note(note) => {
                    if let Err(e) = on_note(note) {
                        self.client.connection.hang_up();
                        return Err(e);
                    }
                }
            }
        }
    }

    fn check_id<T>(&mut self, response: &Response<T>) -> Result<()> {
        // An error without an id concerns the connection: the request was not understood, or there
        // are too many connections.
        let ours = response.id.get() == self.id.to_string()
            || (response.error.is_some() && response.id.get() == "null");
        if ours {
            return Ok(());
        }
        self.client.connection.hang_up();
        let id = response.id.get().chars().take(40).collect::<String>();
        Err(Error::internal(format!(
            "{}: the daemon answered another call ({id})",
            self.method
        ))
        .into())
    }

    fn accept(&mut self, response: Response<R>) -> Result<R> {
        self.check_id(&response)?;
        if let Some(error) = response.error {
            return Err(Failure::from_rpc(error));
        }
        response.result.ok_or_else(|| {
            Error::internal(format!(
                "{}: the daemon's answer has no result",
                self.method
            ))
            .into()
        })
    }
}

fn raw(request: &impl serde::Serialize) -> Result<Box<RawValue>> {
    serde_json::value::to_raw_value(request)
        .map_err(|e| Error::internal("write a request").with_source(e).into())
}

fn protocol(doing: &str, e: serde_json::Error) -> Failure {
    Error::new(Kind::VersionMismatch, doing.to_owned())
        .with_source(e)
        .hint("fcctl and fcd may have different versions: run fcctl version")
        .into()
}

/// Fails if the major versions differ. Otherwise returns a warning about any other difference.
fn compare(theirs: ApiVersion, package: &str) -> Result<Option<String>> {
    let ours = env!("CARGO_PKG_VERSION");
    if theirs.major != VERSION_MAJOR {
        let e = Error::new(
            Kind::VersionMismatch,
            format!(
                "the daemon (fcd {package}) speaks protocol {}.{}, fcctl {ours} speaks {VERSION_MAJOR}.{VERSION_MINOR}",
                theirs.major, theirs.minor
            ),
        )
        .hint("install the same version of fcd and fcctl, then restart fcd");
        return Err(Failure {
            unreachable: true,
            ..e.into()
        });
    }
    if theirs.minor != VERSION_MINOR || package != ours {
        return Ok(Some(format!(
            "fcd is {package} (protocol {}.{}), fcctl is {ours} (protocol {VERSION_MAJOR}.{VERSION_MINOR})",
            theirs.major, theirs.minor
        )));
    }
    Ok(None)
}
