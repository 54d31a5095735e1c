//! Relays a command's bytes between the caller's streams and the pipes that the daemon received.

use super::pipes::{self, End, Stoppable};
use crate::api::exec::Stream;
use crate::client::Result;
use crate::error::Error;
use crate::host::thread;
use crate::host::wait::poll_until;
use crate::locks::{Cancel, CancelCause};
use nix::poll::{PollFd, PollFlags};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PIECE_BYTES: usize = 64 * 1024;
/// How long the command's pipes may stay open without data after the command has ended. After that,
/// the remaining output is dropped.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// The outcome of relaying one output stream.
#[derive(Debug)]
pub(super) enum Drained {
    /// All output was written.
    Whole,
    /// The caller's reader has exited. This is not an error.
    ReaderGone,
    /// The caller's stream cannot be written.
    Failed(io::Error),
    /// The daemon kept its end open after the command had ended.
    Open,
}

/// The caller's streams that are relayed, in addition to stdout.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub stdin: bool,
    /// A pty has no separate stderr.
    pub stderr: bool,
}

/// The relay threads of one command. They are not joined on drop: they end when the daemon closes
/// its ends.
pub(super) struct Relay {
    outputs: Vec<JoinHandle<Drained>>,
    stdin_stop: Cancel,
    /// Fires when the command has ended.
    ended: Cancel,
    fds: Vec<OwnedFd>,
    streams: Vec<Stream>,
}

impl Relay {
    /// Starts the threads. `lost` is called when stdout can no longer be written.
    pub(super) fn start(
        stdio: &super::context::Stdio,
        wanted: Wanted,
        lost: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self> {
        let cancel = || Cancel::try_new().map_err(|e| Error::io("make a cancel token", e));
        let (stdin_stop, ended) = (cancel()?, cancel()?);
        let mut relay = Self {
            outputs: Vec::new(),
            stdin_stop,
            ended,
            fds: Vec::new(),
            streams: Vec::new(),
        };
        let dup = |file: &File| {
            file.try_clone()
                .map_err(|e| Error::io("duplicate a stream", e))
        };
        if wanted.stdin {
            let (to, theirs) = pipes::to_daemon(&relay.stdin_stop)?;
            let from = Stoppable::new(dup(&stdio.stdin)?, &relay.stdin_stop);
            thread::spawn("stdin", move || pump_input(from, to))?;
            relay.lend(Stream::Stdin, theirs);
        }
        relay.output("stdout", Stream::Stdout, dup(&stdio.stdout)?, lost)?;
        if wanted.stderr {
            relay.output("stderr", Stream::Stderr, dup(&stdio.stderr)?, || ())?;
        }
        Ok(relay)
    }

    /// Sends the command through its own pipe instead of in the request.
    pub(super) fn command(&mut self, bytes: &[u8]) -> Result<()> {
        let (mut to, theirs) = pipes::to_daemon(&self.stdin_stop)?;
        let bytes = bytes.to_vec();
        // If the daemon stops reading, its reply says why.
        thread::spawn("command", move || drop(to.write_all(&bytes)))?;
        self.lend(Stream::Command, theirs);
        Ok(())
    }

    fn lend(&mut self, stream: Stream, fd: OwnedFd) {
        self.fds.push(fd);
        self.streams.push(stream);
    }

    fn output(
        &mut self,
        name: &str,
        stream: Stream,
        to: File,
        lost: impl Fn() + Send + 'static,
    ) -> Result<()> {
        let (reader, writer) = io::pipe().map_err(|e| Error::io("make a pipe", e))?;
        let ended = self.ended.clone();
        self.outputs.push(thread::spawn(name, move || {
            let drained = pump_output(reader, to, &ended);
            if !matches!(drained, Drained::Whole | Drained::Open) {
                lost();
            }
            drained
        })?);
        self.lend(stream, writer.into());
        Ok(())
    }

    /// Returns the names of the descriptors in [`Self::fds`], in the same order.
    pub(super) fn streams(&self) -> &[Stream] {
        &self.streams
    }
    pub(super) fn fds(&self) -> Vec<std::os::fd::BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd).collect()
    }

    /// Closes our copies of the daemon's ends once the daemon has them. Each pipe then ends when
    /// the daemon closes its end.
    pub(super) fn close_lent(&mut self) {
        self.fds.clear();
    }

    /// Writes the remaining output, and returns how stdout and stderr ended. Call this when the
    /// command has ended.
    pub(super) fn finish(mut self) -> Vec<Drained> {
        self.close_lent();
        self.stdin_stop.cancel(CancelCause::CommandEnded);
        self.ended.cancel(CancelCause::CommandEnded);
        let joined = std::mem::take(&mut self.outputs).into_iter();
        joined
            .map(|t| {
                t.join().unwrap_or_else(|_| {
                    Drained::Failed(io::Error::other("a relay thread panicked"))
                })
            })
            .collect()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stdin_stop.cancel(CancelCause::CommandEnded);
        self.ended.cancel(CancelCause::CommandEnded);
    }
}

/// Forwards input until either side ends. Dropping `to` signals the end of input to the command.
fn pump_input(mut from: Stoppable, mut to: End) {
    let mut piece = vec![0; PIECE_BYTES];
    while let Ok(n @ 1..) = from.read(&mut piece) {
        if to.write_all(&piece[..n]).is_err() {
            return;
        }
    }
}

fn pump_output(mut from: io::PipeReader, mut to: File, ended: &Cancel) -> Drained {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match wait_for_output(&from, ended) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::TimedOut => return Drained::Open,
            Err(e) => return Drained::Failed(e),
        }
        match from.read(&mut piece) {
            Ok(0) => return Drained::Whole,
            Ok(n) => match write_patiently(&mut to, &piece[..n]) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Drained::ReaderGone,
                Err(e) => return Drained::Failed(e),
            },
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Drained::Failed(e),
        }
    }
}

/// Waits without a limit while the command runs, and up to [`DRAIN_DEADLINE`] after it has ended.
fn wait_for_output(from: &io::PipeReader, ended: &Cancel) -> io::Result<()> {
    match pipes::wait(from.as_fd(), PollFlags::POLLIN, ended, None) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
        other => return other,
    }
    let deadline = Instant::now() + DRAIN_DEADLINE;
    match poll_until(
        &mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)],
        Some(deadline),
    )? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// Writes all bytes, even if another process has made the caller's stream non-blocking.
pub(super) fn write_patiently(to: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                poll_until(&mut [PollFd::new(to.as_fd(), PollFlags::POLLOUT)], None)?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_to_non_blocking_stdout_is_complete() {
        let (mut reader, writer) = io::pipe().unwrap();
        crate::host::wait::set_nonblocking(&writer).unwrap();
        let sent: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
        let expected = sent.clone();
        let writing = thread::spawn("writer", move || {
            let mut to = File::from(OwnedFd::from(writer));
            write_patiently(&mut to, &sent)
        })
        .unwrap();
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        writing.join().unwrap().unwrap();
        assert_eq!(got, expected);
    }
}
