//! Reads one layer: hashes the blob, inflates it, hashes the tar, spools the tar to a file, and
//! indexes its entries, all in one pass and with memory that does not depend on the layer's size.

use super::budget::Budget;
use super::decompress::decoder;
use super::digest::Hashing;
use super::entry::Entry;
use super::errors::{as_io, bad, check_cancel, read_error, stopped};
use super::manifest::Layer;
use super::spool::Spooling;
use super::tar_reader::{Input, TarReader};
use crate::error::Result;
use crate::locks::Cancel;
use std::fs::File;
use std::io::{BufReader, Read};
use std::sync::atomic::{AtomicBool, Ordering};

const COMPRESSED_BUFFER_BYTES: usize = 128 << 10;
const TAR_BUFFER_BYTES: usize = 256 << 10;

/// The entries of a layer, in the order of its tar.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct LayerIndex {
    pub entries: Vec<Entry>,
    /// The size of the uncompressed tar.
    pub tar_bytes: u64,
}

/// The state that a thread that reads a layer shares with the others.
pub(super) struct Reading<'a> {
    pub(super) budget: &'a Budget,
    pub(super) cancel: &'a Cancel,
    /// True if another layer has failed, so that this one need not be read.
    pub(super) has_failed: &'a AtomicBool,
    /// Called with the number of compressed bytes that were read since the last call.
    pub(super) progress: &'a (dyn Fn(u64) + Sync),
}

impl Reading<'_> {
    fn check(&self) -> Result<()> {
        check_cancel(self.cancel)?;
        if self.has_failed.load(Ordering::Relaxed) {
            return Err(stopped());
        }
        Ok(())
    }
}

/// Reads the blob of a layer, writes its tar to `spool`, and verifies both digests.
pub(super) fn read_layer(
    layer: &Layer,
    blob: impl Read,
    spool: &File,
    reading: &Reading<'_>,
) -> Result<LayerIndex> {
    let mut compressed = Hashing::new(Compressed {
        inner: blob,
        left: layer.blob.size,
        reading,
    });
    let mut tar = Spooling {
        inner: Hashing::new(
            decoder(BufReader::with_capacity(
                COMPRESSED_BUFFER_BYTES,
                &mut compressed,
            ))
            .map_err(|e| read_error("read the layer", e))?,
        ),
        spool,
        budget: reading.budget,
    };
    let buffered = BufReader::with_capacity(TAR_BUFFER_BYTES, &mut tar);
    let index = index(buffered, reading.budget)?;
    let diff_id = tar.inner.digest();
    // A decompressor may stop before the end of its input.
    std::io::copy(&mut compressed, &mut std::io::sink())
        .map_err(|e| read_error("read the layer", e))?;
    if compressed.count() != layer.blob.size {
        return Err(bad(format!(
            "the blob has {} bytes instead of {}",
            compressed.count(),
            layer.blob.size
        )));
    }
    let digest = compressed.digest();
    for (what, expected, found) in [
        ("blob", layer.blob.digest, digest),
        ("uncompressed tar", layer.diff_id, diff_id),
    ] {
        if found != expected {
            return Err(bad(format!("the {what} has another digest: {found}")));
        }
    }
    Ok(index)
}

/// Indexes an uncompressed tar.
pub(super) fn index(tar: impl Input, budget: &Budget) -> Result<LayerIndex> {
    let mut reader = TarReader::new(tar, budget);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next()? {
        entries.push(entry);
    }
    entries.shrink_to_fit();
    let tar_bytes = reader.finish()?;
    Ok(LayerIndex { entries, tar_bytes })
}

/// Reads the bytes of a blob as they arrive. Fails if there are more than the descriptor announces,
/// or if the pull is cancelled.
struct Compressed<'a, R> {
    inner: R,
    left: u64,
    reading: &'a Reading<'a>,
}

impl<R: Read> Read for Compressed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.reading.check().map_err(as_io)?;
        let n = self.inner.read(buffer)?;
        if n as u64 > self.left {
            return Err(as_io(bad("the blob has more bytes than it should have")));
        }
        self.left -= n as u64;
        (self.reading.progress)(n as u64);
        Ok(n)
    }
}
