//! Confines file access to a directory tree: every lookup is relative to one descriptor and follows
//! no link.

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);
/// Maximum number of calls of openat2(2) for one lookup. A call fails with EAGAIN if something is
/// renamed during the lookup.
const TRIES: usize = 64;

/// A directory and everything below it.
pub(super) struct Beneath {
    root: OwnedFd,
    /// The directory that was used last. Paths are sorted, so it is likely to be used again.
    cached: Option<(Vec<u8>, OwnedFd)>,
}

impl Beneath {
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self::new(rustix::fs::open(root, flags, Mode::empty())?))
    }

    pub(super) fn new(root: OwnedFd) -> Self {
        Self { root, cached: None }
    }

    /// Opens the directory at the relative `path`. An empty path is the root itself.
    pub(super) fn open_dir(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let path = if path.is_empty() {
            b".".as_slice()
        } else {
            path
        };
        self.openat2(path, flags)
    }

    fn openat2(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        for _ in 0..TRIES {
            match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), RESOLVE) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// Creates the directories above `path` that do not exist.
    pub(super) fn ensure_parent(&mut self, path: &[u8]) -> io::Result<()> {
        match self.parent(path) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
            found => return found.map(drop),
        }
        for at in (0..path.len()).filter(|at| path[*at] == b'/') {
            let (dir, name) = self.parent(&path[..at])?;
            match rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.parent(path).map(drop)
    }

    /// Returns the open directory that contains `path`, and the last component.
    pub(super) fn parent<'p>(&mut self, path: &'p [u8]) -> io::Result<(BorrowedFd<'_>, &'p [u8])> {
        let Some(slash) = path.iter().rposition(|b| *b == b'/') else {
            return Ok((self.root.as_fd(), path));
        };
        let (dir, name) = (&path[..slash], &path[slash + 1..]);
        if self.cached.as_ref().is_none_or(|(known, _)| known != dir) {
            self.cached = Some((dir.to_vec(), self.open_dir(dir)?));
        }
        let (_, fd) = self.cached.as_ref().expect("just set");
        Ok((fd.as_fd(), name))
    }

    /// Returns the metadata of `path` itself, never of a link's target.
    pub(super) fn stat(&mut self, path: &[u8]) -> io::Result<Stat> {
        let (dir, name) = self.parent(path)?;
        Ok(rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Opens a file for reading. The call follows no link and does not wait for a FIFO's writer, so
    /// the caller must check the type of what was opened.
    pub(super) fn open_file(&mut self, path: &[u8]) -> io::Result<File> {
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let (dir, name) = self.parent(path)?;
        Ok(File::from(rustix::fs::openat(
            dir,
            name,
            flags,
            Mode::empty(),
        )?))
    }

    pub(super) fn read_link(&mut self, path: &[u8]) -> io::Result<Vec<u8>> {
        let (dir, name) = self.parent(path)?;
        Ok(rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes())
    }

    /// True if the caller may read the file. Does not open it.
    pub(super) fn readable(&mut self, path: &[u8]) -> io::Result<bool> {
        let (dir, name) = self.parent(path)?;
        match rustix::fs::accessat(dir, name, rustix::fs::Access::READ_OK, AtFlags::EACCESS) {
            Ok(()) => Ok(true),
            Err(Errno::ACCESS | Errno::PERM) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

/// True if the error means that the path does not exist, or that it leads through a link or a file.
pub(super) fn is_absent(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)
    )
}
