//! The disks that a VM had before it was restored from a snapshot. They are set aside until the
//! guest runs, and restored if the start fails or the daemon dies. Once the guest runs, they only
//! have to be removed.

use super::{Resource, Resources, Span};
use crate::daemon::vm_dir::{CHANGES_FILE, DISK_FILE, WORK_DISK_FILE};
use crate::error::{Error, Result};
use crate::ids::Tag;
use crate::store::{LedgerRow, Tx, VmRow};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

const FORMER_DIR: &str = "former";
/// The files that are set aside, if they exist. `DISK_FILE` is a device node if the disk is a
/// device-mapper snapshot. The node is recreated with the device.
const FILES: [&str; 3] = [DISK_FILE, CHANGES_FILE, WORK_DISK_FILE];

/// Disks that are set aside while the start is in progress. A restore writes the ledger row: see
/// [`intend`].
pub(super) struct FormerDisks;

/// The replaced disks of a VM that runs from the snapshot.
pub(super) struct ReplacedDisks;

impl Resource for FormerDisks {
    fn kind(&self) -> &'static str {
        "former_disks"
    }
    fn span(&self) -> Span {
        Span::Start
    }

    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        crate::locks::may_block("file access");
        let dir = dir_of(resources, name)?;
        let doing = || format!("restore the disks in {}", dir.join(FORMER_DIR).display());
        let restore = || -> std::io::Result<()> {
            for file in FILES {
                ignore_absent(std::fs::remove_file(crate::disk::draft(&dir.join(file))))?;
                ignore_absent(std::fs::rename(
                    dir.join(FORMER_DIR).join(file),
                    dir.join(file),
                ))?;
            }
            ignore_absent(File::open(&dir).and_then(|dir| dir.sync_all()))?;
            ignore_absent(std::fs::remove_dir(dir.join(FORMER_DIR)))
        };
        restore().map_err(|e| Error::io(doing(), e))
    }

    /// Disks that are set aside are always in the ledger: see [`set_aside`].
    fn found(&self, _resources: &Resources) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

impl Resource for ReplacedDisks {
    fn kind(&self) -> &'static str {
        "replaced_disks"
    }
    fn span(&self) -> Span {
        Span::Start
    }

    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        let path = dir_of(resources, name)?.join(FORMER_DIR);
        crate::host::fs::remove_tree(&path)
            .map_err(|e| Error::io(format!("remove {}", path.display()), e))
    }

    fn found(&self, _resources: &Resources) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// Writes the ledger row that lets the next daemon restore the disks. The row must be durable
/// before [`set_aside`] moves them away.
pub(in crate::daemon) fn intend(tx: &mut Tx, row: &VmRow, tag: &str) -> u64 {
    tx.intend(Some(&row.id), row.generation, FormerDisks.kind(), tag)
}

/// Moves the disks away, so that the snapshot's disks can take their names.
pub(in crate::daemon) fn set_aside(dir: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let former = dir.join(FORMER_DIR);
    let io =
        |e: std::io::Error| Error::io(format!("set aside the disks in {}", former.display()), e);
    drop(crate::host::fs::create_private_dir(&former)?);
    for file in FILES {
        ignore_absent(std::fs::rename(dir.join(file), former.join(file))).map_err(io)?;
    }
    File::open(&former)
        .and_then(|dir| dir.sync_all())
        .map_err(io)
}

/// Marks the former disks for removal, because the guest runs from the new disks. Call this in the
/// transaction that records the new disks.
pub(in crate::daemon) fn mark_replaced(tx: &mut Tx, former: u64, row: &VmRow, tag: &str) -> u64 {
    tx.strike(former);
    tx.intend(Some(&row.id), row.generation, ReplacedDisks.kind(), tag)
}

/// Removes the replaced disks. Call this after the transaction of [`mark_replaced`]. If the removal
/// fails, the ledger row stays, so a later clean-up retries it.
pub(in crate::daemon) fn remove(resources: &Resources, row: &VmRow, tag: &str, replaced: u64) {
    let (vm, kind, name) = (
        Some(row.id.clone()),
        ReplacedDisks.kind().to_owned(),
        tag.to_owned(),
    );
    let ledger = LedgerRow {
        id: replaced,
        vm,
        generation: row.generation,
        kind,
        name,
        facts: None,
    };
    if let Err(e) = resources.release_row(&ReplacedDisks, &ledger) {
        log::warn!("{e}; retrying when VM {} has stopped", row.name);
    }
}

fn dir_of(resources: &Resources, tag: &str) -> Result<PathBuf> {
    tag.parse().map(|tag: Tag| resources.core.vm_dir(tag.vm()))
}

fn ignore_absent(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
