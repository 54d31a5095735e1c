//! Implements one connection to the daemon. It sends requests with descriptors and reads lines of
//! bounded length, with deadlines for both.

use super::failure::{self, Failure, Result};
use crate::api::frame::{Request, Version};
use crate::api::limits::{FDS_MAX, FRAME_BYTES_MAX};
use crate::error::{Error, Kind};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde_json::value::RawValue;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The deadline of the connect, which blocks on a full backlog, and of each write.
const SEND_DEADLINE: Duration = Duration::from_secs(10);
/// Size of one read. With this size, a page of a list takes only a few reads, and the daemon rarely
/// waits for the client to read.
const READ_BYTES: usize = 128 * 1024;

pub(super) struct Connection {
    stream: UnixStream,
    /// Bytes that were read. The first `returned` bytes are the line that was returned last.
    buffer: Vec<u8>,
    returned: usize,
    /// A descriptor that was received but not yet taken.
    received: Option<OwnedFd>,
    last_id: u64,
    deadline: Option<Duration>,
}

impl Connection {
    pub(super) fn open(socket: &Path) -> Result<Self> {
        let stream = connect(socket).map_err(|e| unreachable_at(socket, &e))?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
            returned: 0,
            received: None,
            last_id: 0,
            deadline: None,
        })
    }

    pub(super) fn try_clone(&self) -> Result<UnixStream> {
        Ok(self
            .stream
            .try_clone()
            .map_err(|e| Error::io("duplicate a connection", e))?)
    }

    pub(super) fn last_id(&self) -> u64 {
        self.last_id
    }

    /// Takes the descriptor that arrived with a line, if there is one.
    pub(super) fn take_received(&mut self) -> Option<OwnedFd> {
        self.received.take()
    }

    /// Sets how long each read may take.
    pub(super) fn set_deadline(&mut self, deadline: Option<Duration>) -> Result<()> {
        if self.deadline != deadline {
            self.stream
                .set_read_timeout(deadline)
                .map_err(|e| Error::io("set a deadline", e))?;
            self.deadline = deadline;
        }
        Ok(())
    }

    pub(super) fn hang_up(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Sends one request. The descriptors accompany its first byte. Succeeds even if the daemon has
    /// already closed the connection, because the next read returns the daemon's last error or
    /// reports the lost connection.
    pub(super) fn send(
        &mut self,
        method: &str,
        params: &RawValue,
        more: bool,
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        self.last_id += 1;
        let id = RawValue::from_string(self.last_id.to_string()).expect("a number");
        let request = Request {
            jsonrpc: Version::V2,
            id: &id,
            method: method.into(),
            params: Some(params),
            more,
            key: None,
        };
        let mut line = serde_json::to_vec(&request)
            .map_err(|e| Error::internal(format!("write {method}")).with_source(e))?;
        line.push(b'\n');
        if line.len() > FRAME_BYTES_MAX {
            let e = Error::new(
                Kind::FrameTooLarge,
                format!(
                    "{method}: the request has {} bytes, more than the limit of {FRAME_BYTES_MAX}",
                    line.len()
                ),
            );
            return Err(e
                .hint("pass less on the command line and the rest through stdin (-i)")
                .into());
        }
        match write_with_fds(&self.stream, &line, fds) {
            // The daemon may have sent an error before it closed the connection. The next read
            // returns that error.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(Error::new(
                Kind::Timeout,
                format!(
                    "{method}: the daemon did not accept the request in {} s",
                    SEND_DEADLINE.as_secs()
                ),
            )
            .into()),
            Err(e) => Err(Error::io(format!("send {method}"), e).into()),
            Ok(()) => Ok(()),
        }
    }

    /// Reads the next line and returns it without the newline. Closes the connection if the
    /// deadline passes or the line is too long.
    pub(super) fn read_line(&mut self, method: &str) -> Result<&[u8]> {
        self.buffer.drain(..std::mem::take(&mut self.returned));
        let mut searched = 0;
        loop {
            let end = end_of_line(&self.buffer[searched..]).map(|len| searched + len);
            if end.unwrap_or(self.buffer.len() + 1) > FRAME_BYTES_MAX {
                self.hang_up();
                return Err(Error::internal(format!(
                    "{method}: the daemon sent a line of more than {FRAME_BYTES_MAX} bytes"
                ))
                .into());
            }
            if let Some(end) = end {
                self.returned = end;
                return Ok(&self.buffer[..end - 1]);
            }
            searched = self.buffer.len();
            self.buffer.resize(searched + READ_BYTES, 0);
            let got = read_some(
                &self.stream,
                &mut self.received,
                &mut self.buffer[searched..],
            );
            self.buffer.truncate(searched + *got.as_ref().unwrap_or(&0));
            match got {
                Ok(0) => return Err(lost(method)),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(lost(method)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.hang_up();
                    let waited = self.deadline.unwrap_or_default().as_secs();
                    let e = Error::new(
                        Kind::Timeout,
                        format!("{method}: the daemon did not respond within {waited} s"),
                    );
                    return Err(e.hint("see what it is doing: fcctl debug locks").into());
                }
                Err(e) => {
                    return Err(Error::io(format!("{method}: read from the daemon"), e).into());
                }
            }
        }
    }
}

