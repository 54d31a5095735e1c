//! One thread for each VMM, which owns its event monitor: it sees that the guest is paused, that the VMM hangs, and why it
//! ends.
//!
//! A guest whose write finds the host's disk full is paused by QEMU (`werror=enospc`, its default) and never sees an
//! error. It goes on when somebody says `cont`: here, once there is room again.

use super::argv::QMP_SOCKET;
use super::qmp::Qmp;
use crate::error::{Kind, Result};
use crate::host::process::Process;
use crate::locks::{Cancel, Rank, region};
use crate::vmm::dial::{self, Patience};
use crate::vmm::end::Note;
use crate::vmm::{Told, run_dir};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For one answer of a VMM; a healthy one takes a millisecond, on a very busy host a second.
const ANSWER_DEADLINE: Duration = Duration::from_secs(4);
/// So many deadlines in a row without an answer make it `unresponsive`.
const MISSES_MAX: u32 = 3;
/// Between two looks at a VMM that has told nothing.
const PING_PERIOD: Duration = Duration::from_secs(5);
/// While a guest is paused: between two looks at the free space.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// A guest goes on when there is more than this: what a store gives up for deletes must not go to guests.
const FREE_BYTES_MIN: u64 = 16 << 20;
/// `query-status` of a guest that was paused for an error of its disk; only a full one pauses.
const PAUSED: &str = "io-error";

/// One VMM, attended from a thread of its own until it exits or the driver goes.
pub struct Attended {
    pub process: Process,
    /// The VM's directory: the disk is there, and `run/`.
    pub dir: PathBuf,
    pub closing: Cancel,
    pub told: Box<dyn Fn(Told) + Send>,
    /// For what it says of its end.
    pub note: Arc<Note>,
}

impl Attended {
    pub fn run(self) {
        let attended = self.attend();
        self.note.close();
        if let Err(e) = attended
            && !self.closing.is_cancelled()
            && !run_dir::is_exiting(&self.process)
        {
            log::warn!("the VMM of {} is no longer asked how it is: {e}", self.dir.display());
        }
        (self.told)(Told::Paused(false));
    }

    fn attend(&self) -> Result<()> {
        let Some(mut qmp) = self.open()? else { return Ok(()) };
        let attended = self.converse(&mut qmp);
        self.note.record(qmp.shutdown_cause());
        attended
    }

    /// Until the VMM hangs up, or the driver goes.
    fn converse<'a>(&'a self, qmp: &mut Qmp<'a>) -> Result<()> {
        let (mut was_paused, mut has_answered) = (false, false);
        loop {
            let is_paused = self.look(qmp, was_paused)?;
            if !std::mem::replace(&mut has_answered, true) {
                (self.told)(Told::Answered);
            }
            if is_paused != was_paused {
                log::warn!(
                    "{}: the guest {}",
                    self.dir.display(),
                    if is_paused { "is paused: the disk is full" } else { "goes on" }
                );
                (self.told)(Told::Paused(is_paused));
                was_paused = is_paused;
            }
            self.await_event(qmp, if is_paused { LOOK_PERIOD } else { PING_PERIOD })?;
        }
    }

    fn open(&self) -> Result<Option<Qmp<'_>>> {
        let dir = run_dir::open(&self.dir, "open the VMM's run directory")?;
        self.patiently(|patience| {
            let control = dial::connect(&dir, QMP_SOCKET, &self.process, patience)?;
            control.map(|control| Qmp::open(control, patience)).transpose()
        })
    }

    /// Whether the guest is paused; where it was so before and there is room again, it goes on.
    fn look<'a>(&'a self, qmp: &mut Qmp<'a>, was_paused: bool) -> Result<bool> {
        let is_paused = self.is_paused(qmp)?;
        if !is_paused || !was_paused || !self.has_room() {
            return Ok(is_paused);
        }
        self.execute(qmp, "cont")?;
        // Another write may have failed already.
        self.is_paused(qmp)
    }

    fn is_paused<'a>(&'a self, qmp: &mut Qmp<'a>) -> Result<bool> {
        Ok(self.execute(qmp, "query-status")?["status"] == PAUSED)
    }

    fn execute<'a>(&'a self, qmp: &mut Qmp<'a>, command: &str) -> Result<serde_json::Value> {
        let mut is_asked = false;
        self.patiently(|patience| {
            qmp.be_patient(patience);
            if !is_asked {
                qmp.ask(command, &json!({}))?;
                is_asked = true;
            }
            qmp.answer(command)
        })
    }

    /// Tries until there is an answer, and tells when there has been none for too long, and when it came after all.
    fn patiently<'a, T>(&'a self, mut attempt: impl FnMut(Patience<'a>) -> Result<T>) -> Result<T> {
        let mut misses = 0;
        let result = loop {
            let result = {
                let _blocking = region(Rank::VmmApi);
                attempt(self.patience(ANSWER_DEADLINE))
            };
            match result {
                Err(e) if e.kind() == Kind::Timeout => misses += 1,
                other => break other,
            }
            // Again and again: who is told may not have taken note of the VM yet.
            if misses % MISSES_MAX == 0 {
                (self.told)(Told::Unresponsive(true));
            }
        };
        if misses >= MISSES_MAX && result.is_ok() {
            (self.told)(Told::Unresponsive(false));
        }
        result
    }

    fn await_event<'a>(&'a self, qmp: &mut Qmp<'a>, period: Duration) -> Result<()> {
        let _blocking = region(Rank::VmmApi);
        qmp.be_patient(self.patience(period));
        match qmp.event() {
            Err(e) if e.kind() != Kind::Timeout => Err(e),
            _ => Ok(()),
        }
    }

    fn patience(&self, period: Duration) -> Patience<'_> {
        Patience { deadline: Instant::now() + period, cancel: &self.closing }
    }

    /// As the VMM sees it, which does not run as root.
    fn has_room(&self) -> bool {
        rustix::fs::statvfs(&self.dir).is_ok_and(|s| s.f_bavail.saturating_mul(s.f_frsize) >= FREE_BYTES_MIN)
    }
}
