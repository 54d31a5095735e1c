//! Detects whether a published file has been written to.
//!
//! The disks of VMs are layers over the files of images, so a change of such a file would damage
//! all of them. Reading gigabytes of content at each start would take too long. Therefore the size
//! and the time of the last write are recorded, which detects everything but a deliberate forgery.
//! The time of the last change of attributes is not recorded, because every hard link to the file
//! changes it.

use super::in_place::Stamp;
use crate::host::command::read_bounded;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The file with the record. Directories that earlier versions published do not have it.
pub(super) const STAMPS: &str = "files.json";
const STAMPS_BYTES_MAX: u64 = 64 << 10;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileStamp {
    name: String,
    bytes: u64,
    mtime: Stamp,
}

impl FileStamp {
    fn of(dir: &Path, name: &str) -> io::Result<Self> {
        crate::locks::may_block("file access");
        let stat = std::fs::metadata(dir.join(name))?;
        Ok(Self {
            name: name.to_owned(),
            bytes: stat.len(),
            mtime: Stamp {
                s: stat.mtime(),
                ns: stat.mtime_nsec().unsigned_abs(),
            },
        })
    }

    fn compare(&self, dir: &Path) -> Result<(), String> {
        let now = Self::of(dir, &self.name).map_err(|e| format!("{}: {e}", self.name))?;
        if now.bytes != self.bytes {
            let (name, bytes) = (&self.name, self.bytes);
            return Err(format!("{name} has {} bytes instead of {bytes}", now.bytes));
        }
        // A backup may keep only whole seconds, as some tar formats do.
        let whole = now.mtime.ns == 0 && now.mtime.s == self.mtime.s;
        if now.mtime != self.mtime && !whole {
            return Err(format!(
                "{} was written to after it was published",
                self.name
            ));
        }
        Ok(())
    }
}

/// Records the files of a directory that is about to be published.
pub(super) fn write(dir: &Path, files: &[&str]) -> io::Result<()> {
    crate::locks::may_block("file access");
    let stamps: io::Result<Vec<_>> = files.iter().map(|name| FileStamp::of(dir, name)).collect();
    std::fs::write(dir.join(STAMPS), serde_json::to_vec(&stamps?)?)
}

/// Checks that the files of a published directory have not changed. Fails with a description of the
/// difference.
pub(super) fn require_unchanged(dir: &Path) -> Result<(), String> {
    crate::locks::may_block("file access");
    let unreadable = |e: io::Error| format!("{STAMPS}: {e}");
    let file = match File::open(dir.join(STAMPS)) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        opened => opened.map_err(unreadable)?,
    };
    let text = read_bounded(file, STAMPS_BYTES_MAX).map_err(unreadable)?;
    let stamps: Vec<FileStamp> = serde_json::from_slice(&text).map_err(|e| unreadable(e.into()))?;
    stamps.iter().try_for_each(|stamp| stamp.compare(dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    #[track_caller]
    fn check(change: impl FnOnce(&Path), wanted: Result<(), &str>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "abc").unwrap();
        write(dir.path(), &["disk"]).unwrap();
        change(&path);
        let found = require_unchanged(dir.path());
        assert_eq!(found.as_ref().map_err(String::as_str).copied(), wanted);
    }

    #[test]
    fn written_file_is_found() {
        check(|_| {}, Ok(()));
        check(
            |path| {
                let file = File::options().write(true).open(path).unwrap();
                let later = SystemTime::now() + Duration::from_secs(1);
                file.set_modified(later).unwrap();
            },
            Err("disk was written to after it was published"),
        );
        check(
            |path| std::fs::write(path, "abcd").unwrap(),
            Err("disk has 4 bytes instead of 3"),
        );
        check(
            |path| std::fs::remove_file(path).unwrap(),
            Err("disk: No such file or directory (os error 2)"),
        );
    }

    #[test]
    fn file_restored_from_a_backup_is_as_it_was() {
        check(
            |path| {
                let of = |file: &File| file.metadata().unwrap().mtime().unsigned_abs();
                let file = File::options().write(true).open(path).unwrap();
                let whole = SystemTime::UNIX_EPOCH + Duration::from_secs(of(&file));
                file.set_modified(whole).unwrap();
            },
            Ok(()),
        );
    }

    #[test]
    fn another_link_or_mode_is_not_a_change() {
        check(
            |path| {
                std::fs::hard_link(path, path.with_extension("link")).unwrap();
                std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o400))
                    .unwrap();
            },
            Ok(()),
        );
    }

    #[test]
    fn damaged_record_is_an_error_and_a_missing_one_is_not() {
        let record = |path: &Path| path.with_file_name(STAMPS);
        check(|path| std::fs::remove_file(record(path)).unwrap(), Ok(()));
        check(
            |path| std::fs::write(record(path), "[").unwrap(),
            Err("files.json: EOF while parsing a list at line 1 column 1"),
        );
    }
}
