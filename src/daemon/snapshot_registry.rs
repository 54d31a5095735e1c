//! Snapshots that are being made, and their directories.

use super::uses::{UseGuard, Uses};
use super::vm_dir::{DISK_FILE, WORK_DISK_FILE};
use crate::error::{Error, Kind, Result};
use crate::ids::{SnapshotId, VmId};
use crate::locks::{Mutex, Rank};
use crate::store::{SnapshotRow, VmRow};
use crate::vmm::Saved;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) const SNAPSHOTS_DIR: &str = "snapshots";

/// The snapshots that this daemon makes now, and of which VM each is.
#[derive(Clone)]
pub(super) struct SnapshotRegistry {
    /// The directory of all snapshots.
    dir: Arc<Path>,
    making: Arc<Mutex<HashMap<SnapshotId, VmId>>>,
    /// Starts use snapshots.
    pub uses: Uses<SnapshotId>,
}

impl std::fmt::Debug for SnapshotRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SnapshotRegistry")
    }
}

/// One of them, for as long as this lives.
pub(super) struct CreateGuard {
    registry: SnapshotRegistry,
    pub id: SnapshotId,
}

impl Drop for CreateGuard {
    fn drop(&mut self) {
        self.registry.making.lock().remove(&self.id);
    }
}

impl SnapshotRegistry {
    pub fn new(state_dir: &Path) -> Self {
        Self {
            dir: state_dir.join(SNAPSHOTS_DIR).into(),
            making: Arc::new(Mutex::new(Rank::Runtimes, HashMap::new())),
            uses: Uses::new(),
        }
    }

    /// # Errors
    /// `busy` while another of this VM is made: its guest is stopped and let go as a whole.
    pub fn begin(&self, row: &VmRow) -> Result<CreateGuard> {
        let id = SnapshotId::random();
        let mut making = self.making.lock();
        if making.values().any(|vm| *vm == row.id) {
            return Err(Error::new(Kind::Busy, format!("vm {} is being saved already", row.name)).hint("fcctl op list"));
        }
        making.insert(id.clone(), row.id.clone());
        drop(making);
        Ok(CreateGuard { registry: self.clone(), id })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The files of a snapshot.
    pub fn files(&self, id: &SnapshotId) -> Files {
        Files::at(self.dir.join(id.as_str()))
    }

    pub fn contains(&self, id: &SnapshotId) -> bool {
        self.making.lock().contains_key(id)
    }
}

/// Where the parts of a snapshot are.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub dir: PathBuf,
    /// For root alone.
    pub private: PathBuf,
    pub memory: PathBuf,
    pub devices: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub disk: PathBuf,
    pub work_disk: PathBuf,
}

impl Files {
    fn at(dir: PathBuf) -> Self {
        let path = |name: &str| dir.join(name);
        Self {
            private: path("private"),
            memory: path("private/memory"),
            devices: path("private/devices"),
            kernel: path("vmlinux"),
            initrd: path("initrd"),
            disk: path(DISK_FILE),
            work_disk: path(WORK_DISK_FILE),
            dir,
        }
    }
}

/// From where a boot goes on.
#[derive(Clone, Debug)]
pub(super) struct Restore {
    pub row: Arc<SnapshotRow>,
    pub files: Files,
    /// In another VM than it was saved of.
    pub elsewhere: bool,
    /// Of one that could be deleted meanwhile.
    pub _in_use: Option<Arc<UseGuard<SnapshotId>>>,
}

impl Restore {
    pub fn saved(&self) -> Saved {
        Saved { memory: self.files.memory.clone(), devices: self.files.devices.clone(), driver: self.row.driver.clone() }
    }

    /// What must be as it was then. Its disks become the VM's when they are there.
    pub fn enter(&self, row: &mut VmRow) {
        (row.vcpus, row.mem_mib) = (self.row.vcpus, self.row.mem_mib);
        (row.has_balloon, row.balloon_mib) = (self.row.has_balloon, self.row.balloon_mib);
        if row.disk_driver.is_none() {
            row.disk_driver = Some(self.row.disk_driver.clone());
            row.guest_version = self.row.guest_version;
        }
    }
}

/// What is in a directory takes on its file system, in bytes.
pub(super) fn allocated_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    // What others have a name for, too, is not this directory's.
    entries.filter_map(|e| e.metadata().ok()).filter(|m| m.nlink() == 1).map(|m| m.blocks() * 512).sum()
}

/// What a VM's own disks take, however many names they have.
pub(super) fn disk_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    // What they stand on is not copied.
    let own = entries.filter(|e| e.file_name() != "origin").filter_map(|e| e.metadata().ok());
    own.filter(std::fs::Metadata::is_file).map(|m| m.blocks() * 512).sum()
}

/// Opens a finished file of a snapshot and makes it read-only. VMMs with any uid may read it,
/// through a link or a descriptor that they are given; the private directory keeps everybody else
/// out.
pub(super) fn share_saved(path: &Path, credentials: Option<(u32, u32)>) -> Result<File> {
    let io = |e: std::io::Error| Error::io(format!("keep {}", path.display()), e);
    let file = crate::host::fs::open_nofollow(path)?;
    if credentials.is_some() {
        std::os::unix::fs::fchown(&file, Some(0), Some(0)).map_err(io)?;
    }
    let mode = if credentials.is_some() { 0o444 } else { 0o600 };
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode)).map_err(io)?;
    Ok(file)
}
