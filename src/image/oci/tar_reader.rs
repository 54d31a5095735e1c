//! Reads the entries of a tar as docker reads them, and refuses what readers could understand in
//! different ways.
//!
//! The crate `tar` is not used here, because it reads PAX headers and long names of any size into
//! memory, and because it accepts headers that contradict each other.

use super::budget::Budget;
use super::entry::{Attributes, Entry, EntryKind, Time, clean_path};
use super::errors::{bad, read_error, shown};
use super::header::{BLOCK, Header, Number, until_null};
use super::limits::{EXTENSION_BYTES_MAX, PATH_BYTES_MAX};
use super::pax::{Pax, sparse};
use crate::error::{Kind, Result};
use std::io::BufRead;

/// The largest size of an entry that a header can state in octal digits.
const OCTAL_SIZE_MAX: u64 = 0o77_777_777_777;
/// Limits of Linux for the numbers of a device.
const MAJOR_MAX: i64 = 0xfff;
const MINOR_MAX: i64 = 0xf_ffff;

/// The source from which a tar is read.
pub(super) trait Input: BufRead {
    /// Skips bytes. Returns how many, which is fewer only at the end.
    fn skip(&mut self, bytes: u64) -> std::io::Result<u64>;
}

/// Input that is read from its beginning to its end, because all of it is hashed and stored.
impl<R: std::io::Read> Input for std::io::BufReader<R> {
    fn skip(&mut self, mut bytes: u64) -> std::io::Result<u64> {
        let wanted = bytes;
        while bytes > 0 {
            let n = match self.fill_buf() {
                Ok(filled) => (filled.len() as u64).min(bytes),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            if n == 0 {
                break;
            }
            self.consume(n as usize);
            bytes -= n;
        }
        Ok(wanted - bytes)
    }
}

pub(super) struct TarReader<'a, R> {
    inner: R,
    budget: &'a Budget,
    position: u64,
    /// The bytes of content and padding before the next header.
    skip: u64,
}

