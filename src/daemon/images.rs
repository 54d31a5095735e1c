//! Image builds: the name is reserved under `image_ops`, the work runs with no lock; a build publishes itself by a
//! rename that refuses to replace.

use super::{Begun, Caller, Daemon, to_value};
use crate::api::image::{Image, ImageBuildRequest, ImageListReply, ImageReply};
use crate::api::page::{self, ListRequest};
use crate::error::{Error, Kind, Result};
use crate::ids::ImageRef;
use crate::image::{BuildSpec, DISK_BYTES_DEFAULT};
use crate::ops::OpHandle;
use serde_json::value::RawValue;
use std::collections::HashMap;

/// A name under which an image is being built; given back when dropped.
struct Reserved {
    daemon: Daemon,
    name: ImageRef,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.daemon.building.lock().remove(&self.name);
    }
}

impl Daemon {
    /// An operation. Any caller may build: an image belongs to the host.
    pub fn image_build(&self, caller: &Caller, request: &ImageBuildRequest) -> Result<Begun> {
        let name = request.name.clone().unwrap_or_else(|| self.config.vm.image.clone());
        let spec = BuildSpec { name: name.clone(), include: request.include.clone(), disk_bytes: DISK_BYTES_DEFAULT };
        let reserved = self.reserve_image(name)?;
        let op = self.begin_op("image.build", None, caller.uid, true)?;
        if let Err(e) = self.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, daemon) = (op.id().clone(), self.clone());
        self.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope(format!("image.build {}", reserved.name));
            let result = daemon.build_image(&op, &spec).and_then(|image| to_value(&ImageReply { image }));
            drop(reserved);
            daemon.end_op(op, result);
        })?;
        Ok(Begun::Op(id))
    }

    fn reserve_image(&self, name: ImageRef) -> Result<Reserved> {
        // A damaged one is in the way, too.
        if !self.images.get(&name).is_err_and(|e| e.kind() == Kind::ImageNotFound) {
            return Err(Error::new(Kind::NameTaken, format!("there is an image {name} already"))
                .hint("images never change once they are made: build one under another name: fcctl image build NAME"));
        }
        let _images = self.locks.image_ops.lock(&());
        if !self.building.lock().insert(name.clone()) {
            return Err(Error::new(Kind::Busy, format!("image {name} is being built")).hint("fcctl op list"));
        }
        Ok(Reserved { daemon: self.clone(), name })
    }

    fn build_image(&self, op: &OpHandle, spec: &BuildSpec) -> Result<Image> {
        let reporter = op.reporter();
        let info = crate::image::build(&self.images, self.commands.as_ref(), spec, op.cancel(), &mut |stage, done, total| {
            reporter.progress(stage);
            reporter.progress_units(done, Some(total), "steps");
        })?;
        Ok(info.to_api(0))
    }

    pub fn image_list(&self, request: &ListRequest) -> Result<ImageListReply<Box<RawValue>>> {
        let mut vms: HashMap<ImageRef, u64> = HashMap::new();
        self.store.read(|s| s.vms().for_each(|row| *vms.entry(row.image.clone()).or_default() += 1));
        let mut infos = self.images.list()?;
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        let rest = infos.into_iter().filter(|info| request.after.as_deref().is_none_or(|after| info.name.as_str() > after));
        let views = rest.map(|info| (info.name.to_string(), info.to_api(vms.get(&info.name).copied().unwrap_or(0))));
        let (images, next) = page::fill(request.limit, views)?;
        Ok(ImageListReply { images, next })
    }
}
