//! Scripts that the daemon runs in guests around a snapshot.

use crate::host::time::now_s;

/// The command that runs a script from standard input. With `sh -s`, background processes would
/// keep a descriptor of the script open, and with it the connection.
pub(super) const GUEST_SHELL: &str = "/usr/lib/fcd/busybox sh -c \"$(cat)\"";

/// Returns the command that sets the guest's clock to the host's current time.
pub(super) fn set_clock_command() -> String {
    format!("/usr/lib/fcd/busybox date -s @{} >/dev/null", now_s())
}