/// The extensions that precede a header.
#[derive(Default)]
struct Extensions {
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<'a, R: Input> TarReader<'a, R> {
    pub(super) fn new(inner: R, budget: &'a Budget) -> Self {
        Self {
            inner,
            budget,
            position: 0,
            skip: 0,
        }
    }

    /// Returns the next entry, or `None` at the end of the archive.
    pub(super) fn next(&mut self) -> Result<Option<Entry>> {
        let mut extensions = Extensions::default();
        loop {
            let skip = std::mem::take(&mut self.skip);
            self.consume(skip)?;
            let Some(block) = self.header()? else {
                return Ok(None);
            };
            let header = Header::new(&block)?;
            match header.kind() {
                b'x' => {
                    let pax = Pax::parse(&self.extension(&header)?)?;
                    once(&mut extensions.pax, pax)?;
                }
                // Docker ignores global headers. A global header that names files is refused,
                // because other readers would apply it.
                b'g' => {
                    if Pax::parse(&self.extension(&header)?)?.names_an_entry() {
                        return Err(bad("a global PAX header of the tar names files"));
                    }
                }
                b'L' => {
                    let name = until_null(&self.extension(&header)?).to_vec();
                    once(&mut extensions.long_name, name)?;
                }
                b'K' => {
                    let link = until_null(&self.extension(&header)?).to_vec();
                    once(&mut extensions.long_link, link)?;
                }
                _ => {
                    let entry = self.entry(&header, extensions)?;
                    self.budget.add_entry(entry.metadata_bytes())?;
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Reads everything after the end of the archive, so that it is part of the digest.
    pub(super) fn finish(mut self) -> Result<u64> {
        loop {
            let n = self.fill()?.len();
            if n == 0 {
                return Ok(self.position);
            }
            self.inner.consume(n);
            self.position += n as u64;
        }
    }

    /// Reads one header. Both two blocks of zeros and the end of the data end an archive.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        if !self.block(&mut block)? {
            return Ok(None);
        }
        if block.iter().any(|b| *b != 0) {
            return Ok(Some(block));
        }
        if self.block(&mut block)? && block.iter().any(|b| *b != 0) {
            return Err(bad("the tar has one block of zeros and then more entries"));
        }
        Ok(None)
    }

    /// Reads one block. Returns false if the data ended before it.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        let mut filled = 0;
        while filled < BLOCK {
            let available = self.fill()?;
            let n = available.len().min(BLOCK - filled);
            if n == 0 {
                if filled == 0 {
                    return Ok(false);
                }
                return Err(truncated());
            }
            block[filled..filled + n].copy_from_slice(&available[..n]);
            self.inner.consume(n);
            filled += n;
        }
        self.position += BLOCK as u64;
        Ok(true)
    }

    fn fill(&mut self) -> Result<&[u8]> {
        loop {
            // The second call returns the same bytes, because nothing was consumed. The borrow
            // checker does not accept returning the first result from a loop.
            match self.inner.fill_buf() {
                Ok(_) => break,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(read_error("read the tar", e)),
            }
        }
        let filled = self.inner.fill_buf();
        filled.map_err(|e| read_error("read the tar", e))
    }

    fn consume(&mut self, bytes: u64) -> Result<()> {
        let skipped = self.inner.skip(bytes);
        let skipped = skipped.map_err(|e| read_error("read the tar", e))?;
        self.position += skipped;
        if skipped < bytes {
            return Err(truncated());
        }
        Ok(())
    }

    /// Reads the content of an extension header.
    fn extension(&mut self, header: &Header<'_>) -> Result<Vec<u8>> {
        let size = size_of(header)?;
        if size > EXTENSION_BYTES_MAX {
            return Err(bad(format!(
                "an extension header of the tar has {size} bytes, at most {EXTENSION_BYTES_MAX} are \
                 allowed"
            )));
        }
        let mut content = Vec::new();
        let mut left = size as usize;
        while left > 0 {
            let available = self.fill()?;
            let n = available.len().min(left);
            if n == 0 {
                return Err(truncated());
            }
            content.extend_from_slice(&available[..n]);
            self.inner.consume(n);
            self.position += n as u64;
            left -= n;
        }
        self.consume(padding(size))?;
        Ok(content)
    }

    fn entry(&mut self, header: &Header<'_>, extensions: Extensions) -> Result<Entry> {
        let pax = extensions.pax.unwrap_or_default();
        let raw = agreed(pax.path, extensions.long_name)?.unwrap_or_else(|| header.name());
        let path = clean_path(&raw)?;
        let link = agreed(pax.link, extensions.long_link)?;
        let link = link.unwrap_or_else(|| header.link_target().to_vec());
        let in_entry = |e: crate::error::Error| e.context(format!("entry {}", shown(&raw)));
        let size = entry_size(header, pax.size).map_err(in_entry)?;
        let is_old_directory = header.kind() == 0 && raw.ends_with(b"/");
        let kind = match header.kind() {
            _ if is_old_directory => EntryKind::Directory,
            0 | b'0' | b'7' => {
                self.budget.check_bytes(size).map_err(in_entry)?;
                self.skip = size + padding(size);
                EntryKind::File {
                    offset: self.position,
                    bytes: size,
                }
            }
            b'1' => EntryKind::HardLink {
                target: clean_path(&link).map_err(in_entry)?,
            },
            b'2' => EntryKind::Symlink {
                target: symlink_target(&link).map_err(in_entry)?,
            },
            b'3' | b'4' => device(header).map_err(in_entry)?,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            b'S' => return Err(in_entry(sparse())),
            other => {
                let name = char::from(other).escape_default();
                let message = format!("the tar has an entry of the unknown kind '{name}'");
                return Err(in_entry(bad(message).with_kind(Kind::Unsupported)));
            }
        };
        let attributes = Attributes {
            mode: (header.number(Number::Mode)? & 0o7777) as u16,
            uid: id(pax.uid, header, Number::Uid).map_err(in_entry)?,
            gid: id(pax.gid, header, Number::Gid).map_err(in_entry)?,
            mtime: match pax.mtime {
                Some(time) => time,
                None => Time {
                    seconds: header.number(Number::Mtime)?,
                    nanoseconds: 0,
                },
            },
            xattrs: pax.xattrs,
        };
        Ok(Entry {
            path,
            kind,
            attributes,
        })
    }
}

fn truncated() -> crate::error::Error {
    bad("the tar ends in the middle of an entry")
}

fn padding(size: u64) -> u64 {
    size.next_multiple_of(BLOCK as u64) - size
}

fn once<T>(field: &mut Option<T>, value: T) -> Result<()> {
    if field.replace(value).is_some() {
        return Err(bad(
            "an entry of the tar has two extension headers of one kind",
        ));
    }
    Ok(())
}

/// Returns the name from a PAX header or from a GNU header, which must not contradict each other.
fn agreed(pax: Option<Vec<u8>>, gnu: Option<Vec<u8>>) -> Result<Option<Vec<u8>>> {
    match (pax, gnu) {
        (Some(pax), Some(gnu)) if pax != gnu => Err(bad(format!(
            "the PAX and GNU headers of the tar contradict each other: {} and {}",
            shown(&pax),
            shown(&gnu)
        ))),
        (pax, gnu) => Ok(pax.or(gnu)),
    }
}

fn size_of(header: &Header<'_>) -> Result<u64> {
    let size = header.number(Number::Size)?;
    // Sizes near the maximum would overflow when they are rounded up.
    u64::try_from(size)
        .ok()
        .filter(|size| *size <= i64::MAX as u64 - BLOCK as u64)
        .ok_or_else(|| bad("a header of the tar has an impossible size"))
}

/// Returns the size of an entry. A PAX header may contain the size if the header itself contains
/// zero or the same size, or if the size does not fit into the header.
fn entry_size(header: &Header<'_>, pax: Option<u64>) -> Result<u64> {
    let own = size_of(header)?;
    match pax {
        None => Ok(own),
        Some(size) if size > i64::MAX as u64 - BLOCK as u64 => {
            Err(bad("a PAX header of the tar has an impossible size"))
        }
        Some(size) if size == own || own == 0 || size > OCTAL_SIZE_MAX => Ok(size),
        Some(size) => Err(bad(format!(
            "the headers of the tar contradict each other: sizes {own} and {size}"
        ))),
    }
}

/// Returns a uid or gid. The largest number is not an id, but means "do not change it" in chown(2).
fn id(pax: Option<i64>, header: &Header<'_>, field: Number) -> Result<u32> {
    let id = match pax {
        Some(id) => id,
        None => header.number(field)?,
    };
    let id = u32::try_from(id).ok().filter(|id| *id != u32::MAX);
    id.ok_or_else(|| bad("the owner is not a number that Linux can store"))
}

fn symlink_target(link: &[u8]) -> Result<Box<str>> {
    let target = std::str::from_utf8(link).map_err(|_| {
        let message = format!("the link target {} is not UTF-8", shown(link));
        bad(message).with_kind(Kind::Unsupported)
    })?;
    if target.is_empty() || target.len() > PATH_BYTES_MAX || target.contains('\0') {
        return Err(bad("the link has no valid target"));
    }
    Ok(target.into())
}

fn device(header: &Header<'_>) -> Result<EntryKind> {
    let (major, minor) = (header.number(Number::Major)?, header.number(Number::Minor)?);
    if !(0..=MAJOR_MAX).contains(&major) || !(0..=MINOR_MAX).contains(&minor) {
        return Err(bad("the device has numbers that Linux cannot store"));
    }
    let (major, minor) = (major as u32, minor as u32);
    Ok(if header.kind() == b'3' {
        EntryKind::CharacterDevice { major, minor }
    } else {
        EntryKind::BlockDevice { major, minor }
    })
}

#[cfg(test)]
#[path = "tar_reader_tests.rs"]
mod tests;
