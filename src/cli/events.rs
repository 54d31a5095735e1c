//! `events`: prints changes of VMs and operations as they happen.

use super::context::{Context, Env};
use super::logs::{is_unread, unread};
use super::op::name as op_state;
use super::output::size;
use super::printer::Printer;
use super::vm_text::{auto_ports, settings, workspace_line};
use crate::api::event::{Event, EventsWatch, EventsWatchRequest, Members, Snapshot, What};
use crate::api::frame::Note;
use crate::api::port::AutoPorts;
use crate::api::vm::{Pending, RateLimits, Vm, WorkspaceInfo};
use crate::client::{Client, Failure, Hangup, Result};
use crate::error::{Error, Kind};
use crate::host::text::printable;
use crate::host::wait::{WaitResult, wait_any};
use crate::locks::{Cancel, CancelCause};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use nix::poll::PollFlags;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the thread that watches stdout waits in one call. Every event wakes the thread, so this
/// is only an upper bound.
const POLL_TIMEOUT: Duration = Duration::from_secs(3600);

#[derive(clap::Args, Debug)]
#[command(after_help = "\
Without --since, the current state of all VMs is printed first. With --json, every line is a\n\
document with its `event` and the number `seq` of the change that it belongs to; `set` has the\n\
members of a VM that changed. The lines of one change are written together, so --since can be\n\
the `seq` of the last line that was read.")]
pub(super) struct Args {
    /// Continue after the change with this number
    #[arg(long, value_name = "N")]
    since: Option<u64>,
}

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        env,
        ..
    } = ctx;
    let mut client = connector.connect(printer)?;
    let stdout = StdoutWatcher::start(&stdio.stdout, &client)?;
    let mut screen = Screen {
        zone: zone(env),
        last: args.since,
        in_snapshot: false,
    };
    loop {
        let request = EventsWatchRequest { since: screen.last };
        let result = client.call_more::<EventsWatch>(&request, &[], &mut |note| {
            screen.show(printer, note)?;
            if printer.is_unread() {
                Err(unread())
            } else {
                Ok(())
            }
        });
        match result {
            // Either side was too slow and notes were dropped. The daemon may still have them, so
            // resume from there.
            Ok(reply) => screen.last = Some(reply.resume_seq),
            Err(e) if is_unread(&e) || stdout.reader_exited() => return Ok(0),
            Err(e) => return Err(screen.with_resume_hint(e)),
        }
    }
}

/// Returns the time zone of the caller.
fn zone(env: &Env) -> TimeZone {
    match env("TZ").as_deref() {
        Some("UTC") => TimeZone::UTC,
        _ => TimeZone::system(),
    }
}

struct Screen {
    zone: TimeZone,
    /// The sequence number of the last change that was printed.
    last: Option<u64>,
    /// True if the next note continues the snapshot.
    in_snapshot: bool,
}

impl Screen {
    fn show(&mut self, printer: &mut Printer, note: Note) -> Result<()> {
        match note {
            Note::Snapshot(snapshot) => {
                self.snapshot(printer, &snapshot)?;
                self.in_snapshot = snapshot.more;
                // Only a complete snapshot counts. If the connection breaks within one, the next
                // call must get a new snapshot.
                self.last = if snapshot.more {
                    self.last
                } else {
                    Some(snapshot.seq)
                };
            }
            Note::Events(batch) => {
                let known = batch.events.iter().filter(|e| e.what != What::Unknown);
                // All events of a change go out in one write, so that a reader gets a change whole
                // or not at all.
                let text: Result<String> = known
                    .map(|e| {
                        if printer.json {
                            json(e, None)
                        } else {
                            Ok(self.line(e))
                        }
                    })
                    .collect();
                printer.text(&text?)?;
                self.last = Some(batch.seq);
            }
            Note::Lagged(lagged) if printer.json => {
                printer.text(&json(&lagged, Some("lagged"))?)?
            }
            Note::Lagged(lagged) => {
                let dropped = lagged.dropped;
                printer.note(&format!(
                    "{dropped} changes were dropped because they were not read in time; continuing after change {}",
                    lagged.resume_seq
                ));
            }
            _ => {}
        }
        Ok(())
    }

    fn snapshot(&self, printer: &mut Printer, snapshot: &Snapshot) -> Result<()> {
        if printer.json {
            return printer.text(&json(snapshot, Some("snapshot"))?);
        }
        if snapshot.resync && !self.in_snapshot {
            let since = self.last.unwrap_or_default();
            printer.note(&format!(
                "changes after {since} are no longer available; state after change {}:",
                snapshot.seq
            ));
        }
        let line = |vm: &Vm| {
            let reason = vm
                .reason
                .as_ref()
                .map(|r| format!(" ({r})"))
                .unwrap_or_default();
            self.words(
                snapshot.at,
                vm.name.as_str(),
                &format!("is {}{reason}", vm.state.name()),
            )
        };
        printer.text(&snapshot.vms.iter().map(line).collect::<String>())
    }

    /// Returns one line, or nothing for an event that this version does not know.
    fn line(&self, event: &Event) -> String {
        let text = match &event.what {
            What::Created { .. } => "created".to_owned(),
            What::Deleted { .. } => "deleted".to_owned(),
            What::State {
                from, to, reason, ..
            } => {
                let reason = reason
                    .as_ref()
                    .map(|r| format!(": {r}"))
                    .unwrap_or_default();
                format!("{} -> {}{reason}", from.name(), to.name())
            }
            What::Changed { set } => changed(set),
            What::OpEnded {
                method,
                state,
                error,
                ..
            } => {
                let why = error
                    .as_ref()
                    .map(|fault| format!(": {fault}"))
                    .unwrap_or_default();
                format!("{method} {}{why}", op_state(*state))
            }
            What::Unknown => String::new(),
        };
        let name = event.name.as_ref().map_or("-", |name| name.as_str());
        if text.is_empty() {
            text
        } else {
            self.words(event.at, name, &text)
        }
    }