/// Waits for bytes and reads what has arrived. If descriptors arrive with the bytes, keeps the last
/// one; the daemon never sends more than one at a time.
fn read_some(
    stream: &UnixStream,
    received: &mut Option<OwnedFd>,
    piece: &mut [u8],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut pieces = [IoSliceMut::new(piece)];
    let got = rustix::net::recvmsg(stream, &mut pieces, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            *received = fds.last().or(received.take());
        }
    }
    Ok(got.bytes)
}

/// Returns the length of the first line, with its newline, or `None` without a newline.
fn end_of_line(bytes: &[u8]) -> Option<usize> {
    // `contains` compares whole words for a single byte. That is faster than `position`, which
    // compares byte by byte.
    if !bytes.contains(&b'\n') {
        return None;
    }
    bytes.iter().position(|b| *b == b'\n').map(|at| at + 1)
}

fn lost(method: &str) -> Failure {
    let message = format!("{method}: the daemon closed the connection without an answer");
    Failure::unreachable(failure::LOST, message, "see whether fcd runs: fcctl doctor")
}

/// Connects to the daemon's socket. If the backlog is full, waits at most [`SEND_DEADLINE`]
/// (`SO_SNDTIMEO`, unix(7)), whereas `UnixStream::connect` has no limit.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(socket)?;
    let fd = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_socket_timeout(&fd, Timeout::Send, Some(SEND_DEADLINE))?;
    rustix::io::retry_on_intr(|| rustix::net::connect(&fd, &address))?;
    Ok(UnixStream::from(fd))
}

fn unreachable_at(socket: &Path, e: &io::Error) -> Failure {
    let at = socket.display();
    match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Failure::unreachable(
            failure::ABSENT,
            format!("no daemon at {at}: the socket does not exist"),
            "start the daemon (fcd), or name its socket (--socket S or FCD_SOCKET)",
        ),
        io::ErrorKind::ConnectionRefused => Failure::unreachable(
            failure::ABSENT,
            format!("no daemon at {at}: connection refused"),
            "start the daemon again: fcd",
        ),
        io::ErrorKind::PermissionDenied => Failure::unreachable(
            failure::DENIED,
            format!("connect to {at}: permission denied"),
            format!("join the group that ls -l {at} shows, or run your own daemon: fcd"),
        ),
        io::ErrorKind::WouldBlock => Failure::unreachable(
            failure::LOST,
            format!(
                "the daemon at {at} did not accept the connection in {} s",
                SEND_DEADLINE.as_secs()
            ),
            "run fcctl doctor, or restart the daemon if it hangs",
        ),
        _ => Failure::unreachable(
            failure::LOST,
            format!("connect to {at}: {e}"),
            "run fcctl doctor",
        ),
    }
}

pub(super) fn write_with_fds(
    mut stream: &UnixStream,
    line: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut sent = 0;
    if !fds.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("more than {FDS_MAX} descriptors"),
            ));
        }
        let pieces = [IoSlice::new(line)];
        sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(stream, &pieces, &mut ancillary, SendFlags::NOSIGNAL)
        })?;
    }
    stream.write_all(&line[sent..])
}
