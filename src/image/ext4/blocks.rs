//! Finds the blocks that hold the content of a file, and reads them.

use super::disk::Disk;
use super::inode::Inode;
use super::{damaged, u16_at, u32_at};
use crate::error::{Error, Result};
use std::io::{self, Read};

const EXTENT_MAGIC: u16 = 0xf30a;
const EXTENT_BYTES: usize = 12;
/// The maximum depth of a tree of extents, which is the kernel's limit (EXT4_MAX_EXTENT_DEPTH).
const DEPTH_MAX: u16 = 5;
/// The maximum length of an extent that was written. A larger number in the length field marks an
/// extent without content, whose length is the number minus this constant.
const WRITTEN_MAX: u64 = 32768;
/// The number of blocks whose numbers the old map keeps in the inode itself.
const DIRECT: usize = 12;
/// The maximum number of runs in the content of one file.
const RUNS_MAX: usize = 4 << 20;
/// The maximum number of blocks in the map of one file.
const MAP_BLOCKS_MAX: u64 = 1 << 20;
const PIECE_BYTES: u64 = 1 << 20;

/// Blocks that follow each other in a file and on the disk. The gaps between runs are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// The first block in the file.
    at: u64,
    len: u64,
    /// The first block on the disk.
    from: u64,
}

/// The content of a file.
pub(super) struct Content<'a> {
    disk: &'a Disk<'a>,
    runs: Vec<Run>,
    bytes: u64,
    position: u64,
    next_run: usize,
    error: Option<Error>,
}

impl<'a> Content<'a> {
    pub(super) fn of(disk: &'a Disk<'a>, inode: &Inode) -> Result<Self> {
        let mut map = Map {
            disk,
            runs: Vec::new(),
            blocks: inode.bytes.div_ceil(disk.block_bytes),
            read: 0,
        };
        if inode.has_extents() {
            map.extents(inode.map(), None)?;
        } else {
            map.old_map(inode.map())?;
        }
        Ok(Self {
            disk,
            runs: map.runs,
            bytes: inode.bytes,
            position: 0,
            next_run: 0,
            error: None,
        })
    }

    /// Returns the error of a read that has failed.
    pub(super) fn take_error(&mut self) -> Option<Error> {
        self.error.take()
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let block_bytes = self.disk.block_bytes;
        let left = self.bytes.saturating_sub(self.position);
        let wanted = left.min(buffer.len() as u64).min(PIECE_BYTES);
        if wanted == 0 {
            return Ok(0);
        }
        let block = self.position / block_bytes;
        while (self.runs.get(self.next_run)).is_some_and(|run| run.at + run.len <= block) {
            self.next_run += 1;
        }
        let run = self.runs.get(self.next_run).copied();
        let end_of = |block: u64| (block * block_bytes).saturating_sub(self.position);
        let len = match run {
            Some(run) if run.at <= block => {
                let len = wanted.min(end_of(run.at + run.len));
                let into = self.position - run.at * block_bytes;
                let bytes = &mut buffer[..len as usize];
                self.disk.read_in_blocks(run.from, into, bytes)?;
                len
            }
            Some(run) => wanted.min(end_of(run.at)),
            None => wanted,
        };
        if run.is_none_or(|run| run.at > block) {
            buffer[..len as usize].fill(0);
        }
        self.position += len;
        Ok(len as usize)
    }
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.fill(buffer).map_err(|e| {
            let text = e.to_string();
            self.error = Some(e);
            io::Error::other(text)
        })
    }
}

struct Map<'a> {
    disk: &'a Disk<'a>,
    runs: Vec<Run>,
    /// The length of the file in blocks, which bounds the size of the map.
    blocks: u64,
    /// The number of blocks of the map that were read.
    read: u64,
}

impl Map<'_> {
    fn add(&mut self, run: Run) -> Result<()> {
        if let Some(last) = self.runs.last_mut() {
            if run.at < last.at + last.len {
                return Err(damaged("the blocks of a file are not in order"));
            }
            if (last.at + last.len, last.from + last.len) == (run.at, run.from) {
                last.len += run.len;
                return Ok(());
            }
        }
        if self.runs.len() >= RUNS_MAX {
            return Err(damaged("a file consists of too many pieces"));
        }
        self.runs.push(run);
        Ok(())
    }

    /// Reads one block of the map. Their number is bounded, because a map with a loop would never
    /// end.
    fn block(&mut self, number: u64) -> Result<Vec<u8>> {
        self.read += 1;
        if self.read > (self.blocks + u64::from(DEPTH_MAX)).min(MAP_BLOCKS_MAX) {
            return Err(damaged("the map of a file has a loop"));
        }
        let mut bytes = vec![0; self.disk.block_bytes as usize];
        self.disk.read_block(number, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a node of the tree of extents. `depth` is None for the root.
    fn extents(&mut self, node: &[u8], depth: Option<u16>) -> Result<()> {
        let (magic, count, found) = (u16_at(node, 0), u16_at(node, 2), u16_at(node, 6));
        let fits = (usize::from(count) + 1) * EXTENT_BYTES <= node.len();
        let is_expected = depth.map_or(found <= DEPTH_MAX, |depth| found == depth);
        if magic != EXTENT_MAGIC || !fits || !is_expected {
            return Err(damaged("the extents of a file are malformed"));
        }
        let entries = node[EXTENT_BYTES..].chunks_exact(EXTENT_BYTES);
        for entry in entries.take(usize::from(count)) {
            if found > 0 {
                let low = u64::from(u32_at(entry, 4));
                let child = self.block(u64::from(u16_at(entry, 8)) << 32 | low)?;
                self.extents(&child, Some(found - 1))?;
                continue;
            }
            let len = u64::from(u16_at(entry, 4));
            // An extent that was not written yet reads as zero, like a gap.
            if len <= WRITTEN_MAX {
                self.add(Run {
                    at: u64::from(u32_at(entry, 0)),
                    len,
                    from: u64::from(u16_at(entry, 6)) << 32 | u64::from(u32_at(entry, 8)),
                })?;
            }
        }
        Ok(())
    }

    /// Reads the map of ext2 and ext3, which lists blocks, and blocks that list blocks.
    fn old_map(&mut self, map: &[u8]) -> Result<()> {
        let mut at = self.pointers(&map[..DIRECT * 4], 0, 0)?;
        for depth in 1..=3 {
            let pointer = &map[(DIRECT + depth - 1) * 4..][..4];
            at = self.pointers(pointer, at, depth as u32)?;
        }
        Ok(())
    }

    /// Reads numbers of blocks. If `depth` is above 0, these blocks are maps themselves. Returns
    /// the position in the file after the blocks.
    fn pointers(&mut self, numbers: &[u8], mut at: u64, depth: u32) -> Result<u64> {
        let per_block = self.disk.block_bytes / 4;
        let covered = per_block.pow(depth);
        for number in numbers.chunks_exact(4).map(|number| u32_at(number, 0)) {
            if at >= self.blocks {
                break;
            }
            if number != 0 && depth > 0 {
                let child = self.block(u64::from(number))?;
                self.pointers(&child, at, depth - 1)?;
            } else if number != 0 {
                self.add(Run {
                    at,
                    len: 1,
                    from: u64::from(number),
                })?;
            }
            at += covered;
        }
        Ok(at)
    }
}
