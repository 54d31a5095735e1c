//! Pulls images from registries and archives.
//!
//! A pull counts against its user's limit from the start. Once its helper process has found out
//! which image is being pulled, the image's name is reserved under `image_ops`. The image is
//! published by a rename without a lock. An image of the same name is replaced only if no VM and no
//! snapshot uses it.

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::image_reserve::name_is_busy;
use super::images::{ImageService, Reserved, is_usable};
use super::locks::ImageNames;
use super::rules::is_at_rest;
use crate::api::image::{
    ImagePruneReply, ImagePruneRequest, ImagePullRequest, ImageReply, ImageShowReply,
    ImageTagRequest, PullSource,
};
use crate::api::op;
use crate::api::page;
use crate::api::registry::{CREDENTIAL_BYTES_MAX, Credential};
use crate::error::{Error, Kind, Result};
use crate::guest::io::fifo::{self, Direction};
use crate::host::text::quoted;
use crate::host::wait::{WaitResult, cancelled_by, wait_any};
use crate::ids::ImageRef;
use crate::image::pull::{self, Decision, Found, Observer, Progress, PullSpec, Source};
use crate::image::{DiskUse, ImageInfo, Tag};
use crate::ops::OpHandle;
use crate::sched::Instant;
use nix::poll::PollFlags;
use std::any::Any;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// How long the caller may take to send a credential.
const CREDENTIAL_DEADLINE: Duration = Duration::from_secs(10);

/// How long a pull waits for another operation on the same name.
const NAME_DEADLINE: Duration = Duration::from_secs(3600);

/// A pull in progress.
struct Pull {
    caller: Caller,
    request: ImagePullRequest,
    fifo: Option<OwnedFd>,
    reserved: Reserved,
}

impl ImageService {
    /// Begins to pull an image. `fds` contains the read end of a FIFO that carries the archive or,
    /// for a registry, the caller's credential if there is one.
    pub fn image_pull(
        &self,
        caller: &Caller,
        request: ImagePullRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<CallOutcome> {
        require_may_share(caller, request.shared)?;
        let fifo = accept(&request.source, fds)?;
        let max = self.pulls.config.pulls_per_uid_max;
        let reserved = self.reserve(caller, max)?;
        let op = self.core.begin_op("image.pull", None, caller.uid, true)?;
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let mut pull = Pull {
            caller: *caller,
            request,
            fifo,
            reserved,
        };
        let (id, service) = (op.id().clone(), self.clone());
        self.core.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope("image.pull".to_owned());
            let (what, pull_uid) = (pull.describe(), pull.caller.uid);
            let result = service
                .pull(&op, &mut pull)
                .map_err(|e| service.core.with_free_space(e))
                .map_err(|e| e.context(format!("pull {what}")))
                .and_then(|info| {
                    to_value(&ImageReply {
                        image: info.to_api(pull_uid, 0),
                    })
                });
            drop(pull);
            service.core.end_op(op, result);
        })?;
        Ok(CallOutcome::Op(id))
    }

    fn pull(&self, op: &OpHandle, pull: &mut Pull) -> Result<ImageInfo> {
        let source = pull.source(op)?;
        self.core.effects.before("pull the image")?;
        let admitted = self
            .pulls
            .admission
            .enter_as(pull.caller.uid, op.cancel(), |_| {
                op.progress("wait for another pull")
            })?;
        let spec = PullSpec {
            source,
            platform: pull.request.platform.clone(),
            owner_uid: pull.caller.uid,
            private: !pull.request.shared,
            bytes_max: self.bytes_left(&pull.caller)?,
            helper: self.pulls.helper,
            config: &self.pulls.config,
        };
        let info = pull::pull(
            &self.images,
            &self.pulls.layers,
            self.commands.as_ref(),
            spec,
            op.cancel(),
            &mut Follower {
                service: self,
                op,
                pull,
            },
        )?;
        pull.reserved.end_publication();
        drop(admitted);
        self.core.effects.before("provide the guest runtime")?;
        self.ensure_runtime(op)?;
        Ok(info)
    }

    /// Reserves the name of a pulled image. As docker does, waits for another operation of the same
    /// user that will publish an image of this name. Users do not wait for each other.
    fn await_name(&self, op: &OpHandle, pull: &mut Pull, name: &ImageRef) -> Result<()> {
        let deadline = Instant::now() + NAME_DEADLINE;
        loop {
            let held = {
                let _images = self.core.locks.image_ops.lock(&ImageNames);
                pull.reserved.hold(name)
            };
            let Some(holder) = held else {
                return Ok(());
            };
            if holder.uid != pull.caller.uid {
                return Err(name_is_busy(name));
            }
            op.progress(&format!("wait for another pull of {name}"));
            let ended = (holder.ended.fd(), PollFlags::POLLIN);
            let waited = wait_any(&[ended], deadline, op.cancel());
            match waited.map_err(|e| Error::io(format!("wait for image {name}"), e))? {
                WaitResult::Ready => {}
                WaitResult::Cancelled => return Err(cancelled_by(op.cancel())),
                WaitResult::Deadline => return Err(name_is_busy(name)),
            }
        }
    }

    /// Decides whether a pulled image may get this name.
    fn admit_name(
        &self,
        op: &OpHandle,
        pull: &mut Pull,
        name: ImageRef,
        digest: &str,
    ) -> Result<Decision> {
        self.await_name(op, pull, &name)?;
        match self.images.get(&name) {
            Ok(present)
                if present.digest.as_deref() == Some(digest)
                    && is_usable(&pull.caller, &present) =>
            {
                let is_changed = pull.request.shared && present.private;
                let info = match is_changed {
                    true => self.images.share(&name)?,
                    false => present,
                };
                Ok(Decision::Present(Box::new(info)))
            }
            Ok(present) => {
                let doing = format!("replace image {name}");
                self.check_owner(&pull.caller, &name, &doing)?;
                self.check_unused(&name, &doing)?;
                // Only root and the daemon's own user decide what other users run. If anybody else
                // replaces a shared image, the new image is private.
                let is_shared = !present.private && pull.caller.is_privileged();
                Ok(Decision::Replace { name, is_shared })
            }
            Err(e) if e.kind() == Kind::ImageNotFound => {
                self.keep(&mut pull.reserved, &name)?;
                Ok(Decision::Add(name))
            }
            Err(e) => Err(e),
        }
    }
}

