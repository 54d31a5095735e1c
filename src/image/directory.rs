//! The common part of the registries of images, kernels and guest runtimes: directories that are
//! filled under a temporary name, published by one rename, and never changed afterwards.

use super::stamps::{self, STAMPS};
use crate::error::{Error, Result};
use crate::host::{hex, random};
use std::fs::{File, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The prefix of a directory that is being deleted. No name begins with a dot.
pub(super) const DELETING_PREFIX: &str = ".deleting-";
/// The length of the random suffix that makes the name of a directory being deleted unique.
const RANDOM_BYTES: usize = 6;
/// The mode of a registry. VMMs run under their own uids and have to reach the files in it, but no
/// other user can list it.
const REGISTRY_MODE: u32 = 0o711;

/// Determines who may read the files of a published directory. Only the directory's mode restricts
/// access. The files are readable by everybody, because a hard link in a VM's directory has the
/// mode of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readers {
    Everybody,
    /// The daemon, and a VMM through a hard link in its VM's directory.
    Daemon,
}

impl Readers {
    fn mode(self) -> u32 {
        match self {
            Self::Everybody => 0o755,
            Self::Daemon => 0o700,
        }
    }
}

/// Opens `<state_dir>/<name>`, which is created if it does not exist, and removes the directories
/// that an earlier daemon was filling or deleting. The caller holds the state directory's lock.
pub(super) fn open_registry(state_dir: &Path, name: &str, staging_prefix: &str) -> Result<PathBuf> {
    crate::locks::may_block("file access");
    let dir = state_dir.join(name);
    let io = |e| Error::io(format!("open {}", dir.display()), e);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(REGISTRY_MODE)
        .create(&dir)
        .map_err(io)?;
    std::fs::set_permissions(&dir, Permissions::from_mode(REGISTRY_MODE)).map_err(io)?;
    for entry in std::fs::read_dir(&dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let (name, path) = (entry.file_name(), entry.path());
        if [staging_prefix, DELETING_PREFIX]
            .iter()
            .any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
        {
            log::info!("removing the leftover directory {}", path.display());
            std::fs::remove_dir_all(&path)
                .map_err(|e| Error::io(format!("remove {}", path.display()), e))?;
        }
    }
    Ok(dir)
}

/// Publishes the directory `from`, which holds exactly `files`, as `to`: makes the files read-only,
/// syncs everything and renames the directory. Returns false if `to` exists already.
pub(super) fn publish(
    from: &Path,
    files: &[&str],
    readers: Readers,
    to: &Path,
) -> std::io::Result<bool> {
    crate::locks::may_block("file access");
    seal(from, files, readers)?;
    let (cwd, flags) = (rustix::fs::CWD, rustix::fs::RenameFlags::NOREPLACE);
    match rustix::fs::renameat_with(cwd, from, cwd, to, flags) {
        Ok(()) => {}
        Err(rustix::io::Errno::EXIST | rustix::io::Errno::NOTEMPTY) => return Ok(false),
        Err(e) => return Err(e.into()),
    }
    sync_parent(to)?;
    Ok(true)
}

/// Records the files of a directory, makes them read-only and syncs everything.
pub(super) fn seal(dir: &Path, files: &[&str], readers: Readers) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    // Restrict the directory first, so that no other user can open a private file in between.
    set_readers(dir, readers)?;
    // Stamps do not cover the JSON files, because the registries replace those themselves.
    let data: Vec<&str> = files
        .iter()
        .filter(|f| !f.ends_with(".json"))
        .copied()
        .collect();
    stamps::write(dir, &data)?;
    for name in files.iter().chain([&STAMPS]) {
        let file = File::open(dir.join(name))?;
        file.set_permissions(Permissions::from_mode(0o444))?;
        file.sync_all()?;
    }
    File::open(dir)?.sync_all()
}

/// Decides who may read the files of a directory.
pub(super) fn set_readers(dir: &Path, readers: Readers) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    std::fs::set_permissions(dir, Permissions::from_mode(readers.mode()))
}

/// Exchanges two directories. At any time, both names exist.
pub(super) fn exchange(one: &Path, other: &Path) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    let (cwd, flags) = (rustix::fs::CWD, rustix::fs::RenameFlags::EXCHANGE);
    rustix::fs::renameat_with(cwd, one, cwd, other, flags)?;
    sync_parent(other)
}

fn sync_parent(path: &Path) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent)?.sync_all()
}

/// Deletes the directory `name` of a registry. Renames it first, so that it disappears at once.
/// Returns false if it does not exist.
pub(super) fn delete(registry: &Path, name: &str) -> Result<bool> {
    crate::locks::may_block("file access");
    let io = |e: std::io::Error| Error::io(format!("delete {}", registry.join(name).display()), e);
    // Rename it in place instead of moving it into a new directory, which would need space: users
    // delete images when the disk is full.
    let suffix = hex::encode(&random::bytes::<RANDOM_BYTES>());
    let dir = registry.join(format!("{DELETING_PREFIX}{name}-{suffix}"));
    match std::fs::rename(registry.join(name), &dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        renamed => renamed.map_err(io)?,
    }
    let _gone = Staging { dir };
    File::open(registry)
        .and_then(|d| d.sync_all())
        .map_err(io)?;
    Ok(true)
}

/// A directory that is removed with its content when this is dropped.
pub(super) struct Staging {
    dir: PathBuf,
}

impl Staging {
    /// Creates an empty directory whose name begins with `prefix`.
    pub(super) fn new(dir: &Path, prefix: &str) -> Result<Self> {
        crate::locks::may_block("file access");
        let io = |e| Error::io(format!("create a directory in {}", dir.display()), e);
        let made = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(dir)
            .map_err(io)?;
        // The users of apt and of helper processes have to be able to enter the directory, whatever
        // the umask is.
        std::fs::set_permissions(made.path(), Permissions::from_mode(0o711)).map_err(io)?;
        Ok(Self { dir: made.keep() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Staging {
    /// Retries the removal, because the processes of a cancelled build may write until they are
    /// killed.
    fn drop(&mut self) {
        crate::locks::may_block("file access");
        const TRIES: u32 = 40;
        const PAUSE: std::time::Duration = std::time::Duration::from_millis(50);
        for last in (0..TRIES).rev() {
            match std::fs::remove_dir_all(&self.dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound && last > 0 => {
                    std::thread::sleep(PAUSE)
                }
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    log::warn!(
                        "remove {}: {e}; fcd will retry at its next start",
                        self.dir.display()
                    );
                }
                _ => return,
            }
        }
    }
}
