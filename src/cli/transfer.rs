//! Transfers to and from a VM. Packing and unpacking happen here, with the caller's rights.

use super::pipes::{self, End};
use super::printer::Printer;
use super::signals::Interrupts;
use crate::api::Call;
use crate::api::frame::Note;
use crate::api::stream::{self, ChunkReader, ChunkWriter};
use crate::api::workspace::{
    ExportKind, ExportRequest, PrepareReply, PrepareRequest, WorkspaceExport, WorkspacePrepare,
};
use crate::client::{Client, Failure, Result};
use crate::error::{Error, Kind};
use crate::host::plural::count;
use crate::host::shell::quote;
use crate::host::thread;
use crate::locks::{Cancel, CancelCause};
use crate::workspace::caller_env::CallerEnv;
use crate::workspace::left::{self, Left, LeftBehind, Why};
use crate::workspace::options::{History, Options};
use crate::workspace::plan::{Plan, Sent};
use crate::workspace::{encode, guest_path, patch, raw_tar, unpack};
use serde::Serialize;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// How many kept paths are listed.
const KEPT_SHOWN_MAX: usize = 20;
/// How many paths that could not be brought back are listed.
const LEFT_SHOWN_MAX: usize = 20;
const PIECE_BYTES: usize = 256 * 1024;

/// How to create a workspace.
#[derive(clap::Args, Debug, Default)]
pub(super) struct PrepareHow {
    /// Directory in the guest [default: /root/NAME, or /workspace/NAME if another user than root
    /// runs the commands]
    #[arg(long, value_name = "DIR")]
    pub guest_path: Option<String>,
    /// Make the copy read-only in the guest
    #[arg(long)]
    pub readonly: bool,
    /// Commits to send: a number, `full` or `none`
    #[arg(long, value_name = "N|full|none")]
    pub history: Option<History>,
    /// Also replace files that changed in the guest since the last copy
    #[arg(long)]
    pub overwrite: bool,
    /// Allow the repository to use git objects in PATH, as after git clone --shared
    #[arg(long, value_name = "PATH")]
    pub allow_alternate: Vec<PathBuf>,
    /// Fail instead of waiting for another transfer of this VM
    #[arg(long)]
    pub no_wait: bool,
}

impl PrepareHow {
    /// True if any of these options was given.
    pub(super) fn is_given(&self) -> bool {
        self.guest_path.is_some()
            || self.readonly
            || self.history.is_some()
            || self.overwrite
            || !self.allow_alternate.is_empty()
            || self.no_wait
    }
}

/// The limit for data from a guest.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(super) struct Bound {
    /// Fail if the guest sends more than this, such as 512M or 16G
    #[arg(long, value_name = "SIZE", value_parser = super::values::parse_size, default_value = "8G")]
    pub max_bytes: u64,
}

/// A tree that is copied into a workspace.
pub(super) enum Source {
    Tree(Box<Plan>),
    Tar(File),
}

impl Source {
    /// Inspects a tree without calling the daemon.
    pub(super) fn tree(path: &Path, how: &PrepareHow, cancel: &Cancel) -> Result<Self> {
        let options = Options {
            history: how.history.unwrap_or_default(),
            env: CallerEnv::from_process(),
            allow_alternates: how.allow_alternate.clone(),
        };
        let plan = Plan::inspect(path, &options, cancel).map_err(|e| match e.kind() {
            Kind::PathNotFound if e.hint_text().is_none() => {
                e.hint("name an existing directory, or . for the current one")
            }
            _ => e,
        })?;
        Ok(Source::Tree(Box::new(plan)))
    }

    /// Returns the tree to which an exported patch will be applied.
    pub(super) fn top(&self) -> Option<&Path> {
        match self {
            Source::Tree(plan) => Some(plan.root()),
            Source::Tar(_) => None,
        }
    }

    /// Returns the directory in which commands start, relative to the copy.
    pub(super) fn subdir(&self) -> &str {
        match self {
            Source::Tree(plan) => plan.subdir(),
            Source::Tar(_) => "",
        }
    }

    /// Returns the default directory of the copy in the guest.
    pub(super) fn path_for_root(&self) -> String {
        match self {
            Source::Tree(plan) => plan.guest_path(),
            Source::Tar(_) => guest_path::default_for("workspace"),
        }
    }

