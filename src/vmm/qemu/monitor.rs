//! Monitors one VMM with a thread that owns its event monitor. The thread detects when the guest is
//! paused, when the VMM hangs, and why the VMM ends.
//!
//! If a guest's write finds the host's disk full, QEMU pauses the guest (`werror=enospc`, its
//! default), and the guest never sees an error. Once space is free again, this thread resumes the
//! guest.

use super::argv::QMP_SOCKET;
use super::qmp::Qmp;
use crate::error::{Kind, Result};
use crate::host::process::Process;
use crate::locks::{Cancel, Rank, region};
use crate::sched::Instant;
use crate::vmm::dial::{self, Deadline};
use crate::vmm::end::Note;
use crate::vmm::silence::{ANSWER_DEADLINE, PING_PERIOD, Silence};
use crate::vmm::{GuestEvent, run_dir};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How often the free space is checked while a guest is paused.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// The free space, in bytes, at which a paused guest is resumed. The store's reserve for deletes is
/// smaller, so guests do not use it up.
const FREE_BYTES_MIN: u64 = 16 << 20;
/// The answer to `query-status` if the guest was paused because of an error of its disk. Only a
/// full disk makes QEMU pause a guest.
pub(super) const PAUSED_BY_FULL_DISK: &str = "io-error";

/// Monitors one VMM until it exits or the driver is dropped.
pub(super) struct Monitor {
    pub process: Process,
    /// The VM's directory, which holds the disk and `run/`.
    pub dir: PathBuf,
    pub closing: Cancel,
    pub on_event: Box<dyn Fn(GuestEvent) + Send>,
    /// The note that receives the VMM's reason for its end.
    pub note: Arc<Note>,
}

impl Monitor {
    pub(super) fn run(self) {
        let monitored = self.monitor();
        self.note.close();
        if let Err(e) = monitored
            && !self.closing.is_cancelled()
            && !run_dir::is_exiting(&self.process)
        {
            log::warn!(
                "the VMM of {} is no longer monitored: {e}",
                self.dir.display()
            );
        }
        (self.on_event)(GuestEvent::Paused(false));
    }

    fn monitor(&self) -> Result<()> {
        crate::locks::may_block("file access");
        let Some(mut qmp) = self.open()? else {
            return Ok(());
        };
        let conversed = self.converse(&mut qmp);
        self.note.record(qmp.shutdown_cause());
        conversed
    }

    /// Queries the VMM until it hangs up or the driver is dropped.
    fn converse<'a>(&'a self, qmp: &mut Qmp<'a>) -> Result<()> {
        let (mut was_paused, mut has_answered) = (false, false);
        loop {
            let is_paused = self.look(qmp, was_paused)?;
            if !std::mem::replace(&mut has_answered, true) {
                (self.on_event)(GuestEvent::Answered);
            }
            if is_paused != was_paused {
                log::warn!(
                    "{}: the guest is {}",
                    self.dir.display(),
                    if is_paused {
                        "paused because the host's disk is full"
                    } else {
                        "resumed"
                    }
                );
                (self.on_event)(GuestEvent::Paused(is_paused));
                was_paused = is_paused;
            }
            self.await_event(qmp, if is_paused { LOOK_PERIOD } else { PING_PERIOD })?;
        }
    }

    fn open(&self) -> Result<Option<Qmp<'_>>> {
        let dir = run_dir::open(&self.dir, "open the VMM's run directory")?;
        self.until_answered(|deadline| {
            let control = dial::connect(&dir, QMP_SOCKET, &self.process, deadline)?;
            control
                .map(|control| Qmp::open(control, deadline))
                .transpose()
        })
    }

    /// Returns whether the guest is paused. Resumes the guest if it was paused before and space is
    /// free again.
    fn look<'a>(&'a self, qmp: &mut Qmp<'a>, was_paused: bool) -> Result<bool> {
        let is_paused = self.is_paused(qmp)?;
        if !is_paused || !was_paused || !self.has_room() {
            return Ok(is_paused);
        }
        self.execute(qmp, "cont")?;
        // Another write may have failed since the resume.
        self.is_paused(qmp)
    }

    fn is_paused<'a>(&'a self, qmp: &mut Qmp<'a>) -> Result<bool> {
        Ok(self.execute(qmp, "query-status")?["status"] == PAUSED_BY_FULL_DISK)
    }

    fn execute<'a>(&'a self, qmp: &mut Qmp<'a>, command: &str) -> Result<serde_json::Value> {
        let mut is_asked = false;
        self.until_answered(|deadline| {
            qmp.set_deadline(deadline);
            if !is_asked {
                qmp.ask(command, &json!({}))?;
                is_asked = true;
            }
            qmp.answer(command)
        })
    }

    /// Repeats an attempt until the VMM answers. Reports when the VMM has not answered for too
    /// long, and when it answers again.
    fn until_answered<'a, T>(
        &'a self,
        mut attempt: impl FnMut(Deadline<'a>) -> Result<T>,
    ) -> Result<T> {
        let mut silence = Silence::default();
        loop {
            let result = {
                let _blocking = region(Rank::VmmApi);
                attempt(self.deadline_in(ANSWER_DEADLINE))
            };
            match result {
                Err(e) if e.kind() == Kind::Timeout => silence.missed(&self.on_event),
                Err(e) => return Err(e),
                Ok(answer) => {
                    silence.answered(&self.on_event);
                    return Ok(answer);
                }
            }
        }
    }

    fn await_event<'a>(&'a self, qmp: &mut Qmp<'a>, period: Duration) -> Result<()> {
        let _blocking = region(Rank::VmmApi);
        qmp.set_deadline(self.deadline_in(period));
        match qmp.event() {
            Err(e) if e.kind() != Kind::Timeout => Err(e),
            _ => Ok(()),
        }
    }

    fn deadline_in(&self, period: Duration) -> Deadline<'_> {
        Deadline {
            at: Instant::now() + period,
            cancel: &self.closing,
        }
    }

    /// True if an unprivileged process such as the VMM has enough free space.
    fn has_room(&self) -> bool {
        crate::locks::may_block("file access");
        rustix::fs::statvfs(&self.dir)
            .is_ok_and(|s| s.f_bavail.saturating_mul(s.f_frsize) >= FREE_BYTES_MIN)
    }
}
