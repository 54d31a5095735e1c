//! Lists the entries of a tree. The walk examines every path but opens no file for reading.

use super::beneath::{Beneath, is_absent};
use super::encode::encode;
use super::mtime::Mtime;
use super::{ENTRIES_MAX, PATH_BYTES_MAX};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use rustix::fs::FileType;
use std::collections::{HashMap, HashSet};

/// Maximum number of unreadable files that an error names, and of git directories that warnings
/// name.
const NAMED_MAX: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    File,
    Symlink,
    Dir,
}

/// One path of a tree and its metadata at the time of the walk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub path: Vec<u8>,
    pub kind: EntryKind,
    /// The permission bits, without set-id and sticky bits.
    pub mode: u32,
    pub mtime: Mtime,
    /// The approximate number of bytes to send, without holes.
    pub bytes: u64,
}

/// A directory whose files are not sent: a submodule, or a repository that git does not track.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Apart {
    pub path: Vec<u8>,
    /// The submodule's commit, or `None` for a repository that git does not track.
    pub commit: Option<String>,
    /// True if the host has files there. Nothing from a guest may overwrite them.
    pub has_files: bool,
}

impl Apart {
    /// Formats a record of the payload's `submodules` file.
    pub(super) fn record(&self) -> Vec<u8> {
        let flag = if self.has_files { 'x' } else { '-' };
        let mut out = format!("{flag} {} ", self.commit.as_deref().unwrap_or("-")).into_bytes();
        out.extend_from_slice(&self.path);
        out.push(0);
        out
    }
}

/// Collects the entries of a tree.
pub(super) struct Walk<'a> {
    pub beneath: Beneath,
    pub entries: Vec<Entry>,
    pub warnings: Vec<String>,
    pub apart: Vec<Apart>,
    /// The git directories of repositories that are sent as plain files.
    pub repositories: Vec<Vec<u8>>,
    unreadable: Vec<String>,
    unreadable_count: usize,
    skipped: HashSet<Vec<u8>>,
    cancel: &'a Cancel,
}

impl<'a> Walk<'a> {
    pub(super) fn new(beneath: Beneath, cancel: &'a Cancel) -> Self {
        Self {
            beneath,
            entries: Vec::new(),
            warnings: Vec::new(),
            apart: Vec::new(),
            repositories: Vec::new(),
            unreadable: Vec::new(),
            unreadable_count: 0,
            skipped: HashSet::new(),
            cancel,
        }
    }

