//! The work of the helper: finds the image, fetches its layers and writes its file system.

use super::job::{Job, JobSource, Outcome};
use super::link::{LayerFile, Link};
use super::protocol::Found;
use super::report::{Reporter, Stage};
use super::resume::{Body, Resuming};
use crate::error::{Error, Kind, Result};
use crate::host::wait::poll_until;
use crate::image::fetch::{Client, Selector, SystemDialer};
use crate::image::oci::{
    self, Archive, Blobs, Descriptor, Digest, Flatten, Image, Layer, LayerFiles, Wanted,
};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use std::cell::Cell;
use std::fs::File;
use std::io::{self, Cursor, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long the caller may send nothing of an archive. `docker save` of a large image writes its
/// first byte after minutes.
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// How often this helper reports that it waits for the caller.
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// A blob with fewer bytes is fetched again after an interruption.
const PARTIAL_BYTES_MIN: u64 = 1 << 20;

/// Pulls the image into `file`.
pub(super) fn pull(job: Job, stream: Option<OwnedFd>, file: &File, link: &Link) -> Result<Outcome> {
    // The daemon cancels a pull by killing this process, so this token never fires.
    let cancel = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
    let pull = Pull {
        platform: job.platform.parse()?,
        bytes_max: job.bytes_max,
        file,
        link,
        files: DaemonFiles(link),
        cancel,
        reporter: Reporter::new(link),
    };
    match job.source {
        JobSource::Registry {
            settings,
            selector,
            name,
        } => {
            let dialer = Arc::new(SystemDialer);
            let client = Client::new(*settings, dialer, pull.cancel.clone())?;
            pull.pull_registry(client, &selector, name)
        }
        JobSource::Archive { format, reference } => {
            let stream = stream.ok_or_else(|| Error::internal("an archive has no stream"))?;
            let wanted = Wanted {
                format,
                name: reference,
                platform: pull.platform.clone(),
            };
            pull.pull_archive(stream.into(), &wanted)
        }
    }
}

struct Pull<'a> {
    platform: oci::Platform,
    bytes_max: u64,
    file: &'a File,
    link: &'a Link,
    files: DaemonFiles<'a>,
    cancel: Cancel,
    reporter: Reporter<'a>,
}

impl Pull<'_> {
    fn pull_registry(
        &self,
        mut client: Client,
        selector: &Selector,
        name: String,
    ) -> Result<Outcome> {
        self.reporter.stage(Stage::Find, None);
        let manifest = client.manifest(selector)?;
        let root = Descriptor {
            media_type: manifest.media_type,
            digest: manifest.digest.parse()?,
            size: manifest.bytes.len() as u64,
        };
        let blobs = Registry {
            client,
            link: self.link,
            is_resumed: AtomicBool::new(false),
            root: root.digest,
            manifest: manifest.bytes,
        };
        let image = oci::resolve(&root, &self.platform, &blobs)?;
        self.write(&image, &blobs, Some(name))
    }

    fn pull_archive(&self, stream: File, wanted: &Wanted) -> Result<Outcome> {
        self.reporter.stage(Stage::Await, None);
        let has_begun = Cell::new(false);
        let progress = |bytes| {
            if !has_begun.replace(true) {
                self.reporter.stage(Stage::Read, None);
            }
            self.reporter.add(bytes);
        };
        let stream = Stream {
            file: stream,
            silence_max: SILENCE_MAX,
            reporter: &self.reporter,
        };
        let mut archive = Archive::spool(
            stream,
            self.link.file()?,
            self.bytes_max,
            &progress,
            &self.cancel,
        )?;
        self.reporter.stage(Stage::Verify, None);
        let progress = |bytes| self.reporter.add(bytes);
        let image = archive.image(wanted, &progress, &self.cancel)?;
        let name = image.name.clone();
        self.write(&image, &archive, name)
    }

    fn write(&self, image: &Image, blobs: &dyn Blobs, name: Option<String>) -> Result<Outcome> {
        self.link.found(Found {
            digest: image.digest.to_string(),
            name,
        })?;
        self.reporter.begin_layers(&image.layers);
        let progress = |progress| match progress {
            oci::Progress::Cached { layer } => self.reporter.layer_is_cached(layer),
            oci::Progress::Read { layer, bytes } => self.reporter.layer_advances(layer, bytes),
            oci::Progress::Complete { layer } => self.reporter.layer_is_done(layer),
            oci::Progress::Merged { bytes } => self.reporter.stage(Stage::Write, Some(bytes)),
            oci::Progress::Written { bytes } => self.reporter.add(bytes),
        };
        let flattened = oci::flatten(
            image,
            blobs,
            &Flatten {
                files: &self.files,
                out: self.file,
                disk_bytes: crate::image::DISK_BYTES_DEFAULT,
                unpacked_bytes_max: self.bytes_max,
                progress: &progress,
                cancel: &self.cancel,
            },
        )?;
        let diff_ids = flattened.layers.iter();
        Ok(Outcome {
            config: flattened.config,
            history: flattened.history,
            layers: diff_ids.map(|layer| layer.diff_id.to_string()).collect(),
            os: flattened.os,
        })
    }
}

