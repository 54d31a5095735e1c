//! The options for rate limits.

use super::values::{parse_count_rate, parse_rate};
use crate::api::vm::RateLimits;

/// Rate limits of a VM's devices.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub(super) struct Rates {
    /// Bytes per second for each disk, reads and writes together, such as 50M. `none` removes the
    /// limit
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub disk_bps: Option<u64>,
    /// I/O operations per second for each disk
    #[arg(long, value_name = "N", value_parser = parse_count_rate)]
    pub disk_iops: Option<u64>,
    /// Bytes per second that the guest may receive
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub net_rx_bps: Option<u64>,
    /// Bytes per second that the guest may send
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub net_tx_bps: Option<u64>,
}

impl Rates {
    pub(super) fn limits(&self) -> RateLimits {
        RateLimits {
            disk_bytes_per_s: self.disk_bps,
            disk_ops_per_s: self.disk_iops,
            net_rx_bytes_per_s: self.net_rx_bps,
            net_tx_bytes_per_s: self.net_tx_bps,
        }
    }
}
