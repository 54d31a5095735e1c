//! Kernels beside those of images. An import works with no lock and publishes itself by a rename that refuses to replace.

use super::uses::InUse;
use super::{Begun, Caller, Daemon, to_value};
use crate::api::kernel::{Kernel, KernelDeleteReply, KernelImportRequest, KernelListReply, KernelReply};
use crate::api::page::{self, ListRequest};
use crate::error::{Error, Kind, Result};
use crate::ids::KernelName;
use crate::image::kernels::{ImportSpec, KernelInfo};
use serde_json::value::RawValue;

impl Daemon {
    /// An operation.
    pub fn kernel_import(&self, caller: &Caller, request: KernelImportRequest) -> Result<Begun> {
        let KernelImportRequest { path, name, modules } = request;
        if !self.is_privileged(caller) {
            return Err(Error::new(Kind::Denied, "import a kernel: the daemon would read files for you that you may not")
                .hint("let root do it; every VM may boot it then"));
        }
        if let Some(bad) = std::iter::once(&path).chain(&modules).find(|path| !path.is_absolute()) {
            return Err(Error::invalid(format!("import kernel {}: the path is not absolute", bad.display()))
                .hint("the daemon has another working directory"));
        }
        if let Some(name) = name.as_ref().filter(|name| self.kernels.get(name).is_ok()) {
            return Err(Error::new(Kind::NameTaken, format!("kernel {name} already exists")).hint("choose another with --name"));
        }
        let op = self.begin_op("kernel.import", None, caller.uid, true)?;
        if let Err(e) = self.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, daemon, spec) = (op.id().clone(), self.clone(), ImportSpec { path, name, modules });
        self.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope("kernel.import".to_owned());
            op.progress("read the kernel");
            let imported = daemon.kernels.import(&daemon.images, daemon.commands.as_ref(), &spec, op.cancel());
            let result = imported.and_then(|info| to_value(&KernelReply { kernel: view(info, 0) }));
            daemon.end_op(op, result);
        })?;
        Ok(Begun::Op(id))
    }

    pub fn kernel_list(&self, request: &ListRequest) -> Result<KernelListReply<Box<RawValue>>> {
        let mut infos = self.kernels.list()?;
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        let rest = infos.into_iter().filter(|info| request.after.as_deref().is_none_or(|after| info.name.as_str() > after));
        let views = rest.map(|info| {
            let vms = self.boots(&info.name);
            (info.name.to_string(), view(info, vms))
        });
        let (kernels, next) = page::fill(request.limit, views)?;
        Ok(KernelListReply { kernels, next })
    }

    pub fn kernel_show(&self, name: &KernelName) -> Result<KernelReply> {
        Ok(KernelReply { kernel: view(self.kernels.get(name)?, self.boots(name)) })
    }

    /// Kernels belong to the host.
    pub fn kernel_delete(&self, caller: &Caller, name: &KernelName) -> Result<KernelDeleteReply> {
        if !self.is_privileged(caller) {
            return Err(Error::new(Kind::Denied, format!("delete kernel {name}: it belongs to the host")).hint("let root do it"));
        }
        let _deleting = self.kernel_uses.begin_delete(name).ok_or_else(|| {
            Error::new(Kind::Busy, format!("delete kernel {name}: it is being deleted, or a VM is being made with it"))
                .hint("see what is there in a moment: fcctl kernel list")
        })?;
        let snapshots = self.store.read(|s| s.snapshots().filter(|row| row.kernel.as_ref() == Some(name)).count());
        match (self.boots(name), snapshots) {
            (0, 0) => self.kernels.delete(name).map(|()| KernelDeleteReply { deleted: name.clone() }),
            (0, snapshots) => {
                Err(Error::new(Kind::Conflict, format!("delete kernel {name}: VMs of {snapshots} snapshots boot it"))
                    .hint("delete them first: fcctl snapshot list, fcctl snapshot delete"))
            }
            (vms, _) => Err(Error::new(Kind::Conflict, format!("delete kernel {name}: {vms} VMs boot it"))
                .hint("delete them first: fcctl ps -a, fcctl rm")),
        }
    }

    fn boots(&self, name: &KernelName) -> u64 {
        self.store.read(|s| s.vms().filter(|row| row.kernel.as_ref() == Some(name)).count() as u64)
    }

    /// Checks that the kernel is there. It stays until the result is dropped; from then on a row has to name it.
    pub(super) fn use_kernel(&self, name: &KernelName) -> Result<InUse<KernelName>> {
        let in_use = self.kernel_uses.begin_use(name).ok_or_else(|| {
            Error::new(Kind::KernelNotFound, format!("kernel {name} is being deleted")).hint("choose another: fcctl kernel list")
        })?;
        self.kernels.get(name)?;
        Ok(in_use)
    }

    /// Checks that the kernel is there.
    pub(super) fn check_kernel(&self, name: Option<&KernelName>) -> Result<()> {
        name.map_or(Ok(()), |name| self.kernels.get(name).map(drop))
    }
}

fn view(info: KernelInfo, vms: u64) -> Kernel {
    let KernelInfo { name, version, modules, imported_at, bytes } = info;
    Kernel { name, version, modules, imported_at, bytes, vms }
}