impl ImageService {
    /// Builds a guest runtime unless there is a fresh one, because a pulled image cannot boot
    /// without it. The build waits for other builds. If one of those has built a runtime, nothing
    /// is left to do.
    pub(super) fn ensure_runtime(&self, op: &OpHandle) -> Result<()> {
        let (runtimes, commands) = (&self.guest_runtimes, self.commands.as_ref());
        if crate::image::runtime::fresh(runtimes, commands, op.cancel())?.is_some() {
            return Ok(());
        }
        let _admitted = self
            .build_admission
            .enter(op.cancel(), |_| op.progress("wait for another build"))?;
        self.build_runtime(op)
            .map_err(|e| e.context("build the guest runtime"))
    }

    /// Builds a guest runtime unless there is a fresh one. The caller must have been admitted to
    /// build.
    pub(super) fn build_runtime(&self, op: &OpHandle) -> Result<()> {
        let reporter = op.reporter();
        crate::image::runtime::ensure(
            &self.guest_runtimes,
            self.commands.as_ref(),
            op.cancel(),
            &mut |stage, done, total| {
                reporter.progress(&format!("guest runtime: {stage}"));
                reporter.progress_units(done, Some(total), "steps");
            },
        )
        .map(drop)
    }

    pub fn image_show(&self, caller: &Caller, name: &ImageRef) -> Result<ImageShowReply> {
        let info = self.find(caller, name)?;
        let details = self.images.details(&info.name)?;
        // The reply must fit into one frame. The history gets at most half of it, and everything
        // else fits into the other half.
        let history = crate::image::shorten_history(details.history, page::PAGE_BYTES_MAX);
        Ok(ImageShowReply {
            image: info.to_api(caller.uid, self.vms_of_image(&info.name)),
            config: info.config,
            layers: details.layers,
            history: history.steps,
            history_omitted: history.omitted,
        })
    }

    /// Gives an image an additional name, which belongs to the caller.
    pub fn image_tag(&self, caller: &Caller, request: &ImageTagRequest) -> Result<ImageReply> {
        // The guard prevents the image's deletion and replacement while its files are linked.
        let name = self.resolve(caller, &request.image);
        let (info, _in_use) = self.use_image(caller, &name)?;
        require_may_share(caller, request.shared)?;
        if request.shared && info.in_place.is_some() {
            let text = format!("share image {name}: its file can change at any time");
            return Err(Error::new(Kind::Unsupported, text)
                .hint(format!("copy it first: fcctl image promote {name}")));
        }
        let mut reserved = self.reserve(caller, self.pulls.config.pulls_per_uid_max)?;
        let name = self.new_name(caller, &request.name)?;
        self.reserve_new_name(&mut reserved, name.clone())?;
        // Prevent the kernel's deletion until the additional name refers to it.
        let kernel = info.kernel.as_ref();
        let _kernel = kernel
            .map(|name| self.kernel_service.use_kernel(name))
            .transpose()?;
        let files = DiskUse::of_directory(&info.dir)?;
        self.admit_files(caller, &reserved, files)?;
        self.core.effects.before("tag the image")?;
        let tag = Tag {
            new_name: &name,
            owner_uid: caller.uid,
            is_shared: request.shared,
        };
        let tagged = self.images.tag(&info.name, &tag)?;
        Ok(ImageReply {
            image: tagged.to_api(caller.uid, 0),
        })
    }

