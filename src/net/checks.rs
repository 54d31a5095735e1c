//! What the network needs here, what was found, and what stands in its way. Read-only.

use crate::api::daemon::Check;
use crate::config::Network as Config;
use crate::host::Commands;
use crate::locks::Cancel;

/// The checks, with and without a daemon. `vmm_uid`: one of the uids that VMMs run under, when that is not the caller's own.
pub fn checks(config: &Config, vmm_uid: Option<u32>, commands: &dyn Commands, cancel: &Cancel) -> Vec<Check> {
    let _ = (config, vmm_uid, commands, cancel);
    todo!()
}
