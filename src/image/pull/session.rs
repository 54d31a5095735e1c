//! The daemon's side of a pull: starts the helper, hands out files, and waits for the end.

use super::cache::Layers;
use super::partial::is_worth_keeping;
use super::protocol::{Found, MESSAGE_BYTES_MAX, Order, Progress, RESULT_BYTES_MAX, Request};
use super::protocol::{decode, encode};
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::confine::{self, Helper};
use crate::host::wait::{WaitResult, cancelled_by, wait_any};
use crate::image::oci::limits::{LAYERS_MAX, UNPACKED_BYTES_MAX};
use crate::locks::{Cancel, CancelCause};
use crate::sched::Instant;
use nix::poll::PollFlags;
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// How long the helper may be silent. It reports progress at least once a second while bytes move,
/// and gives up if a registry sends nothing for a minute.
const SILENCE_MAX: Duration = Duration::from_secs(180);
/// How long a cancelled pull may take to cache its complete layers.
const KEEP_MAX: Duration = Duration::from_secs(30);
/// How long to wait for the helper to end after it was killed. A large write may take seconds.
const END_MAX: Duration = Duration::from_secs(30);
/// The maximum number of files that the helper may request: the layers of an image and an archive.
const FILES_MAX: usize = LAYERS_MAX + 1;
/// The maximum space of all files together: the layers, and an archive that holds them or their
/// partial downloads.
const FILES_BYTES_MAX: u64 = 2 * UNPACKED_BYTES_MAX;

/// The unit of `st_blocks` (stat(2)).
const BLOCK_BYTES: u64 = 512;

/// A pull to run.
pub(super) struct Session<'a> {
    pub layers: &'a Layers,
    /// The user who pulls.
    pub uid: u32,
    /// The uid and gid of the helper, if the daemon is root.
    pub owner: Option<Credentials>,
    /// The job, which only the helper reads.
    pub job: &'a [u8],
    /// An archive to read instead of a registry.
    pub stream: Option<OwnedFd>,
    /// The empty file that becomes the image's root file system.
    pub image: &'a File,
}

/// Receives the events of a running pull.
pub(super) trait Observer {
    /// Called once, when the image is known. Returns false if it need not be pulled.
    fn found(&mut self, found: Found) -> Result<bool>;
    fn progress(&mut self, progress: Progress);
}

/// The files that the helper has received. `layers` contains those of layers, by diff id.
#[derive(Default)]
struct HandedOut {
    files: usize,
    /// The file of an archive.
    other: Option<File>,
    layers: HashMap<String, File>,
    /// The layers whose file is complete, by diff id, with the digests of their blobs.
    complete: HashMap<String, String>,
    /// The digests of the blobs whose partial downloads were handed out.
    partials: HashSet<String>,
}

