//! Reads a disk's file, whose bytes are not trusted.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// The file of a disk. The fuzz target uses bytes instead.
pub(super) trait ReadAt {
    fn read_at(&self, buffer: &mut [u8], at: u64) -> std::io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
        FileExt::read_at(self, buffer, at)
    }
}

/// A part of a disk that differs from its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// The offset on the disk.
    pub at: u64,
    /// The offset in the disk's file, or None if the part is zero.
    pub from: Option<u64>,
    pub bytes: u64,
}

/// Reads at an offset. Bytes beyond the end of the file are zero.
pub(super) fn read(file: &impl ReadAt, mut buffer: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, at) {
            Ok(0) => return Ok(()),
            Ok(len) => {
                buffer = &mut buffer[len..];
                at = at.saturating_add(len as u64);
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            // The offset is larger than a file can be.
            Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => return Ok(()),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
