//! One thread for each VMM: it asks how the guest is, and tells when there has been no answer for too long.
//!
//! Unlike QEMU, Firecracker hands a full disk of the host's to the guest as an I/O error: there is nothing to tell.

use super::API_SOCKET;
use super::api::Booted;
use crate::error::{Kind, Result};
use crate::host::process::Process;
use crate::locks::{Cancel, Rank, region};
use crate::vmm::dial::{self, Patience};
use crate::vmm::{Told, run_dir};
use nix::poll::PollFlags;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// For one answer of a VMM; a healthy one takes a millisecond. Its API serves one request at a time, and a snapshot of much memory takes
/// seconds.
const ANSWER_DEADLINE: Duration = Duration::from_secs(4);
/// So many deadlines in a row without an answer make it `unresponsive`.
const MISSES_MAX: u32 = 3;
/// Between two looks.
const PING_PERIOD: Duration = Duration::from_secs(5);

/// One VMM, attended from a thread of its own until it exits or the driver goes.
pub struct Attended {
    pub process: Process,
    /// The VM's directory, for messages.
    pub dir: PathBuf,
    pub closing: Cancel,
    pub told: Box<dyn Fn(Told) + Send>,
}

impl Attended {
    pub fn run(self) {
        let (mut misses, mut has_warned, mut has_answered) = (0, false, false);
        loop {
            match self.look() {
                Ok(()) => {
                    if !std::mem::replace(&mut has_answered, true) {
                        (self.told)(Told::Answered);
                    }
                    if misses >= MISSES_MAX {
                        (self.told)(Told::Unresponsive(false));
                    }
                    misses = 0;
                }
                Err(e) if e.kind() == Kind::Timeout => {
                    misses += 1;
                    // Again and again: who is told may not have taken note of the VM yet.
                    if misses % MISSES_MAX == 0 {
                        (self.told)(Told::Unresponsive(true));
                    }
                    continue;
                }
                Err(_) if self.closing.is_cancelled() || run_dir::is_exiting(&self.process) => return,
                // No descriptor, say: later there may be one.
                Err(e) => {
                    if !std::mem::replace(&mut has_warned, true) {
                        log::warn!("ask the VMM of {} how it is: {e}", self.dir.display());
                    }
                }
            }
            if self.is_over() {
                return;
            }
        }
    }

    /// A connection of its own for each: the server has few, and others need one.
    fn look(&self) -> Result<()> {
        let _blocking = region(Rank::VmmApi);
        let patience = Patience { deadline: Instant::now() + ANSWER_DEADLINE, cancel: &self.closing };
        let place = super::place(&self.process, "ask the VMM how it is")?;
        let Some(socket) = dial::connect(&place, API_SOCKET, &self.process, patience)? else { return Ok(()) };
        Booted::open(socket, patience).map(drop)
    }

    /// Waits until it is time for the next look, or there is nothing more to look at.
    fn is_over(&self) -> bool {
        let _blocking = region(Rank::VmmApi);
        let exit = [(self.process.fd(), PollFlags::POLLIN)];
        let woken = crate::host::wait::wait_any(&exit, Instant::now() + PING_PERIOD, &self.closing);
        !matches!(woken, Ok(crate::host::wait::WaitResult::Deadline))
    }
}
