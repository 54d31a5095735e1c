//! Reads tars that GNU tar writes, in GNU and POSIX format. Nothing in them is trusted.
//!
//! The reader accepts files, sparse files, links, directories, devices and FIFOs; its callers
//! decide which of them they accept. The only extensions that it accepts are long names, large
//! sizes, exact times, owners, attributes and holes. The sizes of these extensions are bounded.

use super::{refuse, refuse_kind, stream_error};
use crate::error::{Error, Kind, Result};
use crate::workspace::PATH_BYTES_MAX;
use crate::workspace::attributes::{Extra, Owner, Xattr};
use crate::workspace::mtime::Mtime;
use crate::workspace::tar_writer::XATTR_KEY;
use std::io::Read;

const BLOCK: usize = 512;
/// Maximum number of data segments in a sparse file.
const SEGMENTS_MAX: usize = 1_000_000;
/// Maximum number of zeros after the end of the archive. tar pads its last record with zeros.
const PADDING_BYTES_MAX: u64 = 1024 * 1024;
/// Maximum size of the extended header records of one entry: a path, a link target, a time, and
/// attributes, of which ext4 stores at most 64 KiB for most files.
const RECORDS_BYTES_MAX: u64 = 128 * 1024;
/// Maximum number of digits of a number in the list of holes.
const DIGITS_MAX: usize = 20;
const DOING: &str = "read the tree from the guest";

#[derive(Debug)]
pub(in crate::workspace) enum EntryData {
    Dir,
    Symlink(Vec<u8>),
    /// Another name for the file of an earlier entry.
    HardLink(Vec<u8>),
    /// A device or a FIFO, with the type in the header.
    Special(u8),
    File {
        size: u64,
        /// Offset and length of each data segment of a sparse file, in ascending order.
        segments: Option<Vec<(u64, u64)>>,
    },
}

#[derive(Debug)]
pub(in crate::workspace) struct Item {
    /// The path without a directory's trailing slash.
    pub path: Vec<u8>,
    /// The permission bits, without set-id and sticky bits.
    pub mode: u32,
    pub mtime: Mtime,
    pub extra: Extra,
    pub data: EntryData,
}

pub(in crate::workspace) struct TarReader<'a> {
    from: &'a mut dyn Read,
    /// The number of unread bytes of the current entry's data. `padding` counts the bytes after the
    /// data.
    left: u64,
    padding: u64,
}

fn damaged(why: &str) -> Error {
    Error::new(Kind::InvalidTree, format!("{DOING}: {why}"))
}

impl<'a> TarReader<'a> {
    pub(in crate::workspace) fn new(from: &'a mut dyn Read) -> Self {
        Self {
            from,
            left: 0,
            padding: 0,
        }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.from
            .read_exact(buffer)
            .map_err(|e| stream_error(DOING, e))
    }

    fn block(&mut self) -> Result<[u8; BLOCK]> {
        let mut block = [0; BLOCK];
        self.fill(&mut block)?;
        Ok(block)
    }

    /// Returns the next entry, whose data must be read before the next call. Returns `None` once it
    /// has read the end mark and the end of the stream.
    pub(in crate::workspace) fn next(&mut self) -> Result<Option<Item>> {
        let (mut path, mut link, mut records) = (None, None, None);
        loop {
            let block = self.block()?;
            if block.iter().all(|b| *b == 0) {
                let is_pending = path.is_some() || link.is_some() || records.is_some();
                if self.block()?.iter().any(|b| *b != 0) || is_pending {
                    return Err(damaged("its end mark is invalid"));
                }
                return self.drain().map(|()| None);
            }
            let header = tar::Header::from_byte_slice(&block);
            let sum: u32 = block
                .iter()
                .enumerate()
                .map(|(i, b)| {
                    if (148..156).contains(&i) {
                        32
                    } else {
                        u32::from(*b)
                    }
                })
                .sum();
            if header.cksum().ok() != Some(sum) {
                return Err(damaged("a header is damaged"));
            }
            match header.entry_type().as_byte() {
                b'L' if path.is_none() => path = Some(self.long(header)?),
                b'K' if link.is_none() => link = Some(self.long(header)?),
                b'x' if records.is_none() => records = Some(self.records(header)?),
                _ => {
                    let mut records = records.unwrap_or_default();
                    records.path = path.or(records.path);
                    records.link = link.or(records.link);
                    return self.item(header, records).map(Some);
                }
            }
        }
    }

