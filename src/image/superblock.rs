//! Checks the superblock of a file that should contain an ext4 file system
//! (Documentation/filesystems/ext4/super.rst in Linux). This gives clear errors for the usual
//! mistakes. `e2fsck` checks the rest.

use crate::error::{Error, Kind, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;

const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC: u16 = 0xef53;
/// The kernel mounts only file systems whose blocks are not larger than a page.
const LOG_BLOCK_MAX: u32 = 2;
const STATE_VALID: u16 = 1;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_JOURNAL_DEV: u32 = 0x8;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_ENCRYPT: u32 = 0x1_0000;

/// Checks that a file of `bytes` bytes begins with an ext4 file system that can be mounted.
pub(super) fn check(file: &File, bytes: u64) -> Result<()> {
    let mut superblock = [0; SUPERBLOCK_BYTES];
    if bytes < SUPERBLOCK_AT + SUPERBLOCK_BYTES as u64 {
        return Err(not_ext4());
    }
    file.read_exact_at(&mut superblock, SUPERBLOCK_AT)
        .map_err(|e| Error::io("read the superblock", e))?;
    check_bytes(&superblock, bytes)
}

fn check_bytes(superblock: &[u8; SUPERBLOCK_BYTES], bytes: u64) -> Result<()> {
    let u16_at = |at: usize| u16::from_le_bytes([superblock[at], superblock[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
    if u16_at(0x38) != MAGIC {
        return Err(not_ext4());
    }
    let unsupported = |text: &str, hint: &str| {
        let text = format!("the file system {text}");
        Err(Error::new(Kind::Unsupported, text).hint(hint))
    };
    let make_again = "make the file system again: mke2fs -t ext4 -d TREE FILE SIZE";
    let (incompat, log_block) = (u32_at(0x60), u32_at(0x18));
    if incompat & INCOMPAT_JOURNAL_DEV != 0 {
        return unsupported("is only the journal of another", make_again);
    }
    if incompat & INCOMPAT_ENCRYPT != 0 {
        return unsupported("is encrypted", make_again);
    }
    if log_block > LOG_BLOCK_MAX {
        return unsupported("has blocks of more than 4096 bytes", make_again);
    }
    // The first flag shows this for a file system with a journal, and the second for one without.
    if incompat & INCOMPAT_RECOVER != 0 || u16_at(0x3a) & STATE_VALID == 0 {
        let hint = "unmount it, or replay its journal: e2fsck -p FILE";
        return unsupported("is mounted, or was not unmounted", hint);
    }
    let high = if incompat & INCOMPAT_64BIT != 0 {
        u64::from(u32_at(0x150))
    } else {
        0
    };
    let blocks = high << 32 | u64::from(u32_at(0x4));
    let needed = blocks.saturating_mul(1024 << log_block);
    if needed > bytes {
        let text = format!("the file system needs {needed} bytes, but the file has only {bytes}");
        let hint = "the file was cut off: copy it again";
        return Err(Error::new(Kind::InvalidImage, text).hint(hint));
    }
    Ok(())
}

fn not_ext4() -> Error {
    let text = "the file does not hold an ext4 file system";
    Error::new(Kind::InvalidImage, text)
        .hint("make one: mke2fs -t ext4 -d TREE FILE SIZE; a disk with partitions does not work")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes the superblock of a file system with blocks of 4096 bytes.
    fn superblock(blocks: u32) -> [u8; SUPERBLOCK_BYTES] {
        let mut bytes = [0; SUPERBLOCK_BYTES];
        bytes[0x4..0x8].copy_from_slice(&blocks.to_le_bytes());
        bytes[0x18] = 2;
        bytes[0x38..0x3a].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[0x3a] = 1;
        bytes
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut [u8; SUPERBLOCK_BYTES]), says: &str) {
        let mut bytes = superblock(100);
        change(&mut bytes);
        let e = check_bytes(&bytes, 100 * 4096).unwrap_err();
        assert!(
            e.to_string().contains(says) && e.hint_text().is_some(),
            "{e}"
        );
    }

    #[test]
    fn usable_file_system_is_accepted() {
        check_bytes(&superblock(100), 100 * 4096).unwrap();
        // The file may be longer, by any number of bytes.
        check_bytes(&superblock(100), 100 * 4096 + 5).unwrap();
    }

    #[test]
    fn unusable_file_system_is_refused() {
        check(|bytes| bytes[0x38] = 0, "does not hold an ext4");
        check(|bytes| bytes[0x60] = 0x4, "was not unmounted");
        check(|bytes| bytes[0x3a] = 0, "was not unmounted");
        check(|bytes| bytes[0x60] = 0x8, "journal of another");
        check(|bytes| bytes[0x62] = 0x1, "encrypted");
        check(|bytes| bytes[0x18] = 6, "more than 4096 bytes");
        check(|bytes| bytes[0x4] = 101, "needs 413696 bytes");
        check(
            |bytes| {
                bytes[0x60] = 0x80;
                bytes[0x150..0x154].fill(0xff);
            },
            "has only 409600",
        );
    }

    #[test]
    fn short_file_is_not_a_file_system() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2047).unwrap();
        assert_eq!(
            super::check(&file, 2047).unwrap_err().kind(),
            Kind::InvalidImage
        );
        // The file shrinks after its size was read.
        assert!(super::check(&file, 4096).is_err());
    }
}
