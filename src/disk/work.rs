//! A VM's second disk. It is empty but has a file system, so that the guest never has to decide
//! whether to create one.

use super::Draft;
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::{Command, Commands};
use crate::locks::Cancel;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

/// The mount point of the work disk in the guest.
pub const GUEST_PATH: &str = "/work";
pub const MKFS: &str = "mkfs.ext4";
/// How long mkfs may take. Writing the tables of a terabyte takes some seconds. The guest's kernel
/// initializes the rest.
const MKFS_DEADLINE: Duration = Duration::from_secs(120);

/// Creates a sparse disk of this size at `path`, with mode 0600. After a crash it is either
/// complete or absent. `owner` is the uid and gid of the VMM.
///
/// # Errors
/// `command_missing` if e2fsprogs is not installed.
pub fn make(
    commands: &dyn Commands,
    path: &Path,
    size_bytes: u64,
    owner: Option<Credentials>,
    cancel: &Cancel,
) -> Result<()> {
    crate::locks::may_block("file access");
    let doing = || format!("create work disk {}", path.display());
    let draft = Draft::new(path)?;
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft.path)
        .and_then(|file| file.set_len(size_bytes))
        .map_err(|e| Error::io(doing(), e));
    file?;
    // See mke2fs(8). The disk belongs to the guest's root, and no blocks are reserved.
    let options = "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,nodiscard";
    let command = Command::new(MKFS)
        .args(["-q", "-F", "-L", "work", "-m", "0", "-E", options])
        .arg(&draft.path);
    match commands.run(&command.deadline(MKFS_DEADLINE), cancel, &mut |_| {}) {
        Ok(_) => draft.publish(owner),
        Err(e) if e.kind() == Kind::CommandMissing => {
            Err(e.context(doing()).hint("apt install e2fsprogs"))
        }
        Err(e) => Err(e.context(doing())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostCommands;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn work_disk_is_clean_sparse_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let (path, cancel) = (dir.path().join("work"), Cancel::try_new().unwrap());
        make(&HostCommands, &path, 1 << 30, None, &cancel).unwrap();
        let stat = std::fs::metadata(&path).unwrap();
        assert_eq!((stat.len(), stat.mode() & 0o777), (1 << 30, 0o600));
        assert!(stat.blocks() * 512 < 64 << 20, "{} blocks", stat.blocks());
        let check = Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(&path)
            .deadline(MKFS_DEADLINE);
        HostCommands.run(&check, &cancel, &mut |_| {}).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn failed_work_disk_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let (path, cancel) = (dir.path().join("work"), Cancel::try_new().unwrap());
        assert!(
            make(&HostCommands, &path, 1024, None, &cancel).is_err(),
            "too small for a file system"
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
