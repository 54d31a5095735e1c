//! Writes a GNU tar. Names may hold any byte and holes are preserved. Owners and attributes are
//! left out unless the caller sets [`TarWriter::extra`].
//!
//! Headers and lists of holes are the tar crate's types, but its `Builder` is used only for
//! extended headers. `Builder` copies a file up to its end instead of up to the size in the header,
//! so a file that grows while it is read breaks the archive. `append_file`, its only method that
//! writes a sparse entry, also records the owner and drops nanoseconds. Long names must begin with
//! UTF-8, and link targets are normalised. The tests show these faults.

use super::attributes::Extra;
use super::mtime::Mtime;
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

pub(super) const BLOCK: u64 = 512;
/// Size of one read from a file.
const PIECE_BYTES: usize = 256 * 1024;
/// Maximum number of data segments in a sparse file. A file with more segments is sent in full,
/// with zeros for its holes.
const SEGMENTS_MAX: usize = 65_536;

/// The metadata in an entry's header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meta {
    /// The permission bits.
    pub mode: u32,
    pub mtime: Mtime,
}

/// The beginning of the key of an attribute's record in an extended header.
pub(super) const XATTR_KEY: &str = "SCHILY.xattr.";

/// The outcome of reading a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadOutcome {
    Same,
    /// The file changed while it was read, so what was sent may be neither the old nor the new
    /// content.
    Changed,
}

pub(super) struct TarWriter<'a, W: Write> {
    out: W,
    pub bytes: u64,
    pub entries: u64,
    /// The additional attributes of the entries that follow.
    pub extra: Extra,
    cancel: &'a Cancel,
    buffer: Vec<u8>,
}

