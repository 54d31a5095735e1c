//! How a VMM came to its end, and what says so.
//!
//! A VMM exits with status 0 whether its guest powered off, panicked or met a triple fault: all of them are a reset to it,
//! and a reset ends it. A process that an earlier daemon started tells its status to nobody. So others are asked:
//!
//! 1. QEMU itself, which tells its monitor why it ends (the event `SHUTDOWN`). It tells a power-off from a reset, and an
//!    end that somebody on the host asked for from both. Firecracker has nothing of the kind.
//! 2. The guest's last words on its console, because a panic and a reboot are resets to a VMM: those of the kernel, which it
//!    prints whatever its log level is (kernel/reboot.c, kernel/panic.c: `pr_emerg`), and those of our init. A guest can
//!    forge them, but they only say how it ended itself.
//! 3. The guest's root disk, where nobody was there to hear (`disk::is_unmounted`, which the daemon asks).

use super::console::{self, Consoles, Followed};
use crate::error::{Error, Result};
use crate::host::command::printable;
use crate::host::process::{Exit, Identity};
use crate::host::wait::wait_uncancelled;
use crate::locks::{Cancel, CancelCause, Mutex, Rank};
use nix::poll::PollFlags;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the rest of a console, or of a monitor, may take after its VMM has exited. All of it waits in a socket by then,
/// and the wait ends with the last byte, so only a host that is too busy to read it takes long.
const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(10);
/// Lines that are looked at. What a kernel prints when it panics, with the registers of every CPU, is shorter.
const LAST_LINES: u64 = 400;
/// How much of a panic's message is kept.
const PANIC_CHARS_MAX: usize = 160;

/// Why a VMM that nobody stopped exited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest shut down in order: its console says so.
    GuestShutDown,
    /// The guest rebooted in order, which ends a VM: its console says so.
    GuestRebooted,
    /// The guest's kernel panicked: its console says so, with this message.
    GuestPanicked(String),
    /// The VMM ended well, but its guest said nothing: a triple fault, or a reset by force.
    GuestReset,
    /// Nobody saw it, but the guest has unmounted its root disk.
    GuestUnmounted,
    /// Somebody on the host told the VMM to end. In QEMU's words.
    Told(&'static str),
    /// The VMM failed, or somebody killed it.
    Vmm(Exit),
}

/// Why a VMM says that it ends: `ShutdownCause` of QEMU (qapi/run-state.json).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    GuestShutdown,
    GuestReset,
    GuestPanic,
    /// Not the guest: a signal, a command, an error of the host's.
    Host(&'static str),
}

impl Cause {
    /// None where the name says nothing of an end.
    pub fn parse(name: &str) -> Option<Self> {
        const OF_HOST: [&str; 5] = ["host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui"];
        match name {
            "guest-shutdown" => Some(Cause::GuestShutdown),
            "guest-reset" => Some(Cause::GuestReset),
            "guest-panic" => Some(Cause::GuestPanic),
            _ => OF_HOST.into_iter().find(|known| *known == name).map(Cause::Host),
        }
    }
}

/// What VMMs have said of their ends, for whoever hears that they have exited.
pub(super) struct Notes(Mutex<HashMap<Identity, Arc<Note>>>);

/// Written by whoever listens to a VMM.
pub(super) struct Note {
    cause: Mutex<Option<Cause>>,
    /// Fires when nobody listens any more.
    over: Cancel,
}

impl Notes {
    pub fn new() -> Self {
        Self(Mutex::new(Rank::Consoles, HashMap::new()))
    }

    /// For somebody who begins to listen.
    ///
    /// # Errors
    /// Where no event can be had (EMFILE, ENFILE).
    pub fn open(&self, identity: &Identity) -> Result<Arc<Note>> {
        let over = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        let note = Arc::new(Note { cause: Mutex::new(Rank::Consoles, None), over });
        let earlier = self.0.lock().insert(identity.clone(), note.clone());
        drop(earlier);
        Ok(note)
    }

    /// What this VMM said, which has exited: who listens to it has heard all when it is done.
    pub fn take(&self, identity: &Identity) -> Option<Cause> {
        let note = self.0.lock().remove(identity)?;
        let deadline = Instant::now() + LAST_WORDS_DEADLINE;
        if let Err(e) = wait_uncancelled(&[(note.over.fd(), PollFlags::POLLIN)], deadline) {
            log::warn!("wait for what a VMM said last: {e}");
        }
        *note.cause.lock()
    }
}

impl Note {
    pub fn record(&self, cause: Option<Cause>) {
        *self.cause.lock() = cause;
    }

    pub fn close(&self) {
        self.over.cancel(CancelCause::Finished);
    }
}

