//! QMP, as much as a driver needs: greeting, capabilities, commands. Every answer has a deadline and a bound, and so has
//! the number of events ([`super::incoming`]).
//!
//! Source: docs/interop/qmp-spec.txt of QEMU 7.2. The other side is a process that a guest may have taken over.

use super::incoming::{Budget, Incoming, LINE_BYTES_MAX, LINES_MAX, Message, Unusable};
use crate::error::{Error, Kind, Result};
use crate::host::wait::{WaitResult, cancelled, wait_any};
use crate::vmm::dial::Patience;
use crate::vmm::end::Cause;
use nix::poll::PollFlags;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// One conversation.
pub struct Qmp<'a> {
    stream: UnixStream,
    patience: Patience<'a>,
    incoming: Incoming,
    budget: Budget,
    shutdown_cause: Option<Cause>,
}

impl<'a> Qmp<'a> {
    /// Reads the greeting and leaves the negotiation mode. `stream` must be non-blocking.
    pub fn open(stream: UnixStream, patience: Patience<'a>) -> Result<Self> {
        let budget = Budget::new(Instant::now());
        let mut qmp = Self { stream, patience, incoming: Incoming::default(), budget, shutdown_cause: None };
        let greeting = qmp.message("greet the VMM")?;
        if greeting.greeting.is_none() {
            return Err(Error::new(Kind::VmmFailed, "greet the VMM: it does not speak QMP"));
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// For what is asked from now on.
    pub fn be_patient(&mut self, patience: Patience<'a>) {
        self.patience = patience;
    }

    /// Why the VMM ends, once it has said so. Reads what has come and nobody has looked at yet.
    pub fn shutdown_cause(&mut self) -> Option<Cause> {
        self.patience.deadline = Instant::now();
        while self.message("read what the VMM said last").is_ok() {}
        self.shutdown_cause
    }

    /// Waits until the VMM tells something by itself.
    pub fn event(&mut self) -> Result<()> {
        self.message("wait for an event of the VMM").map(drop)
    }

    /// One command; its answer.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.ask(command, arguments)?;
        self.answer(command)
    }

    /// Gives the VMM a descriptor, under a name for later commands (`getfd`).
    pub fn give(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        let doing = "give the VMM a file";
        let line = json!({ "execute": "getfd", "arguments": { "fdname": name } }).to_string() + "\n";
        self.wait(PollFlags::POLLOUT, doing)?;
        let fds = [fd.as_raw_fd()];
        let (data, rights) = ([IoSlice::new(line.as_bytes())], [ControlMessage::ScmRights(&fds)]);
        let sent = sendmsg::<()>(self.stream.as_raw_fd(), &data, &rights, MsgFlags::MSG_NOSIGNAL, None);
        match sent.map_err(|e| Error::io(doing, std::io::Error::from(e)))? {
            n if n == line.len() => self.answer("getfd").map(drop),
            _ => Err(Error::new(Kind::VmmFailed, format!("{doing}: it takes no more"))),
        }
    }

    /// One command, whose answer is the next.
    pub fn ask(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.send(line.as_bytes(), &format!("ask the VMM for {command}"))
    }

    /// The answer to what was asked last. After a `timeout` it may be waited for again.
    pub fn answer(&mut self, command: &str) -> Result<Value> {
        let doing = format!("ask the VMM for {command}");
        loop {
            match self.message(&doing)? {
                Message { answer: Some(answer), .. } => return Ok(answer),
                Message { error: Some(refusal), .. } => return Err(Error::new(Kind::VmmFailed, refusal.text(&doing))),
                Message { event, .. } => log::debug!("event of a VMM: {event:?}"),
            }
        }
    }

    /// A command of the human monitor; its text.
    pub fn human(&mut self, command: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", &json!({ "command-line": command }))?;
        answer
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| Error::new(Kind::VmmFailed, format!("ask the VMM for {command}: no text")))
    }

    fn wait(&self, flags: PollFlags, doing: &str) -> Result<()> {
        let Patience { deadline, cancel } = self.patience;
        match wait_any(&[(self.stream.as_fd(), flags)], deadline, cancel).map_err(|e| Error::io(doing, e))? {
            WaitResult::Ready => Ok(()),
            WaitResult::Deadline => Err(Error::new(Kind::Timeout, format!("{doing}: no answer in time"))),
            WaitResult::Cancelled => Err(cancelled(doing, cancel)),
        }
    }

    fn send(&mut self, mut bytes: &[u8], doing: &str) -> Result<()> {
        while !bytes.is_empty() {
            self.wait(PollFlags::POLLOUT, doing)?;
            match self.stream.write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(Error::io(doing, e)),
            }
        }
        Ok(())
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
            self.wait(PollFlags::POLLIN, doing)?;
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(Error::new(Kind::VmmFailed, format!("{doing}: the VMM hung up"))),
                Ok(n) => self.incoming.push(&piece[..n]),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(Error::io(doing, e)),
            }
        }
    }
}

fn unusable(doing: &str, why: Unusable) -> Error {
    match why {
        Unusable::TooLong => Error::new(Kind::VmmFailed, format!("{doing}: the answer is longer than {LINE_BYTES_MAX} bytes")),
        Unusable::NotQmp(e) => Error::new(Kind::VmmFailed, format!("{doing}: the answer is not QMP")).with_source(e),
    }
}

