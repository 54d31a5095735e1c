//! The files that hold the tars of layers. Their owner opens them, because the process that parses
//! layers has no access to the file system.

use super::budget::Budget;
use super::digest::Digest;
use super::layer::{LayerIndex, index};
use super::manifest::Layer;
use super::tar_reader::Input;
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

/// Reading a header also reads the bytes after it into this buffer. Most files are longer than the
/// buffer, so a larger one would only read more bytes that are then skipped.
const BUFFER_BYTES: usize = 4 << 10;

/// The file of one layer.
#[derive(Debug)]
pub enum LayerFile {
    /// The layer's uncompressed tar, whose digest was verified when it was written.
    Cached(File),
    /// An empty file to write the tar to.
    Empty(File),
}

/// Opens the files of layers.
pub trait LayerFiles: Sync {
    /// Returns the file of the layer whose uncompressed tar has this digest.
    fn open(&self, diff_id: Digest) -> Result<LayerFile>;
    /// Reports that the empty file of this layer is complete and verified.
    fn complete(&self, layer: &Layer) -> Result<()>;
}

/// A layer that was read: its tar, and the index of its entries.
#[derive(Debug)]
pub(super) struct IndexedLayer {
    pub(super) index: LayerIndex,
    pub(super) tar: File,
}

impl IndexedLayer {
    /// Indexes a cached tar. Skips the content of files.
    pub(super) fn of_cached(tar: File, budget: &Budget) -> Result<Self> {
        let io = |e| Error::io("read a cached layer", e);
        let bytes = tar.metadata().map_err(io)?.len();
        budget.check_bytes(bytes)?;
        // The index compares each file with the rest of the budget, so the layer's bytes must not
        // be counted yet.
        let index = index(Seeking::new(&tar, bytes), budget)?;
        budget.add_bytes(bytes)?;
        Ok(Self { index, tar })
    }
}

/// Reads a file from its beginning, and seeks instead of reading what is skipped.
pub(super) struct Seeking<'a> {
    inner: BufReader<Positioned<'a>>,
    /// The number of bytes that are not read or skipped yet.
    left: u64,
}

impl<'a> Seeking<'a> {
    fn new(file: &'a File, bytes: u64) -> Self {
        Self {
            inner: BufReader::with_capacity(BUFFER_BYTES, Positioned { file, at: 0 }),
            left: bytes,
        }
    }
}

/// A file with a position of its own, so that a seek needs no system call.
struct Positioned<'a> {
    file: &'a File,
    at: u64,
}

impl Read for Positioned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for Positioned<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(bytes) => self.at.checked_add_signed(bytes),
            SeekFrom::End(_) => None,
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

impl Read for Seeking<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.left = self.left.saturating_sub(n as u64);
        Ok(n)
    }
}

impl BufRead for Seeking<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, n: usize) {
        self.left = self.left.saturating_sub(n as u64);
        self.inner.consume(n);
    }
}

impl Input for Seeking<'_> {
    fn skip(&mut self, bytes: u64) -> io::Result<u64> {
        let n = bytes.min(self.left);
        self.inner
            .seek_relative(i64::try_from(n).map_err(io::Error::other)?)?;
        self.left -= n;
        Ok(n)
    }
}

/// Opens files in a directory. In production, the daemon's cache does this.
#[cfg(test)]
pub(super) struct TestFiles(pub(super) std::path::PathBuf);

#[cfg(test)]
impl TestFiles {
    pub(super) fn path(&self, diff_id: Digest) -> std::path::PathBuf {
        self.0.join(diff_id.hex())
    }
}

#[cfg(test)]
impl LayerFiles for TestFiles {
    fn open(&self, diff_id: Digest) -> Result<LayerFile> {
        crate::locks::may_block("file access");
        match File::open(self.path(diff_id)) {
            Ok(file) => Ok(LayerFile::Cached(file)),
            Err(_) => {
                let path = self.0.join(format!("{}.new", diff_id.hex()));
                let mut options = File::options();
                options.read(true).write(true).create(true).truncate(true);
                Ok(LayerFile::Empty(options.open(path).unwrap()))
            }
        }
    }

    fn complete(&self, layer: &Layer) -> Result<()> {
        crate::locks::may_block("file access");
        let path = self.path(layer.diff_id);
        std::fs::rename(path.with_extension("new"), path).unwrap();
        Ok(())
    }
}
