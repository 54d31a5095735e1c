//! Waits for changes to reach the disk.

use super::core::{Core, DURABLE_DEADLINE};
use crate::error::{Kind, Result};
use crate::sched::Instant;
use crate::store::Ticket;

impl Core {
    /// Waits until the change is on disk, for at most [`DURABLE_DEADLINE`].
    pub(super) fn wait_durable(&self, ticket: Ticket) -> Result<()> {
        ticket.wait(Instant::now() + DURABLE_DEADLINE).map(drop)
    }

    /// Like [`Core::wait_durable`], for the reconciler: the deadline holds even if the disk hangs,
    /// so that one VM's change does not block the reconciler.
    pub(super) fn wait_durable_in_time(&self, ticket: &Ticket) -> Result<()> {
        ticket
            .wait_for_thread(Instant::now() + DURABLE_DEADLINE)
            .map(drop)
    }

    /// Waits until the disk has either accepted or refused the change, however long that takes:
    /// until then, the outcome is unknown and must not be reported as a failure. Times out only
    /// when the daemon closes.
    pub(super) fn wait_settled(&self, ticket: &Ticket) -> Result<()> {
        loop {
            match ticket.wait_for_thread(Instant::now() + DURABLE_DEADLINE) {
                Err(e) if e.kind() == Kind::Timeout && !self.closing.is_cancelled() => {
                    log::warn!(
                        "a claim has waited for the disk for {} s",
                        DURABLE_DEADLINE.as_secs()
                    );
                }
                other => return other.map(drop),
            }
        }
    }
}