    fn long(&mut self, header: &tar::Header) -> Result<Vec<u8>> {
        let size = header
            .entry_size()
            .map_err(|_| damaged("a long name has no size"))?;
        if size > PATH_BYTES_MAX as u64 + 100 {
            return Err(damaged(&format!("a name has {size} bytes")));
        }
        let mut name = vec![0; size as usize];
        self.fill(&mut name)?;
        let mut rest = [0; BLOCK];
        self.fill(&mut rest[..(BLOCK - size as usize % BLOCK) % BLOCK])?;
        name.pop_if(|b| *b == 0);
        Ok(name)
    }

    /// Reads POSIX extended header records: `<length> <key>=<value>LF`.
    fn records(&mut self, header: &tar::Header) -> Result<Records> {
        let size = header
            .entry_size()
            .map_err(|_| damaged("records have no size"))?;
        if size > RECORDS_BYTES_MAX {
            return Err(damaged(&format!("records have {size} bytes")));
        }
        let mut bytes = vec![0; size as usize];
        self.fill(&mut bytes)?;
        let mut rest = [0; BLOCK];
        self.fill(&mut rest[..(BLOCK - size as usize % BLOCK) % BLOCK])?;
        let mut records = Records::default();
        let mut left = bytes.as_slice();
        while !left.is_empty() {
            let (record, after) = record(left).ok_or_else(|| damaged("a record is damaged"))?;
            records.take(&record)?;
            left = after;
        }
        Ok(records)
    }

    fn item(&mut self, header: &tar::Header, records: Records) -> Result<Item> {
        let Records {
            path,
            link,
            mtime,
            size,
            real_size: real,
            uid,
            gid,
            xattrs,
        } = records;
        let of_header = name_in(header).ok_or_else(|| damaged("a header is of an unknown form"))?;
        let mut path = path.unwrap_or(of_header);
        let size = match size {
            Some(size) => size,
            None => header
                .entry_size()
                .map_err(|_| refuse(&path, "it has no size"))?,
        };
        let mode = header.mode().map_err(|_| refuse(&path, "it has no mode"))? & 0o777;
        let mtime = mtime.unwrap_or_else(|| time_in(header));
        // An owner that is missing or too large is root, whose files nobody else may change.
        let id = |record: Option<u32>, field: std::io::Result<u64>| {
            let number = record.or_else(|| u32::try_from(field.ok()?).ok());
            number.unwrap_or_default()
        };
        let (uid, gid) = (id(uid, header.uid()), id(gid, header.gid()));
        let data = match header.entry_type().as_byte() {
            b'5' => {
                path.pop_if(|b| *b == b'/');
                EntryData::Dir
            }
            b'2' => EntryData::Symlink(target(link, header)),
            b'1' => EntryData::HardLink(target(link, header)),
            kind @ (b'3' | b'4' | b'6') => EntryData::Special(kind),
            b'0' | 0 => EntryData::File {
                size,
                segments: None,
            },
            b'S' => {
                let gnu = header
                    .as_gnu()
                    .ok_or_else(|| damaged("a header is not GNU tar's"))?;
                let real = gnu
                    .real_size()
                    .map_err(|_| refuse(&path, "it has no size"))?;
                EntryData::File {
                    size: real,
                    segments: Some(self.segments(gnu, size, real, &path)?),
                }
            }
            other => return Err(refuse_kind(&path, other)),
        };
        if matches!(data, EntryData::File { .. }) {
            self.left = size;
            self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        } else if size != 0 {
            return Err(refuse(&path, "it has data and is not a file"));
        }
        let data = match (data, real) {
            (EntryData::File { .. }, Some(real)) => self.holes_ahead(real, &path)?,
            (_, Some(_)) => return Err(refuse(&path, "it has holes and is not a file")),
            (data, None) => data,
        };
        Ok(Item {
            path,
            mode,
            mtime,
            extra: Extra {
                owner: Owner { uid, gid },
                xattrs,
            },
            data,
        })
    }

    /// Reads the map of a sparse file in POSIX format. The file's data begins with decimal numbers,
    /// one per line: the number of segments, then the offset and length of each, padded with zeros
    /// to a whole block.
    fn holes_ahead(&mut self, real: u64, path: &[u8]) -> Result<EntryData> {
        let mut used = 0;
        let count = self.decimal(&mut used, path)?;
        if count > SEGMENTS_MAX as u64 {
            return Err(refuse(path, "it has too many holes"));
        }
        let mut segments = Vec::new();
        for _ in 0..count {
            segments.push((
                self.decimal(&mut used, path)?,
                self.decimal(&mut used, path)?,
            ));
        }
        let mut zeros = vec![0; (BLOCK - used % BLOCK) % BLOCK];
        self.data_exact(&mut zeros, path)?;
        check_segments(&segments, self.left, real, path)?;
        Ok(EntryData::File {
            size: real,
            segments: Some(segments),
        })
    }

