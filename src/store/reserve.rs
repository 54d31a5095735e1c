//! Reserves disk space with a file. The space is released when the disk is full, so that deletes
//! can still be recorded.

use crate::error::{Error, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Size of the reserve. It is far larger than the pages that a delete writes.
pub const RESERVE_BYTES: u64 = 4 << 20;
/// Free space, in addition to the reserve, that a store needs after a full disk before it becomes
/// writable.
pub(super) const PROBE_FREE_BYTES: u64 = 1 << 20;

pub(super) struct Reserve {
    dir: PathBuf,
    pub(super) held: bool,
}

impl Reserve {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            held: false,
        }
    }

    /// Reserves the blocks, unless they are held already.
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
        taken.map_err(|e| {
            Error::io(
                format!(
                    "keep {} MiB of {} in reserve",
                    RESERVE_BYTES >> 20,
                    self.dir.display()
                ),
                e,
            )
        })
    }

    fn fill(&self) -> std::io::Result<()> {
        crate::locks::may_block("file access");
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(self.dir.join("reserve"), flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = std::fs::File::from(fd);
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES) {
            Ok(()) => {}
            // This file system has no fallocate, so write bytes.
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

    /// Releases the blocks to the file system. Returns true if blocks were held and are now
    /// released.
    pub(super) fn release(&mut self) -> bool {
        crate::locks::may_block("file access");
        let had = std::mem::replace(&mut self.held, false);
        match std::fs::remove_file(self.dir.join("reserve")) {
            Ok(()) => had,
            Err(_) => false,
        }
    }

    /// Returns the free bytes of the file system, or `None` if the system call fails.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        crate::locks::may_block("file access");
        let stat = rustix::fs::statvfs(&self.dir).ok()?;
        let blocks = if rustix::process::geteuid().is_root() {
            stat.f_bfree
        } else {
            stat.f_bavail
        };
        Some(blocks.saturating_mul(stat.f_frsize))
    }
}
