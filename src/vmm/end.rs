//! Finds out how a VMM ended.
//!
//! A VMM exits with status 0 whether its guest powered off, panicked or had a triple fault, because
//! the VMM treats each of these as a reset and exits. If an earlier daemon started the VMM, its
//! exit status is available only since Linux 6.15, and only if a daemon was running when the VMM
//! ended. So the daemon uses other sources:
//!
//! 1. QEMU reports the reason in its `SHUTDOWN` event. It distinguishes a power-off, a reset, and
//!    an end that was requested on the host. QEMU's log contains the same reason, even if no daemon
//!    was running (`vmm_log.rs`). Firecracker reports no reason.
//! 2. The guest's last lines on the console distinguish a panic from a reboot. The kernel prints
//!    these lines at every log level (kernel/reboot.c, kernel/panic.c: `pr_emerg`), and our init
//!    prints a line too. A guest can forge them, but only to misreport its own end.
//! 3. If no daemon saw the end, the guest's root disk shows whether it was unmounted
//!    (`disk::is_unmounted`).

use super::console::{self, Consoles, FollowerState};
use super::log_file::MARK;
use super::shutdown_cause::Cause;
use super::vmm_log;
use crate::error::{Error, Result};
use crate::host::process::{Exit, Identity};
use crate::host::text::printable;
use crate::host::wait::wait_uncancelled;
use crate::locks::{Cancel, CancelCause, Mutex, Rank};
use crate::sched::{HashMap, Instant};
use nix::poll::PollFlags;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long to wait for the rest of a console or a monitor after the VMM has exited. All of it is
/// already in a socket or pipe, so only a very busy host takes long to read it.
const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(10);
/// The number of lines of the console that are searched. A panicking kernel prints fewer lines,
/// even with the registers of every CPU.
const LAST_LINES: u64 = 400;
/// The maximum number of characters of a panic's message that are kept.
const PANIC_CHARS_MAX: usize = 160;

/// The reason why a VMM exited without a request to fcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The console shows that the guest shut down cleanly.
    GuestShutDown,
    /// The console shows that the guest rebooted cleanly, which ends its VM.
    GuestRebooted,
    /// The guest was to run its image's init, but the image has none.
    NoInit,
    /// The console shows that the guest's kernel panicked with this message.
    GuestPanicked(String),
    /// The VMM exited normally, but the console shows no reason. The guest had a triple fault or
    /// was forcibly reset.
    GuestReset,
    /// According to the VMM's log, the guest was reset, but no daemon was running to record the
    /// guest's console.
    GuestResetUnrecorded,
    /// No daemon saw the end, but the guest has unmounted its root disk.
    GuestUnmounted,
    /// Something on the host made the VMM end. The text is QEMU's name for the reason.
    HostRequest(&'static str),
    /// The VMM failed or was killed.
    Vmm(Exit),
}

/// The reasons that VMMs have given for their end, kept until their exit is handled.
pub(super) struct Notes(Mutex<HashMap<Identity, Arc<Note>>>);

/// The reason of one VMM, written by the thread that monitors it.
pub(super) struct Note {
    cause: Mutex<Option<Cause>>,
    /// Fires when the monitor's thread has ended.
    over: Cancel,
}

impl Notes {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Rank::Consoles, HashMap::default()))
    }

    /// Adds a note for a VMM. The VMM's monitor calls this when it starts.
    ///
    /// # Errors
    /// The error of an eventfd (EMFILE, ENFILE).
    pub(super) fn open(&self, identity: &Identity) -> Result<Arc<Note>> {
        let over = Cancel::try_new().map_err(|e| Error::io("create an eventfd", e))?;
        let note = Arc::new(Note {
            cause: Mutex::new(Rank::Consoles, None),
            over,
        });
        let earlier = self.0.lock().insert(identity.clone(), note.clone());
        drop(earlier);
        Ok(note)
    }

    /// Removes and returns the reason that a VMM gave before it exited. Waits, for at most
    /// [`LAST_WORDS_DEADLINE`], until the VMM's monitor has read everything. Returns None if the
    /// VMM gave no reason or had no monitor.
    pub(super) fn take(&self, identity: &Identity) -> Option<Cause> {
        let note = self.0.lock().remove(identity)?;
        let deadline = Instant::now() + LAST_WORDS_DEADLINE;
        if let Err(e) = wait_uncancelled(&[(note.over.fd(), PollFlags::POLLIN)], deadline) {
            log::warn!("wait for a VMM's last message: {e}");
        }
        *note.cause.lock()
    }
}

