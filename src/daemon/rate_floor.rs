//! Cancels transfers that are too slow. With the idle limit alone, a sender could occupy a worker
//! for a day by sending one byte a minute.

use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, CancelCause};
use crate::pool::JobHandle;
use crate::sched::Instant;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Counts the bytes of a transfer. Its worker updates it.
#[derive(Clone, Debug, Default)]
pub(super) struct Moved {
    pub bytes: Arc<AtomicU64>,
    /// True once the stream has ended. The guest may then take as long as it needs to process the
    /// stream.
    pub is_over: Arc<AtomicBool>,
}

/// Requires at least `bytes_min` bytes in each window.
#[derive(Clone, Copy, Debug)]
pub(super) struct RateFloor {
    window: Duration,
    bytes_min: u64,
    /// The bytes moved before this window. `None` before the first check.
    bytes_before: Option<u64>,
}

impl RateFloor {
    pub(super) fn new(window: Duration, bytes_per_s: u64) -> Self {
        Self {
            window,
            bytes_min: bytes_per_s.saturating_mul(window.as_secs()),
            bytes_before: None,
        }
    }

    /// Checks a window at its end, when `bytes` have been moved in total. Fails with the number of
    /// bytes in this window if it is below the minimum. The first window of a stream does not
    /// count, because the stream may have begun near the window's end.
    fn check(&mut self, bytes: u64) -> std::result::Result<(), u64> {
        let before = self
            .bytes_before
            .replace(bytes)
            .filter(|before| *before > 0);
        match before.map(|before| bytes - before) {
            Some(moved) if moved < self.bytes_min => Err(moved),
            _ => Ok(()),
        }
    }

    /// Waits until the job ends. If the transfer is too slow, cancels the job and waits for its
    /// end.
    ///
    /// # Errors
    /// The errors of the job; `transfer_idle` if it was too slow; `timeout` at the deadline.
    pub(super) fn wait<T>(
        mut self,
        job: &JobHandle<T>,
        moved: &Moved,
        cancel: &Cancel,
        deadline: Instant,
    ) -> Result<T> {
        let mut slow = None;
        loop {
            let until = deadline.min(Instant::now() + self.window);
            match job.wait(until) {
                // The window is over, but the job is not. If the job is done, the timeout is the
                // job's own error.
                Err(e)
                    if e.kind() == Kind::Timeout && !job.is_done() && Instant::now() < deadline => {
                }
                result => return result.map_err(|e| self.explain(e, slow, cancel)),
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

    fn explain(&self, e: Error, slow: Option<u64>, cancel: &Cancel) -> Error {
        let Some(bytes) = slow.filter(|_| {
            e.kind() == Kind::Cancelled && cancel.cause() == Some(&CancelCause::TooSlow)
        }) else {
            return e;
        };
        let text = format!(
            "{bytes} bytes moved in the last {} s, at least {} are required",
            self.window.as_secs(),
            self.bytes_min
        );
        Error::new(Kind::TransferIdle, text)
            .hint("run it again with a faster sender and receiver, or lower limits.transfer_bytes_per_s_min")
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
        // One byte per window is enough for the idle limit, but not for the rate.
        let mut slow = floor();
        assert_eq!((slow.check(1), slow.check(2)), (Ok(()), Err(1)));
    }

    #[test]
    fn time_before_first_byte_does_not_count() {
        let mut floor = floor();
        assert!((0..100).all(|_| floor.check(0).is_ok()));
        // The stream begins at the end of this window.
        assert_eq!((floor.check(1), floor.check(1001)), (Ok(()), Ok(())));
    }

    #[test]
    fn floor_of_zero_allows_everything() {
        let mut floor = RateFloor::new(Duration::from_secs(10), 0);
        assert!(
            [1, 1, 1]
                .into_iter()
                .all(|bytes| floor.check(bytes).is_ok())
        );
    }
}
