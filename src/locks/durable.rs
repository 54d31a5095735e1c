//! Waits for the disk. Every build records them, because a disk that hangs is the one thing that a
//! call of the daemon cannot cancel.

use super::mutex::{Region, region};
use super::record::{Party, PartyRecord};
use super::{rank::Rank, stats};
use std::sync::atomic::{AtomicU64, Ordering};

static LAST_ID: AtomicU64 = AtomicU64::new(0);
/// The waits in progress, oldest first. This lock is beneath all ranks.
static WAITS: parking_lot::Mutex<Vec<(u64, PartyRecord)>> = parking_lot::Mutex::new(Vec::new());

/// Says that this thread waits for the disk, until the value is dropped. Opens
/// [`Rank::DurableWait`].
#[must_use = "dropping it ends the wait"]
pub struct DurableWait {
    id: u64,
    _region: Region,
}

#[cfg_attr(any(debug_assertions, feature = "lock-check"), track_caller)]
pub fn durable_wait() -> DurableWait {
    let region = region(Rank::DurableWait);
    let id = LAST_ID.fetch_add(1, Ordering::Relaxed);
    WAITS.lock().push((id, PartyRecord::now()));
    DurableWait {
        id,
        _region: region,
    }
}

impl Drop for DurableWait {
    fn drop(&mut self) {
        let mut waits = WAITS.lock();
        let Some(i) = waits.iter().position(|(id, _)| *id == self.id) else {
            return;
        };
        let (_, ended) = waits.remove(i);
        drop(waits);
        stats::waited(Rank::DurableWait, ended.age());
    }
}

/// Returns the threads that wait for the disk now.
pub fn durable_waits() -> Vec<Party> {
    WAITS
        .lock()
        .iter()
        .map(|(_, waiting)| Party::from(waiting))
        .collect()
}
