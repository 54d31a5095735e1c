//! Reads an ext4 file system and writes its files as a tar archive, without mounting it.
//!
//! Everything here parses hostile bytes, so it runs in a helper process. Each size and count has a
//! limit, every offset is checked by the read itself, and no directory is visited twice. Numbers
//! are little-endian (Documentation/filesystems/ext4 in Linux).

mod blocks;
mod directory;
mod disk;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod inode;
mod tree;
mod xattr;

pub(super) use tree::write_tar;

#[cfg(test)]
pub(crate) mod tests;

use crate::error::{Error, Kind};

/// Returns the error for a file system that contradicts itself.
fn damaged(what: &str) -> Error {
    Error::new(
        Kind::InvalidImage,
        format!("the file system is damaged: {what}"),
    )
    .hint("check it: e2fsck -fn FILE")
}

fn unsupported(what: &str) -> Error {
    Error::new(Kind::Unsupported, format!("the file system {what}"))
        .hint("export the file system itself: --format raw")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let word = bytes.get(at..at + 2).and_then(|word| word.try_into().ok());
    u16::from_le_bytes(word.unwrap_or_default())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    u32::from_le_bytes(word.unwrap_or_default())
}
