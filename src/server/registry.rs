//! The registry of open connections. It enforces their limits, and can end all of them.

use super::Limits;
use crate::error::{Error, Kind, Result};
use crate::host::memory;
use crate::host::plural::count;
use crate::host::wait::sleep;
use crate::locks::{Cancel, Condvar, Mutex, Rank};
use crate::sched::{HashMap, Instant};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The smallest number of connections that counts as a peak. After a peak, freed memory is returned
/// to the system.
const PEAK_MIN: usize = 32;
/// A peak is over when at most 1/8 of its connections are left.
const PEAK_PART_LEFT: usize = 8;
/// The time from the end of a peak to the return of memory. The connections of a crowd end within
/// milliseconds of each other, and memory that their threads free after the return is not returned.
const PEAK_SETTLES: Duration = Duration::from_millis(250);

#[derive(Default)]
struct Connected {
    /// The most connections since memory was returned to the system.
    peak: usize,
    last_id: u64,
    /// The sockets by connection. The references are weak, because a connection's slot is freed
    /// after its descriptor.
    sockets: HashMap<u64, Weak<UnixStream>>,
    per_uid: HashMap<u32, usize>,
}

impl Connected {
    /// Returns true once for each peak, when it is over.
    fn is_peak_over(&mut self) -> bool {
        let left = self.sockets.len();
        let over = self.peak >= PEAK_MIN && left <= self.peak / PEAK_PART_LEFT;
        if over {
            self.peak = left;
        }
        over
    }
}

/// All open connections.
pub(super) struct Registry {
    pub(super) limits: Limits,
    connected: Mutex<Connected>,
    left: Condvar,
    stopping: AtomicBool,
}

/// A slot for a connection, which is freed when this is dropped.
pub(super) struct ConnectionSlot {
    registry: Arc<Registry>,
    id: u64,
    uid: u32,
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut connected = self.registry.connected.lock();
        connected.sockets.remove(&self.id);
        if let Some(count) = connected.per_uid.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                connected.per_uid.remove(&self.uid);
            }
        }
        drop(connected);
        self.registry.left.notify_all();
    }
}

impl ConnectionSlot {
    pub(super) fn limits(&self) -> &Limits {
        &self.registry.limits
    }
    pub(super) fn is_stopping(&self) -> bool {
        self.registry.stopping.load(Ordering::SeqCst)
    }
}

impl Registry {
    pub(super) fn new(limits: Limits) -> Self {
        let connected = Mutex::new(Rank::Connections, Connected::default());
        Self {
            limits,
            connected,
            left: Condvar::new(),
            stopping: AtomicBool::new(false),
        }
    }

    pub(super) fn enter(
        self: &Arc<Self>,
        socket: &Arc<UnixStream>,
        uid: u32,
    ) -> Result<ConnectionSlot> {
        let mut connected = self.connected.lock();
        let kept_back = if uid == 0 {
            0
        } else {
            self.limits.connections_root_reserved
        };
        let (all, theirs) = (
            connected.sockets.len(),
            connected.per_uid.get(&uid).copied().unwrap_or(0),
        );
        let limit = |text: String| {
            Err(Error::new(Kind::ConnectionLimit, text)
                .hint("close other connections, or try again later"))
        };
        if all + kept_back >= self.limits.connections_max {
            return limit(format!("all {all} connections are in use"));
        }
        if theirs >= self.limits.connections_per_uid_max {
            return limit(format!(
                "uid {uid} has {} open, which is the limit",
                count(theirs as u64, "connection")
            ));
        }
        connected.last_id += 1;
        let id = connected.last_id;
        connected.sockets.insert(id, Arc::downgrade(socket));
        connected.peak = connected.peak.max(connected.sockets.len());
        *connected.per_uid.entry(uid).or_insert(0) += 1;
        Ok(ConnectionSlot {
            registry: self.clone(),
            id,
            uid,
        })
    }

    /// Returns freed memory to the system if a peak is over. A connection's thread calls this after
    /// its slot has been freed.
    pub(super) fn give_back_after_peak(&self, stop: &Cancel) {
        let is_peak_over = self.connected.lock().is_peak_over();
        if is_peak_over && sleep(PEAK_SETTLES, stop).unwrap_or(false) {
            memory::give_back();
        }
    }

    fn all_sockets(&self) -> Vec<Arc<UnixStream>> {
        self.connected
            .lock()
            .sockets
            .values()
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// Ends connections that wait for a request. A request that has already arrived is still
    /// answered.
    pub(super) fn end_idle(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        for socket in self.all_sockets() {
            // This fails only if the other side has already closed.
            let _ = socket.shutdown(Shutdown::Read);
        }
    }

    pub(super) fn hang_up(&self) {
        for socket in self.all_sockets() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn wait_empty(&self, deadline: Instant) -> usize {
        let mut connected = self.connected.lock();
        self.left
            .wait_while(&mut connected, deadline, |c| !c.sockets.is_empty());
        connected.sockets.len()
    }

    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn len(&self) -> usize {
        self.connected.lock().sockets.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens this many connections and closes them one by one. Returns the number of connections
    /// left at each end of a peak.
    fn peaks_over(connections: u64) -> Vec<usize> {
        let socket = Arc::new(UnixStream::pair().unwrap().0);
        let mut connected = Connected::default();
        for id in 0..connections {
            connected.sockets.insert(id, Arc::downgrade(&socket));
            connected.peak = connected.peak.max(connected.sockets.len());
        }
        let leave = |id| {
            connected.sockets.remove(&id);
            connected.is_peak_over().then_some(connected.sockets.len())
        };
        (0..connections).filter_map(leave).collect()
    }

    #[test]
    fn peak_is_over_when_few_connections_are_left() {
        assert!(peaks_over(31).is_empty());
        assert_eq!(peaks_over(32), [4]);
        assert_eq!(peaks_over(1000), [125, 15]);
    }
}
