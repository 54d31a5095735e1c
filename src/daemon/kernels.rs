//! Imports, lists and deletes kernels that do not belong to an image. An import works without a
//! lock and publishes the kernel by a rename that never replaces anything.

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::core::Core;
use super::uses::{UseGuard, Uses};
use crate::api::kernel::{
    Kernel, KernelDeleteReply, KernelImportRequest, KernelListReply, KernelReply,
};
use crate::api::page::{self, ListRequest};
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use crate::host::plural::count;
use crate::ids::{ImageRef, KernelName};
use crate::image::kernels::Kernels;
use crate::image::kernels::{ImportSpec, KernelInfo};
use crate::image::{Boots, GuestRuntimes, ImageInfo, Images};
use serde_json::value::RawValue;
use std::sync::Arc;

/// The operations on kernels.
#[derive(Clone)]
pub struct KernelService {
    pub(super) core: Core,
    pub(super) commands: Arc<dyn Commands>,
    pub(super) images: Images,
    pub(super) guest_runtimes: GuestRuntimes,
    pub(super) kernels: Kernels,
    pub(super) uses: Uses<KernelName>,
}

impl KernelService {
    /// Begins to import a kernel from files on the host.
    pub fn kernel_import(
        &self,
        caller: &Caller,
        request: KernelImportRequest,
    ) -> Result<CallOutcome> {
        let KernelImportRequest {
            path,
            name,
            modules,
        } = request;
        if let Some(bad) = std::iter::once(&path)
            .chain(&modules)
            .find(|path| !path.is_absolute())
        {
            return Err(Error::invalid(format!(
                "import kernel {}: the path is not absolute",
                bad.display()
            ))
            .hint("use an absolute path, because the daemon has another working directory"));
        }
        if let Some(name) = name.as_ref().filter(|name| self.kernels.get(name).is_ok()) {
            return Err(
                Error::new(Kind::NameTaken, format!("kernel {name} already exists"))
                    .hint("choose another with --name"),
            );
        }
        let op = self
            .core
            .begin_op("kernel.import", None, caller.uid, true)?;
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, service, spec) = (
            op.id().clone(),
            self.clone(),
            ImportSpec {
                path,
                name,
                modules,
            },
        );
        self.core.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope("kernel.import".to_owned());
            op.progress("read the kernel");
            let imported = service.kernels.import(
                (&service.images, &service.guest_runtimes),
                service.commands.as_ref(),
                &spec,
                op.cancel(),
            );
            let result = imported.and_then(|info| {
                to_value(&KernelReply {
                    kernel: view(info, 0),
                })
            });
            service.core.end_op(op, result);
        })?;
        Ok(CallOutcome::Op(id))
    }

    pub fn kernel_list(&self, request: &ListRequest) -> Result<KernelListReply<Box<RawValue>>> {
        let mut infos = self.kernels.list()?;
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        let rest = infos.into_iter().filter(|info| {
            request
                .after
                .as_deref()
                .is_none_or(|after| info.name.as_str() > after)
        });
        let views = rest.map(|info| {
            let vms = self.vms_with_kernel(&info.name);
            (info.name.to_string(), view(info, vms))
        });
        let (kernels, next) = page::fill(request.limit, views)?;
        Ok(KernelListReply { kernels, next })
    }

    pub fn kernel_show(&self, name: &KernelName) -> Result<KernelReply> {
        Ok(KernelReply {
            kernel: view(self.kernels.get(name)?, self.vms_with_kernel(name)),
        })
    }

    /// Deletes a kernel that no VM and no snapshot uses. Kernels belong to the host, so the server
    /// lets only privileged callers delete them.
    pub fn kernel_delete(&self, name: &KernelName) -> Result<KernelDeleteReply> {
        let _delete_guard = self.uses.begin_delete(name).ok_or_else(|| {
            Error::new(
                Kind::Busy,
                format!(
                    "delete kernel {name}: it is being deleted, or a VM is being created with it"
                ),
            )
            .hint("try again in a moment: fcctl kernel list")
        })?;
        let snapshots = self.core.store.read(|s| {
            s.snapshots()
                .filter(|row| row.shape.kernel.as_ref() == Some(name))
                .count()
        });
        if let Some(image) = self.image_with_kernel(name)? {
            let text = format!("delete kernel {name}: it is the kernel of image {image}");
            return Err(Error::new(Kind::Conflict, text)
                .hint(format!("delete the image first: fcctl image rm {image}")));
        }
        match (self.vms_with_kernel(name), snapshots) {
            (0, 0) => self.kernels.delete(name).map(|()| KernelDeleteReply {
                deleted: name.clone(),
            }),
            (0, snapshots) => Err(Error::new(
                Kind::Conflict,
                format!(
                    "delete kernel {name}: it is used by {}",
                    count(snapshots as u64, "snapshot")
                ),
            )
            .hint("delete them first: fcctl snapshot list, fcctl snapshot delete")),
            (vms, _) => Err(Error::new(
                Kind::Conflict,
                format!("delete kernel {name}: it is used by {}", count(vms, "VM")),
            )
            .hint("delete them first: fcctl ps -a, fcctl rm")),
        }
    }

    /// Returns an image whose VMs boot the kernel by default.
    fn image_with_kernel(&self, name: &KernelName) -> Result<Option<ImageRef>> {
        let mut images = self.images.list()?.into_iter();
        let found = images.find(|image| image.kernel.as_ref() == Some(name));
        Ok(found.map(|image| image.name))
    }

    fn vms_with_kernel(&self, name: &KernelName) -> u64 {
        self.core.store.read(|s| {
            s.vms()
                .filter(|row| row.shape.kernel.as_ref() == Some(name))
                .count() as u64
        })
    }

    /// Checks that the kernel exists. The guard prevents its deletion. A row must name the kernel
    /// before the guard is dropped.
    pub(super) fn use_kernel(&self, name: &KernelName) -> Result<UseGuard<KernelName>> {
        let in_use = self.uses.begin_use(name).ok_or_else(|| {
            Error::new(
                Kind::KernelNotFound,
                format!("kernel {name} is being deleted"),
            )
            .hint("choose another: fcctl kernel list")
        })?;
        self.kernels.get(name)?;
        Ok(in_use)
    }

    /// Checks that the kernel exists, if one is named, and can boot the image.
    pub(super) fn check_kernel(&self, name: Option<&KernelName>, image: &ImageInfo) -> Result<()> {
        match name {
            Some(name) if image.boots == Boots::Runtime => {
                self.check_boots_runtime(name, &image.name)
            }
            Some(name) => self.kernels.get(name).map(drop),
            None => Ok(()),
        }
    }

    /// Checks that the kernel exists and can boot an image with a guest runtime.
    pub(super) fn check_boots_runtime(&self, name: &KernelName, image: &ImageRef) -> Result<()> {
        let kernel = self.kernels.get(name)?;
        if !kernel.boots_runtime {
            let text = format!(
                "kernel {name} was imported by an earlier fcd, and cannot boot image {image}"
            );
            return Err(Error::new(Kind::Unsupported, text).hint(format!(
                "run fcctl kernel delete {name}, then import it again"
            )));
        }
        Ok(())
    }
}

fn view(info: KernelInfo, vms: u64) -> Kernel {
    let KernelInfo {
        name,
        version,
        modules,
        boots_runtime: _,
        imported_at,
        bytes,
    } = info;
    Kernel {
        name,
        version,
        modules,
        imported_at,
        bytes,
        vms,
    }
}
