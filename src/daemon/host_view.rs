//! The input of the checks of `doctor`: the configuration, and the host through the daemon's seams.

use crate::config::Config;
use crate::host::Commands;
use crate::locks::Cancel;
use crate::vmm::Driver;

/// The configuration and seams for a check. `fcd doctor` runs without a daemon, so a check cannot
/// use a `Daemon`.
pub(super) struct HostView<'a> {
    pub config: &'a Config,
    pub vmm: &'a dyn Driver,
    pub commands: &'a dyn Commands,
    pub cancel: &'a Cancel,
}
