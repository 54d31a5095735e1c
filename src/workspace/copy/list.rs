//! Lists the entries of paths on the host.

use super::{FileKind, check_cancel, must_be_dir, name_of, shown};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use crate::workspace::attributes::Owner;
use crate::workspace::beneath::{Beneath, is_absent};
use crate::workspace::mtime::Mtime;
use crate::workspace::{ENTRIES_MAX, PATH_BYTES_MAX};
use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags, Stat};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// How many unreadable paths are named.
const NAMED_MAX: usize = 5;

/// A path on the host and everything below it.
#[derive(Debug)]
pub struct Listing {
    path: PathBuf,
    follow: bool,
    pub kind: FileKind,
    /// The name under which it is copied into a directory.
    pub name: Option<Vec<u8>>,
    pub(super) entries: Vec<Entry>,
    /// The paths that are left out, with the reasons.
    pub warnings: Vec<String>,
}

#[derive(Debug)]
pub(super) struct Entry {
    /// The path below the listed directory, or empty for the listed path itself.
    pub path: Vec<u8>,
    pub kind: FileKind,
    /// All permission bits.
    pub mode: u32,
    pub mtime: Mtime,
    pub owner: Owner,
    /// The identity of a file with several names, which is the same for all of them.
    pub inode: Option<Inode>,
    /// The approximate number of bytes to send.
    bytes: u64,
}

/// The identity of a file that has several names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Inode {
    device: u64,
    number: u64,
}

/// Lists `path`. With `follow`, `path` may be a link, whose target is listed. No other link is
/// followed. Errors: `path_not_found`, `invalid_argument` (it is not a file, a link or a
/// directory), `invalid_tree` (a file cannot be read, a path is too long, or there are too many
/// entries), `cancelled`.
pub fn list(path: &Path, follow: bool, cancel: &Cancel) -> Result<Listing> {
    let bytes = path.as_os_str().as_bytes();
    let follow = follow || must_be_dir(bytes);
    let stat = stat(path, follow)?;
    let kind = kind_of(&stat).map_err(|what| {
        let text = format!("{}: it is a {what}, which cannot be copied", path.display());
        Error::invalid(text)
    })?;
    let mut listing = Listing {
        path: path.to_owned(),
        follow,
        kind,
        name: name_of(bytes).map(<[u8]>::to_vec),
        entries: vec![Entry::new(Vec::new(), kind, &stat)],
        warnings: Vec::new(),
    };
    let mut unreadable = Unreadable::default();
    match kind {
        FileKind::Dir => listing.add_below(&mut unreadable, cancel)?,
        FileKind::File if rustix::fs::access(path, Access::READ_OK).is_err() => {
            unreadable.add(bytes);
        }
        _ => {}
    }
    unreadable.check()?;
    Ok(listing)
}

fn stat(path: &Path, follow: bool) -> Result<Stat> {
    let flags = if follow {
        AtFlags::empty()
    } else {
        AtFlags::SYMLINK_NOFOLLOW
    };
    rustix::fs::statat(CWD, path, flags).map_err(|e| {
        let kind = match e {
            rustix::io::Errno::NOENT => Kind::PathNotFound,
            rustix::io::Errno::NOTDIR => Kind::InvalidArgument,
            _ => Kind::Host,
        };
        let what = match kind {
            Kind::PathNotFound => "no such file or directory".to_owned(),
            Kind::InvalidArgument => "not a directory".to_owned(),
            _ => std::io::Error::from(e).to_string(),
        };
        Error::new(kind, format!("{}: {what}", path.display()))
    })
}

/// Returns the kind, or the name of a file type that cannot be copied.
fn kind_of(stat: &Stat) -> std::result::Result<FileKind, &'static str> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(FileKind::File),
        FileType::Symlink => Ok(FileKind::Link),
        FileType::Directory => Ok(FileKind::Dir),
        FileType::Fifo => Err("FIFO"),
        FileType::Socket => Err("socket"),
        _ => Err("device"),
    }
}

impl Entry {
    fn new(path: Vec<u8>, kind: FileKind, stat: &Stat) -> Self {
        let has_names = kind == FileKind::File && stat.st_nlink > 1;
        let used = (stat.st_size as u64).min(stat.st_blocks as u64 * 512);
        Self {
            path,
            kind,
            mode: stat.st_mode & 0o7777,
            mtime: Mtime::of(stat),
            owner: Owner {
                uid: stat.st_uid,
                gid: stat.st_gid,
            },
            inode: has_names.then_some(Inode {
                device: stat.st_dev,
                number: stat.st_ino,
            }),
            bytes: if kind == FileKind::File { used } else { 0 },
        }
    }
}

