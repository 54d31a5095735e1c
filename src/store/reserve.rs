//! A file of real blocks that is given up when the disk is full, so that deletes can still be written down.

use crate::error::{Error, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Far above what a delete writes: its rows and the pages they lie on.
pub const RESERVE_BYTES: u64 = 4 << 20;
/// Free space beside the reserve before a store that met a full disk takes changes again.
pub(super) const PROBE_FREE_BYTES: u64 = 1 << 20;

pub(super) struct Reserve {
    dir: PathBuf,
    pub(super) held: bool,
}

impl Reserve {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), held: false }
    }

    /// Takes the blocks, unless they are held.
    ///
    /// # Errors
    /// `disk_full`, or `host`.
    pub(super) fn take(&mut self) -> Result<()> {
        if self.held {
            return Ok(());
        }
        let taken = self.fill();
        if taken.is_err() {
            self.release();
        }
        self.held = taken.is_ok();
        taken.map_err(|e| Error::io(format!("keep {} MiB of {} in reserve", RESERVE_BYTES >> 20, self.dir.display()), e))
    }

    fn fill(&self) -> std::io::Result<()> {
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(self.dir.join("reserve"), flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = std::fs::File::from(fd);
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES) {
            Ok(()) => {}
            // No fallocate on this file system: bytes do.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                let zeros = vec![0u8; 64 * 1024];
                for _ in 0..RESERVE_BYTES / zeros.len() as u64 {
                    file.write_all(&zeros)?;
                }
            }
            Err(e) => return Err(e.into()),
        }
        file.sync_all()
    }

    /// Gives the blocks back to the file system. True when there were any.
    pub(super) fn release(&mut self) -> bool {
        let had = std::mem::replace(&mut self.held, false);
        match std::fs::remove_file(self.dir.join("reserve")) {
            Ok(()) => had,
            Err(_) => false,
        }
    }

    /// What is free in the file system; `None` when it does not say.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        let stat = rustix::fs::statvfs(&self.dir).ok()?;
        let blocks = if rustix::process::geteuid().is_root() { stat.f_bfree } else { stat.f_bavail };
        Some(blocks.saturating_mul(stat.f_frsize))
    }
}
