//! A caller of the daemon. All its waits are those of a task.

use fcd::testing::api::call::Call;
use fcd::testing::api::fault::Fault;
use fcd::testing::api::frame::{Note, Notification, Request, Response, Version};
use fcd::testing::error::Kind;
use fcd::testing::sched::{Instant, poll_until};
use nix::poll::{PollFd, PollFlags};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::value::{RawValue, to_raw_value};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long an answer may take in virtual time. The longest waits of a history are those for a slow
/// effect, a boot that times out and a stop.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Why a call has no reply.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    Fault(Fault),
    /// The daemon was killed.
    Lost,
    /// There was no answer within [`PATIENCE`].
    Late,
}

impl Failure {
    pub fn is(&self, kind: Kind) -> bool {
        matches!(self, Failure::Fault(fault) if fault.kind == kind.name())
    }
}

pub struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    pub fn send<C: Call>(
        &mut self,
        request: &C::Request,
        more: bool,
        key: Option<&str>,
        fds: &[OwnedFd],
    ) -> Result<(), Failure> {
        let (id, params) = (to_raw_value(&1).unwrap(), to_raw_value(request).unwrap());
        let request = Request {
            jsonrpc: Version::V2,
            id: &id,
            method: C::METHOD.into(),
            params: Some(&params),
            more,
            key: key.map(Into::into),
        };
        let mut line = serde_json::to_vec(&request).unwrap();
        line.push(b'\n');
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let pieces = [IoSlice::new(&line)];
        rustix::net::sendmsg(&self.stream, &pieces, &mut ancillary, SendFlags::NOSIGNAL)
            .map(drop)
            .map_err(|_| Failure::Lost)
    }

    /// Returns the next line, or `None` at the deadline.
    fn line(&mut self, deadline: Instant) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            if poll_until(&mut fds, Some(deadline)).unwrap() == 0 {
                return Ok(None);
            }
            let mut piece = [0; 16 * 1024];
            match rustix::net::recv(&self.stream, &mut piece, RecvFlags::DONTWAIT) {
                Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET) => return Err(Failure::Lost),
                Ok((_, n)) => self.buffer.extend_from_slice(&piece[..n]),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(e) => panic!("read from the daemon: {e}"),
            }
        }
    }

    /// Reads until the reply or the deadline. `on_note` gets the notes before it.
    pub fn reply_until<C: Call>(
        &mut self,
        deadline: Instant,
        on_note: &mut dyn FnMut(Note),
    ) -> Result<Option<C::Reply>, Failure> {
        loop {
            let Some(line) = self.line(deadline)? else {
                return Ok(None);
            };
            if let Ok(note) = serde_json::from_slice::<Notification>(&line) {
                on_note(note.note);
                continue;
            }
            let response: Response<Box<RawValue>> = serde_json::from_slice(&line).unwrap();
            return match (response.result, response.error) {
                (Some(reply), _) => Ok(Some(serde_json::from_str(reply.get()).unwrap())),
                (None, Some(error)) => Err(Failure::Fault(error.data.expect("a fault"))),
                (None, None) => panic!("a response without a result"),
            };
        }
    }

    pub fn reply<C: Call>(&mut self, on_note: &mut dyn FnMut(Note)) -> Result<C::Reply, Failure> {
        let deadline = Instant::now() + PATIENCE;
        self.reply_until::<C>(deadline, on_note)?
            .ok_or(Failure::Late)
    }

    pub fn call<C: Call>(&mut self, request: &C::Request) -> Result<C::Reply, Failure> {
        self.send::<C>(request, false, None, &[])?;
        self.reply::<C>(&mut |_| {})
    }

    pub fn hang_up(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    pub fn stream(&self) -> UnixStream {
        self.stream.try_clone().unwrap()
    }
}