    fn decimal(&mut self, used: &mut usize, path: &[u8]) -> Result<u64> {
        let mut digits = Vec::new();
        loop {
            let mut byte = [0];
            self.data_exact(&mut byte, path)?;
            *used += 1;
            match byte[0] {
                b'\n' => break,
                b'0'..=b'9' if digits.len() < DIGITS_MAX => digits.push(byte[0]),
                _ => return Err(refuse(path, "its holes are damaged")),
            }
        }
        let digits = std::str::from_utf8(&digits)
            .ok()
            .and_then(|d| d.parse().ok());
        digits.ok_or_else(|| refuse(path, "its holes are damaged"))
    }

    fn data_exact(&mut self, buffer: &mut [u8], path: &[u8]) -> Result<()> {
        if buffer.len() as u64 > self.left {
            return Err(refuse(path, "its holes are damaged"));
        }
        self.fill(buffer)?;
        self.left -= buffer.len() as u64;
        Ok(())
    }

    fn segments(
        &mut self,
        gnu: &tar::GnuHeader,
        size: u64,
        real: u64,
        path: &[u8],
    ) -> Result<Vec<(u64, u64)>> {
        let mut out = Vec::new();
        let mut take = |slots: &[tar::GnuSparseHeader]| -> Result<()> {
            for slot in slots.iter().filter(|s| !s.is_empty()) {
                let (Ok(offset), Ok(len)) = (slot.offset(), slot.length()) else {
                    return Err(refuse(path, "its holes are damaged"));
                };
                out.push((offset, len));
            }
            if out.len() > SEGMENTS_MAX {
                Err(refuse(path, "it has too many holes"))
            } else {
                Ok(())
            }
        };
        take(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut ext = tar::GnuExtSparseHeader::new();
            self.from
                .read_exact(ext.as_mut_bytes())
                .map_err(|e| stream_error(DOING, e))?;
            take(&ext.sparse)?;
            more = ext.is_extended();
        }
        check_segments(&out, size, real, path)?;
        Ok(out)
    }

    /// Reads some of the current entry's data, which must not have ended. Returns
    /// `stream_incomplete` if the stream ends first.
    pub(in crate::workspace) fn data(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let want = (buffer.len() as u64).min(self.left) as usize;
        loop {
            match self.from.read(&mut buffer[..want]) {
                Ok(0) => {
                    return Err(Error::new(
                        Kind::StreamIncomplete,
                        format!("{DOING}: it ends in the middle of a file"),
                    ));
                }
                Ok(n) => {
                    self.left -= n as u64;
                    return Ok(n);
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(stream_error(DOING, e)),
            }
        }
    }

    /// Reads `len` bytes of the current entry's data and passes them to `take` in pieces, each with
    /// its offset in the file. The first piece is at `offset`.
    pub(in crate::workspace) fn pieces(
        &mut self,
        (offset, len): (u64, u64),
        buffer: &mut [u8],
        take: &mut dyn FnMut(&[u8], u64) -> Result<()>,
    ) -> Result<()> {
        let mut at = 0;
        while at < len {
            let want = (len - at).min(buffer.len() as u64) as usize;
            let n = self.data(&mut buffer[..want])?;
            take(&buffer[..n], offset + at)?;
            at += n as u64;
        }
        Ok(())
    }

    /// Skips the padding after the last byte of data.
    pub(in crate::workspace) fn end_of_data(&mut self) -> Result<()> {
        debug_assert_eq!(self.left, 0);
        let mut rest = [0; BLOCK];
        let padding = std::mem::take(&mut self.padding) as usize;
        self.fill(&mut rest[..padding])
    }

    /// Reads to the end of the stream, so that its trailer is verified. Only zeros may follow the
    /// end mark.
    fn drain(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        let mut total = 0;
        loop {
            match self.from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    total += n as u64;
                    if buffer[..n].iter().any(|b| *b != 0) || total > PADDING_BYTES_MAX {
                        return Err(damaged("there is data after its end"));
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(stream_error(DOING, e)),
            }
        }
    }
}

/// Extended header records, which override fields of the next header.
#[derive(Default)]
struct Records {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    mtime: Option<Mtime>,
    /// The size of the data, if it does not fit into the header.
    size: Option<u64>,
    /// The size of a sparse file with its holes.
    real_size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    xattrs: Vec<Xattr>,
}

impl Records {
    fn take(&mut self, &Record { key, value }: &Record<'_>) -> Result<()> {
        let number = || {
            std::str::from_utf8(value)
                .ok()
                .and_then(|v| v.parse().ok())
                .ok_or_else(|| damaged("a size is invalid"))
        };
        match key {
            b"path" | b"GNU.sparse.name" => self.path = Some(name(value)?),
            b"linkpath" => self.link = Some(name(value)?),
            b"mtime" => {
                let time = std::str::from_utf8(value).ok().and_then(Mtime::parse);
                self.mtime = Some(time.ok_or_else(|| damaged("a time is invalid"))?);
            }
            b"GNU.sparse.realsize" => self.real_size = Some(number()?),
            b"GNU.sparse.major" if value == b"1" => {}
            b"GNU.sparse.minor" if value == b"0" => {}
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(id(value)?),
            b"gid" => self.gid = Some(id(value)?),
            b"uname" | b"gname" | b"atime" | b"ctime" => {}
            other => {
                if let Some(name) = other.strip_prefix(XATTR_KEY.as_bytes()) {
                    self.xattrs.push(attribute(name, value)?);
                    return Ok(());
                }
                let shown = crate::workspace::encode::encode(&other[..other.len().min(80)]);
                return Err(damaged(&format!(
                    "an extended header has the unknown key \"{shown}\""
                )));
            }
        }
        Ok(())
    }
}

fn id(value: &[u8]) -> Result<u32> {
    std::str::from_utf8(value)
        .ok()
        .and_then(|v| v.parse().ok())
        .ok_or_else(|| damaged("an owner is invalid"))
}

/// Returns an attribute. GNU tar writes `%` and `=` in its name as `%25` and `%3D`.
fn attribute(name: &[u8], value: &[u8]) -> Result<Xattr> {
    let name = std::str::from_utf8(name).map_err(|_| damaged("an attribute's name is invalid"))?;
    Ok(Xattr {
        name: name.replace("%3D", "=").replace("%25", "%"),
        value: value.to_vec(),
    })
}

/// Returns the target of a link.
fn target(record: Option<Vec<u8>>, header: &tar::Header) -> Vec<u8> {
    record.unwrap_or_else(|| until_nul(&header.as_old().linkname))
}

fn name(value: &[u8]) -> Result<Vec<u8>> {
    if value.len() > PATH_BYTES_MAX + 100 {
        return Err(damaged(&format!("a name has {} bytes", value.len())));
    }
    Ok(value.to_vec())
}

/// A record of an extended header.
struct Record<'a> {
    key: &'a [u8],
    value: &'a [u8],
}

