//! File access: durable writes, opens that do not follow links, private directories, removal of
//! trees, and free space.

use super::{hex, random};
use crate::error::{Error, Kind, Result};
use rustix::fs::{AtFlags, Mode, OFlags, RawMode};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The space on a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// The bytes that unprivileged users can still allocate.
    pub free_bytes: u64,
    pub total_bytes: u64,
}

/// Opens a directory. Fails if the last component of `path` is a link.
pub fn open_dir(path: &Path) -> Result<OwnedFd> {
    crate::locks::may_block("file access");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|e| Error::io(format!("open directory {}", path.display()), e))
}

/// Opens `name` in `dir`, never through a link. `O_NOFOLLOW` and `O_CLOEXEC` are added to `flags`.
pub fn open_at(
    dir: impl AsFd,
    name: impl AsRef<OsStr>,
    flags: OFlags,
    mode: RawMode,
) -> std::io::Result<File> {
    crate::locks::may_block("file access");
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(
        dir,
        name.as_ref(),
        flags,
        Mode::from_raw_mode(mode),
    )?))
}

/// Opens a file for reading. Fails if the last component is a link.
pub fn open_nofollow(path: &Path) -> Result<File> {
    crate::locks::may_block("file access");
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|e| Error::io(format!("open {}", path.display()), e))?;
    Ok(File::from(fd))
}

/// Creates a directory and its parents if they do not exist, and sets its mode to exactly `mode`.
///
/// # Errors
/// Fails if the path is a link, is not a directory, or belongs to another user.
pub fn create_dir(path: &Path, mode: RawMode) -> Result<OwnedFd> {
    crate::locks::may_block("file access");
    let doing = || format!("create directory {}", path.display());
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(|e| Error::io(doing(), e))?;
    }
    match rustix::fs::mkdir(path, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(Error::io(doing(), e)),
    }
    let dir = open_dir(path)?;
    let stat = rustix::fs::fstat(&dir).map_err(|e| Error::io(doing(), e))?;
    let me = rustix::process::geteuid().as_raw();
    if stat.st_uid != me {
        let message = format!(
            "{}: it belongs to uid {}, not to {me}",
            doing(),
            stat.st_uid
        );
        return Err(
            Error::new(Kind::Denied, message).hint(format!("look at ls -ld {}", path.display()))
        );
    }
    if Mode::from_raw_mode(stat.st_mode).as_raw_mode() & 0o7777 != mode {
        rustix::fs::fchmod(&dir, Mode::from_raw_mode(mode)).map_err(|e| Error::io(doing(), e))?;
    }
    Ok(dir)
}

/// Creates a directory like [`create_dir`], with mode 0700.
pub fn create_private_dir(path: &Path) -> Result<OwnedFd> {
    create_dir(path, 0o700)
}

/// Replaces a file atomically. Once this returns `Ok`, the content survives a power cut. Readers
/// see either the old or the new content, even after a crash.
pub fn write_durable(path: &Path, bytes: &[u8], mode: RawMode) -> Result<()> {
    crate::locks::may_block("file access");
    let doing = || format!("write {}", path.display());
    let name = path
        .file_name()
        .ok_or_else(|| Error::invalid(format!("{}: it has no file name", doing())))?;
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    // Links in the parent's path may be followed: only the last component is ours.
    let dir = File::open(parent).map_err(|e| Error::io(doing(), e))?;
    let temporary = temporary_name(name);
    let written = (|| -> std::io::Result<()> {
        let mut file = open_at(
            &dir,
            &temporary,
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL,
            mode,
        )?;
        // The umask was applied to the mode of the open, so set the mode again.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        rustix::fs::renameat(&dir, &temporary, &dir, name)?;
        dir.sync_all()
    })();
    if written.is_err() {
        let _ = rustix::fs::unlinkat(&dir, &temporary, AtFlags::empty());
    }
    written.map_err(|e| Error::io(doing(), e))
}

fn temporary_name(name: &OsStr) -> PathBuf {
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.tmp", hex::encode(&random::bytes::<8>())));
    temporary.into()
}

/// Makes changes to a directory's entries durable.
pub fn sync_dir(path: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let synced = File::open(path).and_then(|dir| dir.sync_all());
    synced.map_err(|e| Error::io(format!("sync directory {}", path.display()), e))
}

