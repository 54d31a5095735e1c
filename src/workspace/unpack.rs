//! Unpacks a tree that comes from a guest.
//!
//! The archive is hostile. fcd's own parser accepts only what
//! [`super::remote::export_tree_command`] writes, and every entry stays inside a staging directory,
//! whatever its name. One bad entry rejects the whole archive. The tree is moved to its target only
//! after all of it has arrived.

pub(super) mod reader;

use super::beneath::Beneath;
use super::encode::encode;
use super::mtime::Mtime;
use super::room::{BYTES_MAX_DEFAULT, Room};
use super::walk::inside_git_dir;
use super::{ENTRIES_MAX, PATH_BYTES_MAX};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use reader::{EntryData, Item, TarReader};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Maximum length of a path component, in bytes.
pub(super) const NAME_BYTES_MAX: usize = 255;
/// Maximum size that a file with holes may claim.
pub(super) const SPARSE_BYTES_MAX: u64 = 1 << 44;
const TREE: &str = "tree";

/// Limits on what a guest may send.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub entries: u64,
    /// The number of bytes of file content, without holes.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: ENTRIES_MAX,
            bytes: BYTES_MAX_DEFAULT,
        }
    }
}

/// The result of unpacking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Number of files, links and directories.
    pub entries: u64,
    pub bytes: u64,
}

/// A tree in a staging directory beside its target. Dropping it without calling
/// [`commit`](Staged::commit) removes the tree.
#[derive(Debug)]
pub struct Staged {
    staging: tempfile::TempDir,
    target: PathBuf,
    unpacked: Unpacked,
}

/// Checks that `target` does not exist or is an empty directory. Errors: `target_exists`,
/// `path_not_found` (its parent is not a directory), `invalid_argument` (it has no final
/// component).
pub fn check_target(target: &Path) -> Result<()> {
    match std::fs::symlink_metadata(target) {
        Ok(m) if m.is_dir() => {
            let mut items = std::fs::read_dir(target)
                .map_err(|e| Error::io(format!("read directory {}", target.display()), e))?;
            if items.next().is_some() {
                return Err(taken(target));
            }
        }
        Ok(_) => return Err(taken(target)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let parent = parent_of(target);
            if !parent.is_dir() {
                return Err(Error::new(
                    Kind::PathNotFound,
                    format!("{} is not a directory", parent.display()),
                ));
            }
        }
        Err(e) => return Err(Error::io(format!("inspect {}", target.display()), e)),
    }
    if target.file_name().is_none() {
        return Err(Error::invalid(format!(
            "{} has no final component to unpack to",
            target.display()
        )));
    }
    Ok(())
}

fn taken(target: &Path) -> Error {
    Error::new(
        Kind::TargetExists,
        format!("{} exists and is not an empty directory", target.display()),
    )
    .hint("choose a directory that does not exist yet: nothing is overwritten")
}

