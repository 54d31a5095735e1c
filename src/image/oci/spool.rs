//! Readers around a spooled tar: one that writes the spool, and one that reads a part of it.

use super::budget::Budget;
use super::errors::as_io;
use crate::error::Error;
use std::fs::File;
use std::io::{Read, Write as _};
use std::os::unix::fs::FileExt;

/// Writes everything that is read through it to the spool.
pub(super) struct Spooling<'a, R> {
    pub(super) inner: R,
    pub(super) spool: &'a File,
    pub(super) budget: &'a Budget,
}

impl<R: Read> Read for Spooling<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.budget.add_bytes(n as u64).map_err(as_io)?;
        let mut spool = self.spool;
        let written = spool.write_all(&buffer[..n]);
        written.map_err(|e| as_io(Error::io("write to the cache of layers", e)))?;
        Ok(n)
    }
}

/// A part of a file.
pub(super) struct Portion<'a> {
    pub(super) file: &'a File,
    pub(super) at: u64,
    pub(super) left: u64,
}

impl Read for Portion<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = (buffer.len() as u64).min(self.left) as usize;
        let n = self.file.read_at(&mut buffer[..len], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}
