//! Users' files that images use in place, without a copy in the store.
//!
//! A daemon that runs as root must not open a path that a user names, because the user could name
//! any file on the host. So the user passes a descriptor, and [`InPlace::accept`] records which
//! file it is: its path as the kernel knows it, its device, inode, size, and the times of its last
//! changes. Later, [`InPlace::open`] opens the path without a side effect (`O_PATH`), and compares
//! the file with the record before it opens it for reading. A link, a device or another file that
//! has taken the path is therefore never read.
//!
//! The owner of the file may write to it at any time. [`InPlace::require_same`] shows whether that
//! has happened, so code that reads the file calls it once more at the end.

use crate::error::{Error, Kind, Result};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// The age that the last change of a file must have before it is recorded. The clock of file
/// systems advances every few milliseconds, so two changes within one step have the same time.
const AGE_MIN: Duration = Duration::from_millis(100);
/// The type of FUSE in statfs(2). The process behind such a file system could delay a read forever.
const FUSE_MAGIC: i64 = 0x6573_5546;

/// A time of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub s: i64,
    pub ns: u64,
}

/// The identity of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InPlace {
    pub path: PathBuf,
    pub uid: u32,
    pub dev: u64,
    pub ino: u64,
    pub bytes: u64,
    pub mtime: Stamp,
    pub ctime: Stamp,
}

impl InPlace {
    /// Records the file behind a descriptor that a caller has passed.
    ///
    /// # Errors
    /// `invalid_argument` if it is not a regular file that is open for reading, `denied` if it
    /// belongs to another user, `unsupported` if it is on a file system that may never answer.
    pub fn accept(fd: &OwnedFd, caller_uid: u32) -> Result<Self> {
        crate::locks::may_block("file access");
        let io = |e: rustix::io::Errno| Error::io("inspect the passed descriptor", e);
        let stat = rustix::fs::fstat(fd).map_err(io)?;
        require_regular(&stat).map_err(|what| {
            Error::invalid(format!("the passed descriptor is {what}, not a file"))
                .hint("name a file with an ext4 file system: --rootfs FILE")
        })?;
        let flags = rustix::fs::fcntl_getfl(fd).map_err(io)?;
        if flags.contains(OFlags::PATH) || flags & OFlags::ACCMODE == OFlags::WRONLY {
            let text = "the passed descriptor is not open for reading";
            return Err(Error::invalid(text).hint("open the file for reading; fcctl does"));
        }
        if stat.st_uid != caller_uid {
            let text = format!("the file belongs to uid {}, not to you", stat.st_uid);
            return Err(Error::new(Kind::Denied, text).hint("copy the file, or ask its owner"));
        }
        let path = std::fs::read_link(own_path(fd)).map_err(|e| {
            let doing = "find the path of the passed descriptor";
            Error::io(doing, e)
        })?;
        if stat.st_nlink == 0 || !path.is_absolute() {
            let text = "the file has no path, so it could not be found again";
            return Err(Error::invalid(text).hint("name a file that is not deleted"));
        }
        if path.to_str().is_none() {
            let text = "the path of the file is not valid UTF-8";
            return Err(Error::invalid(text).hint("rename the file"));
        }
        let found = rustix::fs::fstatfs(fd).map_err(io)?;
        #[allow(clippy::useless_conversion)] // `f_type` has other types elsewhere.
        if i64::from(found.f_type) == FUSE_MAGIC {
            let text = "the file is on a FUSE file system, whose reads may never end";
            return Err(Error::new(Kind::Unsupported, text).hint("copy it to a local disk"));
        }
        Ok(Self::of(path, &stat))
    }