fn parent_of(target: &Path) -> &Path {
    target
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Unpacks all of `from` into a staging directory beside `target`. `from` must return an error if
/// its stream lacks a matching trailer. Errors: `invalid_tree` (names the offending entry),
/// `stream_incomplete`, `target_exists`, `exhausted` (over `limits`), `disk_full`, `cancelled`,
/// `host`. An error leaves nothing behind.
pub fn stage(
    from: &mut dyn Read,
    target: &Path,
    limits: &Limits,
    cancel: &Cancel,
) -> Result<Staged> {
    check_target(target)?;
    let doing = || format!("make a staging directory beside {}", target.display());
    let staging = tempfile::Builder::new()
        .prefix(".fcctl-tree-")
        .tempdir_in(parent_of(target))
        .map_err(|e| Error::io(doing(), e))?;
    let tree = staging.path().join(TREE);
    std::fs::create_dir(&tree).map_err(|e| Error::io(doing(), e))?;
    let mut writer = Writer {
        beneath: Beneath::open(&tree).map_err(|e| Error::io(doing(), e))?,
        entries_max: limits.entries,
        room: Room::new(parent_of(target), limits.bytes),
        done: Unpacked::default(),
        buffer: vec![0; 256 * 1024],
        dirs: Vec::new(),
    };
    let mut reader = TarReader::new(from);
    while let Some(item) = reader.next()? {
        if let Some(cause) = cancel.cause() {
            return Err(Error::new(
                Kind::Cancelled,
                format!("unpack the tree: cancelled: {cause}"),
            ));
        }
        writer.write(&item, &mut reader)?;
    }
    writer.set_times_of_directories()?;
    Ok(Staged {
        staging,
        target: target.to_owned(),
        unpacked: writer.done,
    })
}

impl Staged {
    /// Moves the tree to its target in one step. Returns `target_exists` if something else has
    /// appeared at the target.
    pub fn commit(self) -> Result<Unpacked> {
        let tree = self.staging.path().join(TREE);
        match rustix::fs::rename(&tree, &self.target) {
            Ok(()) => Ok(self.unpacked),
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => Err(taken(&self.target)),
            Err(e) => Err(Error::io(
                format!("move the tree to {}", self.target.display()),
                e,
            )),
        }
    }
}

/// Returns the error that the stream's I/O error carries. A premature end of the stream is
/// `stream_incomplete`.
pub(super) fn stream_error(doing: &str, e: std::io::Error) -> Error {
    let kind = e.kind();
    match e.downcast::<Error>() {
        Ok(inner) => inner.context(doing),
        Err(e) if kind == std::io::ErrorKind::UnexpectedEof => {
            Error::new(Kind::StreamIncomplete, doing).with_source(e)
        }
        Err(e) => Error::io(doing, e),
    }
}

fn refuse(path: &[u8], why: &str) -> Error {
    Error::new(Kind::InvalidTree, format!("reject the guest's tree because of \"{}\": {why}", encode(path)))
        .hint("nothing was written; inspect the path in the guest, or get a patch with fcctl workspace export --patch FILE")
}

fn refuse_kind(path: &[u8], kind: u8) -> Error {
    let kind = if kind.is_ascii_graphic() {
        (kind as char).to_string()
    } else {
        format!("{kind:#04x}")
    };
    let why = format!("it is of type {kind}, not a file, a link or a directory");
    refuse(path, &why)
}

struct Writer {
    beneath: Beneath,
    entries_max: u64,
    room: Room,
    done: Unpacked,
    buffer: Vec<u8>,
    /// Directories and their times. The times are set last, because creating a file in a directory
    /// changes the directory's time.
    dirs: Vec<(Vec<u8>, Mtime)>,
}

impl Writer {
    fn set_times_of_directories(&mut self) -> Result<()> {
        for (path, mtime) in std::mem::take(&mut self.dirs).into_iter().rev() {
            let dir = self.beneath.open_dir(&path).map_err(|e| wrong(&path, e))?;
            rustix::fs::futimens(&dir, &mtime.timestamps()).map_err(|e| wrong(&path, e.into()))?;
        }
        Ok(())
    }

    fn write(&mut self, item: &Item, reader: &mut TarReader<'_>) -> Result<()> {
        check_path(&item.path)?;
        self.done.entries += 1;
        if self.done.entries > self.entries_max {
            return Err(Error::new(
                Kind::Exhausted,
                format!(
                    "the guest's tree has more than {} entries",
                    self.entries_max
                ),
            ));
        }
        self.room.take_entry()?;
        self.beneath
            .ensure_parent(&item.path)
            .map_err(|e| wrong(&item.path, e))?;
        match &item.data {
            EntryData::Dir => self.dir(item),
            EntryData::Symlink(target) => self.symlink(item, target),
            EntryData::HardLink(_) => Err(refuse_kind(&item.path, b'1')),
            EntryData::Special(kind) => Err(refuse_kind(&item.path, *kind)),
            EntryData::File { size, segments } => {
                self.file(item, *size, segments.as_deref(), reader)
            }
        }
    }

    fn dir(&mut self, item: &Item) -> Result<()> {
        let (dir, name) = self
            .beneath
            .parent(&item.path)
            .map_err(|e| wrong(&item.path, e))?;
        // Add owner permissions, so that we can write into the directory and remove it again.
        match rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(item.mode | 0o700)) {
            Ok(()) => {
                self.dirs.push((item.path.clone(), item.mtime));
                Ok(())
            }
            Err(Errno::EXIST) => self
                .beneath
                .open_dir(&item.path)
                .map(drop)
                .map_err(|_| refuse(&item.path, "it occurs twice")),
            Err(e) => Err(wrong(&item.path, e.into())),
        }
    }

    fn symlink(&mut self, item: &Item, target: &[u8]) -> Result<()> {
        if target.is_empty() {
            return Err(refuse(&item.path, "its link has no target"));
        }
        let (dir, name) = self
            .beneath
            .parent(&item.path)
            .map_err(|e| wrong(&item.path, e))?;
        rustix::fs::symlinkat(target, dir, name).map_err(|e| wrong(&item.path, e.into()))?;
        let times = item.mtime.timestamps();
        rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| wrong(&item.path, e.into()))
    }

    fn file(
        &mut self,
        item: &Item,
        size: u64,
        segments: Option<&[(u64, u64)]>,
        reader: &mut TarReader<'_>,
    ) -> Result<()> {
        let path = &item.path;
        let content = segments.map_or(size, |s| s.iter().map(|(_, len)| len).sum());
        self.room.check_bound(content)?;
        self.done.bytes = self.done.bytes.saturating_add(content);
        if size > SPARSE_BYTES_MAX {
            return Err(refuse(path, "its size is impossible"));
        }
        let (dir, name) = self.beneath.parent(path).map_err(|e| wrong(path, e))?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(item.mode))
            .map_err(|e| wrong(path, e.into()))?;
        let file = File::from(fd);
        let whole = [(0, size)];
        let doing = || format!("write {}", encode(path));
        for segment in segments.unwrap_or(&whole) {
            reader.pieces(*segment, &mut self.buffer, &mut |piece, at| {
                self.room.take(piece.len() as u64)?;
                file.write_all_at(piece, at)
                    .map_err(|e| Error::io(doing(), e))
            })?;
        }
        reader.end_of_data()?;
        if segments.is_some() {
            file.set_len(size).map_err(|e| Error::io(doing(), e))?;
        }
        rustix::fs::futimens(&file, &item.mtime.timestamps()).map_err(|e| Error::io(doing(), e))
    }
}

