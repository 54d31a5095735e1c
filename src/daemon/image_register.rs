//! Registers a user's file as an image.
//!
//! The user passes a descriptor of the file, so the daemon never opens what the user may not open.
//! The file stays where it is and belongs to the user, who may change it at any time. So each start
//! compares it with what was registered ([`crate::image::InPlace`]), and each VM gets a copy of it.

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::image_reserve::DELETE_HINT;
use super::images::{ImageService, Reserved};
use super::uses::UseGuard;
use crate::api::image::{Image, ImageRegisterRequest, ImageReply};
use crate::error::{Error, Kind, Result};
use crate::host::fs::space;
use crate::ids::KernelName;
use crate::image::{DiskUse, InPlace, RegisterSpec, Steps};
use crate::ops::OpHandle;
use std::fs::File;
use std::os::fd::OwnedFd;

/// The space that a copy leaves free on the host's disk.
const SPARE_BYTES: u64 = 256 << 20;

/// A registration in progress.
struct Registration {
    file: InPlace,
    request: ImageRegisterRequest,
    _reserved: Reserved,
    /// Prevents the deletion of the kernel until the image names it.
    _kernel: Option<UseGuard<KernelName>>,
}

impl ImageService {
    /// Begins to register the file whose descriptor is passed.
    ///
    /// # Errors
    /// `invalid_argument` or `denied` unless the descriptor refers to a regular file of the caller,
    /// `name_taken`, `kernel_not_found`, `busy`, `exhausted`.
    pub fn image_register(
        &self,
        caller: &Caller,
        mut request: ImageRegisterRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<CallOutcome> {
        const METHOD: &str = "image.register";
        let said = request.image.without_owner();
        let doing = |e: Error| e.context(format!("register image {said}"));
        request.image = self.new_name(caller, &request.image)?;
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| {
            let text = format!("image.register takes one descriptor, but got {}", fds.len());
            Error::new(Kind::InvalidRequest, text).hint("pass an open file; fcctl does")
        })?;
        let file = InPlace::accept(&fd, caller.uid).map_err(doing)?;
        let max = self.pulls.config.pulls_per_uid_max;
        let mut reserved = self.reserve(caller, max).map_err(doing)?;
        self.reserve_new_name(&mut reserved, request.image.clone())?;
        let kernels = &self.kernel_service;
        let kernel = request.kernel.as_ref();
        let kernel = kernel.map(|name| {
            let in_use = kernels.use_kernel(name)?;
            kernels.check_boots_runtime(name, &request.image)?;
            Ok(in_use)
        });
        let registration = Registration {
            file,
            _reserved: reserved,
            _kernel: kernel.transpose().map_err(doing)?,
            request,
        };
        let op = self.core.begin_op(METHOD, None, caller.uid, true)?;
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, service, caller) = (op.id().clone(), self.clone(), *caller);
        self.core.spawn(&format!("op-{id}"), move || {
            let name = registration.request.image.clone();
            let _label = crate::locks::operation_scope(format!("{METHOD} {name}"));
            let result = service
                .register(&op, &caller, &registration)
                .map_err(|e| service.core.with_free_space(e))
                .map_err(|e| e.context(format!("register image {said}")))
                .and_then(|image| to_value(&ImageReply { image }));
            drop(registration);
            service.core.end_op(op, result);
        })?;
        Ok(CallOutcome::Op(id))
    }

    fn register(&self, op: &OpHandle, caller: &Caller, asked: &Registration) -> Result<Image> {
        let admitted = self
            .pulls
            .admission
            .enter_as(caller.uid, op.cancel(), |_| op.progress("wait for a pull"))?;
        op.progress("check the file system");
        self.core.effects.before("check the file system")?;
        let spec = RegisterSpec {
            name: asked.request.image.clone(),
            file: &asked.file,
            kernel: asked.request.kernel.clone(),
            owner_uid: caller.uid,
            helper: self.pulls.helper,
        };
        let mut steps = Steps {
            copy: &mut |from, to| self.copy_file(op, caller, from, to),
            publish: &mut || self.core.effects.before("publish the image"),
        };
        let commands = self.commands.as_ref();
        let info = crate::image::register(&self.images, commands, &spec, &mut steps, op.cancel())?;
        drop(admitted);
        self.core.effects.before("provide the guest runtime")?;
        if self.guest_runtimes.newest().is_err() {
            self.ensure_runtime(op)?;
        }
        Ok(info.to_api(caller.uid, 0))
    }

    /// Copies a file into the state directory if there is room for it and the caller's limit allows
    /// it.
    pub(super) fn copy_file(
        &self,
        op: &OpHandle,
        caller: &Caller,
        from: &File,
        to: &File,
    ) -> Result<()> {
        let bytes = DiskUse::of_file(from)?.bytes();
        let left = self.bytes_left(caller)?;
        if bytes > left {
            let text = format!("the file takes {bytes} bytes, but you have {left} left");
            return Err(Error::new(Kind::Exhausted, text).hint(DELETE_HINT));
        }
        let needed = bytes + SPARE_BYTES;
        let free = space(&self.core.state_dir)?.free_bytes;
        if free < needed {
            let text = format!("a copy needs {needed} free bytes, but the host has {free}");
            return Err(Error::new(Kind::DiskFull, text).hint("free some space (df -h)"));
        }
        self.core.effects.before("copy the file")?;
        let reporter = op.reporter();
        let report = &mut |done, total| reporter.progress_units(done, Some(total), "bytes");
        crate::disk::share_or_copy(from, to, op.cancel(), report).map(drop)
    }
}
