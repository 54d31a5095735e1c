//! Monitors one VMM with a thread that queries it, and reports if there is no answer for too long.
//!
//! Unlike QEMU, Firecracker passes a full disk of the host on to the guest as an I/O error, so
//! there is no pause to report.

use super::API_SOCKET;
use super::api::Booted;
use super::running::place;
use crate::error::{Kind, Result};
use crate::host::process::Process;
use crate::locks::{Cancel, Rank, region};
use crate::vmm::dial::{self, Deadline};
use crate::vmm::{GuestEvent, run_dir};
use nix::poll::PollFlags;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a VMM may take to answer. A healthy one takes a millisecond, but its API handles one
/// request at a time, and a snapshot of much memory takes seconds.
const ANSWER_DEADLINE: Duration = Duration::from_secs(4);
/// A VMM that has missed this many deadlines in a row is unresponsive.
const MISSES_MAX: u32 = 3;
/// How long to wait between two queries.
const PING_PERIOD: Duration = Duration::from_secs(5);

/// Monitors one VMM until it exits or the driver is dropped.
pub struct Monitor {
    pub process: Process,
    /// The VM's directory, for messages.
    pub dir: PathBuf,
    pub closing: Cancel,
    pub on_event: Box<dyn Fn(GuestEvent) + Send>,
}

impl Monitor {
    pub fn run(self) {
        let (mut misses, mut has_warned, mut has_answered) = (0, false, false);
        loop {
            match self.look() {
                Ok(()) => {
                    if !std::mem::replace(&mut has_answered, true) {
                        (self.on_event)(GuestEvent::Answered);
                    }
                    if misses >= MISSES_MAX {
                        (self.on_event)(GuestEvent::Unresponsive(false));
                    }
                    misses = 0;
                }
                Err(e) if e.kind() == Kind::Timeout => {
                    misses += 1;
                    // Reported repeatedly, because the daemon may not have recorded this VM when
                    // the first report came.
                    if misses % MISSES_MAX == 0 {
                        (self.on_event)(GuestEvent::Unresponsive(true));
                    }
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

    /// Queries the VMM. Each query opens a connection, because the server has few and others need
    /// one too.
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
