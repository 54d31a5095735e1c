//! The device of a root disk that is a device-mapper snapshot. Other disks do not have a device.
//! The name of the device is the VM's tag.

use super::{Boot, BootStep, Resource, Resources, Span};
use crate::disk::{Method, snapshot};
use crate::error::{Error, Result};
use crate::ids::Tag;
use crate::locks::Cancel;
use crate::store::VmRow;

pub(super) struct DiskDevice;

impl BootStep for DiskDevice {
    fn stage(&self) -> &'static str {
        "make the disk's device"
    }

    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        if resources.specs.disk_method(&boot.row) != Some(Method::DmSnapshot) {
            return Ok(());
        }
        let store = resources.specs.disk_path(&boot.row.id, Method::DmSnapshot);
        let spec = snapshot::DeviceSpec {
            name: boot.spec.tag.as_str(),
            origin: &crate::disk::origin(&store, &boot.image.rootfs),
            store: &store,
            size_bytes: boot.row.shape.disk_bytes,
            node: &boot.spec.disk,
            owner: boot.spec.credentials,
        };
        snapshot::activate(resources.commands.as_ref(), &spec, boot.cancel)
    }
}

impl Resource for DiskDevice {
    fn kind(&self) -> &'static str {
        "disk_device"
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, resources: &Resources, row: &VmRow) -> Option<String> {
        (resources.specs.disk_method(row) == Some(Method::DmSnapshot))
            .then(|| resources.core.tag(row).to_string())
    }
    /// Uses its own cancel token, because clean-up continues while the daemon closes.
    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        let cancel = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        let node = name.parse::<Tag>().ok().map(|tag| {
            resources
                .core
                .vm_dir(tag.vm())
                .join(crate::daemon::vm_dir::DISK_FILE)
        });
        snapshot::deactivate(resources.commands.as_ref(), name, node.as_deref(), &cancel)
    }

    fn found(&self, resources: &Resources) -> Result<Vec<String>> {
        snapshot::list(&resources.core.tag_prefix())
    }
}
