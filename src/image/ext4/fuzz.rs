//! The fuzz target for file systems, for `tests/fuzz`.

use super::disk::Source;
use super::tree::write_tar;
use std::io;

impl Source for &[u8] {
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let at = usize::try_from(at).ok();
        let found = at.and_then(|at| self.get(at..at.checked_add(buffer.len())?));
        buffer.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Writes the files of a file system as an archive.
pub fn ext4(input: &[u8]) {
    const BYTES_MAX: u64 = 1 << 20;
    let _ = write_tar(&input, &mut io::sink(), BYTES_MAX, &|_| {});
}
