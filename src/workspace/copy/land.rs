//! Writes files that a guest sends to a destination on the host, with the caller's rights.
//!
//! The guest is hostile. Each path is checked and looked up relative to one directory without
//! following links. Files and links are created under a temporary name and then renamed, so that
//! none is ever incomplete under its own name. Devices, FIFOs, set-id bits and attributes that give
//! rights are left out.

mod files;

use super::{Copied, FileKind, check_cancel, must_be_dir, name_of, shown};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use crate::workspace::PATH_BYTES_MAX;
use crate::workspace::attributes::{self, Extra, Owner};
use crate::workspace::beneath::Beneath;
use crate::workspace::mtime::Mtime;
use crate::workspace::room::Room;
use crate::workspace::unpack::reader::{EntryData, Item, TarReader};
use crate::workspace::unpack::{Limits, NAME_BYTES_MAX};
use rustix::fs::{AtFlags, Gid, Mode, Uid};
use rustix::io::Errno;
use std::collections::HashSet;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// How many skipped paths are named.
const SKIPPED_MAX: usize = 20;
const PIECE_BYTES: usize = 256 * 1024;

/// The destination of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// An existing directory.
    base: PathBuf,
    /// The path below it, or empty for the directory itself.
    below: Vec<u8>,
    kind: FileKind,
}

/// The attributes to keep, and the amount of data to accept.
#[derive(Clone, Copy, Debug)]
pub struct Landing {
    /// Keep owners, hard links and attributes.
    pub archive: bool,
    pub limits: Limits,
}

/// The result of a copy.
#[derive(Debug, Default)]
pub struct Landed {
    pub copied: Copied,
    pub warnings: Vec<String>,
}

/// Checks a destination as far as possible before the guest is asked. The destination, or the
/// directory that contains it, must be a directory. With `several`, the destination itself must be
/// one.
pub fn check(to: &Path, several: bool) -> Result<()> {
    let kind = if several || must_be_dir(to.as_os_str().as_bytes()) {
        FileKind::Dir
    } else {
        FileKind::File
    };
    match std::fs::metadata(to) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) if several => Err(not_a_directory(to)),
        Err(e) if several && e.kind() == io::ErrorKind::NotFound => Err(no_directory(to)),
        _ => resolve(to, Some(b"x"), kind).map(drop),
    }
}

/// Applies the rules of cp(1). If the destination is an existing directory, the source is copied
/// into it. Otherwise the copy gets the destination's name. `name` is the name of the source; if it
/// is None, the content of the source directory is copied. Errors: `path_not_found`,
/// `target_exists`, `invalid_argument`.
pub fn resolve(to: &Path, name: Option<&[u8]>, kind: FileKind) -> Result<Destination> {
    let bytes = to.as_os_str().as_bytes();
    let found = match std::fs::metadata(to) {
        // A link that leads nowhere is replaced like a file.
        Err(e) if e.kind() == io::ErrorKind::NotFound => std::fs::symlink_metadata(to),
        found => found,
    };
    match found {
        Ok(found) if found.is_dir() => {
            return Ok(Destination {
                base: to.to_owned(),
                below: name.unwrap_or_default().to_vec(),
                kind,
            });
        }
        Ok(_) if kind == FileKind::Dir => return Err(taken(&to.display().to_string())),
        Ok(found) if !(found.is_file() || found.is_symlink()) || is_of_system(to) => {
            let text = format!("{}: it is neither a file nor a directory", to.display());
            return Err(Error::invalid(text).hint(
                "to print a file, use fcctl exec VM -- cat PATH; to write a tar to stdout, use -",
            ));
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if kind != FileKind::Dir && must_be_dir(bytes) {
                return Err(no_directory(to));
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => return Err(not_a_directory(to)),
        Err(e) => return Err(Error::io(format!("inspect {}", to.display()), e)),
    }
    let base = match to.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    };
    if !base.is_dir() {
        return Err(no_directory(base));
    }
    let below = name_of(bytes).ok_or_else(|| no_directory(to))?.to_vec();
    let base = base.to_owned();
    Ok(Destination { base, below, kind })
}

/// True for a link of the system such as /dev/stdout, which may lead to a file. A copy would
/// replace it.
fn is_of_system(path: &Path) -> bool {
    let dir = path.parent().and_then(|dir| dir.canonicalize().ok());
    dir.is_some_and(|dir| dir == Path::new("/dev") || dir.starts_with("/proc"))
}

fn no_directory(path: &Path) -> Error {
    let path = path.display();
    Error::new(Kind::PathNotFound, format!("{path}: no such directory"))
        .hint(format!("create it: mkdir -p {path}"))
}

fn not_a_directory(path: &Path) -> Error {
    Error::invalid(format!("{}: not a directory", path.display()))
}

fn taken(path: &str) -> Error {
    let text = format!("{path}: it exists and is not a directory");
    Error::new(Kind::TargetExists, text)
}

/// Writes a tar from a guest to its destination. `progress` gets the size of each piece. Errors:
/// `invalid_tree` (names the offending entry), `stream_incomplete`, `target_exists`, `exhausted`
/// (over the limits), `disk_full`, `cancelled`, `host`. Files that arrived completely before an
/// error stay.
pub fn land(
    from: &mut dyn Read,
    to: &Destination,
    landing: &Landing,
    progress: &mut dyn FnMut(u64),
    cancel: &Cancel,
) -> Result<Landed> {
    let doing = || format!("open {}", to.base.display());
    let random = crate::host::hex::encode(&crate::host::random::bytes::<8>());
    let mut lander = Lander {
        to,
        archive: landing.archive,
        owner: owner_to_set(landing.archive),
        beneath: Beneath::open(&to.base).map_err(|e| Error::io(doing(), e))?,
        entries_max: landing.limits.entries,
        room: Room::new(&to.base, landing.limits.bytes),
        made: HashSet::new(),
        dirs: Vec::new(),
        temporary: format!(".fcctl-cp-{random}"),
        buffer: vec![0; PIECE_BYTES],
        skipped: 0,
        landed: Landed::default(),
        progress,
    };
    let mut reader = TarReader::new(from);
    let explained = |e| explained(e, to);
    while let Some(item) = reader.next().map_err(explained)? {
        check_cancel(cancel)?;
        lander.item(&item, &mut reader).map_err(explained)?;
    }
    lander.finish().map_err(explained)
}

/// Adds the destination to errors about paths below it, and replaces the hints of an archive's
/// errors, which are about workspaces.
fn explained(e: Error, to: &Destination) -> Error {
    match e.kind() {
        Kind::InvalidTree => {
            e.hint("what was copied before is complete; inspect the path in the guest")
        }
        Kind::Host | Kind::DiskFull | Kind::TargetExists => {
            e.context(format!("copy to {}", to.base.display()))
        }
        _ => e,
    }
}

fn refuse(path: &[u8], why: &str) -> Error {
    let path = shown(&path[..path.len().min(PATH_BYTES_MAX)]);
    Error::new(
        Kind::InvalidTree,
        format!("reject what the guest sends because of \"{path}\": {why}"),
    )
}

/// True if the owners in the tar are set. Only root can give files away. Other users own what they
/// copy, as with cp -a.
fn owner_to_set(archive: bool) -> bool {
    archive && rustix::process::geteuid().is_root()
}

/// The identity of a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Inode {
    device: u64,
    number: u64,
}