/// The blobs of a repository.
struct Registry<'a> {
    client: Client,
    link: &'a Link,
    /// True if a part of any blob comes from an earlier pull.
    is_resumed: AtomicBool,
    root: Digest,
    /// The bytes of the blob `root`, which was fetched first.
    manifest: Vec<u8>,
}

impl Blobs for Registry<'_> {
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send + '_>> {
        if blob.digest == self.root {
            return Ok(Box::new(Cursor::new(&self.manifest)));
        }
        let digest = blob.digest.to_string();
        if blob.is_manifest() {
            let manifest = self.client.clone().manifest(&Selector::Digest(digest))?;
            return Ok(Box::new(Cursor::new(manifest.bytes)));
        }
        match self.partial(blob)? {
            None => self.client_blob(blob, 0),
            Some(file) => self.resume(blob, file),
        }
    }

    fn open_again(&self, blob: &Descriptor) -> Result<Option<Box<dyn Read + Send + '_>>> {
        crate::locks::may_block("file access");
        if !self.is_resumed.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let Some(file) = self.partial(blob)? else {
            return Ok(None);
        };
        file.set_len(0)
            .map_err(|e| Error::io("empty a partial download", e))?;
        self.resume(blob, file).map(Some)
    }
}

impl Registry<'_> {
    fn client_blob(&self, blob: &Descriptor, from: u64) -> Result<Body<'_>> {
        let digest = blob.digest.to_string();
        Ok(Box::new(self.client.blob(&digest, blob.size, from)?))
    }

    fn partial(&self, blob: &Descriptor) -> Result<Option<File>> {
        if blob.size < PARTIAL_BYTES_MIN {
            return Ok(None);
        }
        self.link.partial(&blob.digest.to_string())
    }

    fn resume(&self, blob: &Descriptor, file: File) -> Result<Body<'_>> {
        let wanted = blob.clone();
        let open = move |from| self.client_blob(&wanted, from);
        let blob = Resuming::new(file, blob.size, Box::new(open))?;
        if blob.is_resumed() {
            self.is_resumed.store(true, Ordering::Relaxed);
        }
        Ok(Box::new(blob))
    }
}

/// The files of layers, which the daemon opens.
struct DaemonFiles<'a>(&'a Link);

impl LayerFiles for DaemonFiles<'_> {
    fn open(&self, diff_id: Digest) -> Result<oci::LayerFile> {
        Ok(match self.0.layer(&diff_id.to_string())? {
            LayerFile::Cached(file) => oci::LayerFile::Cached(file),
            LayerFile::Empty(file) => oci::LayerFile::Empty(file),
        })
    }

    fn complete(&self, layer: &Layer) -> Result<()> {
        let (diff_id, blob) = (layer.diff_id.to_string(), layer.blob.digest.to_string());
        self.0.stored(diff_id, blob)
    }
}

/// The caller's stream, which is non-blocking.
struct Stream<'a> {
    file: File,
    silence_max: Duration,
    reporter: &'a Reporter<'a>,
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let begun = Instant::now();
        loop {
            match self.file.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            let left = self.silence_max.saturating_sub(begun.elapsed());
            if left.is_zero() {
                let text = format!(
                    "the caller sent nothing of the archive for {} s",
                    self.silence_max.as_secs()
                );
                let error = Error::new(Kind::Timeout, text)
                    .hint("check the command that writes the archive, or write it to a file first");
                return Err(io::Error::other(error));
            }
            let until = Instant::now() + left.min(REPORT_EVERY);
            let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
            if poll_until(&mut fds, Some(until))? == 0 {
                self.reporter.report();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::link::Answer;
    use super::super::protocol::Request;
    use super::*;
    use crate::host::thread;
    use crossbeam_channel::unbounded;
    use std::os::fd::OwnedFd;

    #[test]
    fn silent_caller_is_named() {
        let (asking, asked) = unbounded::<super::super::link::Asking>();
        let link = Link::new(asking);
        let reports = thread::spawn("reports", move || {
            let mut stages = Vec::new();
            for (request, to) in asked {
                if let Request::Progress(progress) = request {
                    stages.push(progress.stage);
                }
                let _ = to.send(Ok(Answer::None));
            }
            stages
        })
        .unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        crate::host::wait::set_nonblocking(&reader).unwrap();
        {
            let reporter = Reporter::new(&link);
            reporter.stage(Stage::Await, None);
            let mut stream = Stream {
                file: OwnedFd::from(reader).into(),
                silence_max: Duration::from_millis(50),
                reporter: &reporter,
            };
            let e = stream.read(&mut [0]).unwrap_err();
            let e = e.downcast::<Error>().unwrap();
            assert_eq!(e.kind(), Kind::Timeout);
            assert!(e.to_string().contains("the caller sent nothing"), "{e}");
        }
        drop(link);
        let stages = reports.join().unwrap();
        assert!(stages.len() >= 2, "it is silent: {stages:?}");
        assert!(stages.iter().all(|stage| stage == "wait for the archive"));
    }
}
