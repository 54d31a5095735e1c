//! Writes a new file that gets its name only when it is complete, so that nothing is left if fcctl
//! is killed before that.

use crate::error::{Error, Kind, Result};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// The prefix of a temporary name, for file systems that do not support unnamed files.
const PREFIX: &str = ".fcctl-";

pub(super) struct Draft {
    content: Content,
    path: PathBuf,
}

enum Content {
    Unnamed(File),
    Named(tempfile::NamedTempFile),
}

impl Draft {
    /// Creates an empty file in the directory of `path`. Only its owner can read it.
    pub(super) fn new(path: &Path) -> Result<Self> {
        let io = |e| Error::io(format!("write {}", path.display()), e);
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = dir.unwrap_or(Path::new("."));
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let content = match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => Content::Unnamed(fd.into()),
            Err(Errno::OPNOTSUPP | Errno::ISDIR) => Content::Named(
                tempfile::Builder::new()
                    .prefix(PREFIX)
                    .tempfile_in(dir)
                    .map_err(io)?,
            ),
            Err(e) => return Err(io(e.into())),
        };
        Ok(Self {
            content,
            path: path.to_owned(),
        })
    }

    pub(super) fn file(&self) -> &File {
        match &self.content {
            Content::Unnamed(file) => file,
            Content::Named(file) => file.as_file(),
        }
    }

    /// Returns the error for a failed write to the file.
    pub(super) fn error(&self, e: io::Error) -> Error {
        Error::io(format!("write {}", self.path.display()), e)
    }

    /// Syncs the file and gives it its name.
    ///
    /// # Errors
    /// `target_exists` if another file already has the name.
    pub(super) fn publish(self) -> Result<()> {
        self.file().sync_all().map_err(|e| self.error(e))?;
        let failed = |e| Error::io(format!("write {}", self.path.display()), e);
        let named = match self.content {
            Content::Unnamed(file) => {
                let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
                let flags = AtFlags::SYMLINK_FOLLOW;
                rustix::fs::linkat(CWD, &unnamed, CWD, &self.path, flags).map_err(io::Error::from)
            }
            Content::Named(file) => {
                let named = file.persist_noclobber(&self.path);
                named.map(drop).map_err(|e| e.error)
            }
        };
        named.map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => {
                let text = format!("{} already exists", self.path.display());
                Error::new(Kind::TargetExists, text).hint("choose another name")
            }
            _ => failed(e),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn file_appears_when_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let count = || std::fs::read_dir(dir.path()).unwrap().count();
        for is_named in [false, true] {
            let mut draft = Draft::new(&path).unwrap();
            if is_named {
                let named = tempfile::NamedTempFile::new_in(dir.path()).unwrap();
                draft.content = Content::Named(named);
            }
            draft.file().write_all(b"all of it").unwrap();
            assert_eq!(count(), usize::from(is_named));
            draft.publish().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"all of it");
            let second = Draft::new(&path).unwrap().publish().unwrap_err();
            assert_eq!(second.kind(), Kind::TargetExists);
            drop(Draft::new(&path).unwrap());
            assert_eq!(count(), 1);
            std::fs::remove_file(&path).unwrap();
        }
        let e = Draft::new(&dir.path().join("no/out")).err().unwrap();
        assert!(e.to_string().contains("no/out"), "{e}");
    }
}