impl End {
    /// Whether the guest came to its end in order.
    pub fn is_orderly(&self) -> bool {
        matches!(self, End::GuestShutDown | End::GuestRebooted | End::GuestUnmounted)
    }

    /// Whether nobody saw how it ended.
    pub fn is_unseen(&self) -> bool {
        *self == End::Vmm(Exit::Unknown)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::GuestShutDown => f.write_str("the guest shut itself down"),
            End::GuestRebooted => f.write_str("the guest rebooted, which ends its VM"),
            End::GuestPanicked(message) => write!(f, "the guest's kernel panicked: {message}"),
            End::GuestReset => f.write_str("the guest was reset without a shutdown: a triple fault, or a reset by force"),
            End::GuestUnmounted => f.write_str("the guest shut itself down: nobody saw it, but it has unmounted its root disk"),
            End::Told(cause) => write!(f, "the VMM was told to end ({cause})"),
            End::Vmm(exit) => write!(f, "the vmm died: {exit}"),
        }
    }
}

/// Finds out why the VMM with this directory exited, which said that `cause` is why. Waits for the rest of its console.
pub(super) fn of(exit: Exit, cause: Option<Cause>, consoles: &Consoles, dir: &Path) -> End {
    let (Exit::Status(0) | Exit::Unknown) = exit else { return End::Vmm(exit) };
    match cause {
        Some(Cause::GuestShutdown) => return End::GuestShutDown,
        Some(Cause::Host(cause)) => return End::Told(cause),
        Some(Cause::GuestReset | Cause::GuestPanic) | None => {}
    }
    last_words(consoles, dir).unwrap_or_else(|| match (cause, exit) {
        (Some(Cause::GuestPanic), _) => End::GuestPanicked("its console does not say why".to_owned()),
        (None, Exit::Unknown) => End::Vmm(exit),
        _ => End::GuestReset,
    })
}

/// How a guest ended as the console log in `dir` has it, which nobody writes any more.
pub fn from_console(dir: &Path) -> Option<End> {
    console::read(dir, Some(LAST_LINES)).ok().and_then(|text| parse(&text))
}

fn last_words(consoles: &Consoles, dir: &Path) -> Option<End> {
    let deadline = Instant::now() + LAST_WORDS_DEADLINE;
    let cancel = Cancel::try_new().ok()?;
    let mut follower = consoles.follow(dir, Some(0)).ok()?;
    loop {
        // Asked before the log is read, so that nothing falls between.
        let is_complete = !consoles.is_attached(dir);
        let found = from_console(dir);
        if found.is_some() || is_complete {
            return found;
        }
        while follower.next_chunk().ok()?.is_some() {}
        match follower.wait(deadline, &cancel) {
            Ok(Followed::More) => {}
            Ok(Followed::Deadline | Followed::Ended) | Err(_) => return None,
        }
    }
}

