//! Root disks, work disks and the seed drive that configures a guest.
//!
//! A root disk is made once from its image, in one of four ways ([`Method`]). The VM's row records
//! which one:
//!
//! - `reflink`: a copy that shares blocks with the image. It is independent of the image's file.
//! - `qcow2`: a file on top of the image. It needs no device and no root.
//! - `dm-snapshot`: a device-mapper snapshot of the image. It needs root, and device nodes while
//!   the VM runs.
//! - `copy`: a full copy, only if the configuration asks for it.
//!
//! `auto` tries the first three in this order, and takes the first that the host and the VMM
//! support. A disk that depends on its image keeps a hard link to the image's file in the VM's
//! directory, so removing or rebuilding the image does not affect it.
//!
//! An image may be a user's file that can change. Whatever the configured method is, its disks are
//! independent copies, which share blocks with the file if that is possible ([`copy_root`]).
//!
//! The devices of a dm-snapshot exist while the VM runs and carry its tag (`snapshot/`). Their loop
//! devices are set to detach themselves, so nothing is left if a process dies between two steps.
//! The kernel invalidates a dm-snapshot that has no space for a change, so its file is long enough
//! for every block of the disk, and the next 256 MiB are always allocated. If the host has no space
//! for that, `daemon/room.rs` pauses the guest.
//!
//! A work disk is a sparse raw file. The host creates an ext4 file system on it while it is empty,
//! and never reads it again.
//!
//! The host never mounts a disk. It only enlarges the file, and the guest grows its own file
//! system. If no daemon saw how a guest ended, three numbers in the superblock are read
//! (`unmounted.rs`).

mod copy;
pub mod duplicate;
mod flatten;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod method;
mod qcow2;
mod read_at;
pub mod root;
pub mod seed;
pub mod snapshot;
mod unmounted;
pub mod work;

pub use copy::{punch_zeroes, share_or_copy};
pub use flatten::flatten;
pub use method::{Method, Probe, probe};
pub use root::{CopySpec, RootSpec, copy_root, grow, make_root, origin};
pub use seed::{KeyPair, Network, NetworkIpv6, RestoreSeed, Seed, SeedFile};
pub use unmounted::is_unmounted;

use crate::error::{Error, Result};
use crate::host::Credentials;
use std::fs::File;
use std::os::unix::fs::fchown;
use std::path::{Path, PathBuf};

/// The result of [`ficlone`].
enum Cloned {
    Yes,
    /// The file system cannot share these blocks; the text is the kernel's error.
    No(String),
}

/// Makes `target` share the blocks of `source` (ioctl_ficlone(2)). Returns `Cloned::No` if the file
/// system cannot do this, and all other failures as errors.
fn ficlone(target: &File, source: &File) -> std::io::Result<Cloned> {
    use rustix::io::Errno;
    match rustix::fs::ioctl_ficlone(target, source) {
        Ok(()) => Ok(Cloned::Yes),
        Err(e @ (Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS)) => {
            Ok(Cloned::No(e.to_string().to_lowercase()))
        }
        Err(e) => Err(e.into()),
    }
}

/// A file that is written next to its target and renamed when it is complete. Dropping the draft
/// before the rename removes the file.
struct Draft {
    path: PathBuf,
    target: PathBuf,
    published: bool,
}

/// Returns the temporary path of a file that will be renamed to `target`. A file at this path may
/// be left over from an attempt that was killed.
pub fn draft(target: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".new");
    target.with_file_name(name)
}

impl Draft {
    /// Picks the path of the draft, and removes the draft of an earlier attempt. Does not create
    /// the file.
    fn new(target: &Path) -> Result<Self> {
        crate::locks::may_block("file access");
        let draft = Self {
            path: draft(target),
            target: target.to_owned(),
            published: false,
        };
        match std::fs::remove_file(&draft.path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", draft.path.display()), e))
            }
            _ => Ok(draft),
        }
    }

    /// Sets the owner, syncs the file and renames it. After a crash the target is either complete
    /// or what it was before.
    fn publish(mut self, owner: Option<Credentials>) -> Result<()> {
        crate::locks::may_block("file access");
        let doing = || format!("write {}", self.target.display());
        let io = |e: std::io::Error| Error::io(doing(), e);
        let file = File::open(&self.path).map_err(io)?;
        if let Some(Credentials { uid, gid }) = owner {
            fchown(&file, Some(uid), Some(gid)).map_err(io)?;
        }
        file.sync_all().map_err(io)?;
        std::fs::rename(&self.path, &self.target).map_err(io)?;
        let dir = self
            .target
            .parent()
            .filter(|d| !d.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(dir).and_then(|d| d.sync_all()).map_err(io)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        crate::locks::may_block("file access");
        if !self.published {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