impl Note {
    pub(super) fn record(&self, cause: Option<Cause>) {
        *self.cause.lock() = cause;
    }

    pub(super) fn close(&self) {
        self.over.cancel(CancelCause::Finished);
    }
}

impl End {
    /// True if the guest ended cleanly.
    pub fn is_orderly(&self) -> bool {
        matches!(
            self,
            End::GuestShutDown | End::GuestRebooted | End::GuestUnmounted
        )
    }

    /// True if nothing shows how the VMM ended.
    pub fn is_unseen(&self) -> bool {
        *self == End::Vmm(Exit::Unknown)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::GuestShutDown => f.write_str("the guest shut itself down"),
            End::GuestRebooted => f.write_str("the guest rebooted, which ends its VM"),
            End::NoInit => f.write_str("the image has no init, neither /sbin/init nor systemd"),
            End::GuestPanicked(message) => write!(f, "the guest's kernel panicked: {message}"),
            End::GuestReset => f.write_str("the guest was reset without a shutdown: a triple fault or a forced reset"),
            End::GuestResetUnrecorded => {
                f.write_str("the guest was reset, according to the VMM's log; its console was not recorded, so it may have panicked")
            }
            End::GuestUnmounted => f.write_str("the guest shut itself down: it has unmounted its root disk"),
            End::HostRequest(cause) => write!(f, "the VMM was ended from the host ({cause})"),
            End::Vmm(Exit::Unknown) => f.write_str(
                "the VMM ended for an unknown reason: an earlier fcd started it, so its exit status is not available",
            ),
            End::Vmm(exit) => write!(f, "the VMM died: {exit}"),
        }
    }
}

/// Finds out how the VMM in `dir` ended. `cause` is the reason that the VMM gave, if any. Waits for
/// the rest of the console.
pub(super) fn of(exit: Exit, cause: Option<Cause>, consoles: &Consoles, dir: &Path) -> End {
    let (Exit::Status(0) | Exit::Unknown) = exit else {
        return End::Vmm(exit);
    };
    let cause = cause.or_else(|| vmm_log::cause(dir));
    match cause {
        Some(Cause::GuestShutdown) => return End::GuestShutDown,
        Some(Cause::Host(cause)) => return End::HostRequest(cause),
        Some(Cause::GuestReset | Cause::GuestPanic) | None => {}
    }
    last_words(consoles, dir).unwrap_or_else(|| match (cause, exit) {
        (Some(Cause::GuestPanic), _) => {
            End::GuestPanicked("its console does not say why".to_owned())
        }
        (None, Exit::Unknown) => End::Vmm(exit),
        _ => End::GuestReset,
    })
}

/// Finds out how a guest ended from the console log in `dir`, or else from the VMM's log. Both must
/// be complete. Returns None if neither shows it.
pub fn from_files(dir: &Path) -> Option<End> {
    from_console(dir).or_else(|| match vmm_log::cause(dir)? {
        Cause::GuestShutdown => Some(End::GuestShutDown),
        Cause::GuestReset | Cause::GuestPanic => Some(End::GuestResetUnrecorded),
        Cause::Host(cause) => Some(End::HostRequest(cause)),
    })
}

fn from_console(dir: &Path) -> Option<End> {
    console::read(dir, Some(LAST_LINES))
        .ok()
        .and_then(|text| parse(&text))
}