/// Removes a directory with everything in it, without following links. A missing directory is not
/// an error.
///
/// Users may nest directories arbitrarily deep, and a recursive walk would need stack and a
/// descriptor per level. Instead, nested directories are moved up to the top level until everything
/// is flat.
///
/// # Errors
/// Errors of the system calls, and `DirectoryNotEmpty` if another process still creates files in
/// it.
pub fn remove_tree(path: &Path) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    let mut lifted = 0;
    loop {
        let names = some_names(&top)?;
        if names.is_empty() {
            break;
        }
        for name in names {
            if !remove_one(&top, &name)? {
                lift(&top, &name, &mut lifted)?;
            }
        }
    }
    match std::fs::remove_dir(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// How many names of a directory are kept in memory at once.
const NAMES_MAX: usize = 1024;

fn some_names(dir: &OwnedFd) -> std::io::Result<Vec<std::ffi::CString>> {
    let entries = rustix::fs::Dir::read_from(dir)?;
    let names = entries.map(|entry| entry.map(|e| e.file_name().to_owned()));
    let others = names.filter(|name| {
        name.as_ref()
            .map_or(true, |n| !matches!(n.to_bytes(), b"." | b".."))
    });
    Ok(others.take(NAMES_MAX).collect::<Result<_, Errno>>()?)
}

/// Removes a file or an empty directory. Returns false if it is a directory that is not empty.
fn remove_one(dir: &OwnedFd, name: &std::ffi::CStr) -> std::io::Result<bool> {
    crate::locks::may_block("file access");
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(true),
        // POSIX specifies EPERM for a directory (unlink(2)).
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Empties the directory `name` by moving its subdirectories up into `top`.
fn lift(top: &OwnedFd, name: &std::ffi::CStr, lifted: &mut u64) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(top, name, flags, Mode::empty())?;
    for inner in some_names(&dir)? {
        while !remove_one(&dir, &inner)? {
            *lifted += 1;
            match rustix::fs::renameat(&dir, &inner, top, format!(".lifted-{lifted}")) {
                Ok(()) => break,
                // The target name exists, so try the next one.
                Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

/// Returns the space on the file system of `path`.
pub fn space(path: &Path) -> Result<Space> {
    crate::locks::may_block("file access");
    let stat = rustix::fs::statvfs(path)
        .map_err(|e| Error::io(format!("read the free space at {}", path.display()), e))?;
    Ok(Space {
        free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path)
            .unwrap()
            .permissions()
            .mode()
            & 0o7777
    }

    #[test]
    fn durable_write_replaces_the_file_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_durable(&path, b"one", 0o600).unwrap();
        write_durable(&path, b"two", 0o644).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(mode(&path), 0o644);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        std::fs::create_dir(dir.path().join("d")).unwrap();
        assert!(write_durable(&dir.path().join("d"), b"x", 0o600).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn deep_and_wide_tree_is_removed() {
        // More levels than a path has bytes. A recursion would have 85 bytes of stack for each.
        const DEEP: usize = 6_000;
        let temp = tempfile::tempdir().unwrap();
        let (tree, outside) = (temp.path().join("tree"), temp.path().join("outside"));
        for dir in [&tree, &outside] {
            std::fs::create_dir(dir).unwrap();
        }
        std::fs::write(outside.join("kept"), "x").unwrap();
        std::fs::write(tree.join(".lifted-1"), "a name that is taken").unwrap();
        let mut at = open_dir(&tree).unwrap();
        for level in 0..DEEP {
            rustix::fs::symlinkat(&outside, &at, "link").unwrap();
            for name in ["d", "e"] {
                rustix::fs::mkdirat(&at, name, Mode::RWXU).unwrap();
            }
            if level % 1000 == 0 {
                drop(open_at(&at, "e/f", OFlags::WRONLY | OFlags::CREATE, 0o600).unwrap());
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            at = rustix::fs::openat(&at, "d", flags, Mode::empty()).unwrap();
        }
        for n in 0..2 * NAMES_MAX {
            drop(open_at(&at, format!("{n}"), OFlags::WRONLY | OFlags::CREATE, 0o600).unwrap());
        }
        drop(at);
        let removed = crate::host::thread::spawn("remove", move || remove_tree(&tree)).unwrap();
        removed.join().unwrap().unwrap();
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1);
        assert!(outside.join("kept").exists());
        remove_tree(&temp.path().join("none")).unwrap();
        assert!(remove_tree(&outside.join("kept")).is_err());
        symlink(&outside, temp.path().join("link")).unwrap();
        assert!(remove_tree(&temp.path().join("link")).is_err() && outside.join("kept").exists());
    }

    #[test]
    fn durable_write_replaces_a_link_without_following_it() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        std::fs::write(&target, "old").unwrap();
        symlink(&target, &link).unwrap();
        write_durable(&link, b"new", 0o600).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"old");
        assert_eq!(std::fs::read(&link).unwrap(), b"new");
    }

    #[test]
    fn directories_get_their_mode_and_links_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        create_dir(&path, 0o711).unwrap();
        assert_eq!(mode(&path), 0o711);
        create_private_dir(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        symlink(&path, dir.path().join("l")).unwrap();
        assert!(create_private_dir(&dir.path().join("l")).is_err());
        std::fs::write(dir.path().join("f"), "").unwrap();
        assert!(create_private_dir(&dir.path().join("f")).is_err());
        assert!(open_nofollow(&dir.path().join("l")).is_err());
    }

    #[test]
    fn free_space_is_at_most_the_total() {
        let s = space(Path::new("/")).unwrap();
        assert!(s.free_bytes > 0 && s.free_bytes <= s.total_bytes, "{s:?}");
    }
}