    fn of(path: PathBuf, stat: &Stat) -> Self {
        let stamp = |s, ns| Stamp { s, ns };
        Self {
            path,
            uid: stat.st_uid,
            dev: stat.st_dev,
            ino: stat.st_ino,
            bytes: stat.st_size.cast_unsigned(),
            mtime: stamp(stat.st_mtime, stat.st_mtime_nsec),
            ctime: stamp(stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Returns how long to wait until every later change of the file has a later time.
    pub fn settles_in(&self) -> Duration {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let changed = u64::try_from(self.ctime.s).unwrap_or(0);
        let changed = Duration::from_secs(changed) + Duration::from_nanos(self.ctime.ns);
        match now.unwrap_or_default().checked_sub(changed) {
            Some(age) => AGE_MIN.saturating_sub(age),
            // The time is in the future. Waiting would not help.
            None => Duration::ZERO,
        }
    }

    /// Opens the file for reading if it is still the one that was recorded.
    ///
    /// # Errors
    /// `conflict` if it has changed or is gone, and `host` if the daemon may not read it.
    pub fn open(&self) -> Result<File> {
        crate::locks::may_block("file access");
        let found = self.find()?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::open(own_path(&found), flags, Mode::empty())
            .map_err(|e| Error::io(format!("open {}", self.path.display()), e))?;
        let file = File::from(file);
        self.require_same(&file)?;
        Ok(file)
    }

    /// Opens the path without access to its content, and compares the file with the record.
    fn find(&self) -> Result<OwnedFd> {
        crate::locks::may_block("file access");
        use rustix::io::Errno;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = rustix::fs::open(&self.path, flags, Mode::empty()).map_err(|e| match e {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP => self.changed("it is gone"),
            e => Error::io(format!("find {}", self.path.display()), e),
        })?;
        self.compare(&found)?;
        Ok(found)
    }

    /// Fails if the open file is not the recorded one, or was changed since.
    pub fn require_same(&self, file: &File) -> Result<()> {
        self.compare(file)
    }

    /// Returns how the file differs from the record, or None if it does not.
    pub fn difference(&self) -> Option<String> {
        self.find().err().map(|e| e.to_string())
    }

    fn compare(&self, file: impl std::os::fd::AsFd) -> Result<()> {
        let stat = rustix::fs::fstat(file)
            .map_err(|e| Error::io(format!("inspect {}", self.path.display()), e))?;
        if let Err(what) = require_regular(&stat) {
            return Err(self.changed(&format!("it is {what} now")));
        }
        let now = Self::of(self.path.clone(), &stat);
        let difference = if (now.dev, now.ino) != (self.dev, self.ino) {
            "another file has its place".to_owned()
        } else if now.bytes != self.bytes {
            format!("it has {} bytes instead of {}", now.bytes, self.bytes)
        } else if now.uid != self.uid {
            format!("it belongs to uid {} now", now.uid)
        } else if now.mtime != self.mtime {
            "it was written".to_owned()
        } else if now.ctime != self.ctime {
            "its attributes or its content were changed".to_owned()
        } else {
            return Ok(());
        };
        Err(self.changed(&difference))
    }

    fn changed(&self, how: &str) -> Error {
        let text = format!(
            "{} has changed since it was registered: {how}",
            self.path.display()
        );
        Error::new(Kind::Conflict, text)
    }
}

fn own_path(fd: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Fails with a description of the file if it is not a regular file.
fn require_regular(stat: &Stat) -> std::result::Result<(), &'static str> {
    Err(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Unknown => "something unknown",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    fn me() -> u32 {
        nix::unistd::geteuid().as_raw()
    }

    fn open(path: &Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    /// Records a new file in a directory of its own.
    fn recorded() -> (tempfile::TempDir, PathBuf, InPlace) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.ext4");
        std::fs::write(&path, vec![7; 4096]).unwrap();
        let record = InPlace::accept(&open(&path), me()).unwrap();
        (dir, path, record)
    }

    #[test]
    fn file_that_stays_is_opened() {
        let (_dir, path, record) = recorded();
        assert_eq!((record.bytes, record.uid), (4096, me()));
        assert_eq!(record.path, path.canonicalize().unwrap());
        let file = record.open().unwrap();
        record.require_same(&file).unwrap();
        assert_eq!(record.difference(), None);
        assert!(record.settles_in() <= AGE_MIN);
    }

    #[track_caller]
    fn check_changed(change: impl FnOnce(&Path), says: &str) {
        let (_dir, path, record) = recorded();
        let reader = record.open().unwrap();
        // Otherwise the change could have the same time.
        while record.settles_in() > Duration::ZERO {
            std::thread::yield_now();
        }
        change(&path);
        let e = record.open().unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict, "{e}");
        assert!(e.to_string().contains(says), "{e}");
        assert!(record.difference().unwrap().contains(says));
        // A reader that has the file open notices the change at its end, unless only the path has
        // changed.
        let is_path_only = says.contains("place") || says.contains("gone") || says.contains(" now");
        assert!(is_path_only || record.require_same(&reader).is_err());
    }

    #[test]
    fn changed_file_is_refused() {
        let size = "it has 3 bytes instead of 4096";
        check_changed(|path| std::fs::write(path, "abc").unwrap(), size);
        check_changed(
            |path| std::fs::write(path, vec![8; 4096]).unwrap(),
            "it was written",
        );
        check_changed(
            |path| {
                let file = File::options().write(true).open(path).unwrap();
                let before = file.metadata().unwrap().modified().unwrap();
                std::os::unix::fs::FileExt::write_at(&file, b"x", 9).unwrap();
                file.set_modified(before).unwrap();
            },
            "attributes or its content",
        );
    }

    #[test]
    fn another_file_at_the_path_is_refused() {
        check_changed(|path| std::fs::remove_file(path).unwrap(), "it is gone");
        let replace = |path: &Path, make: &dyn Fn(&Path)| {
            let other = path.with_file_name("other");
            make(&other);
            std::fs::rename(&other, path).unwrap();
        };
        check_changed(
            |path| replace(path, &|other| std::fs::write(other, vec![7; 4096]).unwrap()),
            "another file has its place",
        );
        check_changed(
            |path| replace(path, &|other| symlink("/etc/passwd", other).unwrap()),
            "it is a symbolic link now",
        );
        // Opening a pipe for reading would wait for a writer.
        check_changed(
            |path| {
                let mode = nix::sys::stat::Mode::S_IRUSR;
                replace(path, &|other| nix::unistd::mkfifo(other, mode).unwrap());
            },
            "it is a pipe now",
        );
    }

    #[test]
    fn descriptor_of_another_kind_is_refused() {
        let refused = |fd: OwnedFd, uid| InPlace::accept(&fd, uid).unwrap_err();
        let (dir, path, _) = recorded();
        for (other, what) in [
            (dir.path(), "a directory"),
            ("/dev/null".as_ref(), "device"),
        ] {
            let e = refused(open(other), me());
            assert_eq!(e.kind(), Kind::InvalidArgument);
            assert!(e.to_string().contains(what), "{e}");
        }
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(refused(reader.into(), me()).to_string().contains("a pipe"));
        let by_path = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let writer = File::options().append(true).open(&path).unwrap();
        for unreadable in [by_path.unwrap(), writer.into()] {
            assert_eq!(refused(unreadable, me()).kind(), Kind::InvalidArgument);
        }
        assert_eq!(refused(open(&path), me() + 1).kind(), Kind::Denied);
        let deleted = tempfile::tempfile().unwrap();
        assert!(
            refused(deleted.into(), me())
                .to_string()
                .contains("no path")
        );
    }
}
