//! A guest whose write finds the host's disk full is paused by QEMU (`werror=enospc`, its default) and never sees an
//! error. It goes on when somebody says `cont`: here, once there is room again.

use super::argv::QMP_SOCKET;
use super::qmp::{self, Patience, Qmp};
use crate::error::{Error, Kind, Result};
use crate::host::fs::{open_at, open_dir};
use crate::host::process::Process;
use crate::locks::{Cancel, Rank, region};
use rustix::fs::OFlags;
use serde_json::json;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// For one answer of a VMM.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// While a guest is paused: between two looks at the free space.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// While it runs the VMM tells by itself, so this bounds nothing but a wait.
const EVENT_PERIOD: Duration = Duration::from_secs(3600);
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
    /// Whether the guest is paused, at each change.
    pub told: Box<dyn Fn(bool) + Send>,
}

impl Attended {
    pub fn run(self) {
        if let Err(e) = self.attend()
            && !self.closing.is_cancelled()
            && !super::is_exiting(&self.process)
        {
            log::warn!("the VMM of {} is no longer asked whether its disk is full: {e}", self.dir.display());
        }
        (self.told)(false);
    }

    fn attend(&self) -> Result<()> {
        let Some(mut qmp) = self.open()? else { return Ok(()) };
        let mut was_paused = false;
        loop {
            let is_paused = self.look(&mut qmp, was_paused)?;
            if is_paused != was_paused {
                log::warn!(
                    "{}: the guest {}",
                    self.dir.display(),
                    if is_paused { "is paused: the disk is full" } else { "goes on" }
                );
                (self.told)(is_paused);
                was_paused = is_paused;
            }
            self.await_event(&mut qmp, if is_paused { LOOK_PERIOD } else { EVENT_PERIOD })?;
        }
    }

    fn open(&self) -> Result<Option<Qmp<'_>>> {
        let _blocking = region(Rank::VmmApi);
        let dir = open_at(open_dir(&self.dir)?, super::RUN_DIR, OFlags::RDONLY | OFlags::DIRECTORY, 0);
        let dir = OwnedFd::from(dir.map_err(|e| Error::io("open the VMM's run directory", e))?);
        let control = qmp::connect(&dir, QMP_SOCKET, &self.process, self.patience(ANSWER_DEADLINE))?;
        control.map(|control| Qmp::open(control, self.patience(ANSWER_DEADLINE))).transpose()
    }

    /// Whether the guest is paused; where it was so before and there is room again, it goes on.
    fn look<'a>(&'a self, qmp: &mut Qmp<'a>, was_paused: bool) -> Result<bool> {
        let _blocking = region(Rank::VmmApi);
        qmp.be_patient(self.patience(ANSWER_DEADLINE));
        if !is_paused(qmp)? {
            return Ok(false);
        }
        if was_paused && self.has_room() {
            qmp.execute("cont", &json!({}))?;
            // Another write may have failed already.
            return is_paused(qmp);
        }
        Ok(true)
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

fn is_paused(qmp: &mut Qmp<'_>) -> Result<bool> {
    Ok(qmp.execute("query-status", &json!({}))?["status"] == PAUSED)
}