fn flooded(doing: &str) -> Error {
    Error::new(Kind::VmmFailed, format!("{doing}: the VMM floods its monitor, more than {LINES_MAX} lines came"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locks::Cancel;
    use std::time::Duration;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

    /// Says all of `script` whatever it is asked, and gives what was asked of it.
    fn talk<T>(script: &str, ms: u64, with: impl FnOnce(Result<Qmp<'_>>, &Cancel) -> T) -> (T, String) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(script.as_bytes()).unwrap();
        let cancel = Cancel::try_new().unwrap();
        let patience = Patience { deadline: Instant::now() + Duration::from_millis(ms), cancel: &cancel };
        let result = with(Qmp::open(ours, patience), &cancel);
        let mut asked = String::new();
        theirs.read_to_string(&mut asked).unwrap();
        (result, asked)
    }

    #[test]
    fn events_are_passed_over_and_answers_found() {
        let script = format!(
            "{GREETING}{{\"return\": {{}}}}\r\n{{\"event\": \"RESUME\", \"data\": {{}}, \"timestamp\": {{}}}}\r\n{{\"return\": \"text\\r\\n\"}}\r\n"
        );
        let (text, asked) = talk(&script, 10_000, |qmp, _| qmp.unwrap().human("info usernet").unwrap());
        assert_eq!(text, "text\r\n");
        assert_eq!(
            asked,
            "{\"arguments\":{},\"execute\":\"qmp_capabilities\"}\n\
             {\"arguments\":{\"command-line\":\"info usernet\"},\"execute\":\"human-monitor-command\"}\n"
        );
    }

    #[test]
    fn a_refusal_is_an_error_with_its_text() {
        let script = format!("{GREETING}{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"no \\u001b\"}}}}\n");
        let (e, _) = talk(&script, 10_000, |qmp, _| qmp.err().unwrap());
        assert_eq!(e.kind(), Kind::VmmFailed);
        assert_eq!(e.to_string(), "ask the VMM for qmp_capabilities: GenericError: no \\u{1b}");
    }

    #[test]
    fn silence_garbage_and_floods_end() {
        let kind = |script: &str, ms| talk(script, ms, |qmp, _| qmp.err().unwrap().kind()).0;
        assert_eq!(kind("", 10), Kind::Timeout);
        assert_eq!(kind("SSH-2.0\n", 10_000), Kind::VmmFailed);
        assert_eq!(kind("{\"return\": {}}\n", 10_000), Kind::VmmFailed);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let flood = crate::host::thread::spawn("flood", move || while theirs.write_all(&[b'x'; 4096]).is_ok() {}).unwrap();
        let cancel = Cancel::try_new().unwrap();
        let patience = Patience { deadline: Instant::now() + Duration::from_secs(20), cancel: &cancel };
        assert_eq!(Qmp::open(ours, patience).err().unwrap().kind(), Kind::VmmFailed);
        flood.join().unwrap();
    }

    #[test]
    fn flood_of_events_before_an_answer_is_refused() {
        let event = "{\"event\": \"RTC_CHANGE\"}\n";
        let script = format!("{GREETING}{}{{\"return\": {{}}}}\n", event.repeat(LINES_MAX as usize));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let flood = crate::host::thread::spawn("flood", move || (theirs.write_all(script.as_bytes()), theirs)).unwrap();
        let cancel = Cancel::try_new().unwrap();
        let patience = Patience { deadline: Instant::now() + Duration::from_secs(20), cancel: &cancel };
        let e = Qmp::open(ours, patience).err().unwrap();
        assert!(e.kind() == Kind::VmmFailed && e.to_string().contains("floods its monitor"), "{e}");
        let _ = flood.join().unwrap();
    }

    /// QEMU says it and hangs up; who asked something else at that moment gets it all the same.
    #[test]
    fn why_a_vmm_ends_is_known_after_it_hung_up() {
        let event = "{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-shutdown\"}}\n";
        for asks in [false, true] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let cancel = Cancel::try_new().unwrap();
            theirs.write_all(format!("{GREETING}{{\"return\": {{}}}}\n").as_bytes()).unwrap();
            let patience = Patience { deadline: Instant::now() + Duration::from_secs(20), cancel: &cancel };
            let mut qmp = Qmp::open(ours, patience).unwrap();
            theirs.write_all(event.as_bytes()).unwrap();
            drop(theirs);
            if asks {
                assert_eq!(qmp.execute("query-status", &json!({})).unwrap_err().kind(), Kind::Host);
            }
            assert_eq!(qmp.shutdown_cause(), Some(Cause::GuestShutdown));
        }
    }

    #[test]
    fn a_cancel_ends_it() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let cancel = Cancel::try_new().unwrap();
        cancel.cancel(crate::locks::CancelCause::VmStopped);
        let patience = Patience { deadline: Instant::now() + Duration::from_secs(20), cancel: &cancel };
        let e = Qmp::open(ours, patience).err().unwrap();
        assert_eq!((e.kind(), e.to_string()), (Kind::Cancelled, "greet the VMM: cancelled: the VM was stopped".into()));
    }
}
