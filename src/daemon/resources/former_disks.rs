//! The disks that a VM had before it was restored from a snapshot. Until the guest runs they are
//! set aside, and they are restored if the start fails or the daemon dies. After that they only
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
/// For a device-mapper snapshot, `DISK_FILE` is a device node, which is made again with its device.
const FILES: [&str; 3] = [DISK_FILE, CHANGES_FILE, WORK_DISK_FILE];

/// Disks that are set aside while the start is in progress. A restore writes the ledger row: see
/// [`intend`].
pub(super) struct FormerDisks;

/// Disks that were replaced, of a VM that runs from the snapshot.
pub(super) struct ReplacedDisks;

impl Resource for FormerDisks {
    fn kind(&self) -> &'static str {
        "former_disks"
    }
    fn span(&self) -> Span {
        Span::Start
    }

    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
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

    /// They are always in the ledger: see [`set_aside`].
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

/// Writes the ledger row by which the next daemon restores the disks that [`set_aside`] moves away.
/// It must be durable before that.
pub(in crate::daemon) fn intend(tx: &mut Tx, row: &VmRow, tag: &str) -> u64 {
    tx.intend(Some(&row.id), row.generation, FormerDisks.kind(), tag)
}

/// Moves the disks away, so that others can take their names.
pub(in crate::daemon) fn set_aside(dir: &Path) -> Result<()> {
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

/// The guest runs, so the former disks are no longer restored but removed. Call it in the
/// transaction that records the new disks.
pub(in crate::daemon) fn mark_replaced(tx: &mut Tx, former: u64, row: &VmRow, tag: &str) -> u64 {
    tx.strike(former);
    tx.intend(Some(&row.id), row.generation, ReplacedDisks.kind(), tag)
}

/// Removes the replaced disks. Call it after that transaction. If this fails, it is retried when
/// the VM has stopped.
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
        log::warn!("{e}; retried when VM {} has stopped", row.name);
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
