//! Tracks the snapshots that are being made, and provides the paths of the files of all snapshots.

use super::uses::{UseGuard, Uses};
use super::vm_dir::{DISK_FILE, ENV_FILE, WORK_DISK_FILE};
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::ids::{SnapshotId, VmId};
use crate::locks::{Mutex, Rank};
use crate::sched::HashMap;
use crate::store::{SnapshotRow, VmRow};
use crate::vmm::Saved;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) const SNAPSHOTS_DIR: &str = "snapshots";

/// The snapshots that this daemon is making, each with its VM, and the snapshots that starts use.
#[derive(Clone)]
pub(super) struct SnapshotRegistry {
    /// The directory of all snapshots.
    dir: Arc<Path>,
    in_progress: Arc<Mutex<HashMap<SnapshotId, VmId>>>,
    /// Snapshots in use by starts.
    pub uses: Uses<SnapshotId>,
}

impl std::fmt::Debug for SnapshotRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SnapshotRegistry")
    }
}

/// Marks a snapshot as being made until this is dropped.
pub(super) struct CreateGuard {
    registry: SnapshotRegistry,
    pub id: SnapshotId,
}

impl Drop for CreateGuard {
    fn drop(&mut self) {
        self.registry.in_progress.lock().remove(&self.id);
    }
}

impl SnapshotRegistry {
    pub(super) fn new(state_dir: &Path) -> Self {
        Self {
            dir: state_dir.join(SNAPSHOTS_DIR).into(),
            in_progress: Arc::new(Mutex::new(Rank::Runtimes, HashMap::default())),
            uses: Uses::new(),
        }
    }

    /// Begins a snapshot of a VM under a new ID.
    ///
    /// # Errors
    /// `busy` while another snapshot of this VM is being made, because the two would pause and
    /// resume the guest independently.
    pub(super) fn begin(&self, row: &VmRow) -> Result<CreateGuard> {
        let id = SnapshotId::random();
        let mut in_progress = self.in_progress.lock();
        if in_progress.values().any(|vm| *vm == row.id) {
            return Err(Error::new(
                Kind::Busy,
                format!("VM {} is being saved already", row.name),
            )
            .hint("fcctl op list"));
        }
        in_progress.insert(id.clone(), row.id.clone());
        drop(in_progress);
        Ok(CreateGuard {
            registry: self.clone(),
            id,
        })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the paths of a snapshot's files.
    pub(super) fn files(&self, id: &SnapshotId) -> Files {
        Files::at(self.dir.join(id.as_str()))
    }

    pub(super) fn contains(&self, id: &SnapshotId) -> bool {
        self.in_progress.lock().contains_key(id)
    }
}

/// The paths of a snapshot's files.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub dir: PathBuf,
    /// The directory of `memory`, `devices` and `env`, which only the daemon's user can enter.
    pub private: PathBuf,
    pub memory: PathBuf,
    pub devices: PathBuf,
    /// The variables of the VM's commands, if it had any.
    pub env: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// The disk of the guest runtime, if the VM had one.
    pub runtime: PathBuf,
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
            env: dir.join("private").join(ENV_FILE),
            kernel: path("vmlinux"),
            initrd: path("initrd"),
            runtime: path("runtime.ext4"),
            disk: path(DISK_FILE),
            work_disk: path(WORK_DISK_FILE),
            dir,
        }
    }
}

/// The snapshot that a boot restores.
#[derive(Clone, Debug)]
pub(super) struct Restore {
    pub row: Arc<SnapshotRow>,
    pub files: Files,
    /// True if the snapshot is restored into a VM other than the one from which it was taken.
    pub in_other_vm: bool,
    /// Prevents the deletion of the snapshot. `None` for the unpublished snapshot of a fork.
    pub _in_use: Option<Arc<UseGuard<SnapshotId>>>,
}

impl Restore {
    pub(super) fn saved(&self) -> Saved {
        Saved {
            memory: self.files.memory.clone(),
            devices: self.files.devices.clone(),
            driver: self.row.driver.clone(),
        }
    }

    /// Copies the settings that must match the snapshot into the row. The boot replaces the disks.
    pub(super) fn enter(&self, row: &mut VmRow) {
        (row.shape.vcpus, row.shape.mem_mib) = (self.row.shape.vcpus, self.row.shape.mem_mib);
        row.shape.runtime = self.row.shape.runtime.clone();
        (row.has_balloon, row.balloon_mib) = (self.row.has_balloon, self.row.balloon_mib);
        if row.disk_driver.is_none() {
            row.disk_driver = Some(self.row.disk_driver.clone());
            row.guest_version = self.row.guest_version;
        }
    }
}

/// Returns how many bytes the files in a directory occupy, without those that have other hard
/// links.
pub(super) fn allocated_bytes(dir: &Path) -> u64 {
    crate::locks::may_block("file access");
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    // Files with other hard links are shared, for example with an image.
    entries
        .filter_map(|e| e.metadata().ok())
        .filter(|m| m.nlink() == 1)
        .map(|m| m.blocks() * 512)
        .sum()
}

/// Returns how many bytes the files in a VM's directory occupy, including those with several hard
/// links.
pub(super) fn disk_bytes(dir: &Path) -> u64 {
    crate::locks::may_block("file access");
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    // The origin of device-mapper snapshots is not copied.
    let own = entries
        .filter(|e| e.file_name() != "origin")
        .filter_map(|e| e.metadata().ok());
    own.filter(std::fs::Metadata::is_file)
        .map(|m| m.blocks() * 512)
        .sum()
}

/// Opens a finished file of a snapshot and sets its owner and mode. If VMMs have their own uids
/// (`credentials`), a VMM of any uid may then read the file through a link or a descriptor, and the
/// private directory keeps all other processes out. Otherwise, only the daemon's user can use the
/// file.
pub(super) fn share_saved(path: &Path, credentials: Option<Credentials>) -> Result<File> {
    let io = |e: std::io::Error| Error::io(format!("share {}", path.display()), e);
    let file = crate::host::fs::open_nofollow(path)?;
    if credentials.is_some() {
        std::os::unix::fs::fchown(&file, Some(0), Some(0)).map_err(io)?;
    }
    let mode = if credentials.is_some() { 0o444 } else { 0o600 };
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))
        .map_err(io)?;
    Ok(file)
}