    /// Returns the default directory of the copy for a user who cannot enter root's home.
    pub(super) fn path_for_user(&self) -> String {
        self.path_for_root().replacen("/root", "/workspace", 1)
    }

    fn request(&self, vm: &str, how: PrepareHow) -> Result<PrepareRequest> {
        let (subdir, bytes_expected) = match self {
            Source::Tree(plan) => (plan.subdir().to_owned(), Some(plan.bytes_expected())),
            Source::Tar(_) => (String::new(), None),
        };
        let guest_path = how.guest_path.unwrap_or_else(|| self.path_for_root());
        Ok(PrepareRequest {
            vm: vm.to_owned(),
            guest_path: guest_path::validate(&guest_path)?,
            subdir,
            readonly: how.readonly,
            overwrite: how.overwrite,
            no_wait: how.no_wait,
            bytes_expected,
            raw_tar: matches!(self, Source::Tar(_)),
        })
    }
}

/// One transfer to or from a VM.
pub(super) struct Transfer<'a> {
    pub printer: &'a mut Printer,
    pub interrupts: &'a Interrupts,
    pub client: &'a mut Client,
    pub vm: &'a str,
}

/// The thread that packs or unpacks during the call. The flag is true if the thread's error is only
/// a consequence of a cancellation or of the other end closing its pipe.
pub(super) type TransferThread<T> = JoinHandle<(crate::error::Result<T>, bool)>;

impl Transfer<'_> {
    /// Sends `source`. Kept and omitted files are listed on stderr.
    pub(super) fn prepare(&mut self, source: Source, how: PrepareHow) -> Result<PrepareReply> {
        let request = source.request(self.vm, how)?;
        if let Source::Tree(plan) = &source {
            plan.warnings()
                .iter()
                .for_each(|w| self.printer.note(&format!("warning: {w}")));
        }
        let stop = self.stop()?;
        let (ours, theirs) = pipes::to_daemon(&stop)?;
        let (token, mut ours, vm) = (stop.clone(), ours, self.vm.to_owned());
        let mut begin = Some(move |keep: Vec<Vec<u8>>| {
            let result = pack(source, &mut ours, &keep, &token);
            // Our end is still open here, so `is_unread` cannot be a consequence of our own
            // failure.
            (
                result.map_err(|e| e.of_vm(&vm)),
                token.is_cancelled() || ours.is_unread(),
            )
        });
        let mut packer: Option<TransferThread<Sent>> = None;
        let reply = self.call::<WorkspacePrepare>(
            &format!("copy to {}", self.vm),
            &request,
            theirs,
            &mut |note| {
                if let Note::Ready(ready) = note
                    && let Some(begin) = begin.take()
                {
                    let keep = encode::decode_all(&ready.keep)?;
                    packer = Some(thread::spawn("pack", move || begin(keep))?);
                }
                Ok(())
            },
        );
        let (reply, sent) = conclude(reply, packer, &stop)?;
        sent.into_iter()
            .flat_map(|s| s.warnings)
            .for_each(|w| self.printer.note(&format!("warning: {w}")));
        self.report_kept(&reply.kept);
        Ok(reply)
    }

    fn report_kept(&mut self, kept: &[String]) {
        if kept.is_empty() {
            return;
        }
        let files = count(kept.len() as u64, "file");
        self.printer.note(&format!("kept {files} that changed in the guest since the last copy (--overwrite replaces them):"));
        kept.iter()
            .take(KEPT_SHOWN_MAX)
            .for_each(|path| self.printer.note(&format!("  {path}")));
        if kept.len() > KEPT_SHOWN_MAX {
            self.printer
                .note(&format!("  and {} more", kept.len() - KEPT_SHOWN_MAX));
        }
    }

    /// Exports into `to`, which is afterwards either complete or untouched.
    pub(super) fn export(&mut self, to: &ExportTo, bound: Bound, no_wait: bool) -> Result<Fetched> {
        to.check()?;
        let kind = if matches!(to, ExportTo::Tree(_)) {
            ExportKind::Tree
        } else {
            ExportKind::Patch
        };
        let request = ExportRequest {
            vm: self.vm.to_owned(),
            kind,
            no_wait,
        };
        let stop = self.stop()?;
        let (ours, theirs) = pipes::from_daemon(&stop)?;
        let (token, target) = (stop.clone(), to.clone());
        let receiver = thread::spawn("unpack", move || {
            let mut stream = Incoming {
                chunks: ChunkReader::new(ours),
                is_broken: false,
            };
            let result = receive(&mut stream, &target, bound, &token);
            (result, token.is_cancelled() || stream.is_broken)
        })?;
        let reply = self.call::<WorkspaceExport>(
            &format!("fetch from {}", self.vm),
            &request,
            theirs,
            &mut |_| Ok(()),
        );
        let (reply, received) = conclude(reply, Some(receiver), &stop)?;
        let Some((received, left_behind)) = received else {
            return Err(Error::internal("an export ended without its receiver").into());
        };
        let patch = |patch: patch::Patch| Exported::Patch {
            files_changed: patch.files,
            bytes: patch.bytes,
        };
        let exported = match received {
            Received::Staged(staged) => Exported::Tree {
                entries: staged.commit()?.entries,
                bytes: reply.bytes,
            },
            Received::Spooled(spool, spooled) => {
                self.print(spool)?;
                patch(spooled)
            }
            Received::Written(written) => patch(written),
        };
        Ok(Fetched {
            exported,
            left_behind,
        })
    }

    /// Prints the patch in `spool`. Call this only once all of it has arrived, so that a partial
    /// patch is never printed.
    fn print(&mut self, mut spool: File) -> Result<()> {
        let doing = "read the patch back";
        let mut piece = vec![0; PIECE_BYTES];
        spool.rewind().map_err(|e| Error::io(doing, e))?;
        loop {
            match spool.read(&mut piece).map_err(|e| Error::io(doing, e))? {
                0 => return Ok(()),
                n => self.printer.bytes(&piece[..n])?,
            }
        }
    }

    /// Returns a token that also fires at a signal.
    fn stop(&self) -> Result<Cancel> {
        let stop = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
        let fired = stop.clone();
        self.interrupts
            .on_end(move || fired.cancel(CancelCause::Interrupted));
        Ok(stop)
    }

    /// Makes the call with one end of a pipe, and closes that end here once the daemon has it.
    /// Shows progress.
    fn call<C: Call>(
        &mut self,
        doing: &str,
        request: &C::Request,
        theirs: OwnedFd,
        on_note: &mut dyn FnMut(Note) -> Result<()>,
    ) -> Result<C::Reply> {
        let _guard = self.interrupts.guard(self.client)?;
        let mut progress = self.printer.progress(doing);
        let in_flight = self.client.begin::<C>(request, &[theirs.as_fd()]);
        drop(theirs);
        in_flight?.finish(&mut |note| match note {
            Note::Progress(p) => {
                progress.update(&p);
                Ok(())
            }
            note => on_note(note),
        })
    }
}

