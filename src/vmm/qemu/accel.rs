//! Picks the accelerator and the board for VMs on this host, once, when they are first needed.
//!
//! The presence of `/dev/kvm` proves nothing. The device may be inaccessible, or the virtualisation
//! may be unable to run a stock kernel. So the probe boots a stock kernel with KVM but without a
//! root file system. If the kernel panics in time because it has no root file system, it has passed
//! all steps that fail on such hosts.

use super::argv::{Accelerator, Board, PROBE_LAST_WORDS, Platform, probe_argv};
use super::tsc;
use crate::config::{Accel, Machine, Qemu};
use crate::error::{Error, Kind, Result};
use crate::host::command::{Command, run_any_status};
use crate::host::text::printable;
use crate::host::wait::{WaitResult, cancelled, wait_any};
use crate::locks::{Cancel, CancelCause, Mutex, Rank};
use crate::sched::Instant;
use crate::vmm::devices::{self, KVM};
use nix::poll::PollFlags;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long the probe may take. With working virtualisation a stock kernel panics after one or two
/// seconds.
const PROBE_DEADLINE: Duration = Duration::from_secs(10);
/// How long picking may take, including the probe.
const PICK_DEADLINE: Duration = Duration::from_secs(20);

/// The platform that was picked, and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Picked {
    pub platform: Platform,
    pub why: String,
    /// The groups that a VMM with another uid needs to open `/dev/kvm`.
    pub groups: Vec<u32>,
}

enum State {
    Unknown,
    /// A thread is probing. The token fires when the thread has finished.
    Probing(Cancel),
    Known(Picked),
}

pub(super) struct Picker {
    config: Qemu,
    state: Arc<Mutex<State>>,
}

impl Picker {
    pub(super) fn new(config: Qemu) -> Self {
        Self {
            config,
            state: Arc::new(Mutex::new(Rank::Consoles, State::Unknown)),
        }
    }

    pub(super) fn known(&self) -> Option<Picked> {
        match &*self.state.lock() {
            State::Known(picked) => Some(picked.clone()),
            _ => None,
        }
    }

    /// Returns the picked platform. If none has been picked yet, starts a probe, or joins the one
    /// that is running, and waits for its result. The probe runs on a separate thread, so a
    /// cancelled caller does not stop it, and the next caller gets its result.
    pub(super) fn pick(&self, kernel: &Path, cancel: &Cancel) -> Result<Picked> {
        let doing = "pick an accelerator";
        let deadline = Instant::now() + PICK_DEADLINE;
        loop {
            let over = match &mut *self.state.lock() {
                State::Known(picked) => return Ok(picked.clone()),
                State::Probing(over) => over.clone(),
                unknown => {
                    let over = Cancel::try_new().map_err(|e| Error::io(doing, e))?;
                    self.begin(kernel, over.clone())?;
                    *unknown = State::Probing(over.clone());
                    over
                }
            };
            match wait_any(&[(over.fd(), PollFlags::POLLIN)], deadline, cancel)
                .map_err(|e| Error::io(doing, e))?
            {
                WaitResult::Ready => {}
                WaitResult::Cancelled => return Err(cancelled(doing, cancel)),
                WaitResult::Deadline => {
                    return Err(Error::new(
                        Kind::Timeout,
                        format!("{doing}: the deadline has passed"),
                    ));
                }
            }
        }
    }

    /// Starts a probe. The caller holds the lock of the state, so the thread can only store its
    /// result after the caller has set [`State::Probing`].
    fn begin(&self, kernel: &Path, over: Cancel) -> Result<()> {
        let (config, kernel, state) = (self.config.clone(), kernel.to_owned(), self.state.clone());
        crate::host::thread::spawn("vmm-probe", move || {
            // After a panic the waiting callers must still get an answer.
            let pick = std::panic::AssertUnwindSafe(|| pick(&config, &kernel, &over));
            let picked = std::panic::catch_unwind(pick)
                .unwrap_or_else(|_| Err(Error::internal("the probe panicked")));
            *state.lock() = match picked {
                Ok(picked) => {
                    log::info!("VMs run on {}: {}", picked.platform, picked.why);
                    State::Known(picked)
                }
                Err(e) => {
                    log::warn!("pick an accelerator: {e}");
                    State::Unknown
                }
            };
            over.cancel(CancelCause::Finished);
        })?;
        Ok(())
    }
}

