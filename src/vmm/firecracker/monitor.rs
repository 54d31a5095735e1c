//! Monitors one VMM with a thread that queries it, and reports a VMM that does not answer for too
//! long.
//!
//! Unlike QEMU, Firecracker passes a full disk of the host on to the guest as an I/O error, so
//! there is no pause to report.

use super::API_SOCKET;
use super::api::Booted;
use super::running::place;
use crate::error::{Kind, Result};
use crate::host::process::Process;
use crate::locks::{Cancel, Rank, region};
use crate::sched::Instant;
use crate::vmm::dial::{self, Deadline};
use crate::vmm::silence::{ANSWER_DEADLINE, PING_PERIOD, Silence};
use crate::vmm::{GuestEvent, run_dir};
use nix::poll::PollFlags;
use std::path::PathBuf;

/// Monitors one VMM until it exits or the driver is dropped.
pub(super) struct Monitor {
    pub process: Process,
    /// The VM's directory, for messages.
    pub dir: PathBuf,
    pub closing: Cancel,
    pub on_event: Box<dyn Fn(GuestEvent) + Send>,
}

impl Monitor {
    pub(super) fn run(self) {
        let mut silence = Silence::default();
        let (mut has_warned, mut has_answered) = (false, false);
        loop {
            match self.look() {
                Ok(()) => {
                    if !std::mem::replace(&mut has_answered, true) {
                        (self.on_event)(GuestEvent::Answered);
                    }
                    silence.answered(&self.on_event);
                }
                Err(e) if e.kind() == Kind::Timeout => {
                    silence.missed(&self.on_event);
                    continue;
                }
                Err(_) if self.closing.is_cancelled() || run_dir::is_exiting(&self.process) => {
                    return;
                }
                // A lack of descriptors, for example, may be temporary.
                Err(e) => {
                    if !std::mem::replace(&mut has_warned, true) {
                        log::warn!("query the VMM of {}: {e}", self.dir.display());
                    }
                }
            }
            if self.is_over() {
                return;
            }
        }
    }

    /// Queries the VMM. Succeeds if the VMM has exited. Each query opens a new connection, because
    /// the server allows only a few connections and other conversations need them too.
    fn look(&self) -> Result<()> {
        let _blocking = region(Rank::VmmApi);
        let deadline = Deadline {
            at: Instant::now() + ANSWER_DEADLINE,
            cancel: &self.closing,
        };
        let place = place(&self.process, "query the VMM")?;
        let Some(socket) = dial::connect(&place, API_SOCKET, &self.process, deadline)? else {
            return Ok(());
        };
        Booted::open(socket, deadline).map(drop)
    }

    /// Waits until the next query. Returns true if the VMM has exited or the driver is closing.
    fn is_over(&self) -> bool {
        let _blocking = region(Rank::VmmApi);
        let exit = [(self.process.fd(), PollFlags::POLLIN)];
        let woken = crate::host::wait::wait_any(&exit, Instant::now() + PING_PERIOD, &self.closing);
        !matches!(woken, Ok(crate::host::wait::WaitResult::Deadline))
    }
}
