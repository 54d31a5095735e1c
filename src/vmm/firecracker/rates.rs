//! Rate limits in the form of Firecracker's API.

use serde::Serialize;

/// The limits of one device. A missing bucket leaves a limit as it is, and a bucket of size 0
/// removes the limit (docs/api_requests/patch-block.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct RateLimiter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A bucket of `size` tokens that refills completely in `refill_time` milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct TokenBucket {
    pub size: u64,
    pub refill_time: u64,
}

/// The smallest bucket for bytes. It must hold the largest request (`max_sectors_kb` in Linux is
/// 1280 by default), because the VMM logs a line for each request that does not fit.
pub(super) const BUCKET_BYTES_MIN: u64 = 2 << 20;

impl TokenBucket {
    const NONE: Self = Self {
        size: 0,
        refill_time: 0,
    };

    fn ops(per_s: u64) -> Self {
        Self {
            size: per_s,
            refill_time: 1000,
        }
    }

    fn bytes(per_s: u64) -> Self {
        let size = per_s.max(BUCKET_BYTES_MIN);
        let ms = u128::from(size) * 1000 / u128::from(per_s.max(1));
        Self {
            size,
            refill_time: u64::try_from(ms).unwrap_or(u64::MAX),
        }
    }
}

impl RateLimiter {
    /// Returns the limits of a new device, or None if the device is not limited.
    pub(crate) fn new(bytes_per_s: Option<u64>, ops_per_s: Option<u64>) -> Option<Self> {
        let limiter = Self {
            bandwidth: bytes_per_s.map(TokenBucket::bytes),
            ops: ops_per_s.map(TokenBucket::ops),
        };
        Some(limiter).filter(|l| *l != Self::default())
    }

    /// Returns the limits of an existing device, which replace its previous limits. A limit of None
    /// removes the previous limit.
    pub(crate) fn instead(bytes_per_s: Option<u64>, ops_per_s: Option<u64>) -> Self {
        let bandwidth = bytes_per_s.map_or(TokenBucket::NONE, TokenBucket::bytes);
        Self {
            bandwidth: Some(bandwidth),
            ops: Some(ops_per_s.map_or(TokenBucket::NONE, TokenBucket::ops)),
        }
    }
}