fn last_words(consoles: &Consoles, dir: &Path) -> Option<End> {
    let deadline = Instant::now() + LAST_WORDS_DEADLINE;
    let cancel = Cancel::try_new().ok()?;
    let mut follower = consoles.follow(dir, Some(0)).ok()?;
    loop {
        // Check this before reading the log, so that no bytes are missed.
        let is_complete = !consoles.is_attached(dir);
        let found = from_console(dir);
        if found.is_some() || is_complete {
            return found;
        }
        while follower.next_chunk().ok()?.is_some() {}
        match follower.wait(deadline, &cancel) {
            Ok(FollowerState::More) => {}
            Ok(FollowerState::Deadline | FollowerState::Ended) | Err(_) => return None,
        }
    }
}

/// Finds the newest line since the start of the VM that shows how it ended.
fn parse(text: &str) -> Option<End> {
    const PANIC: &str = "Kernel panic - not syncing: ";
    let this_boot = text
        .lines()
        .rev()
        .take_while(|line| !line.starts_with(MARK));
    this_boot.into_iter().find_map(|line| {
        let says = |words: &str| line.contains(words);
        if let Some((_, message)) = line.split_once(PANIC) {
            let message = message.trim_end().trim_end_matches(" ]---");
            return Some(End::GuestPanicked(printable(
                &message.chars().take(PANIC_CHARS_MAX).collect::<String>(),
            )));
        }
        if says("fcd-init: the image has no init") {
            return Some(End::NoInit);
        }
        if says("reboot: Power down") || says("reboot: System halted") || says("fcd-init: disk ") {
            return Some(End::GuestShutDown);
        }
        says("reboot: Restarting system").then_some(End::GuestRebooted)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::console::Attach;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    const OFF: &str = "fcd-init: shutting down\r\nfcd-init: disk is clean\r\n[    9.1] sysrq: Power Off\r\n[    9.2] reboot: Power down\r\n";
    const PANIC: &str = "[    4.2] sysrq: Trigger a crash\r\n[    4.2] Kernel panic - not syncing: sysrq triggered crash\r\n\
                         [    4.2] CPU: 0 PID: 1 Comm: sh\r\n[    4.3] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---\r\n";

    #[test]
    fn console_shows_how_guest_ended() {
        let panicked = || Some(End::GuestPanicked("sysrq triggered crash".to_owned()));
        for (text, end) in [
            (OFF, Some(End::GuestShutDown)),
            (
                "[ 1.0] reboot: Restarting system\r\n",
                Some(End::GuestRebooted),
            ),
            // fcd's init ends a Firecracker guest with a reset.
            (
                "fcd-init: disk is clean\r\n[ 2.0] sysrq: Resetting\r\n",
                Some(End::GuestShutDown),
            ),
            (PANIC, panicked()),
            (&format!("{OFF}--- fcd: started ---\r\n{PANIC}"), panicked()),
            (
                &format!("{PANIC}--- fcd: started ---\r\n{OFF}"),
                Some(End::GuestShutDown),
            ),
            (
                &format!("{OFF}--- fcd: started ---\r\n[ 0.0] Linux\r\n"),
                None,
            ),
            ("[ 2.0] sysrq: Resetting\r\n", None),
            (
                "fcd-init: the image has no init\r\n[ 2.0] sysrq: Resetting\r\n",
                Some(End::NoInit),
            ),
            ("", None),
        ] {
            assert_eq!(parse(text), end, "{text}");
        }
        let long = format!(
            "Kernel panic - not syncing: \u{1b}[2J{}\r\n",
            "x".repeat(1000)
        );
        let Some(End::GuestPanicked(message)) = parse(&long) else {
            panic!("not parsed as a panic")
        };
        assert!(message.starts_with("\\u{1b}[2J") && message.len() < 2 * PANIC_CHARS_MAX);
    }

    /// Returns the end of a VMM that exited with `exit` after its console printed `text`.
    fn end(exit: Exit, text: &str) -> End {
        end_because(exit, None, text)
    }

    /// Returns the end of a VMM that also gave `cause` as the reason.
    fn end_because(exit: Exit, cause: Option<&str>, text: &str) -> End {
        let dir = tempfile::tempdir().unwrap();
        let consoles = Arc::new(Consoles::try_new().unwrap());
        let (reader, mut writer) = std::io::pipe().unwrap();
        let from = File::from(OwnedFd::from(reader));
        consoles
            .attach(Attach {
                dir: dir.path().into(),
                bytes_max: 1 << 16,
                from,
                mark: "started".into(),
            })
            .unwrap();
        let text = text.to_owned();
        let guest =
            crate::host::thread::spawn("guest", move || writer.write_all(text.as_bytes())).unwrap();
        let cause = cause.map(|name| Cause::parse(name).unwrap());
        let end = of(exit, cause, &consoles, dir.path());
        guest.join().unwrap().unwrap();
        end
    }

    #[test]
    fn clean_exit_is_explained_by_console() {
        assert_eq!(end(Exit::Status(0), OFF), End::GuestShutDown);
        assert!(matches!(end(Exit::Status(0), PANIC), End::GuestPanicked(_)));
        assert_eq!(
            end(Exit::Status(0), "[ 0.1] Linux version\r\n"),
            End::GuestReset
        );
    }

    #[test]
    fn unknown_exit_is_explained_by_console_or_stays_unknown() {
        assert_eq!(end(Exit::Unknown, OFF), End::GuestShutDown);
        assert_eq!(end(Exit::Unknown, ""), End::Vmm(Exit::Unknown));
    }

    /// The causes are those of QEMU 7.2. A power-off or an end from the host counts even if the
    /// console shows something else.
    #[test]
    fn cause_from_vmm_takes_precedence_over_console() {
        for exit in [Exit::Status(0), Exit::Unknown] {
            let end = |cause, text| end_because(exit, Some(cause), text);
            assert_eq!(end("guest-shutdown", ""), End::GuestShutDown);
            assert_eq!(end("guest-shutdown", PANIC), End::GuestShutDown);
            assert_eq!(
                end("guest-reset", "[ 0.1] Linux version\r\n"),
                End::GuestReset
            );
            assert_eq!(
                end("guest-reset", "[ 1.0] reboot: Restarting system\r\n"),
                End::GuestRebooted
            );
            assert!(matches!(end("guest-reset", PANIC), End::GuestPanicked(_)));
            assert!(matches!(end("guest-panic", ""), End::GuestPanicked(_)));
            assert_eq!(end("host-signal", OFF), End::HostRequest("host-signal"));
        }
        assert_eq!(
            end_because(Exit::Signal(9), Some("guest-shutdown"), OFF),
            End::Vmm(Exit::Signal(9))
        );
        assert_eq!(Cause::parse("none"), None);
        assert_eq!(Cause::parse("snapshot-load"), None);
    }

    #[test]
    fn note_waits_for_monitor_and_is_taken_once() {
        let notes = Arc::new(Notes::new());
        let identity = Identity {
            pid: 1,
            start_time: 2,
            boot_id: "of a test".into(),
        };
        assert_eq!(notes.take(&identity), None);
        let note = notes.open(&identity).unwrap();
        let (theirs, whose) = (notes.clone(), identity.clone());
        let taken = crate::host::thread::spawn("takes", move || theirs.take(&whose)).unwrap();
        while notes.0.lock().contains_key(&identity) {
            std::thread::yield_now();
        }
        for _ in 0..100 {
            std::thread::yield_now();
            assert!(!taken.is_finished());
        }
        note.record(Some(Cause::GuestReset));
        note.close();
        assert_eq!(taken.join().unwrap(), Some(Cause::GuestReset));
        assert_eq!(notes.take(&identity), None);
    }

    #[test]
    fn killed_vmm_is_reported_as_died_despite_console() {
        assert_eq!(end(Exit::Signal(9), OFF), End::Vmm(Exit::Signal(9)));
        assert_eq!(
            end(Exit::Status(1), OFF).to_string(),
            "the VMM died: exit status 1"
        );
    }
}
