//! The second disk of VMs that were created with one. It is in the VM's directory and is removed
//! with it.

use super::{HostView, Resource, Span};
use crate::api::daemon::Check;
use crate::daemon::resources::{Boot, Resources};
use crate::disk::work;
use crate::error::Result;
use crate::store::VmRow;

pub(super) struct WorkDisk;

impl Resource for WorkDisk {
    fn kind(&self) -> &'static str {
        "work_disk"
    }
    fn span(&self) -> Span {
        Span::Life
    }
    fn intent(&self, _resources: &Resources, _row: &VmRow) -> Option<String> {
        None
    }
    fn stage(&self) -> Option<&'static str> {
        Some("prepare the work disk")
    }

    fn acquire(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        let (Some(path), Some(bytes)) = (&boot.spec.work_disk, boot.row.work_disk_bytes) else {
            return Ok(());
        };
        boot.needs_guest("a work disk")?;
        if path.exists() {
            return Ok(());
        }
        work::make(
            resources.commands.as_ref(),
            path,
            bytes,
            boot.spec.credentials,
            boot.cancel,
        )
    }

    fn release(&self, _resources: &Resources, _name: &str) -> Result<()> {
        Ok(())
    }
    fn found(&self, _resources: &Resources) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn checks(&self, _host: &HostView<'_>) -> Vec<Check> {
        const ID: &str = "work-disk";
        if crate::host::command::find_program(work::MKFS.as_ref()).is_some() {
            return vec![Check::ok(
                ID,
                format!("work disks can be made ({})", work::MKFS),
            )];
        }
        vec![Check::warn(
            ID,
            format!(
                "{} is not installed, so VMs cannot have a work disk",
                work::MKFS
            ),
            "apt install e2fsprogs",
        )]
    }
}
