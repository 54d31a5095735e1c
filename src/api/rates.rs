//! Rate limits and how they combine.

use serde::{Deserialize, Serialize};

/// The rate limits of a VM's devices. None means no limit, or no change in a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimits {
    /// The limit for each disk, with reads and writes counted together.
    pub disk_bytes_per_s: Option<u64>,
    pub disk_ops_per_s: Option<u64>,
    /// The limit for traffic to the guest.
    pub net_rx_bytes_per_s: Option<u64>,
    /// The limit for traffic from the guest.
    pub net_tx_bytes_per_s: Option<u64>,
}

impl RateLimits {
    /// Combines each limit with the same limit in `other` by calling `f`.
    pub fn zip_with(
        &self,
        other: &Self,
        f: impl Fn(Option<u64>, Option<u64>) -> Option<u64>,
    ) -> Self {
        Self {
            disk_bytes_per_s: f(self.disk_bytes_per_s, other.disk_bytes_per_s),
            disk_ops_per_s: f(self.disk_ops_per_s, other.disk_ops_per_s),
            net_rx_bytes_per_s: f(self.net_rx_bytes_per_s, other.net_rx_bytes_per_s),
            net_tx_bytes_per_s: f(self.net_tx_bytes_per_s, other.net_tx_bytes_per_s),
        }
    }

    /// Applies a requested change to these limits. A 0 in `change` removes a limit.
    pub fn with(&self, change: &Self) -> Self {
        self.zip_with(change, |now, change| {
            change.map_or(now, |n| Some(n).filter(|n| *n > 0))
        })
    }

    /// Returns the limits of `self` that `other` does not have.
    pub fn without(&self, other: &Self) -> Self {
        self.zip_with(other, |own, other| own.filter(|_| other.is_none()))
    }

    /// Returns the limits of `self`. A limit that `self` lacks is taken from `other`.
    pub fn or(&self, other: &Self) -> Self {
        self.zip_with(other, Option::or)
    }

    /// True if a limit above 0 is set for the guest's network.
    pub fn limits_network(&self) -> bool {
        [self.net_rx_bytes_per_s, self.net_tx_bytes_per_s]
            .into_iter()
            .flatten()
            .any(|n| n > 0)
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
