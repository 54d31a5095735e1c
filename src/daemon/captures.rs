//! Snapshots that are being made, and their directories.

use super::Daemon;
use super::boot::{DISK_FILE, WORK_DISK_FILE};
use super::uses::{InUse, Uses};
use crate::error::{Error, Kind, Result};
use crate::ids::{SnapshotId, VmId};
use crate::locks::{Mutex, Rank};
use crate::store::{SnapshotRow, VmRow};
use crate::vmm::Saved;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) const SNAPSHOTS_DIR: &str = "snapshots";

/// The snapshots that this daemon makes now, and of which VM each is.
#[derive(Clone)]
pub(super) struct Captures {
    making: Arc<Mutex<HashMap<SnapshotId, VmId>>>,
    /// Starts use snapshots.
    pub uses: Uses<SnapshotId>,
}

impl std::fmt::Debug for Captures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Captures")
    }
}

/// One of them, for as long as this lives.
pub(super) struct Capturing {
    captures: Captures,
    pub id: SnapshotId,
}

impl Drop for Capturing {
    fn drop(&mut self) {
        self.captures.making.lock().remove(&self.id);
    }
}

impl Captures {
    pub fn new() -> Self {
        Self { making: Arc::new(Mutex::new(Rank::Runtimes, HashMap::new())), uses: Uses::new() }
    }

    /// # Errors
    /// `busy` while another of this VM is made: its guest is stopped and let go as a whole.
    pub fn begin(&self, row: &VmRow) -> Result<Capturing> {
        let id = SnapshotId::random();
        let mut captures = self.making.lock();
        if captures.values().any(|vm| *vm == row.id) {
            return Err(Error::new(Kind::Busy, format!("vm {} is being saved already", row.name)).hint("fcctl op list"));
        }
        captures.insert(id.clone(), row.id.clone());
        drop(captures);
        Ok(Capturing { captures: self.clone(), id })
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
    pub _in_use: Option<Arc<InUse<SnapshotId>>>,
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

impl Daemon {
    pub(super) fn snapshots_dir(&self) -> PathBuf {
        self.config.state_dir.join(SNAPSHOTS_DIR)
    }

    pub(super) fn snapshot_files(&self, id: &SnapshotId) -> Files {
        Files::at(self.snapshots_dir().join(id.as_str()))
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
