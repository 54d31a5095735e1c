//! Counts the resources that the layers of one image use together.

use super::errors::bad;
use super::limits::{ENTRIES_MAX, METADATA_BYTES_MAX};
use crate::error::Result;
use std::sync::atomic::{AtomicU64, Ordering};

/// The resources that the layers of an image have used so far. The threads that read layers share
/// one budget.
#[derive(Debug)]
pub(super) struct Budget {
    entries: AtomicU64,
    metadata_bytes: AtomicU64,
    unpacked_bytes: AtomicU64,
    entries_max: u64,
    metadata_bytes_max: u64,
    unpacked_bytes_max: u64,
}

impl Budget {
    pub(super) fn new(unpacked_bytes_max: u64) -> Self {
        Self {
            entries: AtomicU64::new(0),
            metadata_bytes: AtomicU64::new(0),
            unpacked_bytes: AtomicU64::new(0),
            entries_max: ENTRIES_MAX,
            metadata_bytes_max: METADATA_BYTES_MAX,
            unpacked_bytes_max,
        }
    }

    /// Returns a budget with small limits.
    #[cfg(test)]
    pub(super) fn small(entries_max: u64, metadata_bytes_max: u64) -> Self {
        Self {
            entries_max,
            metadata_bytes_max,
            ..Self::new(u64::MAX)
        }
    }

    /// Counts one entry whose names and attributes have `bytes` bytes.
    pub(super) fn add_entry(&self, bytes: usize) -> Result<()> {
        if self.entries.fetch_add(1, Ordering::Relaxed) >= self.entries_max {
            return Err(bad(format!(
                "the layers have more than {} entries",
                self.entries_max
            )));
        }
        let before = self
            .metadata_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
        if before + bytes as u64 > self.metadata_bytes_max {
            return Err(bad(format!(
                "the names and attributes in the layers have more than {} bytes",
                self.metadata_bytes_max
            )));
        }
        Ok(())
    }

    /// Counts bytes of an uncompressed layer.
    pub(super) fn add_bytes(&self, bytes: u64) -> Result<()> {
        let before = self.unpacked_bytes.fetch_add(bytes, Ordering::Relaxed);
        if bytes > self.unpacked_bytes_max.saturating_sub(before) {
            return Err(self.too_large());
        }
        Ok(())
    }

    /// Fails if `bytes` more bytes would exceed the limit, without counting them. This refuses a
    /// header that claims an impossible size before its content is read.
    pub(super) fn check_bytes(&self, bytes: u64) -> Result<()> {
        let used = self.unpacked_bytes.load(Ordering::Relaxed);
        if bytes > self.unpacked_bytes_max.saturating_sub(used) {
            return Err(self.too_large());
        }
        Ok(())
    }

    fn too_large(&self) -> crate::error::Error {
        bad(format!(
            "the uncompressed layers have more than {} bytes",
            self.unpacked_bytes_max
        ))
    }
}
