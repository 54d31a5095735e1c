//! The blocking client: one connection, one call in flight on it.
//!
//! Nothing here prints, reads the environment or chooses a socket; `cli` does.

mod connection;
mod failure;
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use failure::{ABSENT, DENIED, Failure, LOST, Result, UNREACHABLE_STATUS};

use crate::api::daemon::ApiVersion;
use crate::api::frame::{Line, Note, Response};
use crate::api::page::ListCall;
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

/// A daemon that lives answers a plain call from memory; this much covers a very busy host.
pub const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// From the connect to the answer of `fcd.info`.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// A connection to a daemon of a fitting version.
pub struct Client {
    connection: Connection,
    socket: PathBuf,
    warning: Option<String>,
}

/// What comes next on the line of a `more` call.
#[derive(Debug)]
pub enum Event<R> {
    Note(Note),
    Reply(R),
}

/// A call that was sent and not yet answered. Dropping it before its reply leaves the connection of no further use.
pub struct InFlight<'a, R> {
    client: &'a mut Client,
    id: u64,
    method: &'a str,
    reply: PhantomData<R>,
}

/// Cuts a connection from another thread; the call in flight on it then fails, and the daemon sees a hang-up.
#[derive(Debug)]
pub struct Hangup(std::os::unix::net::UnixStream);