    /// Examines one path. Returns `None` if it does not exist, cannot be read, or is not a file, a
    /// link or a directory.
    fn look(&mut self, path: &[u8]) -> Result<Option<Entry>> {
        if let Some(cause) = self.cancel.cause() {
            return Err(Error::new(
                Kind::Cancelled,
                format!("look at the tree: cancelled: {cause}"),
            ));
        }
        if path.len() > PATH_BYTES_MAX {
            let start = encode(&path[..80]);
            return Err(Error::new(
                Kind::InvalidTree,
                format!("{start}... is longer than {PATH_BYTES_MAX} bytes"),
            )
            .hint(
                "such a path cannot be created in the guest: shorten it or add it to .gitignore",
            ));
        }
        let stat = match self.beneath.stat(path) {
            Ok(stat) => stat,
            Err(e) if is_absent(&e) => return Ok(None),
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                self.note_unreadable(path);
                return Ok(None);
            }
            Err(e) => return Err(Error::io(format!("inspect {}", encode(path)), e)),
        };
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => EntryKind::File,
            FileType::Symlink => EntryKind::Symlink,
            FileType::Directory => EntryKind::Dir,
            other => {
                if self.skipped.insert(path.to_vec()) {
                    self.warnings.push(format!(
                        "left out {}: it is a {}",
                        encode(path),
                        name_of(other)
                    ));
                }
                return Ok(None);
            }
        };
        let bytes = match kind {
            EntryKind::File => (stat.st_size as u64).min(stat.st_blocks as u64 * 512 + 512),
            _ => 0,
        };
        Ok(Some(Entry {
            path: path.to_vec(),
            kind,
            mode: stat.st_mode & 0o777,
            mtime: Mtime::of(&stat),
            bytes,
        }))
    }

    fn add(&mut self, entry: Entry) -> Result<()> {
        if entry.kind == EntryKind::File {
            match self.beneath.readable(&entry.path) {
                Ok(true) => {}
                Ok(false) => {
                    self.note_unreadable(&entry.path);
                    return Ok(());
                }
                Err(e) if is_absent(&e) => return Ok(()),
                Err(e) => return Err(Error::io(format!("inspect {}", encode(&entry.path)), e)),
            }
        }
        if self.entries.len() as u64 >= ENTRIES_MAX {
            return Err(Error::new(
                Kind::InvalidTree,
                format!("the tree has more than {ENTRIES_MAX} entries"),
            ));
        }
        self.entries.push(entry);
        Ok(())
    }

    fn note_unreadable(&mut self, path: &[u8]) {
        self.unreadable_count += 1;
        if self.unreadable.len() < NAMED_MAX {
            self.unreadable.push(encode(path));
        }
    }

    /// Examines the paths that git lists, and fails if some of them cannot be read. `submodules`
    /// maps each directory that git records as a commit to that commit.
    pub(super) fn listed(
        &mut self,
        paths: &[Vec<u8>],
        submodules: &HashMap<&[u8], &str>,
    ) -> Result<()> {
        for path in paths {
            if let Some(inner) = path.strip_suffix(b"/") {
                self.warnings.push(format!(
                    "left out {}: it is a separate repository",
                    encode(inner)
                ));
                self.apart.push(Apart {
                    path: inner.to_vec(),
                    commit: None,
                    has_files: true,
                });
                continue;
            }
            if let Some(like_git) = git_dir_of(path) {
                if self.skipped.insert(like_git.to_vec()) {
                    self.warnings.push(format!(
                        "left out {}: git does not allow such a name",
                        encode(like_git)
                    ));
                }
                continue;
            }
            let Some(entry) = self.look(path)? else {
                continue;
            };
            match (entry.kind, submodules.get(path.as_slice())) {
                (EntryKind::Dir, Some(commit)) => {
                    let has_files = !self.names(path)?.is_empty();
                    self.apart.push(Apart {
                        path: path.clone(),
                        commit: Some((*commit).to_owned()),
                        has_files,
                    });
                    self.warnings.push(format!(
                        "submodule {}: its commit is recorded, its files are not sent",
                        encode(path)
                    ));
                    self.add(entry)?;
                }
                // A directory has replaced a tracked file. Git lists its content separately.
                (EntryKind::Dir, None) => {}
                _ => self.add(entry)?,
            }
        }
        self.settle()
    }

    /// Examines everything below the root, including directories and other file systems. Fails if
    /// something cannot be read.
    pub(super) fn everything(&mut self) -> Result<()> {
        let mut pending = vec![Vec::new()];
        while let Some(dir) = pending.pop() {
            for name in self.names(&dir)? {
                let path = if dir.is_empty() {
                    name
                } else {
                    [&dir[..], b"/", &name[..]].concat()
                };
                if git_dir_of(&path) == Some(&path) {
                    self.repositories.push(path.clone());
                }
                let Some(entry) = self.look(&path)? else {
                    continue;
                };
                if entry.kind == EntryKind::Dir {
                    pending.push(path);
                }
                self.add(entry)?;
            }
        }
        self.entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        self.repositories.sort_unstable();
        for path in self.repositories.iter().take(NAMED_MAX) {
            self.warnings.push(format!(
                "{} is sent, but is never part of an exported patch or tree",
                encode(path)
            ));
        }
        if self.repositories.len() > NAMED_MAX {
            let more = self.repositories.len() - NAMED_MAX;
            self.warnings.push(format!(
                "{more} more git directories are sent, but are never exported"
            ));
        }
        self.settle()
    }

    fn names(&mut self, dir: &[u8]) -> Result<Vec<Vec<u8>>> {
        let shown = || {
            format!(
                "read directory {}",
                if dir.is_empty() {
                    ".".into()
                } else {
                    encode(dir)
                }
            )
        };
        let fd = match self.beneath.open_dir(dir) {
            Ok(fd) => fd,
            Err(e) if is_absent(&e) => return Ok(Vec::new()),
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                self.note_unreadable(if dir.is_empty() { b"." } else { dir });
                return Ok(Vec::new());
            }
            Err(e) => return Err(Error::io(shown(), e)),
        };
        let mut names = Vec::new();
        for item in rustix::fs::Dir::new(fd).map_err(|e| Error::io(shown(), e))? {
            let item = item.map_err(|e| Error::io(shown(), e))?;
            let name = item.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        Ok(names)
    }

    fn settle(&mut self) -> Result<()> {
        if self.unreadable_count == 0 {
            return Ok(());
        }
        let more = self.unreadable_count - self.unreadable.len();
        self.unreadable.sort_unstable();
        let mut named = self.unreadable.join(", ");
        if more > 0 {
            named.push_str(&format!(" and {more} more"));
        }
        Err(unreadable(&named))
    }
}

fn name_of(kind: FileType) -> &'static str {
    match kind {
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        _ => "file of an unknown kind",
    }
}

/// Returns the path up to the first component that is `.git` in upper or lower case, or `None` if
/// there is no such component. git refuses to record such a path, and an exported patch or tree
/// never has one.
fn git_dir_of(path: &[u8]) -> Option<&[u8]> {
    let mut from = 0;
    for part in path.split(|b| *b == b'/') {
        let end = from + part.len();
        if part.eq_ignore_ascii_case(b".git") {
            return Some(&path[..end]);
        }
        from = end + 1;
    }
    None
}

pub(super) fn inside_git_dir(path: &[u8]) -> bool {
    git_dir_of(path).is_some()
}

pub(super) fn unreadable(what: &str) -> Error {
    Error::new(Kind::InvalidTree, format!("cannot read {what}"))
        .hint("make it readable or add it to .gitignore, then try again")
}
