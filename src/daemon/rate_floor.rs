//! The least that a transfer must move. The idle limit alone lets a sender hold a worker for a day
//! with one byte a minute.

use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, CancelCause};
use crate::pool::JobHandle;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The bytes that a transfer has moved, as its worker counts them.
#[derive(Clone, Debug, Default)]
pub(super) struct Moved {
    pub bytes: Arc<AtomicU64>,
    /// The stream has ended. What the guest does with it afterwards takes as long as it takes.
    pub is_over: Arc<AtomicBool>,
}

/// At least `bytes_min` in each window.
#[derive(Clone, Copy, Debug)]
pub(super) struct RateFloor {
    window: Duration,
    bytes_min: u64,
    /// At the beginning of the window; none before the first byte.
    bytes_then: Option<u64>,
}

impl RateFloor {
    pub fn new(window: Duration, bytes_per_s: u64) -> Self {
        Self { window, bytes_min: bytes_per_s.saturating_mul(window.as_secs()), bytes_then: None }
    }

    /// At the end of a window with `bytes` moved in all: how many moved in it, if those are too
    /// few. The stream may have begun at any time within its first window, which so does not count.
    fn check(&mut self, bytes: u64) -> std::result::Result<(), u64> {
        let then = self.bytes_then.replace(bytes).filter(|then| *then > 0);
        match then.map(|then| bytes - then) {
            Some(moved) if moved < self.bytes_min => Err(moved),
            _ => Ok(()),
        }
    }

    /// Waits for the job's end. One that moves too little is cancelled by its token, and waited
    /// for.
    ///
    /// # Errors
    /// Those of the job; `transfer_idle` when it was too slow; `timeout` at the deadline.
    pub fn wait<T>(mut self, job: &JobHandle<T>, moved: &Moved, cancel: &Cancel, deadline: Instant) -> Result<T> {
        let mut slow = None;
        loop {
            let until = deadline.min(Instant::now() + self.window);
            match job.wait(until) {
                // Not the job's own answer, which is taken only once.
                Err(e) if e.kind() == Kind::Timeout && !job.is_done() && Instant::now() < deadline => {}
                result => return result.map_err(|e| self.blame(e, slow, cancel)),
            }
            if slow.is_none()
                && !moved.is_over.load(Ordering::Relaxed)
                && let Err(bytes) = self.check(moved.bytes.load(Ordering::Relaxed))
            {
                slow = Some(bytes);
                cancel.cancel(CancelCause::TooSlow);
            }
        }
    }

    fn blame(&self, e: Error, slow: Option<u64>, cancel: &Cancel) -> Error {
        let Some(bytes) = slow.filter(|_| e.kind() == Kind::Cancelled && cancel.cause() == Some(&CancelCause::TooSlow)) else {
            return e;
        };
        let text =
            format!("{bytes} bytes moved in the last {} s, at least {} are required", self.window.as_secs(), self.bytes_min);
        Error::new(Kind::TransferIdle, text)
            .hint("run it again where both sides are faster, or lower limits.transfer_bytes_per_s_min")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floor() -> RateFloor {
        RateFloor::new(Duration::from_secs(10), 100)
    }

    #[test]
    fn slow_stream_is_found_and_fast_one_is_not() {
        let mut fast = floor();
        for bytes in [0, 0, 5, 1005, 2005, 5000] {
            assert_eq!(fast.check(bytes), Ok(()));
        }
        assert_eq!(fast.check(5999), Err(999));
        // One byte in each window, as fast as the idle limit demands.
        let mut slow = floor();
        assert_eq!((slow.check(1), slow.check(2)), (Ok(()), Err(1)));
    }

    #[test]
    fn time_before_first_byte_does_not_count() {
        let mut floor = floor();
        assert!((0..100).all(|_| floor.check(0).is_ok()));
        // Started at the end of this window.
        assert_eq!((floor.check(1), floor.check(1001)), (Ok(()), Ok(())));
    }

    #[test]
    fn floor_of_zero_allows_everything() {
        let mut floor = RateFloor::new(Duration::from_secs(10), 0);
        assert!([1, 1, 1].into_iter().all(|bytes| floor.check(bytes).is_ok()));
    }
}
