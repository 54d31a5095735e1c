//! Partial downloads: the part of a layer that an interrupted pull has received.
//!
//! While a helper fetches a large layer, it also writes the compressed bytes to a file that the
//! daemon has opened. The next pull of the same user reads this file first, and requests only the
//! rest from the registry. A pull therefore continues in the middle of a layer even if the daemon
//! was killed.
//!
//! A partial download is not verified, so it is never shared between users. If it is wrong, the
//! digest of the whole layer differs, and the layer is fetched once more from the beginning.
//! Therefore nothing needs to be synced. The compressed bytes add about a third to a layer's
//! writes, but they cost no time, because they stay in the page cache if the pull ends soon.
//!
//! The files count towards the limit of the layer cache, and are removed after a week.

use crate::error::{Error, Kind, Result};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

const PARTIAL_DIR: &str = "partial";
const HEX_LEN: usize = 64;
/// How long an unused partial download is kept.
pub(super) const AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// The partial downloads of all users.
#[derive(Clone, Debug)]
pub(super) struct Partials {
    dir: PathBuf,
}

impl Partials {
    /// Opens the directory in that of the layers. Creates it if it does not exist.
    pub(super) fn open(layers: &Path) -> Result<Self> {
        let dir = layers.join(PARTIAL_DIR);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|e| Error::io(format!("create {}", dir.display()), e))?;
        Ok(Self { dir })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the file with the user's part of a blob, which is empty at first. Returns None if
    /// another pull of the user is fetching the blob, or if `digest` is not a digest. The file is
    /// locked until all its descriptors are closed, also one that was passed to another process.
    pub(super) fn get(&self, uid: u32, digest: &str) -> Result<Option<File>> {
        crate::locks::may_block("file access");
        let Some(path) = self.path(uid, digest) else {
            return Ok(None);
        };
        let io = |e: rustix::io::Errno| {
            let e = std::io::Error::from(e);
            Error::io(format!("open {}", path.display()), e)
        };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file: File = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(io)?
            .into();
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(io(e)),
        }
    }

    /// Returns the space that the user's part of a blob takes.
    pub(super) fn bytes(&self, uid: u32, digest: &str) -> u64 {
        crate::locks::may_block("file access");
        let path = self.path(uid, digest);
        let metadata = path.and_then(|path| path.symlink_metadata().ok());
        metadata.map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// Removes the user's part of a blob.
    pub(super) fn forget(&self, uid: u32, digest: &str) {
        crate::locks::may_block("file access");
        let Some(path) = self.path(uid, digest) else {
            return;
        };
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                log::warn!("remove {}: {e}", path.display());
            }
            _ => {}
        }
    }

    fn path(&self, uid: u32, digest: &str) -> Option<PathBuf> {
        Some(self.dir.join(format!("{uid}-{}", hex_of(digest)?)))
    }
}

/// Returns the hexadecimal digits of a SHA-256 digest, or None if it is something else.
pub(super) fn hex_of(digest: &str) -> Option<&str> {
    let hex = digest.strip_prefix("sha256:")?;
    let is_digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (hex.len() == HEX_LEN && hex.bytes().all(is_digit)).then_some(hex)
}

/// True if the next pull should continue where a pull has failed with this error. False if the disk
/// is full, or if the received bytes may be the reason.
pub(super) fn is_worth_keeping(error: &Error) -> bool {
    matches!(
        error.kind(),
        Kind::Cancelled
            | Kind::Timeout
            | Kind::RegistryUnreachable
            | Kind::RegistryBusy
            | Kind::RegistryDenied
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn partial_download_belongs_to_one_user_and_one_pull() {
        let dir = tempfile::tempdir().unwrap();
        let partials = Partials::open(dir.path()).unwrap();
        let mut file = partials.get(7, DIGEST).unwrap().unwrap();
        file.write_all(b"some").unwrap();
        // Another pull of the same user does not share the file.
        assert!(partials.get(7, DIGEST).unwrap().is_none());
        let mut others = partials.get(8, DIGEST).unwrap().unwrap();
        assert_eq!(others.read(&mut [0]).unwrap(), 0);
        drop(file);
        let again = partials.get(7, DIGEST).unwrap().unwrap();
        assert_eq!(std::io::read_to_string(again).unwrap(), "some");
        partials.forget(7, DIGEST);
        partials.forget(7, DIGEST);
        let again = partials.get(7, DIGEST).unwrap().unwrap();
        assert_eq!(again.metadata().unwrap().len(), 0);
        for not_a_digest in ["sha256:../../x", "md5:1", ""] {
            assert!(partials.get(7, not_a_digest).unwrap().is_none());
            partials.forget(7, not_a_digest);
        }
    }
}