/// The mode, time and attributes of a directory. They are set at the end, because creating files in
/// the directory needs rights and changes its time.
struct DirEnd {
    path: Vec<u8>,
    mtime: Mtime,
    mode: Option<u32>,
    extra: Option<Extra>,
}

struct Lander<'a> {
    to: &'a Destination,
    archive: bool,
    owner: bool,
    beneath: Beneath,
    entries_max: u64,
    room: Room,
    /// The files that this copy has created. Hard links may lead only to these.
    made: HashSet<Inode>,
    dirs: Vec<DirEnd>,
    /// The name of a file until it is complete.
    temporary: String,
    buffer: Vec<u8>,
    skipped: usize,
    landed: Landed,
    progress: &'a mut dyn FnMut(u64),
}

impl Lander<'_> {
    fn item(&mut self, item: &Item, reader: &mut TarReader<'_>) -> Result<()> {
        if self.landed.copied.entries >= self.entries_max {
            let text = format!("the guest sends more than {} entries", self.entries_max);
            return Err(Error::new(Kind::Exhausted, text));
        }
        let path = self.path_of(item)?;
        if let EntryData::Special(kind) = item.data {
            self.skip(&path, kind);
            return Ok(());
        }
        self.landed.copied.entries += 1;
        self.room.take_entry()?;
        if path.is_empty() {
            return self.base(item);
        }
        self.beneath
            .ensure_parent(&path)
            .map_err(|e| wrong(&path, e))?;
        match &item.data {
            EntryData::Dir => self.dir(&path, item),
            EntryData::Symlink(target) => self.symlink(&path, item, target),
            EntryData::HardLink(target) => self.hard_link(&path, target),
            EntryData::File { size, segments } => {
                self.file(&path, item, *size, segments.as_deref(), reader)
            }
            EntryData::Special(_) => Ok(()),
        }
    }

    /// Returns the path below the base. It is empty for the base itself.
    fn path_of(&self, item: &Item) -> Result<Vec<u8>> {
        let is_dir = matches!(item.data, EntryData::Dir);
        match self.to.kind {
            FileKind::Dir => {
                if item.path == b"." && !is_dir {
                    return Err(refuse(&item.path, "it is not a directory"));
                }
                self.below(&item.path)
            }
            _ if is_dir || self.landed.copied.entries > 0 => {
                Err(refuse(&item.path, "only one file was expected"))
            }
            _ => Ok(self.to.below.clone()),
        }
    }

    /// Returns the path below the base for a path in a directory's tar.
    fn below(&self, path: &[u8]) -> Result<Vec<u8>> {
        if path == b"." {
            return Ok(self.to.below.clone());
        }
        let inner = path.strip_prefix(b"./").unwrap_or(path);
        check_path(inner)?;
        Ok(if self.to.below.is_empty() {
            inner.to_vec()
        } else {
            [&self.to.below, &b"/"[..], inner].concat()
        })
    }

    fn skip(&mut self, path: &[u8], kind: u8) {
        self.skipped += 1;
        if self.skipped <= SKIPPED_MAX {
            let what = if kind == b'6' { "FIFO" } else { "device" };
            let text = format!("skipped {}: it is a {what}", self.shown(path));
            self.landed.warnings.push(text);
        }
    }

    fn shown(&self, path: &[u8]) -> String {
        let path = self.to.base.join(std::ffi::OsStr::from_bytes(path));
        path.display().to_string()
    }

    /// Handles the entry of the destination itself, which is an existing directory.
    fn base(&mut self, item: &Item) -> Result<()> {
        if self.archive {
            self.at_end(Vec::new(), item, Some(item.mode));
        }
        Ok(())
    }

    fn dir(&mut self, path: &[u8], item: &Item) -> Result<()> {
        let (dir, name) = self.beneath.parent(path).map_err(|e| wrong(path, e))?;
        match rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(item.mode)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                self.beneath
                    .open_dir(path)
                    .map_err(|_| taken(&shown(path)))?;
                if self.archive {
                    self.at_end(path.to_vec(), item, Some(item.mode));
                }
                return Ok(());
            }
            Err(e) => return Err(wrong(path, e.into())),
        }
        // The owner needs all rights to open and fill the new directory. Its own mode is set at the
        // end.
        let found = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| wrong(path, e.into()))?;
        let mode = found.st_mode & 0o777;
        let is_restricted = mode & 0o700 != 0o700;
        if is_restricted {
            let open = Mode::from_raw_mode(mode | 0o700);
            rustix::fs::chmodat(dir, name, open, AtFlags::empty())
                .map_err(|e| wrong(path, e.into()))?;
        }
        let mode = match self.archive {
            true => Some(item.mode),
            false => is_restricted.then_some(mode),
        };
        self.at_end(path.to_vec(), item, mode);
        Ok(())
    }

    fn at_end(&mut self, path: Vec<u8>, item: &Item, mode: Option<u32>) {
        self.dirs.push(DirEnd {
            path,
            mtime: item.mtime,
            mode,
            extra: self.archive.then(|| item.extra.clone()),
        });
    }

    fn finish(mut self) -> Result<Landed> {
        for end in std::mem::take(&mut self.dirs).into_iter().rev() {
            let dir = self
                .beneath
                .open_dir(&end.path)
                .map_err(|e| wrong(&end.path, e))?;
            if let Some(extra) = &end.extra {
                self.set_extra(&dir, extra)
                    .map_err(|e| wrong(&end.path, e))?;
            }
            if let Some(mode) = end.mode {
                rustix::fs::fchmod(&dir, Mode::from_raw_mode(mode))
                    .map_err(|e| wrong(&end.path, e.into()))?;
            }
            rustix::fs::futimens(&dir, &end.mtime.timestamps())
                .map_err(|e| wrong(&end.path, e.into()))?;
        }
        if self.skipped > SKIPPED_MAX {
            let more = self.skipped - SKIPPED_MAX;
            let text = format!("skipped {more} more devices and FIFOs");
            self.landed.warnings.push(text);
        }
        Ok(self.landed)
    }

    fn set_extra(&self, fd: impl AsFd, extra: &Extra) -> io::Result<()> {
        attributes::set(&fd, &extra.xattrs)?;
        if self.owner {
            let Owner { uid, gid } = extra.owner;
            rustix::fs::fchown(&fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        Ok(())
    }
}

/// Maps an error of creating `path`, which is below the destination.
fn wrong(path: &[u8], e: io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::ELOOP | libc::ENOTDIR | libc::EXDEV) => Error::new(
            Kind::TargetExists,
            format!("write {}: a link or a file is in its way", shown(path)),
        ),
        Some(libc::ENAMETOOLONG | libc::EINVAL | libc::EILSEQ) => {
            refuse(path, "this host does not support such a name")
        }
        _ => Error::io(format!("write {}", shown(path)), e),
    }
}

fn check_path(path: &[u8]) -> Result<()> {
    if path.is_empty() || path.len() > PATH_BYTES_MAX {
        return Err(refuse(path, "it is empty or too long"));
    }
    for part in path.split(|b| *b == b'/') {
        let is_step = part.is_empty() || part == b"." || part == b"..";
        if is_step || part.len() > NAME_BYTES_MAX || part.contains(&0) {
            return Err(refuse(path, "it has an invalid component"));
        }
    }
    Ok(())
}
