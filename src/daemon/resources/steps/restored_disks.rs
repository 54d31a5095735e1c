//! The disks of a restored snapshot. A boot from a snapshot replaces the VM's own disks with copies
//! of the snapshot's disks.

use super::super::former_disks;
use super::super::{Boot, BootStep, Resources};
use crate::daemon::snapshot_registry::share_saved;
use crate::disk::{Method, duplicate};
use crate::error::{Error, Kind, Result};
use crate::store::{SnapshotRow, WorkspaceRow};
use std::path::Path;

pub(in super::super) struct RestoredDisks;

impl BootStep for RestoredDisks {
    fn stage(&self) -> &'static str {
        "copy the snapshot's disks"
    }

    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        resources.replace_disks(boot)
    }
}

impl Resources {
    /// Replaces the VM's disks with copies of the snapshot's disks. The VM's own disks are restored
    /// if the start fails: see [`Resources::keep_disks`].
    fn replace_disks(&self, boot: &mut Boot<'_>) -> Result<()> {
        crate::locks::may_block("file access");
        let Some(restore) = boot.restore else {
            return Ok(());
        };
        let (from, saved) = (&restore.files, &restore.row);
        // Make all checks before the VM's own disks are moved away.
        self.vmm.warm_up(&from.kernel, boot.cancel);
        self.vmm.can_load(&saved.driver, restore.in_other_vm)?;
        let runtime = saved.shape.runtime.as_ref().map(|_| &from.runtime);
        for path in [&from.memory, &from.kernel, &from.initrd]
            .into_iter()
            .chain(runtime)
        {
            let len = std::fs::metadata(path)
                .map_err(|e| damaged(saved, path, &e.to_string()))?
                .len();
            if len == 0 {
                return Err(damaged(saved, path, "it is empty"));
            }
        }
        for path in [&from.memory, &from.devices] {
            // Share the files again, because an earlier version gave all VMMs access to the saved
            // state through a common group.
            share_saved(path, boot.spec.credentials)
                .map_err(|e| damaged(saved, path, &e.to_string()))?;
        }
        let method = Method::from_name(&saved.disk_driver).ok_or_else(|| {
            Error::new(
                Kind::Unsupported,
                format!(
                    "snapshot {}: unknown kind of disk {}",
                    saved.name, saved.disk_driver
                ),
            )
        })?;
        let root = duplicate::Source {
            method: Some(method),
            path: &from.disk,
            base: &boot.image.rootfs,
        };
        let work = boot.spec.work_disk.clone().map(|to| {
            (
                duplicate::Source {
                    method: None,
                    path: &from.work_disk,
                    base: &from.work_disk,
                },
                to,
            )
        });
        let reporter = boot.op.reporter();
        let report = &mut |done, total| reporter.progress_units(done, Some(total), "bytes");
        let (former, ticket) = self
            .core
            .store
            .change(|tx| Ok(former_disks::intend(tx, &boot.row, boot.spec.tag.as_str())))?;
        self.core.wait_durable(ticket)?;
        boot.former_disks = Some(former);
        let mut copied = Vec::new();
        for (source, to) in
            std::iter::once((root, self.specs.disk_path(&boot.row.id, method))).chain(work)
        {
            copied.push(duplicate::copy(
                self.commands.as_ref(),
                &source,
                &to,
                boot.spec.credentials,
                boot.cancel,
                report,
            )?);
        }
        self.core.effects.before("set the disks aside")?;
        former_disks::set_aside(&boot.spec.dir)?;
        self.core.effects.before("replace the disks")?;
        copied
            .into_iter()
            .try_for_each(duplicate::Copied::publish)?;
        // The store's row still describes the former disks.
        boot.row.shape.disk_bytes = saved.shape.disk_bytes;
        Ok(())
    }

    /// Keeps the new disks, because the guest runs: copies their description from the snapshot to
    /// the VM, and removes the former disks. Does nothing if the boot restores no snapshot.
    pub(in crate::daemon) fn keep_disks(&self, boot: &mut Boot<'_>) -> Result<()> {
        let (Some(restore), Some(former)) = (boot.restore, boot.former_disks.take()) else {
            return Ok(());
        };
        let (saved, row, tag) = (&restore.row, &boot.row, boot.spec.tag.as_str());
        let workspace = saved.workspace.clone().map(|w| WorkspaceRow {
            vm: row.id.clone(),
            generation: row.generation,
            ..w
        });
        let guard = self.core.locks.vm.lock(&row.id);
        let (replaced, ticket) = self.core.store.change(|tx| {
            tx.reset_workspace(&guard, workspace)?;
            tx.update_vm(&guard, |row| {
                (row.shape.disk_bytes, row.guest_version) =
                    (saved.shape.disk_bytes, saved.guest_version);
                row.disk_driver = Some(saved.disk_driver.clone());
            })?;
            Ok(former_disks::mark_replaced(tx, former, row, tag))
        })?;
        drop(guard);
        self.core.wait_durable(ticket)?;
        former_disks::remove(self, row, tag, replaced);
        Ok(())
    }
}

fn damaged(snapshot: &SnapshotRow, path: &Path, why: &str) -> Error {
    Error::new(
        Kind::Host,
        format!(
            "snapshot {} is damaged: {}: {why}",
            snapshot.name,
            path.display()
        ),
    )
    .hint(format!(
        "delete it: fcctl snapshot delete {}",
        snapshot.name
    ))
}
