//! Creates files and links under a temporary name, and then renames them.

use super::{Inode, Lander, refuse, wrong};
use crate::error::{Error, Kind, Result};
use crate::workspace::copy::shown;
use crate::workspace::unpack::SPARSE_BYTES_MAX;
use crate::workspace::unpack::reader::{Item, TarReader};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// The mode of a file whose attributes are not set yet.
const PRIVATE_MODE: u32 = 0o600;

/// A file or a link under a temporary name, which is removed unless it was renamed.
struct Temporary {
    dir: OwnedFd,
    name: String,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Usually the file was renamed, so this name no longer exists.
        let _ = rustix::fs::unlinkat(&self.dir, &self.name, AtFlags::empty());
    }
}

impl Temporary {
    /// Renames the file or link to the last component of `path`. A link at `path` is replaced, not
    /// followed.
    fn rename(&self, path: &[u8]) -> Result<()> {
        match rustix::fs::renameat(&self.dir, &self.name, &self.dir, name_in(path)) {
            Ok(()) => Ok(()),
            Err(Errno::ISDIR) => Err(is_directory(path)),
            Err(e) => Err(wrong(path, e.into())),
        }
    }
}

fn name_in(path: &[u8]) -> &[u8] {
    path.rsplit(|b| *b == b'/').next().unwrap_or(path)
}

fn is_directory(path: &[u8]) -> Error {
    let text = format!("write {}: it is a directory", shown(path));
    Error::new(Kind::TargetExists, text)
}

impl Lander<'_> {
    fn temporary(&mut self, path: &[u8]) -> Result<Temporary> {
        let name = self.temporary.clone();
        let (dir, _) = self.beneath.parent(path).map_err(|e| wrong(path, e))?;
        let dir = dir.try_clone_to_owned().map_err(|e| wrong(path, e))?;
        Ok(Temporary { dir, name })
    }

    pub(super) fn symlink(&mut self, path: &[u8], item: &Item, target: &[u8]) -> Result<()> {
        if target.is_empty() {
            return Err(refuse(path, "its link has no target"));
        }
        let temporary = self.temporary(path)?;
        let (dir, name) = (&temporary.dir, temporary.name.as_str());
        rustix::fs::symlinkat(target, dir, name).map_err(|e| wrong(path, e.into()))?;
        if self.owner {
            let owner = item.extra.owner;
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(dir, name, Some(uid), Some(gid), flags)
                .map_err(|e| wrong(path, e.into()))?;
        }
        let times = item.mtime.timestamps();
        rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| wrong(path, e.into()))?;
        temporary.rename(path)
    }

    /// Creates a hard link to a file that this copy has created. A guest must not get links to
    /// other files of the destination.
    pub(super) fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let target = self.below(target)?;
        let (dir, name) = self
            .beneath
            .parent(&target)
            .map_err(|_| refuse(path, "its hard link leads nowhere"))?;
        let found = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|_| refuse(path, "its hard link leads nowhere"))?;
        let inode = Inode {
            device: found.st_dev,
            number: found.st_ino,
        };
        if !self.made.contains(&inode) {
            return Err(refuse(path, "its hard link leads to another file"));
        }
        let from = dir.try_clone_to_owned().map_err(|e| wrong(path, e))?;
        let temporary = self.temporary(path)?;
        rustix::fs::linkat(
            &from,
            name_in(&target),
            &temporary.dir,
            &temporary.name,
            AtFlags::empty(),
        )
        .map_err(|e| wrong(path, e.into()))?;
        // If `path` already names the same file, rename(2) keeps both names. Dropping `temporary`
        // then removes the temporary one.
        temporary.rename(path)
    }

    pub(super) fn file(
        &mut self,
        path: &[u8],
        item: &Item,
        size: u64,
        segments: Option<&[(u64, u64)]>,
        reader: &mut TarReader<'_>,
    ) -> Result<()> {
        let content = segments.map_or(size, |s| s.iter().map(|(_, len)| len).sum());
        self.room.check_bound(content)?;
        if size > SPARSE_BYTES_MAX {
            return Err(refuse(path, "its size is impossible"));
        }
        if self
            .beneath
            .stat(path)
            .is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory)
        {
            return Err(is_directory(path));
        }
        let temporary = self.temporary(path)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = if self.archive {
            PRIVATE_MODE
        } else {
            item.mode
        };
        let mode = Mode::from_raw_mode(mode);
        let opened = rustix::fs::openat(&temporary.dir, &temporary.name, flags, mode);
        let file = File::from(opened.map_err(|e| wrong(path, e.into()))?);
        let whole = [(0, size)];
        let failed = |e: std::io::Error| Error::io(format!("write {}", shown(path)), e);
        for segment in segments.unwrap_or(&whole) {
            reader.pieces(*segment, &mut self.buffer, &mut |piece, at| {
                let bytes = piece.len() as u64;
                self.room.take(bytes)?;
                file.write_all_at(piece, at).map_err(failed)?;
                self.landed.copied.bytes += bytes;
                (self.progress)(bytes);
                Ok(())
            })?;
        }
        reader.end_of_data()?;
        if segments.is_some() {
            file.set_len(size).map_err(failed)?;
        }
        if self.archive {
            self.set_extra(&file, &item.extra).map_err(failed)?;
            rustix::fs::fchmod(&file, Mode::from_raw_mode(item.mode))
                .map_err(|e| failed(e.into()))?;
            let found = rustix::fs::fstat(&file).map_err(|e| failed(e.into()))?;
            self.made.insert(Inode {
                device: found.st_dev,
                number: found.st_ino,
            });
        }
        rustix::fs::futimens(&file, &item.mtime.timestamps()).map_err(|e| failed(e.into()))?;
        temporary.rename(path)
    }
}