impl Session<'_> {
    /// Fails if the helper has filled more of the disk than any image needs.
    fn check_space(&self, handed_out: &HandedOut) -> Result<()> {
        let mut used = 0;
        for file in handed_out.layers.values().chain(&handed_out.other) {
            let metadata = file.metadata();
            let metadata = metadata.map_err(|e| Error::io("inspect a layer", e))?;
            used += metadata.blocks() * BLOCK_BYTES;
        }
        let partials = handed_out.partials.iter();
        used += partials
            .map(|digest| self.layers.partials.bytes(self.uid, digest))
            .sum::<u64>();
        if used > FILES_BYTES_MAX {
            return Err(violation("wrote too much"));
        }
        Ok(())
    }

    /// Runs the pull, and returns the bytes of its result, or None if the image need not be pulled.
    /// Complete layers are cached even if the pull fails, so that a retry need not fetch them
    /// again.
    pub(super) fn run(
        &mut self,
        name: &str,
        cancel: &Cancel,
        observer: &mut dyn Observer,
    ) -> Result<Option<Vec<u8>>> {
        let io = |e| Error::io("start the pull", e);
        let helper = confine::spawn(name, self.owner)?;
        let mut job = self.layers.new_file()?;
        job.write_all(self.job).map_err(io)?;
        job.rewind().map_err(io)?;
        let result = self.layers.new_file()?;
        let mut passed = vec![job.as_fd(), self.image.as_fd(), result.as_fd()];
        passed.extend(self.stream.as_ref().map(AsFd::as_fd));
        send(&helper, &Order::Pull, &passed)?;
        // Only the helper reads the stream now, so the writer notices when the helper ends.
        self.stream = None;
        let mut handed_out = HandedOut::default();
        let ended = self.serve(&helper, &mut handed_out, cancel, observer);
        // The helper must not change a layer or the image once they have been checked.
        let mut helper = helper;
        helper.end(Instant::now() + END_MAX)?;
        self.keep(&handed_out, cancel);
        if ended.as_ref().err().is_none_or(|e| !is_worth_keeping(e)) {
            for digest in &handed_out.partials {
                self.layers.partials.forget(self.uid, digest);
            }
        }
        self.trim();
        if !ended? {
            return Ok(None);
        }
        let mut result = result;
        result.rewind().map_err(io)?;
        crate::host::command::read_bounded(result, RESULT_BYTES_MAX)
            .map(Some)
            .map_err(|e| Error::io("read the result of the pull", e))
    }

    fn serve(
        &self,
        helper: &Helper,
        handed_out: &mut HandedOut,
        cancel: &Cancel,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        loop {
            match next(helper, cancel)? {
                Request::Found(found) => {
                    if !observer.found(found)? {
                        return Ok(false);
                    }
                    send(helper, &Order::Continue, &[])?;
                }
                Request::Layer { diff_id } => self.hand_out_layer(helper, handed_out, diff_id)?,
                Request::Stored { diff_id, blob } => {
                    if !handed_out.layers.contains_key(&diff_id) {
                        return Err(violation("completed a layer that it did not ask for"));
                    }
                    handed_out.complete.insert(diff_id, blob);
                }
                Request::Partial { digest } => self.hand_out_partial(helper, handed_out, digest)?,
                Request::File => {
                    let file = self.new_file(handed_out)?;
                    send(helper, &Order::Empty, &[file.as_fd()])?;
                    handed_out.other = Some(file);
                }
                Request::Progress(progress) => {
                    self.check_space(handed_out)?;
                    observer.progress(progress.bounded());
                }
                Request::Done => return Ok(true),
                Request::Failed(failure) => return Err(failure.into_error()),
            }
        }
    }

    fn hand_out_layer(
        &self,
        helper: &Helper,
        handed_out: &mut HandedOut,
        diff_id: String,
    ) -> Result<()> {
        if let Some(cached) = self.layers.get(&diff_id)? {
            return send(helper, &Order::Cached, &[cached.as_fd()]);
        }
        let file = self.new_file(handed_out)?;
        send(helper, &Order::Empty, &[file.as_fd()])?;
        handed_out.layers.insert(diff_id, file);
        Ok(())
    }

    /// Hands out the partial download of a blob. If there is none, the pull continues without it.
    fn hand_out_partial(
        &self,
        helper: &Helper,
        handed_out: &mut HandedOut,
        digest: String,
    ) -> Result<()> {
        // An honest helper requests one per layer.
        if handed_out.partials.len() >= LAYERS_MAX && !handed_out.partials.contains(&digest) {
            return Err(violation("asked for too many files"));
        }
        match self.layers.partials.get(self.uid, &digest) {
            Ok(Some(file)) => {
                handed_out.partials.insert(digest);
                send(helper, &Order::Partial, &[file.as_fd()])
            }
            Ok(None) => send(helper, &Order::Continue, &[]),
            Err(e) => {
                log::warn!("{e}");
                send(helper, &Order::Continue, &[])
            }
        }
    }

    fn new_file(&self, handed_out: &mut HandedOut) -> Result<File> {
        handed_out.files += 1;
        if handed_out.files > FILES_MAX {
            return Err(violation("asked for too many files"));
        }
        self.layers.new_file()
    }

    /// Caches the complete layers, even if the pull was cancelled, so that the next pull need not
    /// fetch them again or read their partial downloads. A failure only costs time at the next
    /// pull.
    fn keep(&self, handed_out: &HandedOut, cancel: &Cancel) {
        let cancelled_at = Cell::new(None);
        let gives_up = || match cancel.cause() {
            None => false,
            Some(CancelCause::DaemonStops) => true,
            Some(_) => {
                let at = cancelled_at.get().unwrap_or_else(Instant::now);
                cancelled_at.set(Some(at));
                at.elapsed() > KEEP_MAX
            }
        };
        for (diff_id, blob) in &handed_out.complete {
            let Some(file) = handed_out.layers.get(diff_id) else {
                continue;
            };
            match self.layers.insert(diff_id, file, &gives_up) {
                Ok(true) if handed_out.partials.contains(blob) => {
                    self.layers.partials.forget(self.uid, blob);
                }
                Ok(_) => {}
                Err(e) => log::warn!("{e}"),
            }
        }
    }

    fn trim(&self) {
        if let Err(e) = self.layers.trim() {
            log::warn!("{e}");
        }
    }
}

/// Waits for the helper's next message.
fn next(helper: &Helper, cancel: &Cancel) -> Result<Request> {
    let deadline = Instant::now() + SILENCE_MAX;
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    loop {
        match helper.channel.receive(&mut buffer) {
            Ok(0) => return Err(died()),
            Ok(len) => {
                return decode(&buffer[..len]).ok_or_else(|| violation("sent a malformed message"));
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(Error::io("read from the image helper", e)),
        }
        let waited = wait_any(
            &[(helper.channel.fd(), PollFlags::POLLIN)],
            deadline,
            cancel,
        );
        match waited.map_err(|e| Error::io("wait for the image helper", e))? {
            WaitResult::Ready => {}
            WaitResult::Cancelled => return Err(cancelled_by(cancel)),
            WaitResult::Deadline => {
                let text = format!(
                    "the image helper reported nothing for {} s",
                    SILENCE_MAX.as_secs()
                );
                return Err(Error::new(Kind::Timeout, text).hint("try again"));
            }
        }
    }
}

/// Sends one message. The helper reads each message before it sends its next request, so the
/// channel has room for it.
fn send(helper: &Helper, order: &Order, fds: &[BorrowedFd<'_>]) -> Result<()> {
    helper
        .channel
        .send(&encode(order), fds)
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::BrokenPipe => died(),
            _ => Error::io("write to the image helper", e),
        })
}

fn died() -> Error {
    Error::new(Kind::Host, "the helper process that reads the image died")
        .hint("the image may be larger than its limits, or crafted to attack; see the daemon's log")
}

fn violation(what: &str) -> Error {
    Error::new(
        Kind::Host,
        format!("the helper process that reads the image {what}"),
    )
    .hint("do not trust this image")
}
