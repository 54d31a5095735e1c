//! Walks through all directories and writes their files to a tar archive, which becomes a layer.

use super::blocks::Content;
use super::damaged;
use super::directory::{Name, names};
use super::disk::{Disk, Source};
use super::inode::{FileKind, Inode, MAP_BYTES};
use super::xattr::xattrs;
use crate::error::{Error, Kind, Result};
use crate::host::text::quoted;
use crate::image::oci::limits::{DEPTH_MAX, ENTRIES_MAX, METADATA_BYTES_MAX};
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use tar::{Builder, EntryType, Header};

const ROOT: u32 = 2;
const LINK_BYTES_MAX: u64 = 4096;
/// A layer deletes the file whose name follows this prefix.
const WHITEOUT: &[u8] = b".wh.";
/// mke2fs makes this directory.
const LOST_AND_FOUND: &[u8] = b"lost+found";
/// The largest user or group id that fits into a field of a tar header, which has seven octal
/// digits.
const HEADER_ID_MAX: u32 = 0o7_777_777;

/// Writes all files of the file system in `disk` to `to`. `progress` receives the bytes of each
/// file.
///
/// # Errors
/// `exhausted` if the files contain more than `bytes_max` bytes in total.
pub(in crate::image) fn write_tar(
    disk: &dyn Source,
    to: &mut dyn Write,
    bytes_max: u64,
    progress: &dyn Fn(u64),
) -> Result<()> {
    let disk = Disk::open(disk)?;
    let mut walk = Walk {
        disk: &disk,
        tar: Builder::new(to),
        visited: HashSet::new(),
        links: HashMap::new(),
        entries: 0,
        metadata_bytes: 0,
        bytes_left: bytes_max,
        progress,
    };
    walk.run()?;
    let finished = walk.tar.into_inner().and_then(|to| to.flush());
    finished.map_err(|e| Error::io("write the layer", e))
}

/// A directory whose names are being written.
struct Open {
    path: Vec<u8>,
    names: std::vec::IntoIter<Name>,
}

struct Walk<'a> {
    disk: &'a Disk<'a>,
    tar: Builder<&'a mut dyn Write>,
    /// The inodes of the directories that were visited.
    visited: HashSet<u32>,
    /// The first path of each file that has several.
    links: HashMap<u32, Vec<u8>>,
    entries: u64,
    metadata_bytes: u64,
    bytes_left: u64,
    progress: &'a dyn Fn(u64),
}

