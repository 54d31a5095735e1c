//! Makes an image of a VM's root disk, as `docker commit` does with a container.
//!
//! Only the stopped VM's disk is read, and no lock is held meanwhile. So a start or a delete of the
//! VM never waits: if one begins, the disk is no longer what was read, and the commit fails.

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::images::{ImageService, Reserved};
use crate::api::image::{Image, ImageCommitRequest, ImageReply};
use crate::api::vm::VmState;
use crate::disk::duplicate::Source;
use crate::disk::{Method, flatten};
use crate::error::{Error, Kind, Result};
use crate::image::{CommitSpec, ImageInfo};
use crate::ops::OpHandle;
use crate::store::VmRow;

/// A commit in progress.
struct Commit {
    caller: Caller,
    request: ImageCommitRequest,
    /// The VM, as it was when the commit began.
    row: VmRow,
    method: Method,
    reserved: Reserved,
}

impl ImageService {
    /// Begins to make an image of a stopped VM.
    ///
    /// # Errors
    /// `wrong_state` if the VM is not stopped or has no disk yet, `name_taken`, `conflict` if the
    /// VM is started meanwhile.
    pub fn image_commit(
        &self,
        caller: &Caller,
        request: &ImageCommitRequest,
    ) -> Result<CallOutcome> {
        const METHOD: &str = "image.commit";
        let core = &self.core;
        let row = core.resolve(caller, &request.vm)?;
        let method = self.disk_at_rest(&row)?;
        let name = self.new_name(caller, &request.image)?;
        let reserved = self.reserve_build(caller, name.clone())?;
        let op = core.begin_op(METHOD, None, caller.uid, true)?;
        if let Err(e) = core.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, service) = (op.id().clone(), self.clone());
        let commit = Commit {
            caller: *caller,
            request: ImageCommitRequest {
                image: name,
                ..request.clone()
            },
            row,
            method,
            reserved,
        };
        core.spawn(&format!("op-{id}"), move || {
            let row = &commit.row;
            let _label = crate::locks::operation_scope(format!("{METHOD} {}", row.id));
            let result = service
                .make_of_disk(&op, &commit)
                .map_err(|e| service.core.with_free_space(e))
                .map_err(|e| e.context(format!("make an image of VM {}", row.name)))
                .and_then(|image| to_value(&ImageReply { image }));
            drop(commit);
            service.core.end_op(op, result);
        })?;
        Ok(CallOutcome::Op(id))
    }

    /// Returns how the disk of a VM at rest was made.
    fn disk_at_rest(&self, row: &VmRow) -> Result<Method> {
        let refuse = |text: &str, hint: &str| {
            Err(
                Error::new(Kind::WrongState, format!("VM {} {text}", row.name))
                    .hint(format!("{hint} {}", row.name)),
            )
        };
        match row.state {
            VmState::Stopped | VmState::Failed => {}
            VmState::Created => return refuse("has no disk yet", "start it first: fcctl start"),
            _ => return refuse("is not stopped", "stop it first: fcctl stop"),
        }
        match self.specs.disk_method(row) {
            Some(method) => Ok(method),
            None => refuse("has no disk yet", "start it first: fcctl start"),
        }
    }

    fn make_of_disk(&self, op: &OpHandle, commit: &Commit) -> Result<Image> {
        let Commit {
            caller,
            request,
            row,
            method,
            reserved,
        } = commit;
        let _admitted = self
            .build_admission
            .enter(op.cancel(), |_| op.progress("wait for another build"))?;
        self.bytes_left(caller)?;
        let (base, _in_use) = self.use_image(caller, &row.shape.image)?;
        let spec = CommitSpec {
            name: request.image.clone(),
            base: &base,
            guest_version: row.guest_version,
            owner_uid: caller.uid,
            recipe: request.recipe.clone(),
            temporary: request.temporary,
        };
        op.progress("read the disk");
        self.core.effects.before("read the disk")?;
        let mut fill = |file: &std::fs::File| {
            self.read_disk(op, row, *method, &base, file)?;
            op.progress("publish");
            self.core.effects.before("publish the image")?;
            self.require_untouched(row)
        };
        let mut admit = |files| self.admit_files(caller, reserved, files);
        let (images, cancel) = (&self.images, op.cancel());
        let info = crate::image::commit(images, &spec, &mut fill, &mut admit, cancel)?;
        if info.temporary {
            self.delete_after_use(info.name.clone());
        }
        Ok(info.to_api(caller.uid, 0))
    }

    fn read_disk(
        &self,
        op: &OpHandle,
        row: &VmRow,
        method: Method,
        base: &ImageInfo,
        to: &std::fs::File,
    ) -> Result<()> {
        let source = Source {
            method: Some(method),
            path: &self.specs.disk_path(&row.id, method),
            base: &base.rootfs,
        };
        let reporter = op.reporter();
        let report = &mut |done, total| reporter.progress_units(done, Some(total), "bytes");
        flatten(&source, row.shape.disk_bytes, to, op.cancel(), report)
    }

    /// Fails if the VM was started or deleted while its disk was read.
    fn require_untouched(&self, row: &VmRow) -> Result<()> {
        let now = self.core.row(&row.id)?;
        if (now.generation, now.state) == (row.generation, row.state) {
            return Ok(());
        }
        Err(
            Error::new(Kind::Conflict, "the VM was started while its disk was read")
                .hint(format!("stop it, then try again: fcctl stop {}", row.name)),
        )
    }
}
