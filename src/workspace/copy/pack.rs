//! Writes the tar of a copy into a guest.

use super::list::{Entry, Inode, Listing};
use super::{Copied, FileKind, check_cancel};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use crate::workspace::attributes::{self, Extra};
use crate::workspace::beneath::{Beneath, is_absent};
use crate::workspace::tar_writer::{Meta, ReadOutcome, TarWriter};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};

/// Size of one write. A guest decrypts each packet separately, which is slow for small packets.
const BUFFER_BYTES: usize = 64 * 1024;
/// The permission bits without the set-id and sticky bits.
const PLAIN_MODE: u32 = 0o777;

/// The options for a tar.
#[derive(Clone, Debug)]
pub struct Packing {
    /// Record owners, hard links and attributes, and all permission bits.
    pub archive: bool,
    /// The name of the last entry; see [`super::script::last_entry`].
    pub last: String,
}

/// The result of packing.
#[derive(Debug, Default)]
pub struct Packed {
    pub copied: Copied,
    pub warnings: Vec<String>,
}

/// Writes the tar of all listings. `progress` gets the size of each piece. Errors: `conflict` (a
/// file became shorter while it was read), `stream_incomplete`, `cancelled`, `host`.
pub fn pack(
    listings: &[Listing],
    packing: &Packing,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
    cancel: &Cancel,
) -> Result<Packed> {
    let mut packer = Packer {
        writer: TarWriter::new(BufWriter::with_capacity(BUFFER_BYTES, out), cancel),
        packing,
        links: HashMap::new(),
        packed: Packed::default(),
        progress,
    };
    for listing in listings {
        packer.listing(listing, cancel)?;
    }
    packer.packed.copied.entries = packer.writer.entries;
    packer.writer.extra = Extra::default();
    packer.writer.data(packing.last.as_bytes(), b"")?;
    let Packer { writer, packed, .. } = packer;
    let (mut out, _) = writer.finish()?;
    out.flush().map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => Error::new(
            Kind::StreamIncomplete,
            "send the tree: the daemon stopped reading",
        ),
        _ => Error::io("send the tree", e),
    })?;
    Ok(packed)
}

struct Packer<'a> {
    writer: TarWriter<'a, BufWriter<&'a mut dyn Write>>,
    packing: &'a Packing,
    /// The path in the tar of each file that has several names.
    links: HashMap<Inode, Vec<u8>>,
    packed: Packed,
    progress: &'a mut dyn FnMut(u64),
}

impl Packer<'_> {
    fn listing(&mut self, listing: &Listing, cancel: &Cancel) -> Result<()> {
        let mut beneath = match listing.kind {
            FileKind::Dir => Some(listing.beneath()?),
            _ => None,
        };
        for entry in &listing.entries {
            check_cancel(cancel)?;
            self.entry(listing, beneath.as_mut(), entry)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        listing: &Listing,
        beneath: Option<&mut Beneath>,
        entry: &Entry,
    ) -> Result<()> {
        let path = path_in_tar(listing, entry);
        let mask = if self.packing.archive {
            0o7777
        } else {
            PLAIN_MODE
        };
        let meta = Meta {
            mode: entry.mode & mask,
            mtime: entry.mtime,
        };
        self.writer.extra = Extra::default();
        if self.packing.archive {
            self.writer.extra.owner = entry.owner;
        }
        match entry.kind {
            FileKind::Dir => self.dir(listing, beneath, entry, &path, meta),
            FileKind::Link => {
                let target = match beneath {
                    Some(beneath) if !entry.path.is_empty() => beneath.read_link(&entry.path),
                    _ => listing.read_link(),
                };
                match target {
                    Ok(target) => self.writer.symlink(&path, &target, meta),
                    Err(e) => self.gone(listing, entry, e),
                }
            }
            FileKind::File => {
                let file = match beneath {
                    Some(beneath) => beneath.open_file(&entry.path),
                    None => listing.open(),
                };
                match file {
                    Ok(file) => self.file(listing, entry, &path, meta, file),
                    Err(e) => self.gone(listing, entry, e),
                }
            }
        }
    }

    fn dir(
        &mut self,
        listing: &Listing,
        beneath: Option<&mut Beneath>,
        entry: &Entry,
        path: &[u8],
        meta: Meta,
    ) -> Result<()> {
        if self.packing.archive
            && let Some(beneath) = beneath
            && let Ok(dir) = beneath.open_dir(&entry.path)
        {
            self.writer.extra.xattrs = attributes::read(&dir).map_err(|e| {
                let text = format!("read the attributes of {}", listing.shown(&entry.path));
                Error::io(text, e)
            })?;
        }
        self.writer.dir(path, meta)
    }

    fn file(
        &mut self,
        listing: &Listing,
        entry: &Entry,
        path: &[u8],
        meta: Meta,
        mut file: File,
    ) -> Result<()> {
        let shown = || listing.shown(&entry.path);
        if !file.metadata().is_ok_and(|m| m.is_file()) {
            let text = format!("read {}: it is not a file any more", shown());
            return Err(Error::new(Kind::Conflict, text));
        }
        if self.packing.archive {
            if let Some(inode) = entry.inode {
                if let Some(first) = self.links.get(&inode) {
                    let (first, link) = (first.clone(), tar::EntryType::Link);
                    self.writer.entries += 1;
                    return self.writer.header(link, path, &first, meta, 0);
                }
                self.links.insert(inode, path.to_vec());
            }
            self.writer.extra.xattrs = attributes::read(&file)
                .map_err(|e| Error::io(format!("read the attributes of {}", shown()), e))?;
        }
        let (progress, mut bytes) = (&mut *self.progress, 0);
        let outcome = self.writer.file(path, &mut file, meta.mode, &mut |n| {
            bytes += n;
            progress(n);
        })?;
        self.packed.copied.bytes += bytes;
        if outcome == ReadOutcome::Changed {
            let text = format!("{} changed while it was read", shown());
            self.packed.warnings.push(text);
        }
        Ok(())
    }

    /// Skips an entry that was removed since it was listed. Any other error is returned.
    fn gone(&mut self, listing: &Listing, entry: &Entry, e: io::Error) -> Result<()> {
        let shown = listing.shown(&entry.path);
        if entry.path.is_empty() || !is_absent(&e) {
            return Err(Error::io(format!("read {shown}"), e));
        }
        let text = format!("skipped {shown}: it has just been removed");
        self.packed.warnings.push(text);
        Ok(())
    }
}

/// Returns the path of an entry in the tar. It begins with the listing's name, if there is one.
fn path_in_tar(listing: &Listing, entry: &Entry) -> Vec<u8> {
    let top = listing.name.as_deref().unwrap_or(b".");
    match (entry.path.is_empty(), &listing.name) {
        (true, _) => top.to_vec(),
        (false, Some(name)) => [name, &b"/"[..], &entry.path].concat(),
        (false, None) => entry.path.clone(),
    }
}