/// Returns the first record and the bytes after it, or `None` if the record is invalid.
fn record(bytes: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let blank = bytes.iter().position(|b| *b == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..blank]).ok()?.parse().ok()?;
    let (record, after) = bytes.split_at_checked(length)?;
    let body = record.get(blank + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|b| *b == b'=')?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    Some((Record { key, value }, after))
}

/// Returns the name in a GNU or POSIX header, or `None` for a header of another format. A POSIX
/// header may hold the first part of the name in a separate field.
fn name_in(header: &tar::Header) -> Option<Vec<u8>> {
    if header.as_gnu().is_some() {
        return Some(until_nul(&header.as_old().name));
    }
    let header = header.as_ustar()?;
    let (prefix, name) = (until_nul(&header.prefix), until_nul(&header.name));
    Some(if prefix.is_empty() {
        name
    } else {
        [&prefix[..], b"/", &name[..]].concat()
    })
}

/// Returns the time in a header: octal, or signed base 256 if the first bit is set.
fn time_in(header: &tar::Header) -> Mtime {
    let field = header.as_old().mtime;
    let seconds = match field[0] & 0x80 {
        0 => header.mtime().unwrap_or(0).min(i64::MAX as u64) as i64,
        // A time fits in the last eight bytes; the bytes before them only repeat the sign.
        _ => i64::from_be_bytes([
            field[4], field[5], field[6], field[7], field[8], field[9], field[10], field[11],
        ]),
    };
    Mtime {
        seconds,
        nanoseconds: 0,
    }
}

fn check_segments(segments: &[(u64, u64)], size: u64, real: u64, path: &[u8]) -> Result<()> {
    let mut end = 0u64;
    let mut total = 0u64;
    for (offset, len) in segments {
        let next = offset
            .checked_add(*len)
            .filter(|next| *offset >= end && *next <= real);
        end = next.ok_or_else(|| refuse(path, "its holes overlap"))?;
        total += len;
    }
    if total == size {
        Ok(())
    } else {
        Err(refuse(path, "its holes do not add up"))
    }
}

fn until_nul(field: &[u8]) -> Vec<u8> {
    field.iter().take_while(|b| **b != 0).copied().collect()
}
