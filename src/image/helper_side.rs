//! The helper's side of the processes that read images, as far as pulls and exports share it. A
//! helper confines itself, does its work, and reports how the work has ended.

use crate::error::{Error, Kind, Result};
use crate::host::confine::{Asked, Channel, Profile};
use crate::host::wait::poll_until;
use nix::poll::{PollFd, PollFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

/// The channel to the daemon, with JSON messages, one per packet. The helper waits on it without a
/// deadline, because the helper is killed when the daemon's thread ends.
pub(super) struct Daemon(Channel);

/// Runs this process as a helper. `last_message` reports how `serve` has ended.
pub(super) fn run<M: Serialize>(
    asked: &Asked,
    profile: &Profile,
    serve: impl FnOnce(&Daemon) -> Result<()>,
    last_message: impl FnOnce(&Result<()>) -> M,
) -> ExitCode {
    let daemon = Daemon(Channel::inherited());
    let ended = asked
        .confine(profile)
        .map_err(|e| Error::new(Kind::Host, format!("confine the image helper: {e}")))
        .and_then(|()| serve(&daemon));
    match daemon.send(&last_message(&ended)) {
        Ok(()) if ended.is_ok() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

impl Daemon {
    pub(super) fn send(&self, message: &impl Serialize) -> io::Result<()> {
        let message = serde_json::to_vec(message)?;
        loop {
            match self.0.send(&message, &[]) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::POLLOUT)?,
                sent => return sent,
            }
        }
    }

    /// Receives one message of at most `bytes_max` bytes, with its descriptors.
    pub(super) fn receive<M: DeserializeOwned>(
        &self,
        bytes_max: usize,
    ) -> io::Result<(M, Vec<OwnedFd>)> {
        let mut buffer = vec![0; bytes_max];
        loop {
            match self.0.receive_with_fds(&mut buffer) {
                Ok(received) => {
                    let message = serde_json::from_slice(&buffer[..received.len])?;
                    return Ok((message, received.fds));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::POLLIN)?,
                Err(e) => return Err(e),
            }
        }
    }

    fn wait(&self, events: PollFlags) -> io::Result<()> {
        poll_until(&mut [PollFd::new(self.0.fd(), events)], None).map(drop)
    }
}