impl Hangup {
    pub fn hang_up(&self) {
        // Fails only when the peer has gone already.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// What every version of the daemon says of itself, whatever else it says.
#[derive(Deserialize)]
struct Hello {
    api: ApiVersion,
    #[serde(default)]
    version: String,
}

impl Client {
    /// Connects and compares versions. Errors: unreachable (`Failure::unreachable`), another major version
    /// (`version_mismatch`, counted as unreachable). A difference that works leaves a [`Client::warning`].
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut client = Self::connect_again(socket)?;
        let params = RawValue::from_string("{}".to_owned()).expect("an object");
        let answer = client.call_raw("fcd.info", &params, HELLO_DEADLINE)?;
        let hello: Hello = serde_json::from_str(answer.get()).map_err(|e| protocol("read the daemon's version", e))?;
        client.warning = compare(hello.api, &hello.version)?;
        Ok(client)
    }

    /// Without asking for the version: for a second connection to a daemon that was asked.
    pub fn connect_again(socket: &Path) -> Result<Self> {
        Ok(Self { connection: Connection::open(socket)?, socket: socket.to_owned(), warning: None })
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A difference of versions that the user should know of.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// A handle that cuts this connection from another thread.
    pub fn hangup(&self) -> Result<Hangup> {
        Ok(Hangup(self.connection.try_clone()?))
    }

    /// A call that is answered at once; `timeout` after [`CALL_DEADLINE`].
    pub fn call<C: Call>(&mut self, request: &C::Request) -> Result<C::Reply> {
        self.send(C::METHOD, &raw(request)?, false, &[])?;
        self.connection.set_deadline(Some(CALL_DEADLINE))?;
        self.flight::<C::Reply>(C::METHOD).finish(&mut |_| Ok(()))
    }

    /// All items of a list, page by page.
    pub fn list<C: ListCall>(&mut self, mut request: C::Request) -> Result<Vec<C::Item>> {
        let mut all = Vec::new();
        loop {
            let (items, next) = C::into_page(self.call::<C>(&request)?);
            let is_empty = items.is_empty();
            all.extend(items);
            match next {
                None => return Ok(all),
                Some(_) if is_empty => {
                    return Err(
                        Error::internal(format!("{}: the daemon sent an empty page that is not the last", C::METHOD)).into()
                    );
                }
                Some(next) => C::start_after(&mut request, next),
            }
        }
    }

    /// The same for a call whose answer brings a descriptor.
    pub fn call_for_fd<C: Call>(&mut self, request: &C::Request) -> Result<(C::Reply, OwnedFd)> {
        let reply = self.call::<C>(request)?;
        let missing = || Error::new(Kind::VersionMismatch, format!("{}: no descriptor came with the answer", C::METHOD));
        let fd = self.connection.take_received().ok_or_else(missing)?;
        Ok((reply, fd))
    }

    /// A call that takes as long as it takes. Notes go to `on_note`, whose error ends the call and the connection.
    pub fn call_more<C: Call>(
        &mut self,
        request: &C::Request,
        fds: &[BorrowedFd<'_>],
        on_note: &mut dyn FnMut(Note) -> Result<()>,
    ) -> Result<C::Reply> {
        self.begin::<C>(request, fds)?.finish(on_note)
    }

    /// Sends a `more` call; [`InFlight::next_event`] reads what comes.
    pub fn begin<C: Call>(&mut self, request: &C::Request, fds: &[BorrowedFd<'_>]) -> Result<InFlight<'_, C::Reply>> {
        self.send(C::METHOD, &raw(request)?, true, fds)?;
        self.connection.set_deadline(None)?;
        Ok(self.flight(C::METHOD))
    }

    /// Any method with any parameters, answered at once.
    pub fn call_raw(&mut self, method: &str, params: &RawValue, deadline: Duration) -> Result<Box<RawValue>> {
        self.send(method, params, false, &[])?;
        self.connection.set_deadline(Some(deadline))?;
        self.raw_flight(method).finish(&mut |_| Ok(()))
    }

    /// As [`Client::call_raw`], with `more`.
    pub fn call_raw_more(
        &mut self,
        method: &str,
        params: &RawValue,
        on_note: &mut dyn FnMut(Note) -> Result<()>,
    ) -> Result<Box<RawValue>> {
        self.send(method, params, true, &[])?;
        self.connection.set_deadline(None)?;
        self.raw_flight(method).finish(on_note)
    }

    fn flight<R>(&mut self, method: &'static str) -> InFlight<'_, R> {
        InFlight { id: self.connection.last_id(), client: self, method, reply: PhantomData }
    }

    fn raw_flight<'a>(&'a mut self, method: &'a str) -> InFlight<'a, Box<RawValue>> {
        InFlight { id: self.connection.last_id(), client: self, method, reply: PhantomData }
    }

    fn send(&mut self, method: &str, params: &RawValue, more: bool, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.connection.send(method, params, more, fds)
    }
}

impl<R: serde::de::DeserializeOwned> InFlight<'_, R> {
    /// The next note or the reply. Errors: the daemon's fault; unreachable when the connection broke; `timeout`.
    pub fn next_event(&mut self) -> Result<Event<R>> {
        loop {
            let line = self.client.connection.read_line(self.method)?;
            match Line::<R>::parse(&line) {
                Ok(None) => {}
                Ok(Some(Line::Note(note))) => return Ok(Event::Note(note)),
                Ok(Some(Line::Response(response))) => return self.accept(response).map(Event::Reply),
                Err(e) => return Err(self.unreadable(&line, e)),
            }
        }
    }

    /// Why a line is not an answer to this call: it answers another one, or it has another form.
    fn unreadable(&mut self, line: &[u8], e: serde_json::Error) -> Failure {
        if let Ok(Some(Line::Response(response))) = Line::<IgnoredAny>::parse(line)
            && let Err(other) = self.check_id(&response)
        {
            return other;
        }
        protocol(&format!("read the answer to {}", self.method), e)
    }

    /// Reads to the reply.
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
        // An error without an id is about the connection: the line was not understood, or there are too many.
        let ours = response.id.get() == self.id.to_string() || (response.error.is_some() && response.id.get() == "null");
        if ours {
            return Ok(());
        }
        self.client.connection.hang_up();
        let id = response.id.get().chars().take(40).collect::<String>();
        Err(Error::internal(format!("{}: the daemon answered another call ({id})", self.method)).into())
    }

    fn accept(&mut self, response: Response<R>) -> Result<R> {
        self.check_id(&response)?;
        if let Some(error) = response.error {
            return Err(Failure::from_rpc(error));
        }
        response.result.ok_or_else(|| Error::internal(format!("{}: an answer without a result", self.method)).into())
    }
}

fn raw(request: &impl serde::Serialize) -> Result<Box<RawValue>> {
    serde_json::value::to_raw_value(request).map_err(|e| Error::internal("write a request").with_source(e).into())
}

fn protocol(doing: &str, e: serde_json::Error) -> Failure {
    Error::new(Kind::VersionMismatch, doing.to_owned())
        .with_source(e)
        .hint("fcctl and fcd may be of different versions: compare with fcctl version")
        .into()
}

/// Refuses another major; describes any other difference.
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
        .hint("install fcd and fcctl of one version, then restart fcd");
        return Err(Failure { unreachable: true, ..e.into() });
    }
    if theirs.minor != VERSION_MINOR || package != ours {
        return Ok(Some(format!(
            "fcd is {package} (protocol {}.{}), fcctl is {ours} (protocol {VERSION_MAJOR}.{VERSION_MINOR})",
            theirs.major, theirs.minor
        )));
    }
    Ok(None)
}
