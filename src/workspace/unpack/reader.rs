//! A reader for GNU tars that trusts nothing: regular files, sparse ones, links and directories; no owners, no
//! extensions but long names, and those are bounded.

use super::{refuse, stream_error};
use crate::error::{Error, Kind, Result};
use crate::workspace::PATH_BYTES_MAX;
use std::io::Read;

const BLOCK: usize = 512;
/// Most data segments of one sparse file.
const SEGMENTS_MAX: usize = 1_000_000;
/// Most zeros after the end: tar fills its last record.
const PADDING_BYTES_MAX: u64 = 1024 * 1024;
const DOING: &str = "read the tree from the guest";

#[derive(Debug)]
pub(super) enum EntryData {
    Dir,
    Symlink(Vec<u8>),
    File {
        size: u64,
        /// Where the data of a sparse file goes: offset and length, ascending.
        segments: Option<Vec<(u64, u64)>>,
    },
}

#[derive(Debug)]
pub(super) struct Item {
    /// Without the slash that ends a directory's.
    pub path: Vec<u8>,
    /// Permission bits alone.
    pub mode: u32,
    pub mtime: u64,
    pub data: EntryData,
}

pub(super) struct TarReader<'a> {
    from: &'a mut dyn Read,
    /// Bytes of the current entry's data that were not read yet, and the padding after them.
    left: u64,
    padding: u64,
}

fn damaged(why: &str) -> Error {
    Error::new(Kind::InvalidTree, format!("{DOING}: {why}"))
}

impl<'a> TarReader<'a> {
    pub fn new(from: &'a mut dyn Read) -> Self {
        Self { from, left: 0, padding: 0 }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.from.read_exact(buffer).map_err(|e| stream_error(DOING, e))
    }

    fn block(&mut self) -> Result<[u8; BLOCK]> {
        let mut block = [0; BLOCK];
        self.fill(&mut block)?;
        Ok(block)
    }

    /// The next entry; its data has to be read before the one after. None: the end mark, and the stream's own end.
    pub fn next(&mut self) -> Result<Option<Item>> {
        let (mut path, mut link) = (None, None);
        loop {
            let block = self.block()?;
            if block.iter().all(|b| *b == 0) {
                if self.block()?.iter().any(|b| *b != 0) || path.is_some() || link.is_some() {
                    return Err(damaged("its end mark is none"));
                }
                return self.drain().map(|()| None);
            }
            let header = tar::Header::from_byte_slice(&block);
            let sum: u32 = block.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
            if header.cksum().ok() != Some(sum) {
                return Err(damaged("a header is damaged"));
            }
            match header.entry_type().as_byte() {
                b'L' if path.is_none() => path = Some(self.long(header)?),
                b'K' if link.is_none() => link = Some(self.long(header)?),
                _ => return self.item(header, path, link).map(Some),
            }
        }
    }

    fn long(&mut self, header: &tar::Header) -> Result<Vec<u8>> {
        let size = header.entry_size().map_err(|_| damaged("a long name has no size"))?;
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

    fn item(&mut self, header: &tar::Header, path: Option<Vec<u8>>, link: Option<Vec<u8>>) -> Result<Item> {
        let gnu = header.as_gnu().ok_or_else(|| damaged("a header is not GNU tar's"))?;
        let mut path = path.unwrap_or_else(|| until_nul(&gnu.name));
        let size = header.entry_size().map_err(|_| refuse(&path, "it has no size"))?;
        let mode = header.mode().map_err(|_| refuse(&path, "it has no mode"))? & 0o777;
        let mtime = header.mtime().unwrap_or(0).min(i64::MAX as u64);
        let data = match header.entry_type().as_byte() {
            b'5' => {
                path.pop_if(|b| *b == b'/');
                EntryData::Dir
            }
            b'2' => EntryData::Symlink(link.unwrap_or_else(|| until_nul(&gnu.linkname))),
            b'0' | 0 => EntryData::File { size, segments: None },
            b'S' => {
                let real = gnu.real_size().map_err(|_| refuse(&path, "it has no size"))?;
                EntryData::File { size: real, segments: Some(self.segments(gnu, size, real, &path)?) }
            }
            other => {
                let kind = if other.is_ascii_graphic() { (other as char).to_string() } else { format!("{other:#04x}") };
                return Err(refuse(&path, &format!("it is of type {kind}, neither file nor link nor directory")));
            }
        };
        if matches!(data, EntryData::File { .. }) {
            self.left = size;
            self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        } else if size != 0 {
            return Err(refuse(&path, "it has data and is no file"));
        }
        Ok(Item { path, mode, mtime, data })
    }

    fn segments(&mut self, gnu: &tar::GnuHeader, size: u64, real: u64, path: &[u8]) -> Result<Vec<(u64, u64)>> {
        let mut out = Vec::new();
        let mut take = |slots: &[tar::GnuSparseHeader]| -> Result<()> {
            for slot in slots.iter().filter(|s| !s.is_empty()) {
                let (Ok(offset), Ok(len)) = (slot.offset(), slot.length()) else {
                    return Err(refuse(path, "its holes are damaged"));
                };
                out.push((offset, len));
            }
            if out.len() > SEGMENTS_MAX { Err(refuse(path, "it has too many holes")) } else { Ok(()) }
        };
        take(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut ext = tar::GnuExtSparseHeader::new();
            self.from.read_exact(ext.as_mut_bytes()).map_err(|e| stream_error(DOING, e))?;
            take(&ext.sparse)?;
            more = ext.is_extended();
        }
        let mut end = 0u64;
        let mut total = 0u64;
        for (offset, len) in &out {
            let next = offset.checked_add(*len).filter(|next| *offset >= end && *next <= real);
            end = next.ok_or_else(|| refuse(path, "its holes overlap"))?;
            total += len;
        }
        if total != size {
            return Err(refuse(path, "its holes do not add up"));
        }
        Ok(out)
    }

    /// Some of the current entry's data; never 0 while there is some.
    pub fn data(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let want = (buffer.len() as u64).min(self.left) as usize;
        loop {
            match self.from.read(&mut buffer[..want]) {
                Ok(0) => return Err(Error::new(Kind::StreamIncomplete, format!("{DOING}: it ends in the middle of a file"))),
                Ok(n) => {
                    self.left -= n as u64;
                    return Ok(n);
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(stream_error(DOING, e)),
            }
        }
    }

    /// After the last byte of data: skips the padding.
    pub fn end_of_data(&mut self) -> Result<()> {
        debug_assert_eq!(self.left, 0);
        let mut rest = [0; BLOCK];
        let padding = std::mem::take(&mut self.padding) as usize;
        self.fill(&mut rest[..padding])
    }

    /// Nothing but zeros follows, up to the end of the stream, which is when its trailer is looked at.
    fn drain(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        let mut total = 0;
        loop {
            match self.from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    total += n as u64;
                    if buffer[..n].iter().any(|b| *b != 0) || total > PADDING_BYTES_MAX {
                        return Err(damaged("something follows its end"));
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(stream_error(DOING, e)),
            }
        }
    }
}

fn until_nul(field: &[u8]) -> Vec<u8> {
    field.iter().take_while(|b| **b != 0).copied().collect()
}