/// The newest of the last words since the VM was started.
fn parse(text: &str) -> Option<End> {
    const PANIC: &str = "Kernel panic - not syncing: ";
    let this_boot = text.lines().rev().take_while(|line| !line.starts_with(console::MARK));
    this_boot.into_iter().find_map(|line| {
        let says = |words: &str| line.contains(words);
        if let Some((_, message)) = line.split_once(PANIC) {
            let message = message.trim_end().trim_end_matches(" ]---");
            return Some(End::GuestPanicked(printable(&message.chars().take(PANIC_CHARS_MAX).collect::<String>())));
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

    const OFF: &str =
        "fcd-init: shutting down\r\nfcd-init: disk is clean\r\n[    9.1] sysrq: Power Off\r\n[    9.2] reboot: Power down\r\n";
    const PANIC: &str = "[    4.2] sysrq: Trigger a crash\r\n[    4.2] Kernel panic - not syncing: sysrq triggered crash\r\n\
                         [    4.2] CPU: 0 PID: 1 Comm: sh\r\n[    4.3] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---\r\n";

    #[test]
    fn last_words_say_how_a_guest_ended() {
        let panicked = || Some(End::GuestPanicked("sysrq triggered crash".to_owned()));
        for (text, end) in [
            (OFF, Some(End::GuestShutDown)),
            ("[ 1.0] reboot: Restarting system\r\n", Some(End::GuestRebooted)),
            // Firecracker's guests end by a reset, which our init asks for.
            ("fcd-init: disk is clean\r\n[ 2.0] sysrq: Resetting\r\n", Some(End::GuestShutDown)),
            (PANIC, panicked()),
            (&format!("{OFF}--- fcd: started ---\r\n{PANIC}"), panicked()),
            (&format!("{PANIC}--- fcd: started ---\r\n{OFF}"), Some(End::GuestShutDown)),
            (&format!("{OFF}--- fcd: started ---\r\n[ 0.0] Linux\r\n"), None),
            ("[ 2.0] sysrq: Resetting\r\n", None),
            ("", None),
        ] {
            assert_eq!(parse(text), end, "{text}");
        }
        let long = format!("Kernel panic - not syncing: \u{1b}[2J{}\r\n", "x".repeat(1000));
        let Some(End::GuestPanicked(message)) = parse(&long) else { panic!("a panic") };
        assert!(message.starts_with("\\u{1b}[2J") && message.len() < 2 * PANIC_CHARS_MAX);
    }

    /// The end of a VMM with `exit`, whose console said `text` and was then closed.
    fn end(exit: Exit, text: &str) -> End {
        end_because(exit, None, text)
    }

    /// The same of one that said that it ends because of `cause`.
    fn end_because(exit: Exit, cause: Option<&str>, text: &str) -> End {
        let dir = tempfile::tempdir().unwrap();
        let consoles = Arc::new(Consoles::try_new().unwrap());
        let (reader, mut writer) = std::io::pipe().unwrap();
        let from = File::from(OwnedFd::from(reader));
        consoles.attach(Attach { dir: dir.path().into(), bytes_max: 1 << 16, from, mark: "started".into() }).unwrap();
        let text = text.to_owned();
        let guest = crate::host::thread::spawn("guest", move || writer.write_all(text.as_bytes())).unwrap();
        let cause = cause.map(|name| Cause::parse(name).unwrap());
        let end = of(exit, cause, &consoles, dir.path());
        guest.join().unwrap().unwrap();
        end
    }

    #[test]
    fn vmm_that_exits_in_order_is_asked_for_what_its_guest_did() {
        assert_eq!(end(Exit::Status(0), OFF), End::GuestShutDown);
        assert!(matches!(end(Exit::Status(0), PANIC), End::GuestPanicked(_)));
        assert_eq!(end(Exit::Status(0), "[ 0.1] Linux version\r\n"), End::GuestReset);
    }

    #[test]
    fn vmm_that_is_not_our_child_is_judged_by_its_guest_and_else_unknown() {
        assert_eq!(end(Exit::Unknown, OFF), End::GuestShutDown);
        assert_eq!(end(Exit::Unknown, ""), End::Vmm(Exit::Unknown));
    }

    /// As QEMU 7.2 says it. A power-off is one whatever the console says, and an end from outside is not the guest's.
    #[test]
    fn vmm_that_says_why_it_ends_is_believed() {
        for exit in [Exit::Status(0), Exit::Unknown] {
            let end = |cause, text| end_because(exit, Some(cause), text);
            assert_eq!(end("guest-shutdown", ""), End::GuestShutDown);
            assert_eq!(end("guest-shutdown", PANIC), End::GuestShutDown);
            assert_eq!(end("guest-reset", "[ 0.1] Linux version\r\n"), End::GuestReset);
            assert_eq!(end("guest-reset", "[ 1.0] reboot: Restarting system\r\n"), End::GuestRebooted);
            assert!(matches!(end("guest-reset", PANIC), End::GuestPanicked(_)));
            assert!(matches!(end("guest-panic", ""), End::GuestPanicked(_)));
            assert_eq!(end("host-signal", OFF), End::Told("host-signal"));
        }
        assert_eq!(end_because(Exit::Signal(9), Some("guest-shutdown"), OFF), End::Vmm(Exit::Signal(9)));
        assert_eq!(Cause::parse("none"), None);
        assert_eq!(Cause::parse("snapshot-load"), None);
    }

    #[test]
    fn what_a_vmm_said_waits_for_who_listens_and_is_taken_once() {
        let notes = Arc::new(Notes::new());
        let identity = Identity { pid: 1, start_time: 2, boot_id: "of a test".into() };
        assert_eq!(notes.take(&identity), None);
        let note = notes.open(&identity).unwrap();
        let (theirs, whose) = (notes.clone(), identity.clone());
        let taken = crate::host::thread::spawn("takes", move || theirs.take(&whose)).unwrap();
        note.record(Some(Cause::GuestReset));
        note.close();
        assert_eq!(taken.join().unwrap(), Some(Cause::GuestReset));
        assert_eq!(notes.take(&identity), None);
    }

    #[test]
    fn vmm_that_was_killed_died_whatever_its_guest_said() {
        assert_eq!(end(Exit::Signal(9), OFF), End::Vmm(Exit::Signal(9)));
        assert_eq!(end(Exit::Status(1), OFF).to_string(), "the vmm died: exit status 1");
    }
}