impl<'a, W: Write> TarWriter<'a, W> {
    pub(super) fn new(out: W, cancel: &'a Cancel) -> Self {
        Self {
            out,
            bytes: 0,
            entries: 0,
            extra: Extra::default(),
            cancel,
            buffer: vec![0; PIECE_BYTES],
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        write_all(&mut self.out, bytes, self.cancel)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self, len: u64) -> Result<()> {
        let rest = (BLOCK - len % BLOCK) % BLOCK;
        self.put(&[0u8; BLOCK as usize][..rest as usize])
    }

    /// Writes a header. Long names and link targets precede it in entries of their own (GNU `L` and
    /// `K`).
    pub(super) fn header(
        &mut self,
        kind: tar::EntryType,
        path: &[u8],
        link: &[u8],
        meta: Meta,
        size: u64,
    ) -> Result<()> {
        self.long(b'K', link)?;
        self.long(b'L', path)?;
        self.extended(meta.mtime)?;
        let mut header = new_header(kind, meta, size);
        set_owner(&mut header, &self.extra);
        set_bytes(&mut gnu(&mut header).name, path);
        set_bytes(&mut gnu(&mut header).linkname, link);
        header.set_cksum();
        self.put(header.as_bytes())
    }

    fn long(&mut self, kind: u8, value: &[u8]) -> Result<()> {
        if value.len() < 100 {
            return Ok(());
        }
        let mut header = new_header(
            tar::EntryType::new(kind),
            Meta {
                mode: 0o644,
                mtime: Mtime::default(),
            },
            value.len() as u64 + 1,
        );
        set_bytes(&mut gnu(&mut header).name, b"././@LongLink");
        header.set_cksum();
        self.put(header.as_bytes())?;
        self.put(value)?;
        self.put(&[0])?;
        self.pad(value.len() as u64 + 1)
    }

    /// Writes a POSIX extended header for attributes, and for a time that does not fit into the
    /// entry's own header.
    fn extended(&mut self, mtime: Mtime) -> Result<()> {
        let mut records = Vec::new();
        if !mtime.is_octal() {
            records.push(("mtime".to_owned(), mtime.decimal().into_bytes()));
        }
        for attribute in &self.extra.xattrs {
            let key = format!("{XATTR_KEY}{}", attribute.name);
            records.push((key, attribute.value.clone()));
        }
        if records.is_empty() {
            return Ok(());
        }
        let mut extended = tar::Builder::new(Vec::new());
        extended
            .append_pax_extensions(records.iter().map(|(k, v)| (k.as_str(), v.as_slice())))
            .map_err(|e| Error::io("write an extended header", e))?;
        self.put(extended.get_ref())
    }

    pub(super) fn dir(&mut self, path: &[u8], meta: Meta) -> Result<()> {
        self.entries += 1;
        let mut name = path.to_vec();
        name.push(b'/');
        self.header(tar::EntryType::Directory, &name, b"", meta, 0)
    }

    pub(super) fn symlink(&mut self, path: &[u8], target: &[u8], meta: Meta) -> Result<()> {
        self.entries += 1;
        self.header(tar::EntryType::Symlink, path, target, meta, 0)
    }

    /// Writes a file whose content is in memory.
    pub(super) fn data(&mut self, path: &[u8], data: &[u8]) -> Result<()> {
        self.entries += 1;
        let meta = Meta {
            mode: 0o644,
            mtime: Mtime::default(),
        };
        self.header(tar::EntryType::Regular, path, b"", meta, data.len() as u64)?;
        self.put(data)?;
        self.pad(data.len() as u64)
    }

    /// Writes a file with the size that it has now. Returns `conflict` if the file becomes shorter
    /// while it is read. `progress` gets the size of each piece.
    pub(super) fn file(
        &mut self,
        path: &[u8],
        file: &mut File,
        mode: u32,
        progress: &mut dyn FnMut(u64),
    ) -> Result<ReadOutcome> {
        self.file_with_time(path, file, mode, true, progress)
    }

    /// Writes a file without its modification time, so that the size of the entry is known in
    /// advance.
    pub(super) fn plain_file(
        &mut self,
        path: &[u8],
        file: &mut File,
        mode: u32,
        progress: &mut dyn FnMut(u64),
    ) -> Result<ReadOutcome> {
        self.file_with_time(path, file, mode, false, progress)
    }

    fn file_with_time(
        &mut self,
        path: &[u8],
        file: &mut File,
        mode: u32,
        timed: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<ReadOutcome> {
        let shown = super::encode::encode(path);
        let doing = || format!("read {shown}");
        let before = rustix::fs::fstat(&*file).map_err(|e| Error::io(doing(), e))?;
        let mtime = if timed {
            Mtime::of(&before)
        } else {
            Mtime::default()
        };
        let (size, meta) = (before.st_size as u64, Meta { mode, mtime });
        let holes = if (before.st_blocks as u64) * 512 < size {
            segments(file, size)
        } else {
            None
        };
        match holes {
            Some(segments) => self.sparse(path, file, &segments, size, meta, progress)?,
            None => {
                self.entries += 1;
                self.header(tar::EntryType::Regular, path, b"", meta, size)?;
                self.copy(file, size, &shown, progress)?;
                self.pad(size)?;
            }
        }
        let after = rustix::fs::fstat(&*file).map_err(|e| Error::io(doing(), e))?;
        let same = (before.st_size, before.st_mtime, before.st_mtime_nsec)
            == (after.st_size, after.st_mtime, after.st_mtime_nsec);
        Ok(if same {
            ReadOutcome::Same
        } else {
            ReadOutcome::Changed
        })
    }

    /// Writes GNU's old sparse format: four segments in the header, 21 in each extension, then the
    /// data of all segments.
    fn sparse(
        &mut self,
        path: &[u8],
        file: &mut File,
        segments: &[(u64, u64)],
        size: u64,
        meta: Meta,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        self.entries += 1;
        self.long(b'L', path)?;
        self.extended(meta.mtime)?;
        let data: u64 = segments.iter().map(|(_, len)| len).sum();
        let mut listed = segments.to_vec();
        listed.push((size, 0)); // Marks the end of a file that ends in a hole.
        let mut header = new_header(tar::EntryType::GNUSparse, meta, data);
        set_owner(&mut header, &self.extra);
        set_bytes(&mut gnu(&mut header).name, path);
        let (first, rest) = listed.split_at(listed.len().min(4));
        let g = gnu(&mut header);
        first
            .iter()
            .zip(&mut g.sparse)
            .for_each(|(s, slot)| set_segment(slot, *s));
        g.set_is_extended(!rest.is_empty());
        g.set_real_size(size);
        header.set_cksum();
        self.put(header.as_bytes())?;
        let mut chunks = rest.chunks(21).peekable();
        while let Some(chunk) = chunks.next() {
            let mut ext = tar::GnuExtSparseHeader::new();
            chunk
                .iter()
                .zip(&mut ext.sparse)
                .for_each(|(s, slot)| set_segment(slot, *s));
            ext.set_is_extended(chunks.peek().is_some());
            self.put(ext.as_bytes())?;
        }
        let shown = super::encode::encode(path);
        for (offset, len) in segments {
            file.seek(SeekFrom::Start(*offset))
                .map_err(|e| Error::io(format!("read {shown}"), e))?;
            self.copy(file, *len, &shown, progress)?;
        }
        self.pad(data)
    }

    fn copy(
        &mut self,
        file: &mut File,
        len: u64,
        shown: &str,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let mut left = len;
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = (|| {
            while left > 0 {
                let want = left.min(PIECE_BYTES as u64) as usize;
                let n = match file.read(&mut buffer[..want]) {
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                    other => other.map_err(|e| Error::io(format!("read {shown}"), e))?,
                };
                if n == 0 {
                    return Err(Error::new(
                        Kind::Conflict,
                        format!("read {shown}: it became shorter while it was read"),
                    )
                    .hint("stop the program that writes to it, then run the command again"));
                }
                self.put(&buffer[..n])?;
                progress(n as u64);
                left -= n as u64;
            }
            Ok(())
        })();
        self.buffer = buffer;
        result
    }

    /// Writes the two end-of-archive blocks. Returns the writer and the number of bytes.
    pub(super) fn finish(mut self) -> Result<(W, u64)> {
        self.put(&[0u8; 2 * BLOCK as usize])?;
        Ok((self.out, self.bytes))
    }
}

/// Writes all of `bytes`. Returns `cancelled` if the token is cancelled, and `stream_incomplete`
/// for a broken pipe.
pub(super) fn write_all(out: &mut impl Write, bytes: &[u8], cancel: &Cancel) -> Result<()> {
    if let Some(cause) = cancel.cause() {
        return Err(Error::new(
            Kind::Cancelled,
            format!("send the tree: cancelled: {cause}"),
        ));
    }
    out.write_all(bytes).map_err(|e| match e.kind() {
        std::io::ErrorKind::BrokenPipe => Error::new(
            Kind::StreamIncomplete,
            "send the tree: the daemon stopped reading",
        ),
        _ => Error::io("send the tree", e),
    })
}

fn gnu(header: &mut tar::Header) -> &mut tar::GnuHeader {
    header.as_gnu_mut().expect("created as a GNU header")
}

fn new_header(kind: tar::EntryType, meta: Meta, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(meta.mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(meta.mtime.octal());
    header.set_size(size);
    header
}

fn set_owner(header: &mut tar::Header, extra: &Extra) {
    header.set_uid(extra.owner.uid.into());
    header.set_gid(extra.owner.gid.into());
}

/// Copies as much of `value` into the field as fits. If a part does not fit, an earlier entry
/// contains the whole value.
fn set_bytes(field: &mut [u8], value: &[u8]) {
    let n = value.len().min(field.len());
    field.fill(0);
    field[..n].copy_from_slice(&value[..n]);
}

fn set_segment(slot: &mut tar::GnuSparseHeader, (offset, len): (u64, u64)) {
    slot.set_offset(offset);
    slot.set_length(len);
}

/// Finds the offset and length of each data segment. Returns `None` if the file system cannot
/// report segments, or if there are too many of them.
fn segments(file: &File, size: u64) -> Option<Vec<(u64, u64)>> {
    use rustix::fs::{SeekFrom as At, seek};
    let mut out = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, At::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break, // The rest of the file is a hole.
            Err(_) => return None,
        };
        let end = seek(file, At::Hole(start)).ok()?.min(size);
        if end <= start {
            break;
        }
        out.push((start, end - start));
        if out.len() > SEGMENTS_MAX {
            return None;
        }
        at = end;
    }
    // Seeking moved the file position; the caller expects the position at the start.
    seek(file, At::Start(0)).ok()?;
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    const META: Meta = Meta {
        mode: 0o644,
        mtime: Mtime {
            seconds: 0,
            nanoseconds: 0,
        },
    };

    fn path(bytes: &[u8]) -> &Path {
        Path::new(OsStr::from_bytes(bytes))
    }

    /// Returns the path, the link target and the content of each entry.
    fn entries(tar: &[u8]) -> std::io::Result<Vec<[Vec<u8>; 3]>> {
        let read = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
            let mut entry = entry?;
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            let link = entry.link_name_bytes().unwrap_or_default().into_owned();
            Ok([entry.path_bytes().into_owned(), link, content])
        };
        tar::Archive::new(tar).entries()?.map(read).collect()
    }

