//! The thread of one connection. It reads a line, calls the handler, and writes the answer.

use super::line::{Descriptors, Incoming, LineReader};
use super::peer::Peer;
use super::registry::ConnectionSlot;
use super::request::{CallError, CallResult, IncomingCall, error_line, parse, response_line};
use super::{FDS_MAX, FRAME_BYTES_MAX, Handler, Limits};
use crate::api::frame::{Note, Notification, Request};
use crate::error::{Error, Kind};
use crate::host::text::quoted;
use crate::locks::check;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// The part of a connection that a handler may use during its call. It stays on the connection's
/// thread.
pub struct Connection<'a> {
    socket: &'a Arc<UnixStream>,
    peer: Peer,
    /// True if a write has failed, because the caller has gone.
    broken: Cell<bool>,
    /// A descriptor to send with the answer.
    passed: Cell<Option<OwnedFd>>,
}

impl Connection<'_> {
    /// Returns a descriptor for `poll` without requested events. POLLHUP or POLLERR means that the
    /// caller has disconnected. A caller that has only shut down its sending side is still
    /// connected.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns the socket for a thread that sends notes. It must not be kept longer than the call.
    pub(super) fn socket(&self) -> Arc<UnixStream> {
        self.socket.clone()
    }

    /// Sends this descriptor with the first byte of the answer, unless the call fails.
    pub fn pass(&self, fd: OwnedFd) {
        self.passed.set(Some(fd));
    }

    /// Sends a note before the answer. Blocks for up to [`super::Limits::write_stall`] while the
    /// caller does not read.
    ///
    /// # Errors
    /// `InvalidData` if the note is too long. Every other error means that the caller has
    /// disconnected or does not read. Both count as a hang-up.
    pub fn notify(&self, note: Note) -> io::Result<()> {
        let line = Notification::line(note)?;
        if line.len() > FRAME_BYTES_MAX {
            let text = format!("a note of {} bytes does not fit into a line", line.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        self.send(&line, None)
    }

    /// Sends bytes, and the descriptor, if there is one, with the first of them.
    pub(super) fn send(&self, mut bytes: &[u8], mut fd: Option<OwnedFd>) -> io::Result<()> {
        if self.broken.get() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        while !bytes.is_empty() {
            match send_some(self.socket, bytes, fd.as_ref()) {
                Ok(n) => {
                    bytes = &bytes[n..];
                    fd = None;
                }
                Err(rustix::io::Errno::INTR) => {}
                // EAGAIN means that the write timeout has passed.
                Err(e) => {
                    self.broken.set(true);
                    return Err(e.into());
                }
            }
        }
        Ok(())
    }
}

fn send_some(socket: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> rustix::io::Result<usize> {
    let Some(fd) = fd else {
        return rustix::net::send(socket, bytes, SendFlags::NOSIGNAL);
    };
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
}

/// Runs a connection's thread. `slot` is the first parameter and therefore dropped last.
pub(super) fn serve(
    slot: ConnectionSlot,
    socket: Arc<UnixStream>,
    peer: Peer,
    handler: &dyn Handler,
) {
    let limits = slot.limits().clone();
    // Accepted sockets do not inherit O_NONBLOCK on Linux (accept(2)).
    if let Err(e) = socket.set_write_timeout(Some(limits.write_stall)) {
        log::warn!("server: connection of uid {}: {e}", peer.uid);
        return;
    }
    let connection = Connection {
        socket: &socket,
        peer,
        broken: Cell::new(false),
        passed: Cell::new(None),
    };
    let mut reader = LineReader::new(&socket);
    loop {
        let last = match reader.next(&limits) {
            Incoming::Line(descriptors) => {
                let stopping = slot.is_stopping();
                let line = answer(reader.line(), descriptors, &connection, handler, stopping);
                check::assert_none_held("the end of a call");
                if connection.send(&line, connection.passed.take()).is_ok() && !stopping {
                    continue;
                }
                return;
            }
            Incoming::End | Incoming::Idle => return,
            Incoming::Broken(e) => {
                return log::debug!("server: connection of uid {}: {e}", peer.uid);
            }
            other => line_error(&other, &limits),
        };
        let _ = connection.send(&error_line(&last), None);
        return;
    }
}

/// Returns the error for a line that is too long, late or cut off.
fn line_error(incoming: &Incoming, limits: &Limits) -> CallError {
    let error = match incoming {
        Incoming::TooLong => Error::new(
            Kind::FrameTooLarge,
            format!("a request is longer than {FRAME_BYTES_MAX} bytes"),
        )
        .hint("pass bulk data through a pipe"),
        Incoming::Late => Error::new(
            Kind::InvalidRequest,
            format!("a request did not end within {:?}", limits.line),
        ),
        _ => Error::new(
            Kind::InvalidRequest,
            "the connection ended within a request",
        )
        .hint("end each request with a newline"),
    };
    CallError::from(error)
}

fn answer(
    line: &[u8],
    descriptors: Descriptors,
    connection: &Connection<'_>,
    handler: &dyn Handler,
    stopping: bool,
) -> Vec<u8> {
    let request = match parse(line) {
        Ok(request) => request,
        Err(refused) => return response_line(refused.id.as_deref(), Err(refused.error)),
    };
    let result = if descriptors.wrong {
        let text = format!(
            "a request may have at most {FDS_MAX} descriptors, and only with its first byte"
        );
        Err(Error::new(Kind::InvalidRequest, text).into())
    } else if stopping {
        Err(
            Error::new(Kind::ShuttingDown, "the daemon is shutting down")
                .hint("try again when it has restarted")
                .into(),
        )
    } else {
        call(&request, descriptors, connection, handler)
    };
    response_line(Some(request.id), result)
}

fn call(
    request: &Request<'_>,
    descriptors: Descriptors,
    connection: &Connection<'_>,
    handler: &dyn Handler,
) -> CallResult {
    let incoming = IncomingCall {
        method: &request.method,
        params: request.params.map_or("{}", |p| p.get()),
        more: request.more,
        key: request.key.as_deref(),
        fds: descriptors.fds,
        peer: connection.peer,
    };
    let result = catch_unwind(AssertUnwindSafe(|| handler.call(incoming, connection)))
        .unwrap_or_else(|_| {
            let text = format!("call {} panicked", quoted(&request.method));
            log::error!("server: {text}");
            Err(Error::internal(text)
                .hint("report this bug with the daemon's log")
                .into())
        });
    if let Err(e) = &result {
        connection.passed.take();
        log::debug!(
            "server: uid {}: {}: {}",
            connection.peer.uid,
            quoted(&request.method),
            quoted(&e.fault.message)
        );
    }
    result
}