/// Maps an error of creating `path`. Returns `invalid_tree` if the archive's path is at fault: it
/// occurs twice, leads through a link or a file, or is not a name that this host supports. Any
/// other error is a host error.
fn wrong(path: &[u8], e: std::io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::EEXIST) => refuse(path, "it occurs twice"),
        Some(libc::ELOOP | libc::ENOTDIR | libc::EXDEV) => {
            refuse(path, "it leads through something that is not a directory")
        }
        Some(libc::ENAMETOOLONG | libc::EINVAL | libc::EILSEQ) => {
            refuse(path, "this host does not support such a name")
        }
        _ => Error::io(format!("write {}", encode(path)), e),
    }
}

fn check_path(path: &[u8]) -> Result<()> {
    if path.is_empty() || path.len() > PATH_BYTES_MAX {
        return Err(refuse(
            &path[..path.len().min(80)],
            "it is empty or too long",
        ));
    }
    if path[0] == b'/' {
        return Err(refuse(path, "it is absolute"));
    }
    for part in path.split(|b| *b == b'/') {
        if part.is_empty()
            || part == b"."
            || part == b".."
            || part.len() > NAME_BYTES_MAX
            || part.contains(&0)
        {
            return Err(refuse(path, "it has an invalid component"));
        }
    }
    if inside_git_dir(path) {
        return Err(refuse(path, "git's own files are never accepted"));
    }
    Ok(())
}