    /// A writer that makes a file grow at the first write.
    struct Growing(Vec<u8>, Option<File>);

    impl Write for Growing {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if let Some(mut file) = self.1.take() {
                file.write_all(&[b'x'; 2 * BLOCK as usize])?;
            }
            self.0.write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn file_that_grows_is_reported_and_leaves_archive_valid() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("a");
        let open = || {
            std::fs::write(&at, "abc").unwrap();
            let appended = File::options().append(true).open(&at).unwrap();
            let growing = Growing(Vec::new(), Some(appended));
            (growing, File::open(&at).unwrap())
        };
        let (out, mut file) = open();
        let cancel = Cancel::try_new().unwrap();
        let mut ours = TarWriter::new(out, &cancel);
        let read = ours.file(b"a", &mut file, 0o644, &mut |_| {}).unwrap();
        assert_eq!(read, ReadOutcome::Changed);
        ours.data(b"b", b"end").unwrap();
        let (out, _) = ours.finish().unwrap();
        let contents = entries(&out.0).unwrap().into_iter().map(|[_, _, c]| c);
        assert_eq!(contents.collect::<Vec<_>>(), [b"abc", b"end"]);

        let (out, mut file) = open();
        let mut theirs = tar::Builder::new(out);
        theirs.append_file("a", &mut file).unwrap();
        assert!(
            entries(&theirs.into_inner().unwrap().0).is_err(),
            "tar::Builder stops at the size in the header: use it"
        );
    }

    #[test]
    fn names_and_links_of_any_bytes_are_kept() {
        let (name, target) = ([0xff; 120], b"../a//b/./c\xff/");
        let cancel = Cancel::try_new().unwrap();
        let mut ours = TarWriter::new(Vec::new(), &cancel);
        ours.symlink(&name, target, META).unwrap();
        let (out, _) = ours.finish().unwrap();
        let [found] = entries(&out).unwrap().try_into().unwrap();
        assert_eq!(found, [name.to_vec(), target.to_vec(), Vec::new()]);

        let mut theirs = tar::Builder::new(Vec::new());
        let mut header = new_header(tar::EntryType::Symlink, META, 0);
        let long = theirs.append_data(&mut header, path(&name), std::io::empty());
        assert!(long.is_err(), "tar::Builder accepts any long name: use it");
        theirs
            .append_link(&mut header, "short", path(target))
            .unwrap();
        let [found] = entries(&theirs.into_inner().unwrap())
            .unwrap()
            .try_into()
            .unwrap();
        assert_ne!(found[1], target, "tar::Builder keeps link targets: use it");
    }
}
