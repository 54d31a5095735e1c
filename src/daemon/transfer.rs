//! The work of an import or an export on a pool worker: scripts and streams, with no lock of the
//! daemon's held.

use super::notes::Notes;
use super::rate_floor::Moved;
use crate::api::exec::Exit;
use crate::api::frame::Note;
use crate::api::workspace::{ExportKind, PrepareRequest, Ready, Trailer};
use crate::error::{Error, Kind, Result};
use crate::guest::io::{ChunkSink, ChunkSource, FdSink, FdSource, VecSink};
use crate::guest::{ExecSpec, Script, Sink, Source, Streams, Target, Transport, run_script};
use crate::locks::Cancel;
use crate::ops::Reporter;
use crate::store::VmRow;
use crate::workspace::{encode, remote};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The guest-side scripts before and after a stream: they hash trees, on slow guests.
const SCRIPT_DEADLINE: Duration = Duration::from_secs(1800);
/// What is kept of a guest's complaints.
const COMPLAINT_BYTES_MAX: usize = 16 * 1024;
const TRAILER_DEADLINE: Duration = Duration::from_secs(30);

/// A transfer on its way.
pub(super) struct Transfer {
    pub transport: Arc<dyn Transport>,
    pub row: VmRow,
    pub target: Target,
    pub reporter: Reporter,
    pub fifo: OwnedFd,
    /// Of the payload, so far.
    pub moved: Moved,
    pub place: remote::GuestWorkspace,
    pub idle: Duration,
}

/// A verified import.
pub(super) struct Imported {
    pub trailer: Trailer,
    /// Changed in the guest and kept.
    pub kept: Vec<Vec<u8>>,
}

impl Transfer {
    /// Begin, receive, verify, finish.
    pub fn import(self, cancel: &Cancel, request: &PrepareRequest, notes: &Notes) -> Result<Imported> {
        self.reporter.progress("look at the guest's tree");
        let changed = remote::parse_begin(&self.script(&remote::begin_command(&self.place), "begin the import", cancel)?)?;
        let keep = if request.overwrite { Vec::new() } else { encode::encode_all(&changed)? };
        notes.send(Note::Ready(Ready { keep }));
        let (fifo, bytes) = (&self.fifo, &self.moved.bytes);
        let fifo = fifo.try_clone().map_err(|e| Error::io("take the stream", e))?;
        let mut source = Counted {
            inner: ChunkSource::new(FdSource::new(fifo), bytes.clone()),
            reporter: &self.reporter,
            bytes,
            expected: request.bytes_expected,
        };
        self.reporter.progress("copy the tree in");
        let trailer = self.receive(&mut source, request.overwrite, cancel)?;
        self.moved.is_over.store(true, Ordering::Relaxed);
        self.reporter.progress("record what was sent");
        let finish = remote::Finish { overwrite: request.overwrite, readonly: request.readonly, subdir: &request.subdir };
        let said = self.script(&remote::finish_command(&self.place, &finish), "finish the import", cancel)?;
        Ok(Imported { trailer, kept: remote::parse_finish(&said)?.kept })
    }

    /// Pumps the payload into the guest. It counts only with a trailer that fits.
    fn receive(&self, source: &mut Counted<'_>, overwrite: bool, cancel: &Cancel) -> Result<Trailer> {
        let spec =
            ExecSpec { command: remote::receive_command(&self.place, overwrite), idle: Some(self.idle), ..ExecSpec::default() };
        let mut complaint = VecSink::new(COMPLAINT_BYTES_MAX);
        let streams = Streams { stdin: Some(source), stderr: Some(&mut complaint), ..Streams::default() };
        let ended = self.transport.exec(&self.target, &spec, streams, cancel);
        let exit = ended.map_err(|e| self.so_far(e))?;
        let trailer = source.inner.finished().cloned();
        match (exit, trailer) {
            (Exit::Status(0), Some(trailer)) => Ok(trailer),
            (Exit::Status(0), None) => Err(self.so_far(
                Error::new(Kind::StreamIncomplete, "the stream ended before its end was announced")
                    .hint("bring the tree in again"),
            )),
            (exit, _) => Err(self.so_far(remote::failure("receive the tree", &exit, &complaint.bytes))),
        }
    }

    /// The patch or the tree, as the guest sends it: nothing on this side looks into it.
    pub fn export(self, cancel: &Cancel, kind: ExportKind) -> Result<Trailer> {
        self.reporter.progress("compare the guest's tree");
        let command = match kind {
            ExportKind::Patch => remote::export_patch_command(&self.place),
            ExportKind::Tree => remote::export_tree_command(&self.place),
        };
        let fifo = self.fifo.try_clone().map_err(|e| Error::io("take the stream", e))?;
        let mut sink = ChunkSink::new(FdSink::new(fifo), self.moved.bytes.clone());
        let mut said = VecSink::new(COMPLAINT_BYTES_MAX);
        // The guest says nothing while it compares, however long that takes.
        let spec = ExecSpec { command, deadline: Some(Instant::now() + SCRIPT_DEADLINE), ..ExecSpec::default() };
        let mut counting = Progressing { inner: &mut sink, reporter: &self.reporter, bytes: &self.moved.bytes };
        let streams = Streams { stdout: Some(&mut counting), stderr: Some(&mut said), ..Streams::default() };
        let exit = self.transport.exec(&self.target, &spec, streams, cancel).map_err(|e| self.so_far(e))?;
        if exit != Exit::Status(0) {
            return Err(self.so_far(remote::failure("compare the tree", &exit, &said.bytes)));
        }
        sink.finish(0, Instant::now() + TRAILER_DEADLINE, cancel)
    }

    fn script(&self, command: &str, doing: &str, cancel: &Cancel) -> Result<Vec<u8>> {
        let deadline = Instant::now() + SCRIPT_DEADLINE;
        let script = Script { command, stdin: &[], deadline, output_bytes_max: remote::ANSWER_BYTES_MAX };
        let (exit, stdout, stderr) =
            run_script(self.transport.as_ref(), &self.target, &script, cancel).map_err(|e| self.so_far(e))?;
        match exit {
            Exit::Status(0) => Ok(stdout),
            exit => Err(self.so_far(remote::failure(doing, &exit, &stderr))),
        }
    }

    /// How far it got belongs to every error.
    fn so_far(&self, e: Error) -> Error {
        e.context(format!("after {} bytes", self.moved.bytes.load(Ordering::Relaxed)))
    }
}

/// Tells the operation how many bytes have gone.
struct Counted<'a> {
    inner: ChunkSource<FdSource>,
    reporter: &'a Reporter,
    bytes: &'a AtomicU64,
    expected: Option<u64>,
}

impl Source for Counted<'_> {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.reporter.progress_bytes(self.bytes.load(Ordering::Relaxed), self.expected);
        Ok(n)
    }
}

/// The same for an export.
struct Progressing<'a> {
    inner: &'a mut ChunkSink<FdSink>,
    reporter: &'a Reporter,
    bytes: &'a AtomicU64,
}

impl Sink for Progressing<'_> {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.reporter.progress_bytes(self.bytes.load(Ordering::Relaxed), None);
        Ok(n)
    }
}
