//! A VM's root disk. It is in the VM's directory and is removed with it.

use super::super::{Boot, BootStep, HostView, Resources};
use crate::api::daemon::Check;
use crate::daemon::disk_probe::probe;
use crate::disk::{self, CopySpec, Method, RootSpec};
use crate::error::{Error, Result};
use crate::image::InPlace;

pub(in super::super) struct RootDisk;

impl BootStep for RootDisk {
    fn stage(&self) -> &'static str {
        "prepare the disk"
    }

    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        if boot.restore.is_some() {
            // The snapshot's disk is already in place, with its original size.
            return Ok(());
        }
        resources.prepare_disk(boot)?;
        // The row now records how the disk was made.
        boot.row = resources.core.row(&boot.row.id)?;
        boot.spec = resources
            .specs
            .boot_spec(boot.restore, &boot.row, boot.image);
        Ok(())
    }
}

pub(in super::super) fn checks(host: &HostView<'_>) -> Vec<Check> {
    vec![disk_check(host)]
}

fn disk_check(host: &HostView<'_>) -> Check {
    let config = host.config;
    let dir = config.state_dir.display();
    match probe(
        &config.disk,
        host.vmm,
        super::super::existing(&config.state_dir),
    ) {
        Ok(probe) => Check::ok(
            "root-disk",
            format!(
                "root disks in {dir}: {} ({})",
                probe.method.name(),
                probe.reason
            ),
        ),
        Err(e) => Check::fail(
            "root-disk",
            e.to_string(),
            e.hint_text().unwrap_or("check the directory's permissions"),
        ),
    }
}

impl Resources {
    /// Decides again how root disks are made, because the first probe may have failed, for example
    /// on a full disk. A device-mapper snapshot is refused, because the claim did not put its
    /// device into the ledger.
    fn probe_again(&self) -> Result<Method> {
        let now = probe(&self.disk, self.vmm.as_ref(), &self.core.state_dir)?.method;
        match self.specs.disk_probe.as_ref() {
            Err(e) if now == Method::DmSnapshot => Err(e
                .clone()
                .hint("restart fcd; it will then be able to create root disks")),
            _ => Ok(now),
        }
    }

    fn prepare_disk(&self, boot: &Boot<'_>) -> Result<()> {
        crate::locks::may_block("file access");
        let (row, image, commands) = (&boot.row, boot.image, self.commands.as_ref());
        let method = self
            .specs
            .disk_method(row)
            .map_or_else(|| self.probe_again(), Ok)?;
        let path = self.specs.disk_path(&row.id, method);
        if row.disk_driver.is_some() && path.exists() {
            return disk::grow(commands, &path, method, row.shape.disk_bytes, boot.cancel);
        }
        let reporter = boot.op.reporter();
        let report = &mut |done, total| reporter.progress_units(done, Some(total), "bytes");
        let method = if let Some(in_place) = &image.in_place {
            self.copy_in_place(boot, in_place, report)?
        } else {
            let wanted = RootSpec {
                method,
                base: &image.rootfs,
                path: &path,
                size_bytes: row.shape.disk_bytes,
                owner: boot.spec.credentials,
            };
            disk::make_root(commands, &wanted, boot.cancel, report)?;
            method
        };
        let ticket = self.core.change_row(&row.id, false, |r| {
            r.disk_driver = Some(method.name().to_owned());
            r.guest_version = image.guest_version;
        })?;
        self.core.wait_durable(ticket)
    }

    /// Makes the disk of an image whose file belongs to a user. The VM gets a copy, because the
    /// user can change the file while the VM runs, and a VMM that opened its path could be led to
    /// another file.
    fn copy_in_place(
        &self,
        boot: &Boot<'_>,
        in_place: &InPlace,
        report: &mut dyn FnMut(u64, u64),
    ) -> Result<Method> {
        let image = boot.image;
        let file = image
            .open_in_place()?
            .ok_or_else(|| Error::internal("an image has no file"))?;
        boot.op.progress("copy the image's file");
        let wanted = CopySpec {
            base: &file,
            base_bytes: in_place.bytes,
            path: &self.specs.disk_path(&boot.row.id, Method::Copy),
            size_bytes: boot.row.shape.disk_bytes,
            owner: boot.spec.credentials,
        };
        let is_same = || image.require_same(&file);
        disk::copy_root(&wanted, &is_same, boot.cancel, report)
    }
}