    /// Removes cached layers and unused guest runtimes. With `all`, also removes the caller's
    /// unused images.
    pub fn image_prune(
        &self,
        caller: &Caller,
        request: &ImagePruneRequest,
    ) -> Result<ImagePruneReply> {
        let mut reply = ImagePruneReply::default();
        if request.all {
            self.prune_images(caller, &mut reply)?;
        }
        // Layers and runtimes serve all users, so an ordinary user cannot remove them.
        if caller.is_privileged() {
            self.core.effects.before("remove the layers")?;
            let pruned = self.pulls.layers.prune()?;
            reply.layers = pruned.layers;
            reply.bytes += pruned.bytes;
            self.prune_runtimes(&mut reply)?;
        }
        Ok(reply)
    }

    /// Removes the caller's images that nothing uses. Counts as freed only files that no remaining
    /// image shares.
    fn prune_images(&self, caller: &Caller, reply: &mut ImagePruneReply) -> Result<()> {
        let mut freed = DiskUse::default();
        for info in self.images.list()? {
            let files = DiskUse::of_directory(&info.dir)?;
            let is_owned = info.owner_uid == Some(caller.uid);
            if is_owned && self.delete_exactly(caller, &info.name).is_ok() {
                freed.add(&files);
                reply.images.push(info.name.said_by(caller.uid));
            }
        }
        for info in self.images.list()? {
            freed.remove(&DiskUse::of_directory(&info.dir)?);
        }
        reply.bytes += freed.bytes();
        Ok(())
    }

    /// Removes the runtimes that no running VM and no snapshot uses. Keeps the newest, which the
    /// next boot uses. A boot that has just chosen an older runtime holds a guard until the VM's
    /// row names the runtime.
    fn prune_runtimes(&self, reply: &mut ImagePruneReply) -> Result<()> {
        let runtimes = self.guest_runtimes.list()?;
        let Ok(newest) = self.guest_runtimes.newest() else {
            return Ok(());
        };
        for runtime in runtimes {
            let Some(_deleting) = self.specs.runtime_uses.begin_delete(&runtime.id) else {
                continue;
            };
            let is_used = self.core.store.read(|s| {
                // A VM at rest boots with the newest runtime at its next start.
                let running = s.vms().filter(|row| !is_at_rest(row.state));
                let of_vms = running.map(|row| &row.shape);
                let of_snapshots = s.snapshots().map(|row| &row.shape);
                of_vms
                    .chain(of_snapshots)
                    .any(|shape| shape.runtime.as_ref() == Some(&runtime.id))
            });
            if !is_used && runtime.id != newest.id {
                self.core.effects.before("remove a guest runtime")?;
                self.guest_runtimes.delete(&runtime.id)?;
                reply.bytes += runtime.bytes;
                reply.runtimes.push(runtime.id.to_string());
            }
        }
        Ok(())
    }
}

impl Pull {
    fn describe(&self) -> String {
        match &self.request.source {
            PullSource::Registry { reference } => quoted(reference),
            PullSource::Archive { .. } => "the archive".to_owned(),
        }
    }

    fn source(&mut self, op: &OpHandle) -> Result<Source> {
        match (&self.request.source, self.fifo.take()) {
            (PullSource::Registry { reference }, fifo) => Ok(Source::Registry {
                reference: reference.clone(),
                credential: match fifo {
                    Some(fifo) => read_credential(fifo, op)?,
                    None => Credential::Anonymous,
                },
            }),
            (PullSource::Archive { format, reference }, Some(stream)) => Ok(Source::Archive {
                format: *format,
                reference: reference.clone(),
                stream,
            }),
            (PullSource::Archive { .. }, None) => Err(Error::internal("an archive has no stream")),
        }
    }

