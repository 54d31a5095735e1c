//! Finds out from a VMM's own log why the VMM exited. Unlike the console and the monitor, the log
//! is written even while no daemon is running.
//!
//! QEMU writes trace events to its log ([`TRACED`]). Their texts are the same in QEMU 7.2
//! (softmmu/trace-events and softmmu/runstate.c) and 10.0. Firecracker logs nothing about a
//! successful exit at its configured level.

use super::console::VMM_LOG;
use super::shutdown_cause::Cause;
use crate::host::command::read_bounded;
use crate::host::fs::{open_at, open_dir};
use rustix::fs::OFlags;
use std::io::{Seek, SeekFrom};
use std::path::Path;

/// The trace events that QEMU is started with.
pub(super) const TRACED: [&str; 2] = ["qemu_system_shutdown_request", "vm_state_notify"];

/// The number of bytes at the end of the log that are read. The relevant lines are the last that
/// QEMU writes.
const TAIL_BYTES_MAX: u64 = 4096;

/// Returns why the VMM with this directory ended. Returns None if its log cannot be read or
/// contains no reason, for example because the VMM was killed.
pub(super) fn cause(dir: &Path) -> Option<Cause> {
    let mut file = open_at(open_dir(dir).ok()?, VMM_LOG, OFlags::RDONLY, 0).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL_BYTES_MAX)))
        .ok()?;
    parse(&String::from_utf8_lossy(
        &read_bounded(file, TAIL_BYTES_MAX).ok()?,
    ))
}

/// Finds the reason in the end of QEMU's log. QEMU traces a request for a power-off or for an end
/// from the host. It does not trace a request for a reset that ends QEMU (`-no-reboot`), but it
/// traces that the guest stops for a shutdown.
fn parse(text: &str) -> Option<Cause> {
    const REQUEST: &str = "qemu_system_shutdown_request reason=";
    const SIGNAL: &str = "terminating on signal ";
    const STOPS: &str = "vm_state_notify running 0 ";
    if text.lines().any(|line| line.contains(SIGNAL)) {
        return Cause::parse("host-signal");
    }
    let request = text
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix(REQUEST));
    if let Some(reason) = request {
        return Cause::from_number(reason.trim().parse().ok()?);
    }
    let stops = text
        .lines()
        .any(|line| line.starts_with(STOPS) && line.trim_end().ends_with("(shutdown)"));
    stops.then_some(Cause::GuestReset)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: &str = "vm_state_notify running 1 reason 9 (running)\n";
    const STOPS: &str = "vm_state_notify running 0 reason 11 (shutdown)\n";

    /// The first two logs were recorded from QEMU 7.2.22.
    #[test]
    fn end_of_qemu_is_read_from_log() {
        let signal = "qemu-system-x86_64: terminating on signal 15 from pid 5081 (timeout)\n";
        for (text, cause) in [
            (format!("{RUNS}{STOPS}"), Some(Cause::GuestReset)),
            (
                format!("{RUNS}{signal}{STOPS}"),
                Some(Cause::Host("host-signal")),
            ),
            (
                format!("{RUNS}qemu_system_shutdown_request reason=6\n{STOPS}"),
                Some(Cause::GuestShutdown),
            ),
            (
                format!("{RUNS}qemu_system_shutdown_request reason=2\n{STOPS}"),
                Some(Cause::Host("host-qmp-quit")),
            ),
            // The log shows no cause after a pause or if the VMM was killed.
            (
                format!("{RUNS}vm_state_notify running 0 reason 4 (paused)\n"),
                None,
            ),
            (RUNS.to_owned(), None),
            (String::new(), None),
        ] {
            assert_eq!(parse(&text), cause, "{text}");
        }
    }

    #[test]
    fn long_log_is_read_from_its_end_only() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cause(dir.path()), None);
        std::fs::write(dir.path().join(VMM_LOG), RUNS.repeat(1000) + STOPS).unwrap();
        assert_eq!(cause(dir.path()), Some(Cause::GuestReset));
    }
}