/// Combines the results of both sides. The error is that of the side that failed first: the other
/// side saw only a broken pipe.
pub(super) fn conclude<R, T, E: Into<Failure>>(
    reply: Result<R>,
    thread: Option<JoinHandle<(std::result::Result<T, E>, bool)>>,
    stop: &Cancel,
) -> Result<(R, Option<T>)> {
    if reply.is_err() {
        stop.cancel(CancelCause::CommandEnded);
    }
    let Some(thread) = thread else {
        return Ok((reply?, None));
    };
    let (ours, is_consequence) = thread
        .join()
        .map_err(|_| Error::internal("a transfer thread panicked"))?;
    match (reply, ours) {
        (Ok(reply), Ok(ours)) => Ok((reply, Some(ours))),
        (Err(theirs), Err(_)) if is_consequence => Err(theirs),
        (_, Err(e)) => Err(e.into()),
        (Err(theirs), Ok(_)) => Err(theirs),
    }
}

/// Writes the stream of an import. The trailer follows only if the whole payload was sent.
fn pack(
    source: Source,
    to: &mut End,
    keep: &[Vec<u8>],
    stop: &Cancel,
) -> crate::error::Result<Sent> {
    let mut writer = ChunkWriter::new(to);
    let sent = match source {
        Source::Tree(mut plan) => plan.send(&mut writer, keep, &mut |_, _| (), stop)?,
        Source::Tar(file) => raw_tar::send(
            &mut pipes::Stoppable::new(file, stop),
            &mut writer,
            keep,
            &mut |_, _| (),
            stop,
        )?,
    };
    writer.finish(sent.entries).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => Error::new(
            Kind::StreamIncomplete,
            "send the tree: the daemon stopped reading",
        ),
        _ => Error::io("send the tree", e),
    })?;
    Ok(sent)
}