    /// Returns the name that the image gets on this host.
    fn name(&self, found: &Found) -> Result<ImageRef> {
        if let Some(name) = &self.request.name {
            return Ok(name.clone());
        }
        let no_name = |text: String| Error::invalid(text).hint("give it one: --name NAME");
        let name = found
            .name
            .as_deref()
            .ok_or_else(|| no_name("the image has no name".to_owned()))?;
        let name: ImageRef = name
            .parse()
            .map_err(|e: Error| no_name(format!("the name of the image: {e}")))?;
        Ok(name.with_default_tag())
    }
}

/// Decides for a pull under which name its image is published, and reports the pull's progress.
struct Follower<'a> {
    service: &'a ImageService,
    op: &'a OpHandle,
    pull: &'a mut Pull,
}

impl Observer for Follower<'_> {
    fn found(&mut self, found: &Found) -> Result<Decision> {
        let name = self.pull.name(found)?;
        let name = self.service.new_name(&self.pull.caller, &name)?;
        self.service.core.effects.before("reserve the name")?;
        self.service
            .admit_name(self.op, self.pull, name, &found.digest)
    }

    fn begin_replace(&mut self, name: &ImageRef) -> Result<Box<dyn Any>> {
        let doing = format!("replace image {name}");
        let guard = self.service.uses.begin_delete(name).ok_or_else(|| {
            let text = format!("{doing}: a VM is being created from it");
            Error::new(Kind::Busy, text).hint("pull it again in a moment")
        })?;
        self.service.check_unused(name, &doing)?;
        Ok(Box::new(guard))
    }

    fn begin_publish(&mut self, files: DiskUse) -> Result<()> {
        let (caller, reserved) = (&self.pull.caller, &self.pull.reserved);
        self.service.admit_files(caller, reserved, files)?;
        self.service.core.effects.before("publish the image")
    }

    fn progress(&mut self, progress: Progress) {
        self.op.reporter().replace(op::Progress {
            stage: progress.stage,
            done: Some(progress.done),
            total: progress.total,
            unit: Some("bytes".to_owned()),
            parts: progress.parts,
            parts_total: progress.parts_total,
        });
    }
}

fn require_may_share(caller: &Caller, is_shared: bool) -> Result<()> {
    if !is_shared || caller.is_privileged() {
        return Ok(());
    }
    let text = "only root and the user who runs fcd may share images";
    Err(Error::new(Kind::Denied, text).hint("leave out --shared"))
}

/// Checks the descriptors of a call and returns the FIFO, if there is one.
fn accept(source: &PullSource, fds: Vec<OwnedFd>) -> Result<Option<OwnedFd>> {
    let count = fds.len();
    let mut fds = fds.into_iter();
    let (fd, expected) = match source {
        PullSource::Registry { .. } => (fds.next(), "at most one descriptor"),
        PullSource::Archive { .. } if count == 1 => (fds.next(), ""),
        PullSource::Archive { .. } => (None, "one descriptor"),
    };
    let fits = match source {
        PullSource::Registry { .. } => count <= 1,
        PullSource::Archive { .. } => count == 1,
    };
    if !fits {
        let text = format!("image.pull takes {expected}, but got {count}");
        return Err(Error::new(Kind::InvalidRequest, text).hint("pass the read end of a FIFO"));
    }
    fd.map(|fd| fifo::accept(fd, Direction::Read)).transpose()
}

/// Reads a credential, whose text must not appear in an error.
fn read_credential(fifo: OwnedFd, op: &OpHandle) -> Result<Credential> {
    let doing = "read the registry's credential";
    let deadline = Instant::now() + CREDENTIAL_DEADLINE;
    let mut bytes = Vec::new();
    loop {
        let waited = wait_any(&[(fifo.as_fd(), PollFlags::POLLIN)], deadline, op.cancel());
        match waited.map_err(|e| Error::io(doing, e))? {
            WaitResult::Ready => {}
            WaitResult::Cancelled => return Err(cancelled_by(op.cancel())),
            WaitResult::Deadline => {
                let text = format!("{doing}: it did not arrive in time");
                return Err(Error::new(Kind::Timeout, text).hint("try again"));
            }
        }
        let mut piece = [0; 4096];
        match rustix::io::read(&fifo, &mut piece) {
            Ok(0) => break,
            Ok(len) => bytes.extend_from_slice(&piece[..len]),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::io(doing, std::io::Error::from(e))),
        }
        if bytes.len() > CREDENTIAL_BYTES_MAX {
            return Err(Error::invalid(format!(
                "{doing}: it is longer than {CREDENTIAL_BYTES_MAX} bytes"
            )));
        }
    }
    Credential::from_bytes(&bytes)
}
