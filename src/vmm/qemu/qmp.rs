//! A QMP client with the parts that a driver needs: greeting, capabilities and commands. A guest
//! may control the VMM, so every answer has a deadline and a size limit, and the number of events
//! is limited too ([`super::incoming`]).
//!
//! Source: docs/interop/qmp-spec.txt of QEMU 7.2.

use super::incoming::{Budget, Incoming, LINE_BYTES_MAX, LINES_MAX, Message, Unusable};
use crate::error::{Error, Kind, Result};
use crate::sched::Instant;
use crate::vmm::conversation::Conversation;
use crate::vmm::dial::Deadline;
use crate::vmm::shutdown_cause::Cause;
use serde_json::{Value, json};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

/// A conversation with one monitor.
pub(super) struct Qmp<'a> {
    conversation: Conversation<'a>,
    incoming: Incoming,
    budget: Budget,
    shutdown_cause: Option<Cause>,
    /// True if an event has arrived since the last command was sent and [`Qmp::event`] has not yet
    /// returned it.
    has_event: bool,
}

impl<'a> Qmp<'a> {
    /// Reads the greeting and leaves negotiation mode. `stream` must be non-blocking.
    pub(super) fn open(stream: UnixStream, deadline: Deadline<'a>) -> Result<Self> {
        let budget = Budget::new(Instant::now());
        let mut qmp = Self {
            conversation: Conversation::new(stream, deadline),
            incoming: Incoming::default(),
            budget,
            shutdown_cause: None,
            has_event: false,
        };
        let greeting = qmp.message("greet the VMM")?;
        if greeting.greeting.is_none() {
            return Err(Error::new(
                Kind::VmmFailed,
                "greet the VMM: it did not send a QMP greeting",
            ));
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Sets the deadline of later commands.
    pub(super) fn set_deadline(&mut self, deadline: Deadline<'a>) {
        self.conversation.deadline = deadline;
    }

    /// Returns the reason for the VMM's end, if the VMM has reported it. Reads all messages that
    /// have arrived.
    pub(super) fn shutdown_cause(&mut self) -> Option<Cause> {
        self.conversation.deadline.at = Instant::now();
        while self.message("read the VMM's last messages").is_ok() {}
        self.shutdown_cause
    }

    /// Waits for an event. Returns at once if one has arrived since the last command was sent: QEMU
    /// sends the events of a migration from another thread, so an event may overtake the answer to
    /// a query that does not yet reflect it.
    pub(super) fn event(&mut self) -> Result<()> {
        if std::mem::take(&mut self.has_event) {
            return Ok(());
        }
        self.message("wait for an event of the VMM").map(drop)
    }

    /// Runs a command and returns its answer.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.ask(command, arguments)?;
        self.answer(command)
    }

    /// Passes a descriptor to the VMM under a name for later commands (`getfd`).
    pub(super) fn give(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        let doing = "pass a file to the VMM";
        let line =
            json!({ "execute": "getfd", "arguments": { "fdname": name } }).to_string() + "\n";
        self.conversation.send_with(line.as_bytes(), fd, doing)?;
        self.answer("getfd").map(drop)
    }

    /// Sends a command. Its answer is read with [`Qmp::answer`].
    pub(super) fn ask(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.has_event = false;
        self.conversation
            .send(line.as_bytes(), &format!("send {command} to the VMM"))
    }

    /// Reads the answer to the last command. After a `timeout`, this method can be called again.
    pub(super) fn answer(&mut self, command: &str) -> Result<Value> {
        let doing = format!("send {command} to the VMM");
        loop {
            match self.message(&doing)? {
                Message {
                    answer: Some(answer),
                    ..
                } => return Ok(answer),
                Message {
                    error: Some(refusal),
                    ..
                } => return Err(Error::new(Kind::VmmFailed, refusal.text(&doing))),
                Message { event, .. } => {
                    log::debug!("event of a VMM: {event:?}");
                    self.has_event = true;
                }
            }
        }
    }

    /// Runs a command of the human monitor and returns its output.
    pub(super) fn human(&mut self, command: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", &json!({ "command-line": command }))?;
        answer.as_str().map(str::to_owned).ok_or_else(|| {
            Error::new(
                Kind::VmmFailed,
                format!("send {command} to the VMM: the answer is not text"),
            )
        })
    }

    fn message(&mut self, doing: &str) -> Result<Message> {
        let mut piece = [0; 4096];
        loop {
            if let Some(message) = self.incoming.message().map_err(|e| unusable(doing, e))? {
                if !self.budget.spend(Instant::now()) {
                    return Err(flooded(doing));
                }
                self.shutdown_cause = message.shutdown_cause().or(self.shutdown_cause);
                return Ok(message);
            }
            let n = self.conversation.read(&mut piece, doing)?;
            self.incoming.push(&piece[..n]);
        }
    }
}

fn unusable(doing: &str, why: Unusable) -> Error {
    match why {
        Unusable::TooLong => Error::new(
            Kind::VmmFailed,
            format!("{doing}: the answer is longer than {LINE_BYTES_MAX} bytes"),
        ),
        Unusable::NotQmp(e) => {
            Error::new(Kind::VmmFailed, format!("{doing}: the answer is not QMP")).with_source(e)
        }
    }
}

fn flooded(doing: &str) -> Error {
    Error::new(
        Kind::VmmFailed,
        format!("{doing}: the VMM floods its monitor with more than {LINES_MAX} lines"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::scripted::{GREETING, talk};
    use super::*;
    use crate::locks::Cancel;
    use std::io::Write;
    use std::time::Duration;

    #[test]
    fn answer_after_events_is_found() {
        let script = format!(
            "{GREETING}{{\"return\": {{}}}}\r\n{{\"event\": \"RESUME\", \"data\": {{}}, \"timestamp\": {{}}}}\r\n{{\"return\": \"text\\r\\n\"}}\r\n"
        );
        let (text, asked) = talk(&script, 10_000, |qmp, _| {
            qmp.unwrap().human("info usernet").unwrap()
        });
        assert_eq!(text, "text\r\n");
        assert_eq!(
            asked,
            "{\"arguments\":{},\"execute\":\"qmp_capabilities\"}\n\
             {\"arguments\":{\"command-line\":\"info usernet\"},\"execute\":\"human-monitor-command\"}\n"
        );
    }

    #[test]
    fn refusal_is_error_with_its_text() {
        let script = format!(
            "{GREETING}{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"no \\u001b\"}}}}\n"
        );
        let (e, _) = talk(&script, 10_000, |qmp, _| qmp.err().unwrap());
        assert_eq!(e.kind(), Kind::VmmFailed);
        assert_eq!(
            e.to_string(),
            "send qmp_capabilities to the VMM: GenericError: no \\u{1b}"
        );
    }

    #[test]
    fn silence_garbage_and_floods_are_errors() {
        let kind = |script: &str, ms| talk(script, ms, |qmp, _| qmp.err().unwrap().kind()).0;
        assert_eq!(kind("", 10), Kind::Timeout);
        assert_eq!(kind("SSH-2.0\n", 10_000), Kind::VmmFailed);
        assert_eq!(kind("{\"return\": {}}\n", 10_000), Kind::VmmFailed);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let flood =
            crate::host::thread::spawn(
                "flood",
                move || while theirs.write_all(&[b'x'; 4096]).is_ok() {},
            )
            .unwrap();
        let cancel = Cancel::try_new().unwrap();
        let deadline = Deadline {
            at: Instant::now() + Duration::from_secs(20),
            cancel: &cancel,
        };
        assert_eq!(
            Qmp::open(ours, deadline).err().unwrap().kind(),
            Kind::VmmFailed
        );
        flood.join().unwrap();
    }

    #[test]
    fn flood_of_events_before_answer_is_error() {
        let event = "{\"event\": \"RTC_CHANGE\"}\n";
        let script = format!(
            "{GREETING}{}{{\"return\": {{}}}}\n",
            event.repeat(LINES_MAX as usize)
        );
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let flood = crate::host::thread::spawn("flood", move || {
            (theirs.write_all(script.as_bytes()), theirs)
        })
        .unwrap();
        let cancel = Cancel::try_new().unwrap();
        let deadline = Deadline {
            at: Instant::now() + Duration::from_secs(20),
            cancel: &cancel,
        };
        let e = Qmp::open(ours, deadline).err().unwrap();
        assert!(
            e.kind() == Kind::VmmFailed && e.to_string().contains("floods its monitor"),
            "{e}"
        );
        let _ = flood.join().unwrap();
    }

    /// QEMU sends the event and hangs up. The event must be read even if a command is sent at the
    /// same moment.
    #[test]
    fn shutdown_cause_is_known_after_hang_up() {
        let event = "{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-shutdown\"}}\n";
        for asks in [false, true] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let cancel = Cancel::try_new().unwrap();
            theirs
                .write_all(format!("{GREETING}{{\"return\": {{}}}}\n").as_bytes())
                .unwrap();
            let deadline = Deadline {
                at: Instant::now() + Duration::from_secs(20),
                cancel: &cancel,
            };
            let mut qmp = Qmp::open(ours, deadline).unwrap();
            theirs.write_all(event.as_bytes()).unwrap();
            drop(theirs);
            if asks {
                assert_eq!(
                    qmp.execute("query-status", &json!({})).unwrap_err().kind(),
                    Kind::VmmFailed
                );
            }
            assert_eq!(qmp.shutdown_cause(), Some(Cause::GuestShutdown));
        }
    }

    #[test]
    fn cancel_ends_conversation() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let cancel = Cancel::try_new().unwrap();
        cancel.cancel(crate::locks::CancelCause::VmStopped);
        let deadline = Deadline {
            at: Instant::now() + Duration::from_secs(20),
            cancel: &cancel,
        };
        let e = Qmp::open(ours, deadline).err().unwrap();
        assert_eq!(
            (e.kind(), e.to_string()),
            (
                Kind::Cancelled,
                "greet the VMM: cancelled: the VM was stopped".into()
            )
        );
    }
}