/// The destination of an export.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum ExportTo {
    /// A file that does not exist yet.
    Patch(PathBuf),
    PatchToStdout,
    /// A directory that does not exist yet.
    Tree(PathBuf),
}

impl ExportTo {
    pub(super) fn patch(arg: PathBuf) -> Self {
        if arg == Path::new("-") {
            ExportTo::PatchToStdout
        } else {
            ExportTo::Patch(arg)
        }
    }

    /// Checks the target before the daemon is called. Fails with `target_exists` or
    /// `path_not_found`.
    pub(super) fn check(&self) -> crate::error::Result<()> {
        match self {
            ExportTo::Patch(path) => patch::check_target(path),
            ExportTo::PatchToStdout => Ok(()),
            ExportTo::Tree(path) => unpack::check_target(path),
        }
    }
}

/// The size of an export, counted by this process.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(super) enum Exported {
    Patch { files_changed: u64, bytes: u64 },
    Tree { entries: u64, bytes: u64 },
}

/// The result of an export: what came back and what could not.
#[derive(Debug, Serialize)]
pub(super) struct Fetched {
    #[serde(flatten)]
    pub exported: Exported,
    pub left_behind: LeftBehind,
}

enum Received {
    Written(patch::Patch),
    Spooled(File, patch::Patch),
    Staged(unpack::Staged),
}

/// The payload of an export, and whether reading it has failed.
struct Incoming {
    chunks: ChunkReader<End>,
    is_broken: bool,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = self.chunks.read(buffer);
        self.is_broken |= result.is_err();
        // `workspace` expects one of our errors inside the I/O error.
        result.map_err(|e| io::Error::other(stream::error("read the stream", e)))
    }
}

/// Unwraps the error of [`Incoming`]; any other I/O error comes from writing.
fn copy_error(doing: &str, e: io::Error) -> Error {
    match e.downcast::<Error>() {
        Ok(inner) => inner.context(doing),
        Err(e) => Error::io(doing, e),
    }
}

fn receive(
    from: &mut Incoming,
    to: &ExportTo,
    bound: Bound,
    stop: &Cancel,
) -> crate::error::Result<(Received, LeftBehind)> {
    let left_behind = left::read(from)?;
    let received = match to {
        ExportTo::Patch(path) => {
            Received::Written(patch::receive(from, path, bound.max_bytes, stop)?)
        }
        ExportTo::PatchToStdout => {
            let (spool, patch) = patch::spool(from, bound.max_bytes, stop)?;
            Received::Spooled(spool, patch)
        }
        ExportTo::Tree(path) => {
            let limits = unpack::Limits {
                bytes: bound.max_bytes,
                ..unpack::Limits::default()
            };
            let staged = unpack::stage(from, path, &limits, stop)?;
            // Read the rest after the archive, which ends with a valid trailer.
            io::copy(from, &mut io::sink()).map_err(|e| copy_error("receive the tree", e))?;
            Received::Staged(staged)
        }
    };
    Ok((received, left_behind))
}

/// Lists what belongs to the tree but exists only in the VM, and how to fetch it.
pub(super) fn report_left_behind(printer: &mut Printer, vm: &str, left: &LeftBehind) {
    let Some(first) = left.named.first() else {
        return;
    };
    printer.note(&format!(
        "warning: not everything could be brought back; these exist only in VM {vm}:"
    ));
    for Left { path, why } in left.named.iter().take(LEFT_SHOWN_MAX) {
        let why = match why {
            Why::Repository => {
                "the history of a repository created in the guest (its files were brought back)"
            }
            Why::Submodule => "files in a submodule, or in a repository that was not sent",
            Why::Name => "git does not allow this file name",
        };
        printer.note(&format!("  {}: {why}", encode::encode(path)));
    }
    let shown = left.named.len().min(LEFT_SHOWN_MAX) as u64;
    if left.total > shown {
        printer.note(&format!("  and {} more", left.total - shown));
    }
    if let Ok(path) = std::str::from_utf8(&first.path) {
        printer.note(&format!(
            "to fetch them: fcctl exec {vm} -- tar c {} > left.tar",
            quote(path)
        ));
    }
}
