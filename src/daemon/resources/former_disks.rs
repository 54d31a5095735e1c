//! The disks that a VM had before it went on from a snapshot. Until the guest runs they lie aside
//! and are put back when the start ends otherwise, whoever dies; from then on they only have to go.

use super::{Resource, Span};
use crate::daemon::resources::{Boot, Resources};
use crate::daemon::vm_dir::{CHANGES_FILE, DISK_FILE, WORK_DISK_FILE};
use crate::error::{Error, Result};
use crate::ids::VmId;
use crate::store::{LedgerRow, Tx, VmRow};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

const FORMER_DIR: &str = "former";
/// Of a device-mapper snapshot the disk is a node, which is made anew with its device.
const FILES: [&str; 3] = [DISK_FILE, CHANGES_FILE, WORK_DISK_FILE];

/// Aside: the start has not come to its end.
pub(super) struct FormerDisks;

/// Of a guest that runs.
pub(super) struct ReplacedDisks;

impl Resource for FormerDisks {
    fn kind(&self) -> &'static str {
        "former_disks"
    }
    fn span(&self) -> Span {
        Span::Start
    }
    /// Only a start from a snapshot has some: it writes them down itself.
    fn intent(&self, _resources: &Resources, _row: &VmRow) -> Option<String> {
        None
    }
    fn doing(&self) -> &'static str {
        "look for the disks that it had"
    }
    fn acquire(&self, _resources: &Resources, _boot: &mut Boot<'_>) -> Result<()> {
        Ok(())
    }

    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        let dir = dir_of(resources, name)?;
        let doing = || format!("put back the disks in {}", dir.join(FORMER_DIR).display());
        let put_back = || -> std::io::Result<()> {
            for file in FILES {
                ignore_absent(std::fs::remove_file(crate::disk::draft(&dir.join(file))))?;
                ignore_absent(std::fs::rename(dir.join(FORMER_DIR).join(file), dir.join(file)))?;
            }
            ignore_absent(File::open(&dir).and_then(|dir| dir.sync_all()))?;
            ignore_absent(std::fs::remove_dir(dir.join(FORMER_DIR)))
        };
        put_back().map_err(|e| Error::io(doing(), e))
    }

    /// None that is in no ledger: see [`set_aside`].
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
    fn intent(&self, _resources: &Resources, _row: &VmRow) -> Option<String> {
        None
    }
    fn doing(&self) -> &'static str {
        "look for disks that were replaced"
    }
    fn acquire(&self, _resources: &Resources, _boot: &mut Boot<'_>) -> Result<()> {
        Ok(())
    }

    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        let path = dir_of(resources, name)?.join(FORMER_DIR);
        crate::host::fs::remove_tree(&path).map_err(|e| Error::io(format!("remove {}", path.display()), e))
    }

    fn found(&self, _resources: &Resources) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// From now on the next daemon puts back what [`set_aside`] takes away. The row must be durable
/// before that.
pub(in crate::daemon) fn intend(tx: &mut Tx, row: &VmRow, tag: &str) -> u64 {
    tx.intend(Some(&row.id), row.generation, FormerDisks.kind(), tag)
}

/// Makes room for other disks of these names.
pub(in crate::daemon) fn set_aside(dir: &Path) -> Result<()> {
    let former = dir.join(FORMER_DIR);
    let io = |e: std::io::Error| Error::io(format!("set the disks aside in {}", former.display()), e);
    drop(crate::host::fs::create_private_dir(&former)?);
    for file in FILES {
        ignore_absent(std::fs::rename(dir.join(file), former.join(file))).map_err(io)?;
    }
    File::open(&former).and_then(|dir| dir.sync_all()).map_err(io)
}

/// The guest runs: nothing is put back from now on. In the change that says what the new disks are.
pub(in crate::daemon) fn let_go(tx: &mut Tx, former: u64, row: &VmRow, tag: &str) -> u64 {
    tx.strike(former);
    tx.intend(Some(&row.id), row.generation, ReplacedDisks.kind(), tag)
}

/// After that change. What cannot be removed goes when the VM comes to rest.
pub(in crate::daemon) fn remove(resources: &Resources, row: &VmRow, tag: &str, replaced: u64) {
    let (vm, kind, name) = (Some(row.id.clone()), ReplacedDisks.kind().to_owned(), tag.to_owned());
    let ledger = LedgerRow { id: replaced, vm, generation: row.generation, kind, name, facts: None };
    if let Err(e) = resources.release_row(&ReplacedDisks, &ledger) {
        log::warn!("{e}; it is tried again when vm {} comes to rest", row.name);
    }
}

fn dir_of(resources: &Resources, tag: &str) -> Result<PathBuf> {
    let vm = tag.rsplit('-').nth(1).and_then(|id| id.parse::<VmId>().ok());
    vm.map(|vm| resources.core.vm_dir(&vm)).ok_or_else(|| Error::internal(format!("{tag:?} names no VM")))
}

fn ignore_absent(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
