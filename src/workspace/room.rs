//! Limits what an export may write to the host: at most `--max-bytes`, and never so much that the
//! disk fills up.

use crate::error::{Error, Kind, Result};
use crate::host::fs::{Space, space};
use std::path::{Path, PathBuf};

/// Default of `--max-bytes`.
pub const BYTES_MAX_DEFAULT: u64 = 8 << 30;
/// The free space that an export must leave on the host, except on a small file system.
const FREE_BYTES_MIN: u64 = 512 << 20;
/// On a small file system, the minimum is this fraction of its size, written as a divisor.
const FREE_FRACTION: u64 = 20;
/// How much is written between two checks of the free space. An export of at most this size is
/// accepted even on a full disk, so that work is not lost because a disk is nearly full.
const LOOK_BYTES: u64 = 16 << 20;
/// Approximate disk usage of an empty file or a directory.
const ENTRY_BYTES: u64 = 4096;

/// Keeps track of what one export has written.
pub struct Room {
    target: PathBuf,
    free: Box<dyn Fn() -> Result<Space> + Send>,
    bytes_max: u64,
    bytes: u64,
    until_look: u64,
}

impl Room {
    /// Creates the account of an export that may write at most `bytes_max` bytes to `dir`.
    pub fn new(dir: &Path, bytes_max: u64) -> Self {
        let target = dir.to_owned();
        let free = Box::new(move || space(&target));
        Self {
            target: dir.to_owned(),
            free,
            bytes_max,
            bytes: 0,
            until_look: LOOK_BYTES,
        }
    }

    /// Accounts for `bytes` that are about to be written.
    ///
    /// # Errors
    /// `exhausted` above `bytes_max`, `disk_full` if too little space would remain.
    pub fn take(&mut self, bytes: u64) -> Result<()> {
        self.check_bound(bytes)?;
        self.bytes += bytes;
        self.spend(bytes)
    }

    /// Checks that `bytes` more may be written, without accounting for them.
    ///
    /// # Errors
    /// `exhausted` above `bytes_max`.
    pub fn check_bound(&self, bytes: u64) -> Result<()> {
        if self
            .bytes
            .checked_add(bytes)
            .is_some_and(|sum| sum <= self.bytes_max)
        {
            return Ok(());
        }
        let what = format!("the guest sends more than {} bytes", self.bytes_max);
        Err(Error::new(Kind::Exhausted, what)
            .hint("if you trust the guest, allow more with --max-bytes SIZE"))
    }

    /// Accounts for a file, a link or a directory that is about to be created.
    ///
    /// # Errors
    /// `disk_full` if too little space would remain.
    pub fn take_entry(&mut self) -> Result<()> {
        self.spend(ENTRY_BYTES)
    }

    fn spend(&mut self, bytes: u64) -> Result<()> {
        if let Some(left) = self.until_look.checked_sub(bytes) {
            self.until_look = left;
            return Ok(());
        }
        self.until_look = LOOK_BYTES;
        let space = (self.free)()?;
        let floor = FREE_BYTES_MIN.min(space.total_bytes / FREE_FRACTION);
        if space.free_bytes.saturating_sub(bytes) >= floor {
            return Ok(());
        }
        let target = self.target.display();
        let what = format!(
            "an export must leave {floor} bytes free at {target}, but only {} are left",
            space.free_bytes
        );
        Err(Error::new(Kind::DiskFull, what).hint(format!(
            "free some space (df -h {target}), or write to another file system"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn room(free: &Arc<AtomicU64>, total_bytes: u64, bytes_max: u64) -> Room {
        let free = free.clone();
        let look = move || {
            Ok(Space {
                free_bytes: free.load(Ordering::Relaxed),
                total_bytes,
            })
        };
        Room {
            free: Box::new(look),
            ..Room::new(Path::new("/out"), bytes_max)
        }
    }

    #[test]
    fn room_above_max_bytes_is_refused() {
        let mut room = room(&Arc::new(AtomicU64::new(u64::MAX)), u64::MAX, 10);
        room.take(4).unwrap();
        room.take(6).unwrap();
        let e = room.take(1).unwrap_err();
        assert_eq!(
            (e.kind(), e.to_string().as_str()),
            (Kind::Exhausted, "the guest sends more than 10 bytes")
        );
        assert!(e.hint_text().unwrap().contains("--max-bytes"));
        assert_eq!(room.take(u64::MAX).unwrap_err().kind(), Kind::Exhausted);
    }

    #[test]
    fn room_below_minimum_free_space_is_a_full_disk() {
        let free = Arc::new(AtomicU64::new(FREE_BYTES_MIN + LOOK_BYTES));
        let mut room = room(&free, 1 << 40, u64::MAX);
        (0..16).for_each(|_| room.take(1 << 20).unwrap());
        // Another process also fills the disk.
        free.store(FREE_BYTES_MIN, Ordering::Relaxed);
        let e = room.take(1).unwrap_err();
        assert_eq!(e.kind(), Kind::DiskFull);
        assert!(
            e.to_string().contains("at /out") && e.hint_text().unwrap().contains("df -h /out"),
            "{e}"
        );
    }

    #[test]
    fn room_is_checked_while_empty_files_are_created() {
        let mut room = room(&Arc::new(AtomicU64::new(0)), 1 << 40, u64::MAX);
        let made = (0..1_000_000)
            .take_while(|_| room.take_entry().is_ok())
            .count() as u64;
        assert_eq!(made, LOOK_BYTES / ENTRY_BYTES);
    }

    #[test]
    fn room_allows_small_export_on_full_disk_and_scales_down_on_small_disk() {
        let mut full = room(&Arc::new(AtomicU64::new(0)), 1 << 40, u64::MAX);
        full.take(LOOK_BYTES).unwrap();
        let mut small = room(&Arc::new(AtomicU64::new(60 << 20)), 100 << 20, u64::MAX);
        small.take(40 << 20).unwrap();
    }
}