impl Walk<'_> {
    fn run(&mut self) -> Result<()> {
        let root = self.disk.inode(ROOT)?;
        let mut open = vec![self.enter(&root, b"./".to_vec())?];
        while let Some(directory) = open.last_mut() {
            let Some(Name { name, inode }) = directory.names.next() else {
                open.pop();
                continue;
            };
            let is_top = open.len() == 1;
            let directory = &open[open.len() - 1];
            let mut path = if is_top {
                name.clone()
            } else {
                [&directory.path[..], &name].concat()
            };
            if name.starts_with(WHITEOUT) {
                let text = format!("the name {} means a deletion in a layer", shown(&path));
                return Err(Error::new(Kind::Unsupported, text)
                    .hint("export the file system itself: --format raw"));
            }
            let inode = self.disk.inode(inode)?;
            if inode.kind != FileKind::Directory {
                self.add_file(&inode, path)?;
                continue;
            }
            if open.len() >= DEPTH_MAX {
                return Err(damaged("its directories are nested too deep"));
            }
            if is_top && name == LOST_AND_FOUND && names(self.disk, &inode)?.is_empty() {
                continue;
            }
            path.push(b'/');
            let entered = self.enter(&inode, path)?;
            open.push(entered);
        }
        Ok(())
    }

    fn enter(&mut self, inode: &Inode, path: Vec<u8>) -> Result<Open> {
        if inode.kind != FileKind::Directory || !self.visited.insert(inode.number) {
            return Err(damaged("a directory is in two places"));
        }
        let names = names(self.disk, inode)?;
        let in_names = names.iter().map(|name| name.name.len() as u64);
        self.count(names.len() as u64, in_names.sum())?;
        self.add(inode, &path, EntryType::Directory, &mut io::empty())?;
        Ok(Open {
            path,
            names: names.into_iter(),
        })
    }

    /// Counts entries and bytes of metadata and fails if there are too many. The limits also bound
    /// the memory of this process.
    fn count(&mut self, entries: u64, bytes: u64) -> Result<()> {
        self.entries += entries;
        self.metadata_bytes += bytes;
        if self.entries <= ENTRIES_MAX && self.metadata_bytes <= METADATA_BYTES_MAX {
            return Ok(());
        }
        let text = format!(
            "the file system has more than {ENTRIES_MAX} files, or names that are too long"
        );
        Err(Error::new(Kind::InvalidImage, text)
            .hint("export the file system itself: --format raw"))
    }

    fn add_file(&mut self, inode: &Inode, path: Vec<u8>) -> Result<()> {
        if inode.links > 1 {
            if let Some(first) = self.links.get(&inode.number) {
                let mut header = self.header(inode, EntryType::Link);
                let linked = self
                    .tar
                    .append_link(&mut header, as_path(&path), as_path(first));
                return linked.map_err(|e| failed(&path, e));
            }
            self.count(0, path.len() as u64)?;
            self.links.insert(inode.number, path.clone());
        }
        let kind = match inode.kind {
            FileKind::Regular => return self.add_regular(inode, &path),
            FileKind::Symlink => return self.add_symlink(inode, &path),
            FileKind::Character => EntryType::Char,
            FileKind::Block => EntryType::Block,
            FileKind::Fifo => EntryType::Fifo,
            // Sockets are omitted, because a socket is useless without its server.
            FileKind::Socket | FileKind::Directory => return Ok(()),
        };
        self.add(inode, &path, kind, &mut io::empty())
    }

    fn add_regular(&mut self, inode: &Inode, path: &[u8]) -> Result<()> {
        if inode.bytes > self.bytes_left {
            let text = "the files have more bytes than a layer may have";
            return Err(Error::new(Kind::Exhausted, text)
                .hint("export the file system itself: --format raw"));
        }
        self.bytes_left -= inode.bytes;
        let mut content = Content::of(self.disk, inode)?;
        let added = self.add(inode, path, EntryType::Regular, &mut content);
        (self.progress)(inode.bytes);
        added.map_err(|e| match content.take_error() {
            Some(cause) => cause.context(format!("read {}", shown(path))),
            None => e,
        })
    }

    fn add_symlink(&mut self, inode: &Inode, path: &[u8]) -> Result<()> {
        if inode.bytes > LINK_BYTES_MAX {
            return Err(damaged("the target of a link is too long"));
        }
        let mut target = vec![0; inode.bytes as usize];
        if target.len() < MAP_BYTES && !inode.has_extents() {
            let len = target.len();
            target.copy_from_slice(&inode.map()[..len]);
        } else {
            let mut content = Content::of(self.disk, inode)?;
            content.read_exact(&mut target).map_err(|e| {
                let cause = content.take_error();
                cause.unwrap_or_else(|| failed(path, e))
            })?;
        }
        if target.is_empty() || target.contains(&0) {
            return Err(damaged("the target of a link is malformed"));
        }
        self.add_extensions(inode, path)?;
        let mut header = self.header(inode, EntryType::Symlink);
        let added = self
            .tar
            .append_link(&mut header, as_path(path), as_path(&target));
        added.map_err(|e| failed(path, e))
    }

    fn add(
        &mut self,
        inode: &Inode,
        path: &[u8],
        kind: EntryType,
        content: &mut dyn Read,
    ) -> Result<()> {
        self.add_extensions(inode, path)?;
        let mut header = self.header(inode, kind);
        let added = self.tar.append_data(&mut header, as_path(path), content);
        added.map_err(|e| failed(path, e))
    }

    fn header(&self, inode: &Inode, kind: EntryType) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(if kind == EntryType::Regular {
            inode.bytes
        } else {
            0
        });
        header.set_mode(inode.mode);
        header.set_uid(u64::from(inode.uid));
        header.set_gid(u64::from(inode.gid));
        header.set_mtime(u64::try_from(inode.mtime_s).unwrap_or(0));
        if matches!(kind, EntryType::Char | EntryType::Block) {
            let (major, minor) = inode.device();
            // This cannot fail, because this kind of header has both fields.
            let _ = header.set_device_major(major);
            let _ = header.set_device_minor(minor);
        }
        header
    }

    /// Adds a pax extension (pax(5)) for each attribute that does not fit into a header.
    fn add_extensions(&mut self, inode: &Inode, path: &[u8]) -> Result<()> {
        let mut extensions = Vec::new();
        if inode.mtime_ns != 0 || inode.mtime_s < 0 {
            let value = pax_time(inode.mtime_s, inode.mtime_ns);
            extensions.push(("mtime".to_owned(), value.into_bytes()));
        }
        for (name, id) in [("uid", inode.uid), ("gid", inode.gid)] {
            if id > HEADER_ID_MAX {
                extensions.push((name.to_owned(), id.to_string().into_bytes()));
            }
        }
        for xattr in xattrs(self.disk, inode)? {
            extensions.push((format!("SCHILY.xattr.{}", xattr.name), xattr.value));
        }
        if extensions.is_empty() {
            return Ok(());
        }
        let extensions = extensions
            .iter()
            .map(|(name, value)| (&name[..], &value[..]));
        let added = self.tar.append_pax_extensions(extensions);
        added.map_err(|e| failed(path, e))
    }
}

/// Formats a time as a decimal number, which may be negative.
fn pax_time(seconds: i64, nanoseconds: u32) -> String {
    if seconds >= 0 || nanoseconds == 0 {
        return format!("{seconds}.{nanoseconds:09}");
    }
    // 0.25 s after -3 is -2.75.
    let (whole, rest) = (-(seconds + 1), 1_000_000_000 - nanoseconds);
    format!("-{whole}.{rest:09}")
}

fn as_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

fn shown(path: &[u8]) -> String {
    quoted(&String::from_utf8_lossy(path))
}

fn failed(path: &[u8], e: io::Error) -> Error {
    Error::io(format!("write {} to the layer", shown(path)), e)
}

#[cfg(test)]
mod tests {
    use super::pax_time;

    #[test]
    fn times_before_the_epoch_are_negative() {
        for (seconds, nanoseconds, text) in [
            (7, 5, "7.000000005"),
            (-3, 0, "-3.000000000"),
            (-3, 250_000_000, "-2.750000000"),
            (-1, 1, "-0.999999999"),
        ] {
            assert_eq!(pax_time(seconds, nanoseconds), text);
        }
    }
}
