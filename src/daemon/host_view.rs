//! What the checks of `doctor` look at.

use crate::config::Config;
use crate::host::Commands;
use crate::locks::Cancel;
use crate::vmm::Driver;

/// What a check may look at. There may be no daemon.
pub(super) struct HostView<'a> {
    pub config: &'a Config,
    pub vmm: &'a dyn Driver,
    pub commands: &'a dyn Commands,
    pub cancel: &'a Cancel,
}
