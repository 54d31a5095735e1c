//! Parses inodes.

use super::{damaged, u16_at, u32_at, unsupported};
use crate::error::Result;

/// The length of the part that every inode has.
const OLD_BYTES: usize = 128;
const FLAG_ENCRYPT: u32 = 0x800;
pub(super) const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_INLINE_DATA: u32 = 0x1000_0000;
/// The length of the block map, or of what is stored in its place.
pub(super) const MAP_BYTES: usize = 60;
const MAP_AT: usize = 0x28;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    Directory,
    Regular,
    Symlink,
    Character,
    Block,
    Fifo,
    Socket,
}

/// A file or directory, without its names.
pub(super) struct Inode {
    pub(super) number: u32,
    pub(super) kind: FileKind,
    /// The permissions, with the set-uid, set-gid and sticky bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) bytes: u64,
    pub(super) mtime_s: i64,
    pub(super) mtime_ns: u32,
    pub(super) links: u16,
    flags: u32,
    raw: Vec<u8>,
}

impl Inode {
    pub(super) fn parse(number: u32, raw: Vec<u8>) -> Result<Self> {
        let mode = u16_at(&raw, 0);
        let kind = match mode >> 12 {
            0x1 => FileKind::Fifo,
            0x2 => FileKind::Character,
            0x4 => FileKind::Directory,
            0x6 => FileKind::Block,
            0x8 => FileKind::Regular,
            0xa => FileKind::Symlink,
            0xc => FileKind::Socket,
            _ => return Err(damaged("a file has no type")),
        };
        let flags = u32_at(&raw, 0x20);
        if flags & FLAG_ENCRYPT != 0 {
            return Err(unsupported("has encrypted files"));
        }
        if flags & FLAG_INLINE_DATA != 0 {
            return Err(unsupported("stores the content of files in their inodes"));
        }
        let wide = |low: usize, high: usize| {
            u32::from(u16_at(&raw, high)) << 16 | u32::from(u16_at(&raw, low))
        };
        let extra = if extra_bytes(&raw) >= 0x8c - OLD_BYTES {
            u32_at(&raw, 0x88)
        } else {
            0
        };
        // The two lowest bits of the extra field extend the seconds, and the others are
        // nanoseconds.
        let seconds = i64::from(u32_at(&raw, 0x10).cast_signed());
        Ok(Self {
            number,
            kind,
            mode: u32::from(mode & 0o7777),
            uid: wide(0x2, 0x78),
            gid: wide(0x18, 0x7a),
            bytes: u64::from(u32_at(&raw, 0x6c)) << 32 | u64::from(u32_at(&raw, 0x4)),
            mtime_s: seconds + (i64::from(extra & 3) << 32),
            mtime_ns: (extra >> 2).min(999_999_999),
            links: u16_at(&raw, 0x1a),
            flags,
            raw,
        })
    }

    pub(super) fn has_extents(&self) -> bool {
        self.flags & FLAG_EXTENTS != 0
    }

    /// Returns the block map, the root of the extents, a short link's target, or a device's number.
    pub(super) fn map(&self) -> &[u8] {
        &self.raw[MAP_AT..MAP_AT + MAP_BYTES]
    }

    /// Returns the number of the block with further extended attributes, or 0.
    pub(super) fn xattr_block(&self) -> u64 {
        u64::from(u16_at(&self.raw, 0x76)) << 32 | u64::from(u32_at(&self.raw, 0x68))
    }

    /// Returns the part of the inode that may hold extended attributes.
    pub(super) fn xattr_area(&self) -> &[u8] {
        let at = OLD_BYTES + extra_bytes(&self.raw);
        self.raw.get(at..).unwrap_or_default()
    }

    /// Returns the major and the minor number of a device.
    pub(super) fn device(&self) -> (u32, u32) {
        let (old, new) = (u32_at(self.map(), 0), u32_at(self.map(), 4));
        if old != 0 {
            return (old >> 8 & 0xff, old & 0xff);
        }
        (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00)
    }
}

/// Returns how many bytes of the inode are used after the old part.
fn extra_bytes(raw: &[u8]) -> usize {
    if raw.len() <= OLD_BYTES {
        return 0;
    }
    usize::from(u16_at(raw, 0x80)).min(raw.len() - OLD_BYTES)
}
