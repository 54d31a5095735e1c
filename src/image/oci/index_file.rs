//! The file format of a layer's index.
//!
//! A header, then the entries, then a SHA-256 digest of all of it. Numbers are little-endian. The
//! file is ours, but a helper process that parsed a hostile layer has written it, so it is checked
//! like every other input.

use super::digest::{Digest, Hashing};
use super::entry::{Attributes, Entry, EntryKind, Time, Xattr, clean_path};
use super::errors::bad;
use super::layer::LayerIndex;
use super::limits::{ENTRIES_MAX, METADATA_BYTES_MAX, XATTR_BYTES_MAX};
use crate::error::{Error, Result};
use std::io::{BufReader, BufWriter, Read, Write};

const MAGIC: &[u8; 8] = b"fcdlayr1";
const BUFFER_BYTES: usize = 256 << 10;

/// Writes an index.
pub(super) fn write(index: &LayerIndex, diff_id: Digest, out: impl Write) -> Result<()> {
    let mut writer = Writer(BufWriter::with_capacity(
        BUFFER_BYTES,
        Sha256Writer::new(out),
    ));
    let written = writer.index(index, diff_id).and_then(|()| {
        let sha256 = writer.0.into_inner().map_err(|e| e.into_error())?;
        sha256.finish()
    });
    written.map_err(|e| Error::io("write the index of a layer", e))
}

struct Sha256Writer<W> {
    out: W,
    hash: sha2::Sha256,
}

impl<W: Write> Sha256Writer<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            hash: <sha2::Sha256 as sha2::Digest>::new(),
        }
    }

    fn finish(mut self) -> std::io::Result<()> {
        let digest = <sha2::Sha256 as sha2::Digest>::finalize(self.hash);
        self.out.write_all(&digest)
    }
}

