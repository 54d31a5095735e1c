//! Exports images into a pipe of the caller.
//!
//! An export reads files that it opened at its start. It holds no lock, takes no place of a pull,
//! and does not prevent the deletion of the image. So a caller that reads slowly, or not at all,
//! delays nobody. An export ends if its caller reads nothing for `limits.transfer_idle_s`.

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::images::ImageService;
use crate::api::image::{ExportFormat, ImageExportReply, ImageExportRequest};
use crate::error::{Error, Kind, Result};
use crate::guest::io::fifo::{self, Direction};
use crate::host::fs::{open_nofollow, space};
use crate::host::wait::{WaitResult, cancelled_by, wait_any};
use crate::image::oci::limits::UNPACKED_BYTES_MAX;
use crate::image::{DiskSpec, ImageInfo, OciArchive};
use crate::ops::OpHandle;
use crate::sched::Instant;
use nix::poll::PollFlags;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

const PIECE_BYTES: usize = 1 << 20;
/// The space that a layer leaves free on the host's disk while it is made.
const SPARE_BYTES: u64 = 1 << 30;

/// The content of an export, whose files are open.
enum Content {
    Oci(OciArchive),
    Raw(File),
}

impl ImageService {
    /// Begins to write an image into the FIFO whose write end is passed.
    ///
    /// # Errors
    /// `image_not_found`, `denied`, `busy`, `conflict` if the image's file has changed.
    pub fn image_export(
        &self,
        caller: &Caller,
        request: &ImageExportRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<CallOutcome> {
        const METHOD: &str = "image.export";
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| {
            let text = format!("image.export takes one descriptor, but got {}", fds.len());
            Error::new(Kind::InvalidRequest, text).hint("pass the write end of a FIFO")
        })?;
        let pipe = fifo::accept(fd, Direction::Write)?;
        let info = self.find(caller, &request.image)?;
        let reserved = self.reserve_work(caller, self.pulls.config.pulls_per_uid_max)?;
        let op = self.core.begin_op(METHOD, None, caller.uid, true)?;
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, service, format) = (op.id().clone(), self.clone(), request.format);
        self.core.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope(format!("{METHOD} {}", info.name));
            let result = service
                .export(&op, &info, format, pipe)
                .map_err(|e| service.core.with_free_space(e))
                .map_err(|e| e.context(format!("export image {}", info.name)))
                .and_then(|reply| to_value(&reply));
            drop(reserved);
            service.core.end_op(op, result);
        })?;
        Ok(CallOutcome::Op(id))
    }

    fn export(
        &self,
        op: &OpHandle,
        info: &ImageInfo,
        format: ExportFormat,
        pipe: OwnedFd,
    ) -> Result<ImageExportReply> {
        self.core.effects.before("open the image")?;
        let content = self.open_content(op, info, format)?;
        let mut out = Output {
            pipe,
            idle: Duration::from_secs(self.core.limits.transfer_idle_s),
            op,
            done: 0,
            total: content.bytes()?,
            failure: None,
        };
        op.progress("write the image");
        self.core.effects.before("write the image")?;
        let written = match &content {
            Content::Oci(archive) => archive.write(&mut out),
            Content::Raw(file) => copy(file, out.total, &mut out),
        };
        if let Err(e) = written {
            let failure = out.failure.take();
            return Err(failure.unwrap_or_else(|| Error::io("read the image", e)));
        }
        if let Content::Raw(file) = &content {
            info.require_same(file)?;
        }
        self.core.effects.before("end the export")?;
        Ok(ImageExportReply { bytes: out.done })
    }

    fn open_content(
        &self,
        op: &OpHandle,
        info: &ImageInfo,
        format: ExportFormat,
    ) -> Result<Content> {
        let cache = &self.pulls.layers;
        if format == ExportFormat::Oci {
            let details = self.images.details(&info.name)?;
            if let Some(archive) = OciArchive::of_layers(info, &details, cache)? {
                return Ok(Content::Oci(archive));
            }
        }
        let disk = match info.open_in_place()? {
            Some(file) => file,
            None => open_nofollow(&info.rootfs)?,
        };
        if format == ExportFormat::Raw {
            return Ok(Content::Raw(disk));
        }
        op.progress("read the file system");
        let free = space(&self.core.state_dir)?.free_bytes;
        let room = free.saturating_sub(SPARE_BYTES);
        let spec = DiskSpec {
            info,
            disk: &disk,
            cache,
            helper: self.pulls.helper,
            bytes_max: UNPACKED_BYTES_MAX.min(room),
        };
        let reporter = op.reporter();
        let report = &mut |done| reporter.progress_units(done, None, "bytes");
        self.core.effects.before("make the layer")?;
        let made = OciArchive::of_disk(&spec, op.cancel(), report);
        let archive = made.map_err(|e| match e.kind() {
            Kind::Exhausted if room < UNPACKED_BYTES_MAX => {
                let spare = SPARE_BYTES >> 20;
                let text =
                    format!("the layer does not fit on the disk: fcd keeps {spare} MiB free");
                Error::new(Kind::DiskFull, text)
            }
            _ => e,
        })?;
        info.require_same(&disk)?;
        Ok(Content::Oci(archive))
    }
}