    fn words(&self, at: u64, name: &str, text: &str) -> String {
        let at = i64::try_from(at)
            .ok()
            .and_then(|at| Timestamp::from_second(at).ok())
            .unwrap_or_default();
        let time = at.to_zoned(self.zone.clone()).strftime("%H:%M:%S");
        format!("{time}  {name}  {}\n", printable(text))
    }

    /// Adds a hint on how to continue, because sequence numbers survive a restart of the daemon.
    fn with_resume_hint(&self, failure: Failure) -> Failure {
        match self.last {
            Some(last) if failure.unreachable || failure.is(Kind::ShuttingDown) => {
                failure.hint(format!("once fcd runs again: fcctl events --since {last}"))
            }
            _ => failure,
        }
    }
}

/// Describes the members that people care about. Process IDs and addresses are left out.
fn changed(set: &Members) -> String {
    fn member<T: DeserializeOwned>(set: &Members, name: &str) -> Option<T> {
        set.get(name).and_then(|value| T::deserialize(value).ok())
    }
    // A rate of null means that the limit was removed.
    let rate = |name| member::<Option<u64>>(set, name).map(Option::unwrap_or_default);
    let now = settings(&Pending {
        vcpus: member(set, "vcpus"),
        mem_mib: member(set, "mem_mib"),
        disk_bytes: member(set, "disk_bytes"),
        rates: RateLimits {
            disk_bytes_per_s: rate("disk_bytes_per_s"),
            disk_ops_per_s: rate("disk_ops_per_s"),
            net_rx_bytes_per_s: rate("net_rx_bytes_per_s"),
            net_tx_bytes_per_s: rate("net_tx_bytes_per_s"),
        },
    });
    let pending = member::<Option<Pending>>(set, "pending").map(|p| match p {
        Some(p) => format!("at next start: {}", settings(&p)),
        None => String::new(),
    });
    let rm = member(set, "rm").map(|rm| {
        if rm {
            "deleted when it stops"
        } else {
            "kept when it stops"
        }
        .to_owned()
    });
    let workspace = member::<Option<WorkspaceInfo>>(set, "workspace").map(|w| match w {
        Some(w) => format!("workspace {}", workspace_line(&w)),
        None => "no workspace".to_owned(),
    });
    let answers = member(set, "unresponsive").map(|hangs| {
        if hangs {
            "VMM does not respond"
        } else {
            "VMM responds again"
        }
        .to_owned()
    });
    let paused = member(set, "paused")
        .map(|is_paused| if is_paused { "paused" } else { "resumed" }.to_owned());
    let balloon = member::<Option<u64>>(set, "balloon_mib")
        .flatten()
        .map(|mib| format!("asked to keep {} of memory", size(mib << 20)));
    let auto = member::<Option<AutoPorts>>(set, "auto_ports").map(|auto| match auto {
        Some(auto) => format!("automatic ports: {}", auto_ports(&auto)),
        None => "no automatic ports".to_owned(),
    });
    let words = [
        Some(now),
        pending,
        rm,
        workspace,
        answers,
        paused,
        balloon,
        auto,
    ]
    .into_iter()
    .flatten()
    .filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(", ")
}

/// Formats one line of JSON. `event` is added as the event's name if the value does not contain
/// one.
fn json(value: &impl serde::Serialize, event: Option<&str>) -> Result<String> {
    let written = |e| Failure::from(Error::internal("write JSON").with_source(e));
    let Some(event) = event else {
        return serde_json::to_string(value)
            .map(|text| text + "\n")
            .map_err(written);
    };
    let mut members = Members::from_iter([("event".to_owned(), event.into())]);
    if let serde_json::Value::Object(own) = serde_json::to_value(value).map_err(written)? {
        members.extend(own);
    }
    serde_json::to_string(&members)
        .map(|text| text + "\n")
        .map_err(written)
}

/// Watches whether the reader of stdout exits, even while no event arrives, and then hangs up.
struct StdoutWatcher {
    reader_exited: Arc<AtomicBool>,
    stop: Cancel,
    thread: Option<JoinHandle<()>>,
}

impl StdoutWatcher {
    fn start(stdout: &File, client: &Client) -> Result<Self> {
        let stop = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        let stdout = stdout
            .try_clone()
            .map_err(|e| Error::io("duplicate stdout", e))?;
        let (hangup, reader_exited): (Hangup, _) =
            (client.hangup()?, Arc::new(AtomicBool::new(false)));
        let (flag, stopped) = (reader_exited.clone(), stop.clone());
        let body = move || {
            // No events are requested, so poll returns only for an error or a hang-up (poll(2): a
            // pipe without a reader).
            let poll = || {
                wait_any(
                    &[(stdout.as_fd(), PollFlags::empty())],
                    Instant::now() + POLL_TIMEOUT,
                    &stopped,
                )
            };
            while let Ok(woken) = poll() {
                match woken {
                    WaitResult::Deadline => {}
                    WaitResult::Cancelled => return,
                    WaitResult::Ready => {
                        flag.store(true, Ordering::Relaxed);
                        return hangup.hang_up();
                    }
                }
            }
        };
        Ok(Self {
            reader_exited,
            stop,
            thread: Some(crate::host::thread::spawn("stdout", body)?),
        })
    }

    fn reader_exited(&self) -> bool {
        self.reader_exited.load(Ordering::Relaxed)
    }
}

impl Drop for StdoutWatcher {
    fn drop(&mut self) {
        self.stop.cancel(CancelCause::CommandEnded);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
#[path = "events_tests.rs"]
mod tests;