impl<W: Write> Write for Sha256Writer<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.out.write(bytes)?;
        sha2::Digest::update(&mut self.hash, &bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

struct Writer<W: Write>(BufWriter<W>);

impl<W: Write> Writer<W> {
    fn index(&mut self, index: &LayerIndex, diff_id: Digest) -> std::io::Result<()> {
        self.0.write_all(MAGIC)?;
        self.0.write_all(diff_id.as_bytes())?;
        self.number(index.tar_bytes)?;
        self.number(index.entries.len() as u64)?;
        index.entries.iter().try_for_each(|entry| self.entry(entry))
    }

    fn number(&mut self, number: u64) -> std::io::Result<()> {
        self.0.write_all(&number.to_le_bytes())
    }

    fn bytes(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all(&(bytes.len() as u32).to_le_bytes())?;
        self.0.write_all(bytes)
    }

    fn entry(&mut self, entry: &Entry) -> std::io::Result<()> {
        self.bytes(entry.path.as_bytes())?;
        let (tag, first, second, target) = match &entry.kind {
            EntryKind::Directory => (b'd', 0, 0, ""),
            EntryKind::File { offset, bytes } => (b'f', *offset, *bytes, ""),
            EntryKind::Symlink { target } => (b'l', 0, 0, &**target),
            EntryKind::HardLink { target } => (b'h', 0, 0, &**target),
            EntryKind::CharacterDevice { major, minor } => {
                (b'c', u64::from(*major), u64::from(*minor), "")
            }
            EntryKind::BlockDevice { major, minor } => {
                (b'b', u64::from(*major), u64::from(*minor), "")
            }
            EntryKind::Fifo => (b'p', 0, 0, ""),
        };
        self.0.write_all(&[tag])?;
        self.number(first)?;
        self.number(second)?;
        self.bytes(target.as_bytes())?;
        let attributes = &entry.attributes;
        self.0.write_all(&attributes.mode.to_le_bytes())?;
        self.0.write_all(&attributes.uid.to_le_bytes())?;
        self.0.write_all(&attributes.gid.to_le_bytes())?;
        self.0.write_all(&attributes.mtime.seconds.to_le_bytes())?;
        self.0
            .write_all(&attributes.mtime.nanoseconds.to_le_bytes())?;
        self.0
            .write_all(&(attributes.xattrs.len() as u32).to_le_bytes())?;
        for xattr in &attributes.xattrs {
            self.bytes(xattr.name.as_bytes())?;
            self.bytes(&xattr.value)?;
        }
        Ok(())
    }
}

/// Reads the index of the layer `diff_id`, whose tar has `tar_bytes` bytes.
///
/// # Errors
/// `invalid_image` if the file is damaged or does not belong to the tar; those of the system calls.
pub(super) fn read(file: impl Read, diff_id: Digest, tar_bytes: u64) -> Result<LayerIndex> {
    let buffered = BufReader::with_capacity(BUFFER_BYTES, file);
    let mut reader = Reader {
        inner: Hashing::new(buffered),
        metadata_bytes: 0,
    };
    let index = reader.index(diff_id, tar_bytes)?;
    let Reader { mut inner, .. } = reader;
    let (mut sum, mut rest) = ([0; 32], [0; 1]);
    let read = inner.read_sum(&mut sum, &mut rest);
    let ended = read.map_err(unreadable)?;
    if !ended || inner.digest() != Digest::from_bytes(sum) {
        return Err(bad("the index of the layer is damaged"));
    }
    Ok(index)
}

fn unreadable(error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::UnexpectedEof {
        return bad("the index of the layer is damaged");
    }
    Error::io("read the index of a layer", error)
}

impl<R: Read> Hashing<R> {
    /// Reads the digest at the end of the file, which is not part of what it covers. Returns true
    /// if the file ends there.
    fn read_sum(&mut self, sum: &mut [u8], rest: &mut [u8]) -> std::io::Result<bool> {
        let inner = self.get_mut();
        inner.read_exact(sum)?;
        Ok(inner.read(rest)? == 0)
    }
}

struct Reader<R> {
    inner: Hashing<R>,
    metadata_bytes: u64,
}

impl<R: Read> Reader<R> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes).map_err(unreadable)?;
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn short(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn bytes(&mut self) -> Result<Vec<u8>> {
        let len = self.short()? as usize;
        self.metadata_bytes += len as u64;
        if len > XATTR_BYTES_MAX || self.metadata_bytes > METADATA_BYTES_MAX {
            return Err(bad("the index of the layer is damaged"));
        }
        let mut bytes = vec![0; len];
        self.inner.read_exact(&mut bytes).map_err(unreadable)?;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<Box<str>> {
        let text = String::from_utf8(self.bytes()?);
        let text = text.map_err(|_| bad("the index of the layer is damaged"))?;
        Ok(text.into())
    }

    fn index(&mut self, diff_id: Digest, tar_bytes: u64) -> Result<LayerIndex> {
        let matches = &self.array::<8>()? == MAGIC
            && &self.array::<32>()? == diff_id.as_bytes()
            && self.number()? == tar_bytes;
        let count = self.number()?;
        if !matches || count > ENTRIES_MAX {
            return Err(bad("the index of the layer is damaged"));
        }
        let mut entries = Vec::new();
        for _ in 0..count {
            entries.push(self.entry(tar_bytes)?);
        }
        entries.shrink_to_fit();
        Ok(LayerIndex { entries, tar_bytes })
    }

    fn entry(&mut self, tar_bytes: u64) -> Result<Entry> {
        let path = clean_path(&self.bytes()?)?;
        let [tag] = self.array()?;
        let (first, second, target) = (self.number()?, self.number()?, self.text()?);
        let damaged = || bad("the index of the layer is damaged");
        let device = |number: u64| u32::try_from(number).map_err(|_| damaged());
        let kind = match tag {
            b'd' => EntryKind::Directory,
            b'f' if first
                .checked_add(second)
                .is_some_and(|end| end <= tar_bytes) =>
            {
                EntryKind::File {
                    offset: first,
                    bytes: second,
                }
            }
            b'l' => EntryKind::Symlink { target },
            b'h' => EntryKind::HardLink {
                target: clean_path(target.as_bytes())?,
            },
            b'c' => EntryKind::CharacterDevice {
                major: device(first)?,
                minor: device(second)?,
            },
            b'b' => EntryKind::BlockDevice {
                major: device(first)?,
                minor: device(second)?,
            },
            b'p' => EntryKind::Fifo,
            _ => return Err(damaged()),
        };
        let mode = u16::from_le_bytes(self.array()?) & 0o7777;
        let (uid, gid) = (self.short()?, self.short()?);
        let mtime = Time {
            seconds: i64::from_le_bytes(self.array()?),
            nanoseconds: self.short()?.min(999_999_999),
        };
        let mut xattrs = Vec::new();
        for _ in 0..self.short()? {
            let (name, value) = (self.text()?, self.bytes()?.into());
            xattrs.push(Xattr { name, value });
        }
        let attributes = Attributes {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        };
        Ok(Entry {
            path,
            kind,
            attributes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> LayerIndex {
        let entry = |path: &str, kind| Entry {
            path: path.into(),
            kind,
            attributes: Attributes {
                mode: 0o4755,
                uid: 1,
                gid: u32::MAX - 1,
                mtime: Time {
                    seconds: -5,
                    nanoseconds: 7,
                },
                xattrs: vec![Xattr {
                    name: "user.a".into(),
                    value: (*b"\0\xff").into(),
                }],
            },
        };
        let (offset, bytes, major, minor) = (512, 100, 4, 300);
        let target: Box<str> = "t/u".into();
        LayerIndex {
            entries: vec![
                entry("", EntryKind::Directory),
                entry("f", EntryKind::File { offset, bytes }),
                entry(
                    "l",
                    EntryKind::Symlink {
                        target: "../x".into(),
                    },
                ),
                entry("h", EntryKind::HardLink { target }),
                entry("c", EntryKind::CharacterDevice { major, minor }),
                entry("b", EntryKind::BlockDevice { major, minor }),
                entry("p", EntryKind::Fifo),
            ],
            tar_bytes: 2048,
        }
    }

    #[test]
    fn index_survives_the_file() {
        let (index, diff_id) = (sample(), Digest::of(b"a"));
        let mut file = Vec::new();
        write(&index, diff_id, &mut file).unwrap();
        assert_eq!(read(&file[..], diff_id, 2048).unwrap(), index);
    }

    #[test]
    fn damaged_index_is_refused() {
        let (index, diff_id) = (sample(), Digest::of(b"a"));
        let mut file = Vec::new();
        write(&index, diff_id, &mut file).unwrap();
        assert!(read(&file[..], Digest::of(b"b"), 2048).is_err());
        assert!(read(&file[..], diff_id, 2047).is_err());
        assert!(read(&[&file[..], b"x"].concat()[..], diff_id, 2048).is_err());
        for at in 0..file.len() {
            assert!(read(&file[..at], diff_id, 2048).is_err(), "cut at {at}");
            let mut wrong = file.clone();
            wrong[at] ^= 4;
            assert!(read(&wrong[..], diff_id, 2048).is_err(), "changed at {at}");
        }
    }
}
