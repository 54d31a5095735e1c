//! The accept loop: registers each connection and starts its thread, or refuses it.

use super::Handler;
use super::connection;
use super::peer::Peer;
use super::registry::Registry;
use super::request::{CallError, error_line};
use super::socket::Socket;
use crate::error::{Error, Kind, Result};
use crate::host::thread;
use crate::host::wait::{poll_until, sleep};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use rustix::net::SendFlags;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// How long to pause after a failed accept.
const BACK_OFF: Duration = Duration::from_millis(50);
/// The minimum interval between two log lines about refused connections. A refused caller can retry
/// quickly.
const WARN_EVERY: Duration = Duration::from_secs(10);

pub(super) struct Acceptor {
    socket: Socket,
    registry: Arc<Registry>,
    handler: Arc<dyn Handler>,
    stop: Cancel,
    /// A reserved descriptor. It is closed briefly if there are no descriptors left, so that a
    /// refused caller gets an error line.
    spare: Option<File>,
    warned_at: Option<Instant>,
}

impl Acceptor {
    pub(super) fn new(
        socket: Socket,
        registry: Arc<Registry>,
        handler: Arc<dyn Handler>,
        stop: Cancel,
    ) -> Result<Self> {
        let spare = Some(spare().map_err(|e| Error::io("keep a descriptor in reserve", e))?);
        Ok(Self {
            socket,
            registry,
            handler,
            stop,
            spare,
            warned_at: None,
        })
    }

    pub(super) fn run(mut self) {
        while !self.stop.is_cancelled() {
            let mut fds = [
                PollFd::new(self.stop.fd(), PollFlags::POLLIN),
                PollFd::new(self.socket.listener.as_fd(), PollFlags::POLLIN),
            ];
            if let Err(e) = poll_until(&mut fds, None) {
                log::error!("server: wait for connections: {e}");
                self.back_off();
            }
            self.accept_all();
        }
    }

    fn accept_all(&mut self) {
        while !self.stop.is_cancelled() {
            match self.socket.listener.accept() {
                Ok((stream, _)) => self.welcome(stream),
                Err(e) => match e.raw_os_error() {
                    Some(libc::EAGAIN) => return,
                    Some(libc::EINTR | libc::ECONNABORTED) => {}
                    Some(libc::EMFILE | libc::ENFILE) => {
                        self.turn_one_away();
                        return self.back_off();
                    }
                    _ => {
                        log::error!("server: accept: {e}");
                        return self.back_off();
                    }
                },
            }
        }
    }

    fn welcome(&mut self, stream: UnixStream) {
        if let Err((stream, error)) = self.begin(stream) {
            self.refuse(&stream, &error);
        }
    }

    fn begin(&self, stream: UnixStream) -> std::result::Result<(), (Arc<UnixStream>, Error)> {
        let stream = Arc::new(stream);
        let started = Peer::of(&stream)
            .and_then(|peer| start(&self.registry, &self.handler, &self.stop, &stream, peer));
        started.map_err(|e| (stream, e))
    }

    fn turn_one_away(&mut self) {
        self.spare = None;
        if let Ok((stream, _)) = self.socket.listener.accept() {
            let error = Error::new(
                Kind::ConnectionLimit,
                "the daemon has run out of file descriptors",
            )
            .hint("try again later");
            self.refuse(&stream, &error);
        }
        self.spare = spare().ok();
    }

    /// Sends one error line to a connection, which the caller then drops. The buffer of a new
    /// socket has room for the line.
    fn refuse(&mut self, stream: &UnixStream, error: &Error) {
        let line = error_line(&CallError::from(error));
        let _ = rustix::net::send(stream, &line, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        if self.warned_at.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            log::warn!("server: refusing connections: {error}");
            self.warned_at = Some(Instant::now());
        }
    }

    fn back_off(&mut self) {
        let _ = sleep(BACK_OFF, &self.stop);
        if self.spare.is_none() {
            self.spare = spare().ok();
        }
    }
}

/// Starts the thread of a connection.
pub(super) fn start(
    registry: &Arc<Registry>,
    handler: &Arc<dyn Handler>,
    stop: &Cancel,
    stream: &Arc<UnixStream>,
    peer: Peer,
) -> Result<()> {
    let slot = registry.enter(stream, peer.uid)?;
    let (handler, socket) = (handler.clone(), stream.clone());
    let (registry, stop) = (registry.clone(), stop.clone());
    thread::spawn("connection", move || {
        connection::serve(slot, socket, peer, &*handler);
        drop(handler);
        registry.give_back_after_peak(&stop);
    })
    .map(drop)
}

fn spare() -> std::io::Result<File> {
    crate::locks::may_block("file access");
    File::open("/dev/null")
}