impl Content {
    fn bytes(&self) -> Result<u64> {
        match self {
            Self::Oci(archive) => Ok(archive.bytes()),
            Self::Raw(file) => {
                let stat = file.metadata();
                stat.map(|stat| stat.len())
                    .map_err(|e| Error::io("read the size of the image", e))
            }
        }
    }
}

fn copy(from: &File, bytes: u64, to: &mut dyn Write) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    while at < bytes {
        let wanted = usize::try_from(bytes - at).unwrap_or(usize::MAX);
        let wanted = wanted.min(PIECE_BYTES);
        match from.read_at(&mut piece[..wanted], at)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                to.write_all(&piece[..read])?;
                at += read as u64;
            }
        }
    }
    Ok(())
}

/// The caller's pipe. Writes wait for the caller, but no longer than `idle`, and end when the
/// operation is cancelled.
struct Output<'a> {
    pipe: OwnedFd,
    idle: Duration,
    op: &'a OpHandle,
    done: u64,
    total: u64,
    /// Why a write has failed.
    failure: Option<Error>,
}

impl Output<'_> {
    fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + self.idle;
        let fds = [(self.pipe.as_fd(), PollFlags::POLLOUT)];
        let waited = wait_any(&fds, deadline, self.op.cancel());
        match waited.map_err(|e| Error::io("wait for the reader", e))? {
            WaitResult::Ready => Ok(()),
            WaitResult::Cancelled => Err(cancelled_by(self.op.cancel())),
            WaitResult::Deadline => {
                let text = format!("nobody has read for {} s", self.idle.as_secs());
                Err(Error::new(Kind::TransferIdle, text).hint("try again"))
            }
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<usize> {
        loop {
            if self.op.cancel().is_cancelled() {
                return Err(cancelled_by(self.op.cancel()));
            }
            match rustix::io::write(&self.pipe, bytes) {
                Ok(written) => {
                    self.done += written as u64;
                    let reporter = self.op.reporter();
                    reporter.progress_units(self.done, Some(self.total), "bytes");
                    return Ok(written);
                }
                Err(rustix::io::Errno::AGAIN) => self.wait()?,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE) => {
                    let text = "cancelled: nobody reads the passed fifo any more";
                    return Err(Error::new(Kind::Cancelled, text));
                }
                Err(e) => return Err(Error::io("write to the passed fifo", e)),
            }
        }
    }
}

impl Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes).map_err(|e| {
            let text = e.to_string();
            self.failure = Some(e);
            io::Error::other(text)
        })
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