impl Listing {
    /// Returns the approximate number of bytes to send.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    /// Opens the listed directory.
    pub(super) fn beneath(&self) -> Result<Beneath> {
        let mut flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if !self.follow {
            flags |= OFlags::NOFOLLOW;
        }
        let opened = rustix::fs::open(&self.path, flags, Mode::empty());
        let opened =
            opened.map_err(|e| Error::io(format!("read directory {}", self.path.display()), e))?;
        Ok(Beneath::new(opened))
    }

    /// Opens the listed file without waiting for the writer of a FIFO.
    pub(super) fn open(&self) -> std::io::Result<File> {
        let mut flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if !self.follow {
            flags |= OFlags::NOFOLLOW;
        }
        Ok(rustix::fs::open(&self.path, flags, Mode::empty())?.into())
    }

    /// Returns the target of the listed link.
    pub(super) fn read_link(&self) -> std::io::Result<Vec<u8>> {
        Ok(rustix::fs::readlink(&self.path, Vec::new())?.into_bytes())
    }

    /// Formats the path of an entry.
    pub(super) fn shown(&self, below: &[u8]) -> String {
        self.path
            .join(std::ffi::OsStr::from_bytes(below))
            .display()
            .to_string()
            .trim_end_matches('/')
            .to_owned()
    }

    fn add_below(&mut self, unreadable: &mut Unreadable, cancel: &Cancel) -> Result<()> {
        let mut beneath = self.beneath()?;
        let mut pending = vec![Vec::new()];
        while let Some(dir) = pending.pop() {
            let names = match names(&beneath, &dir) {
                Ok(names) => names,
                // The directory has just been removed or replaced.
                Err(e) if !dir.is_empty() && is_absent(&e) => continue,
                Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                    unreadable.add(self.shown(&dir).as_bytes());
                    continue;
                }
                Err(e) => return Err(Error::io(format!("read {}", self.shown(&dir)), e)),
            };
            for name in names {
                check_cancel(cancel)?;
                let path = if dir.is_empty() {
                    name
                } else {
                    [&dir[..], b"/", &name[..]].concat()
                };
                if self.add(&mut beneath, &path, unreadable)? {
                    pending.push(path);
                }
            }
        }
        self.entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Ok(())
    }

    /// Adds an entry. Returns true if it is a directory.
    fn add(
        &mut self,
        beneath: &mut Beneath,
        path: &[u8],
        unreadable: &mut Unreadable,
    ) -> Result<bool> {
        let refuse = |text: String| Err(Error::new(Kind::InvalidTree, text));
        if path.len() > PATH_BYTES_MAX {
            let start = self.shown(&path[..80]);
            return refuse(format!("{start}... is longer than {PATH_BYTES_MAX} bytes"));
        }
        if self.entries.len() as u64 >= ENTRIES_MAX {
            let top = self.path.display();
            return refuse(format!("{top} has more than {ENTRIES_MAX} entries"));
        }
        let stat = match beneath.stat(path) {
            Ok(stat) => stat,
            Err(e) if is_absent(&e) => return Ok(false),
            Err(e) => return Err(Error::io(format!("inspect {}", self.shown(path)), e)),
        };
        let kind = match kind_of(&stat) {
            Ok(kind) => kind,
            Err(what) => {
                let text = format!("skipped {}: it is a {what}", self.shown(path));
                self.warnings.push(text);
                return Ok(false);
            }
        };
        if kind == FileKind::File && !beneath.readable(path).unwrap_or(true) {
            unreadable.add(self.shown(path).as_bytes());
        }
        self.entries.push(Entry::new(path.to_vec(), kind, &stat));
        Ok(kind == FileKind::Dir)
    }
}

fn names(beneath: &Beneath, dir: &[u8]) -> std::io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for item in rustix::fs::Dir::new(beneath.open_dir(dir)?)? {
        let item = item?;
        let name = item.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// Paths that the caller may not read.
#[derive(Default)]
struct Unreadable {
    named: Vec<String>,
    count: usize,
}

impl Unreadable {
    fn add(&mut self, path: &[u8]) {
        self.count += 1;
        if self.named.len() < NAMED_MAX {
            self.named.push(shown(path));
        }
    }

    fn check(self) -> Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let mut text = format!("cannot read {}", self.named.join(", "));
        if self.count > self.named.len() {
            text.push_str(&format!(" and {} more", self.count - self.named.len()));
        }
        Err(Error::new(Kind::InvalidTree, text).hint("make it readable; nothing was copied"))
    }
}
