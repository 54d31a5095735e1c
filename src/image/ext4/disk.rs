//! The file system as a whole: its superblock and its groups.

use super::inode::Inode;
use super::{damaged, u16_at, u32_at, unsupported};
use crate::error::{Error, Result};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC: u16 = 0xef53;
const LOG_BLOCK_MAX: u32 = 6;
const INCOMPAT_FILETYPE: u32 = 0x2;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_EXTENTS: u32 = 0x40;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_MMP: u32 = 0x100;
const INCOMPAT_FLEX_BG: u32 = 0x200;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
const INCOMPAT_LARGEDIR: u32 = 0x4000;
/// The incompatible features that this reader understands, or that do not matter to a reader.
const INCOMPAT_KNOWN: u32 = INCOMPAT_FILETYPE
    | INCOMPAT_EXTENTS
    | INCOMPAT_64BIT
    | INCOMPAT_MMP
    | INCOMPAT_FLEX_BG
    | INCOMPAT_CSUM_SEED
    | INCOMPAT_LARGEDIR;

/// The bytes of a file system, such as an open file.
pub(in crate::image) trait Source {
    /// Fills the buffer with the bytes at an offset.
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()>;
}

impl Source for File {
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, at)
    }
}

/// An open file system.
pub(super) struct Disk<'a> {
    source: &'a dyn Source,
    pub(super) block_bytes: u64,
    blocks: u64,
    inodes: u32,
    inodes_per_group: u32,
    inode_bytes: u16,
    descriptor_bytes: u64,
    /// The number of the block with the first group's descriptor.
    descriptors_at: u64,
}

impl<'a> Disk<'a> {
    pub(super) fn open(source: &'a dyn Source) -> Result<Self> {
        let mut bytes = [0; SUPERBLOCK_BYTES];
        source
            .read_exact_at(&mut bytes, SUPERBLOCK_AT)
            .map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => damaged("it has no superblock"),
                _ => Error::io("read the superblock", e),
            })?;
        let u32_of = |at| u32_at(&bytes, at);
        if u16_at(&bytes, 0x38) != MAGIC {
            return Err(damaged("it has no superblock"));
        }
        let incompat = u32_of(0x60);
        if incompat & INCOMPAT_RECOVER != 0 {
            return Err(unsupported("was not unmounted, so its journal has changes"));
        }
        if incompat & !INCOMPAT_KNOWN != 0 {
            let features = incompat & !INCOMPAT_KNOWN;
            return Err(unsupported(&format!("has the features {features:#x}")));
        }
        let log_block = u32_of(0x18);
        if log_block > LOG_BLOCK_MAX {
            return Err(damaged("the size of its blocks is not possible"));
        }
        let block_bytes = 1024 << log_block;
        let is_64bit = incompat & INCOMPAT_64BIT != 0;
        let high = if is_64bit { u32_of(0x150) } else { 0 };
        let descriptor_bytes = match u16_at(&bytes, 0xfe) {
            size if is_64bit && size >= 64 => u64::from(size),
            _ if is_64bit => return Err(damaged("the size of its descriptors is not possible")),
            _ => 32,
        };
        let inode_bytes = if u32_of(0x4c) == 0 {
            128
        } else {
            u16_at(&bytes, 0x58)
        };
        let disk = Self {
            source,
            block_bytes,
            blocks: u64::from(high) << 32 | u64::from(u32_of(0x4)),
            inodes: u32_of(0),
            inodes_per_group: u32_of(0x28),
            inode_bytes,
            descriptor_bytes,
            descriptors_at: u64::from(u32_of(0x14)) + 1,
        };
        if disk.inodes_per_group == 0 || !(128..=4096).contains(&disk.inode_bytes) {
            return Err(damaged("its superblock contradicts itself"));
        }
        Ok(disk)
    }

    /// Fills the buffer from the beginning of a block.
    pub(super) fn read_block(&self, block: u64, buffer: &mut [u8]) -> Result<()> {
        if block == 0 || block >= self.blocks {
            return Err(damaged("a block is beyond its end"));
        }
        self.read(block.saturating_mul(self.block_bytes), buffer)
    }

    /// Fills the buffer from consecutive blocks, `skip` bytes after the beginning of the block
    /// `first`.
    pub(super) fn read_in_blocks(&self, first: u64, skip: u64, buffer: &mut [u8]) -> Result<()> {
        let end = (skip + buffer.len() as u64).div_ceil(self.block_bytes);
        if first == 0 || first.saturating_add(end) > self.blocks {
            return Err(damaged("a block is beyond its end"));
        }
        self.read(first.saturating_mul(self.block_bytes) + skip, buffer)
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<()> {
        self.source
            .read_exact_at(buffer, at)
            .map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => damaged("it is cut off"),
                _ => Error::io("read the file system", e),
            })
    }

    /// Reads an inode.
    pub(super) fn inode(&self, number: u32) -> Result<Inode> {
        if number == 0 || number > self.inodes {
            return Err(damaged("a name refers to an inode that does not exist"));
        }
        let (group, index) = (
            u64::from((number - 1) / self.inodes_per_group),
            u64::from((number - 1) % self.inodes_per_group),
        );
        let mut descriptor = [0; 64];
        let len = usize::try_from(self.descriptor_bytes.min(64)).unwrap_or(32);
        let at = (self.descriptors_at.saturating_mul(self.block_bytes))
            .saturating_add(group * self.descriptor_bytes);
        self.read(at, &mut descriptor[..len])?;
        let high = if len == 64 {
            u32_at(&descriptor, 0x28)
        } else {
            0
        };
        let table = u64::from(high) << 32 | u64::from(u32_at(&descriptor, 0x8));
        if table == 0 || table >= self.blocks {
            return Err(damaged("a table of inodes is beyond its end"));
        }
        let at = table
            .saturating_mul(self.block_bytes)
            .saturating_add(index * u64::from(self.inode_bytes));
        let mut bytes = vec![0; usize::from(self.inode_bytes)];
        self.read(at, &mut bytes)?;
        Inode::parse(number, bytes)
    }
}
