//! Copies the file of a registered image into the store. VMs of the image keep their disks, and
//! start without the file from then on.

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::images::{ImageService, Reserved};
use crate::api::image::{Image, ImageReply};
use crate::error::Result;
use crate::ids::ImageRef;
use crate::image::DiskUse;
use crate::ops::OpHandle;
use std::fs::File;

impl ImageService {
    /// Begins to copy the file of an image into the store. Nothing else can publish or delete an
    /// image of that name meanwhile.
    ///
    /// # Errors
    /// `image_not_found`, `denied`, `busy`.
    pub fn image_promote(&self, caller: &Caller, name: &ImageRef) -> Result<CallOutcome> {
        const METHOD: &str = "image.promote";
        let name = self.resolve(caller, name);
        let doing = format!("promote image {}", name.said_by(caller.uid));
        self.check_owner(caller, &name, &doing)?;
        let (_, in_use) = self.use_image(caller, &name)?;
        let max = self.pulls.config.pulls_per_uid_max;
        let mut reserved = self
            .reserve_work(caller, max)
            .map_err(|e| e.context(&doing))?;
        self.reserve_name(&mut reserved, name.clone())?;
        let op = self.core.begin_op(METHOD, None, caller.uid, true)?;
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, service, caller) = (op.id().clone(), self.clone(), *caller);
        self.core.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope(format!("{METHOD} {name}"));
            let result = service
                .promote(&op, &caller, &name, &reserved)
                .map_err(|e| service.core.with_free_space(e).context(doing))
                .and_then(|image| to_value(&ImageReply { image }));
            drop((in_use, reserved));
            service.core.end_op(op, result);
        })?;
        Ok(CallOutcome::Op(id))
    }

    fn promote(
        &self,
        op: &OpHandle,
        caller: &Caller,
        name: &ImageRef,
        reserved: &Reserved,
    ) -> Result<Image> {
        let _admitted = self
            .pulls
            .admission
            .enter_as(caller.uid, op.cancel(), |_| op.progress("wait for a pull"))?;
        op.progress("copy the file");
        let mut copy = |from: &File, to: &File| {
            self.copy_file(op, caller, from, to)?;
            self.admit_files(caller, reserved, DiskUse::of_file(to)?)?;
            self.core.effects.before("publish the image")
        };
        let info = crate::image::promote(&self.images, name, &mut copy, op.cancel())?;
        Ok(info.to_api(caller.uid, self.vms_of_image(name)))
    }
}
