//! The directory of a snapshot while it is being made or removed. The directory of a complete
//! snapshot has a row and is not in the ledger. A boot that restores a snapshot takes over its
//! disks here.

use super::former_disks;
use super::{Resource, Span};
use crate::daemon::resources::{Boot, Resources};
use crate::daemon::snapshot_registry::share_saved;
use crate::disk::Method;
use crate::disk::duplicate;
use crate::error::{Error, Kind, Result};
use crate::ids::SnapshotId;
use crate::store::SnapshotRow;
use crate::store::VmRow;
use crate::store::WorkspaceRow;
use std::path::Path;

pub(in crate::daemon) const KIND: &str = "snapshot";

pub(super) struct Snapshot;

impl Resource for Snapshot {
    fn kind(&self) -> &'static str {
        KIND
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, _resources: &Resources, _row: &VmRow) -> Option<String> {
        None
    }
    fn stage(&self) -> Option<&'static str> {
        Some("copy the snapshot's disks")
    }

    fn acquire(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        if boot.restore.is_none() {
            return Ok(());
        }
        resources.replace_disks(boot)
    }

    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        let id: SnapshotId = name.parse()?;
        let kept = || {
            Error::new(
                Kind::Busy,
                format!("remove snapshot {id}: it is being made or is complete"),
            )
        };
        if self.is_in_use(resources, name) {
            return Err(kept());
        }
        let dir = resources.snapshot_registry.files(&id).dir;
        crate::host::fs::remove_tree(&dir)
            .map_err(|e| Error::io(format!("remove {}", dir.display()), e))
    }

    fn found(&self, resources: &Resources) -> Result<Vec<String>> {
        let dir = resources.snapshot_registry.dir();
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(format!("list {}", dir.display()), e)),
        };
        let names = entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok());
        Ok(names
            .filter(|name| name.parse::<SnapshotId>().is_ok())
            .collect())
    }

    /// Check the registry first: between the two, a snapshot is in both.
    fn is_in_use(&self, resources: &Resources, name: &str) -> bool {
        let Ok(id) = name.parse() else { return true };
        resources.snapshot_registry.contains(&id)
            || resources.core.store.read(|s| s.snapshot(&id).is_some())
    }
}

impl Resources {
    /// Replaces the VM's disks by copies of the snapshot's. The VM's own disks are restored if the
    /// start fails: see [`Resources::keep_disks`].
    fn replace_disks(&self, boot: &mut Boot<'_>) -> Result<()> {
        let Some(restore) = boot.restore else {
            return Ok(());
        };
        let (from, saved) = (&restore.files, &restore.row);
        // Make all checks before the VM's own disks are moved away.
        self.vmm.warm_up(&from.kernel, boot.cancel);
        self.vmm.can_load(&saved.driver, restore.in_other_vm)?;
        for path in [&from.memory, &from.kernel, &from.initrd] {
            let len = std::fs::metadata(path)
                .map_err(|e| damaged(saved, path, &e.to_string()))?
                .len();
            if len == 0 {
                return Err(damaged(saved, path, "it is empty"));
            }
        }
        for path in [&from.memory, &from.devices] {
            // An earlier version gave them to a group of all VMMs.
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
            .change(|tx| Ok(former_disks::intend(tx, &boot.row, &boot.spec.tag)))?;
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
        boot.row.disk_bytes = saved.disk_bytes;
        Ok(())
    }

    /// The guest runs, so the VM keeps the new disks and takes over what the snapshot says about
    /// them.
    pub(in crate::daemon) fn keep_disks(&self, boot: &mut Boot<'_>) -> Result<()> {
        let (Some(restore), Some(former)) = (boot.restore, boot.former_disks.take()) else {
            return Ok(());
        };
        let (saved, row, tag) = (&restore.row, &boot.row, &boot.spec.tag);
        let workspace = saved.workspace.clone().map(|w| WorkspaceRow {
            vm: row.id.clone(),
            generation: row.generation,
            ..w
        });
        let guard = self.core.locks.vm.lock(&row.id);
        let (replaced, ticket) = self.core.store.change(|tx| {
            match workspace {
                Some(workspace) => tx.put_workspace(workspace)?,
                None => tx.remove_workspace(&row.id),
            }
            tx.update_vm(&guard, |row| {
                (row.disk_bytes, row.guest_version) = (saved.disk_bytes, saved.guest_version);
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
