//! The work of an import or export on a pool worker: scripts and streams. The worker holds no lock
//! of the daemon.

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
use crate::sched::Instant;
use crate::store::VmRow;
use crate::workspace::{encode, remote};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The time limit for each script before or after the stream of an import, and for a whole export.
/// The scripts hash whole trees, which is slow in some guests.
const SCRIPT_DEADLINE: Duration = Duration::from_secs(1800);
/// How much of a guest's error output is kept.
const STDERR_BYTES_MAX: usize = 16 * 1024;
const TRAILER_DEADLINE: Duration = Duration::from_secs(30);

/// A transfer in progress.
pub(super) struct Transfer {
    pub transport: Arc<dyn Transport>,
    pub row: VmRow,
    pub target: Target,
    pub reporter: Reporter,
    pub fifo: OwnedFd,
    /// The number of payload bytes so far.
    pub moved: Moved,
    pub workspace: remote::GuestWorkspace,
    pub idle: Duration,
}

/// A verified import.
pub(super) struct Imported {
    pub trailer: Trailer,
    /// Files that were changed in the guest and therefore kept.
    pub kept: Vec<Vec<u8>>,
}

impl Transfer {
    /// Runs an import: begin, receive, verify, finish.
    pub(super) fn import(
        self,
        cancel: &Cancel,
        request: &PrepareRequest,
        notes: &Notes,
    ) -> Result<Imported> {
        self.reporter.progress("compare the guest's files");
        let changed = remote::parse_begin(&self.script(
            &remote::begin_command(&self.workspace),
            "begin the import",
            cancel,
        )?)?;
        let keep = if request.overwrite {
            Vec::new()
        } else {
            encode::encode_all(&changed)?
        };
        notes.send(Note::Ready(Ready { keep }));
        let (fifo, bytes) = (&self.fifo, &self.moved.bytes);
        let fifo = fifo
            .try_clone()
            .map_err(|e| Error::io("take the stream", e))?;
        let mut source = ImportSource {
            inner: ChunkSource::new(FdSource::new(fifo), bytes.clone()),
            reporter: &self.reporter,
            bytes,
            expected: request.bytes_expected,
        };
        self.reporter.progress("copy the files");
        let trailer = self.receive(&mut source, request.overwrite, cancel)?;
        self.moved.is_over.store(true, Ordering::Relaxed);
        self.reporter.progress("record the copied files");
        let finish = remote::Finish {
            overwrite: request.overwrite,
            readonly: request.readonly,
            subdir: &request.subdir,
        };
        let output = self.script(
            &remote::finish_command(&self.workspace, &finish),
            "finish the import",
            cancel,
        )?;
        Ok(Imported {
            trailer,
            kept: remote::parse_finish(&output)?.kept,
        })
    }

    /// Sends the payload to the guest. The payload is valid only with a matching trailer.
    fn receive(
        &self,
        source: &mut ImportSource<'_>,
        overwrite: bool,
        cancel: &Cancel,
    ) -> Result<Trailer> {
        let spec = ExecSpec {
            command: remote::receive_command(&self.workspace, overwrite),
            idle: Some(self.idle),
            ..ExecSpec::default()
        };
        let mut stderr = VecSink::new(STDERR_BYTES_MAX);
        let streams = Streams {
            stdin: Some(source),
            stderr: Some(&mut stderr),
            ..Streams::default()
        };
        let ended = self.transport.exec(&self.target, &spec, streams, cancel);
        let exit = ended.map_err(|e| self.with_progress(e))?;
        let trailer = source.inner.finished().cloned();
        match (exit, trailer) {
            (Exit::Status(0), Some(trailer)) => Ok(trailer),
            (Exit::Status(0), None) => Err(self.with_progress(
                Error::new(Kind::StreamIncomplete, "the stream ended without a trailer")
                    .hint("run the import again"),
            )),
            (exit, _) => {
                Err(self.with_progress(remote::failure("receive the tree", &exit, &stderr.bytes)))
            }
        }
    }

    /// Sends the caller the patch or the tree as the guest produces it. The daemon does not parse
    /// this output.
    pub(super) fn export(self, cancel: &Cancel, kind: ExportKind) -> Result<Trailer> {
        self.reporter.progress("compare the guest's files");
        let command = match kind {
            ExportKind::Patch => remote::export_patch_command(&self.workspace),
            ExportKind::Tree => remote::export_tree_command(&self.workspace),
        };
        let fifo = self
            .fifo
            .try_clone()
            .map_err(|e| Error::io("take the stream", e))?;
        let mut sink = ChunkSink::new(FdSink::new(fifo), self.moved.bytes.clone());
        let mut output = VecSink::new(STDERR_BYTES_MAX);
        // The guest sends nothing while it compares, so there is no idle limit.
        let spec = ExecSpec {
            command,
            deadline: Some(Instant::now() + SCRIPT_DEADLINE),
            ..ExecSpec::default()
        };
        let mut counting = ExportSink {
            inner: &mut sink,
            reporter: &self.reporter,
            bytes: &self.moved.bytes,
        };
        let streams = Streams {
            stdout: Some(&mut counting),
            stderr: Some(&mut output),
            ..Streams::default()
        };
        let exit = self
            .transport
            .exec(&self.target, &spec, streams, cancel)
            .map_err(|e| self.with_progress(e))?;
        if exit != Exit::Status(0) {
            return Err(self.with_progress(remote::failure(
                "compare the tree",
                &exit,
                &output.bytes,
            )));
        }
        sink.finish(0, Instant::now() + TRAILER_DEADLINE, cancel)
    }

    fn script(&self, command: &str, doing: &str, cancel: &Cancel) -> Result<Vec<u8>> {
        let deadline = Instant::now() + SCRIPT_DEADLINE;
        let script = Script {
            command,
            stdin: &[],
            deadline,
            output_bytes_max: remote::ANSWER_BYTES_MAX,
        };
        let output = run_script(self.transport.as_ref(), &self.target, &script, cancel)
            .map_err(|e| self.with_progress(e))?;
        match output.exit {
            Exit::Status(0) => Ok(output.stdout),
            exit => Err(self.with_progress(remote::failure(doing, &exit, &output.stderr))),
        }
    }

    /// Adds the number of bytes that were moved so far to an error.
    fn with_progress(&self, e: Error) -> Error {
        e.context(format!(
            "after {} bytes",
            self.moved.bytes.load(Ordering::Relaxed)
        ))
    }
}

/// Reports the progress of an import.
struct ImportSource<'a> {
    inner: ChunkSource<FdSource>,
    reporter: &'a Reporter,
    bytes: &'a AtomicU64,
    expected: Option<u64>,
}

impl Source for ImportSource<'_> {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.reporter
            .progress_bytes(self.bytes.load(Ordering::Relaxed), self.expected);
        Ok(n)
    }
}

/// Reports the progress of an export.
struct ExportSink<'a> {
    inner: &'a mut ChunkSink<FdSink>,
    reporter: &'a Reporter,
    bytes: &'a AtomicU64,
}

impl Sink for ExportSink<'_> {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.reporter
            .progress_bytes(self.bytes.load(Ordering::Relaxed), None);
        Ok(n)
    }
}
