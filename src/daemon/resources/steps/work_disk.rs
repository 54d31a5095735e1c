//! The second disk of VMs that were created with one. It is in the VM's directory and is removed
//! with it.

use super::super::{Boot, BootStep, HostView, Resources};
use crate::api::daemon::Check;
use crate::disk::work;
use crate::error::Result;

pub(in super::super) struct WorkDisk;

impl BootStep for WorkDisk {
    fn stage(&self) -> &'static str {
        "prepare the work disk"
    }

    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        crate::locks::may_block("file access");
        let (Some(path), Some(bytes)) = (&boot.spec.work_disk, boot.row.shape.work_disk_bytes)
        else {
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
}

pub(in super::super) fn checks(_host: &HostView<'_>) -> Vec<Check> {
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