fn pick(config: &Qemu, kernel: &Path, cancel: &Cancel) -> Result<Picked> {
    let (accelerator, why, groups) = match config.accel {
        Accel::Tcg => (Accelerator::Tcg, "configured as tcg".to_owned(), Vec::new()),
        Accel::Kvm => (
            Accelerator::Kvm,
            "configured as kvm".to_owned(),
            devices::access(KVM).unwrap_or_default(),
        ),
        Accel::Auto => match devices::access(KVM) {
            Err(why) => (Accelerator::Tcg, why, Vec::new()),
            Ok(groups) => match try_kvm(config, kernel, cancel)? {
                None => (
                    Accelerator::Kvm,
                    "a stock kernel boots with it".to_owned(),
                    groups,
                ),
                Some(why) => (
                    Accelerator::Tcg,
                    format!("{KVM} does not run a stock kernel: {why}"),
                    Vec::new(),
                ),
            },
        },
    };
    let board = pick_board(config.machine, accelerator, cancel)?;
    Ok(Picked {
        platform: Platform { accelerator, board },
        why,
        groups,
    })
}

fn pick_board(machine: Machine, accelerator: Accelerator, cancel: &Cancel) -> Result<Board> {
    let needs_no_tsc = machine == Machine::Microvm && accelerator == Accelerator::Kvm;
    Ok(match machine {
        // KVM reports the TSC's frequency to the guest.
        _ if needs_no_tsc => Board::Microvm { tsc_khz: None },
        Machine::Q35 => Board::Q35,
        Machine::Auto if accelerator == Accelerator::Kvm || !tsc::is_constant() => Board::Q35,
        Machine::Auto | Machine::Microvm => match tsc::measure_khz(cancel)? {
            Some(khz) => Board::Microvm { tsc_khz: Some(khz) },
            None => Board::Q35,
        },
    })
}

/// Boots a stock kernel with KVM. Returns None if it boots, or the reason why it does not. Fails
/// only if the probe itself failed.
pub fn try_kvm(config: &Qemu, kernel: &Path, cancel: &Cancel) -> Result<Option<String>> {
    let platform = Platform {
        accelerator: Accelerator::Kvm,
        board: Board::Q35,
    };
    let command = Command::new(&config.binary)
        .args(probe_argv(&platform, kernel))
        .deadline(PROBE_DEADLINE);
    match run_any_status(&command, cancel, &mut |_| {}) {
        Ok(out)
            if out.status == 0
                && String::from_utf8_lossy(&out.stdout).contains(PROBE_LAST_WORDS) =>
        {
            Ok(None)
        }
        Ok(out) => {
            let said = printable(
                String::from_utf8_lossy(&out.stderr)
                    .lines()
                    .last()
                    .unwrap_or_default(),
            );
            Ok(Some(format!(
                "qemu exited with status {}: {said}",
                out.status
            )))
        }
        Err(e) if e.kind() == Kind::Timeout => Ok(Some(format!(
            "it did not boot within {} s",
            PROBE_DEADLINE.as_secs()
        ))),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picker(accel: Accel, machine: Machine) -> Picker {
        Picker::new(Qemu {
            accel,
            machine,
            binary: "/bin/false".into(),
            ..Qemu::default()
        })
    }

    #[test]
    fn configured_accelerator_and_board_are_used() {
        let cancel = Cancel::try_new().unwrap();
        let pick = |accel, machine| {
            picker(accel, machine)
                .pick(Path::new("/none"), &cancel)
                .unwrap()
                .platform
        };
        assert_eq!(
            pick(Accel::Tcg, Machine::Q35),
            Platform {
                accelerator: Accelerator::Tcg,
                board: Board::Q35
            }
        );
        assert_eq!(
            pick(Accel::Kvm, Machine::Auto),
            Platform {
                accelerator: Accelerator::Kvm,
                board: Board::Q35
            }
        );
        let board = Board::Microvm { tsc_khz: None };
        assert_eq!(
            pick(Accel::Kvm, Machine::Microvm),
            Platform {
                accelerator: Accelerator::Kvm,
                board
            }
        );
        assert!(matches!(
            pick(Accel::Tcg, Machine::Microvm).board,
            Board::Microvm { tsc_khz: Some(_) }
        ));
    }

    #[test]
    fn kvm_failing_probe_is_not_used_and_result_is_kept() {
        let cancel = Cancel::try_new().unwrap();
        let picker = picker(Accel::Auto, Machine::Q35);
        assert_eq!(picker.known(), None);
        let picked = picker.pick(Path::new("/none"), &cancel).unwrap();
        assert_eq!(picked.platform.accelerator, Accelerator::Tcg);
        assert_eq!(picker.known(), Some(picked));
    }

    #[test]
    fn pick_can_be_cancelled() {
        let cancel = Cancel::try_new().unwrap();
        cancel.cancel(crate::locks::CancelCause::VmStopped);
        let e = picker(Accel::Tcg, Machine::Microvm)
            .pick(Path::new("/none"), &cancel)
            .unwrap_err();
        assert_eq!(e.kind(), Kind::Cancelled);
    }
}
