//! A transport without guests, for tests of the daemon. An address identifies a guest. Every wait
//! polls like the real transport: over the caller's descriptors, the cancel token, the hang-up, the
//! deadline and the idle limit.

use super::wait::Wait;
use super::{Control, ExecSpec, Sink, Source, Streams, Target, Transport};
use crate::api::exec::{Exit, PtySize};
use crate::api::stream;
use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, CancelCause, Mutex, Rank, region};
use crate::sched::{HashMap, Instant};
use nix::poll::{PollFd, PollFlags};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Limit of the bytes that are kept of a command's input.
const STDIN_KEPT_MAX: usize = 4 << 20;

/// A gate that stays closed until it is opened, and then stays open. Clones share one gate.
#[derive(Clone)]
pub struct Gate(Cancel);

impl Gate {
    pub fn closed() -> Self {
        Self(Cancel::try_new().expect("an eventfd"))
    }
    pub fn open(&self) {
        self.0.cancel(CancelCause::Finished);
    }
    pub fn is_open(&self) -> bool {
        self.0.is_cancelled()
    }
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }
    fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(self.fd(), PollFlags::POLLIN)
    }
}

/// How a guest answers `wait_ready`.
#[derive(Clone, Default)]
pub enum Readiness {
    #[default]
    Instant,
    /// The guest is ready when the gate opens.
    Gated(Gate),
    Fails(Kind, String),
}

/// The result of a command.
#[derive(Clone)]
pub struct Answer {
    pub exit: Exit,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// The command ends only when this gate opens, or at a signal.
    pub hold: Option<Gate>,
}

impl Default for Answer {
    fn default() -> Self {
        Self {
            exit: Exit::Status(0),
            stdout: Vec::new(),
            stderr: Vec::new(),
            hold: None,
        }
    }
}

impl Answer {
    pub fn status(status: u8) -> Self {
        Self {
            exit: Exit::Status(status),
            ..Self::default()
        }
    }
    #[must_use]
    pub fn stdout(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdout = bytes.into();
        self
    }
    #[must_use]
    pub fn stderr(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stderr = bytes.into();
        self
    }
    #[must_use]
    pub fn hold(mut self, gate: &Gate) -> Self {
        self.hold = Some(gate.clone());
        self
    }
}

/// A command that has started.
#[derive(Clone, Debug)]
pub struct Call {
    pub addr: SocketAddr,
    pub command: String,
    /// The first 4 MiB of the command's input, available once the input has ended.
    pub stdin: Vec<u8>,
    pub stdin_bytes: u64,
}

type OnDial = Arc<dyn Fn() -> Kind + Send + Sync>;
type Respond = Arc<dyn Fn(&Call) -> Answer + Send + Sync>;

#[derive(Default, Clone)]
struct Guest {
    readiness: Readiness,
    /// A function that is called at each dial. Dialing then fails with the kind that it returns.
    on_dial: Option<OnDial>,
    /// True if no bytes pass in either direction.
    cut: bool,
    /// After this many bytes, a command stops reading its input until the gate opens.
    stall: Option<(u64, Gate)>,
    /// Opening this gate breaks the connection.
    lost: Option<Gate>,
    live: usize,
}

#[derive(Default)]
struct State {
    guests: HashMap<SocketAddr, Guest>,
    answers: Vec<(String, Respond)>,
    calls: Vec<Call>,
    resizes: Vec<PtySize>,
    signals: Vec<String>,
}

/// The fake transport. Clones share one state.
#[derive(Clone)]
pub struct FakeTransport {
    state: Arc<Mutex<State>>,
}

impl Default for FakeTransport {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeTransport {
    pub fn new() -> Self {
        Self {
            state: Arc::new(Mutex::new(Rank::Sessions, State::default())),
        }
    }

    fn guest<T>(&self, addr: SocketAddr, change: impl FnOnce(&mut Guest) -> T) -> T {
        change(self.state.lock().guests.entry(addr).or_default())
    }

    pub fn set_readiness(&self, addr: SocketAddr, readiness: Readiness) {
        self.guest(addr, |g| g.readiness = readiness);
    }
    /// Makes dialing fail with `guest_unavailable`, or succeed again.
    pub fn set_unreachable(&self, addr: SocketAddr, unreachable: bool) {
        let refuse: OnDial = Arc::new(|| Kind::GuestUnavailable);
        self.guest(addr, |g| g.on_dial = unreachable.then_some(refuse));
    }
    /// Calls `on_dial` at each dial, which then fails with the kind that the function returns.
    pub fn fail_dialing(
        &self,
        addr: SocketAddr,
        on_dial: impl Fn() -> Kind + Send + Sync + 'static,
    ) {
        self.guest(addr, |g| g.on_dial = Some(Arc::new(on_dial)));
    }
    /// Cuts or restores the guest's network. Commands that start while it is cut neither answer nor
    /// end, and only the caller can end them.
    pub fn set_cut(&self, addr: SocketAddr, cut: bool) {
        self.guest(addr, |g| g.cut = cut);
    }
    /// Makes commands stop reading their input after this many bytes, until the returned gate
    /// opens.
    pub fn stall_reads(&self, addr: SocketAddr, after_bytes: u64) -> Gate {
        let gate = Gate::closed();
        self.guest(addr, |g| g.stall = Some((after_bytes, gate.clone())));
        gate
    }
    /// Breaks all connections to the guest. Calls that use them fail with `guest_lost`.
    pub fn lose(&self, addr: SocketAddr) {
        if let Some(gate) = self.guest(addr, |g| g.lost.take()) {
            gate.open();
        }
    }
    /// Sets the answer of commands that begin with `prefix`. The latest match wins. By default a
    /// command prints nothing and exits with status 0.
    pub fn on(&self, prefix: &str, respond: impl Fn(&Call) -> Answer + Send + Sync + 'static) {
        self.state
            .lock()
            .answers
            .push((prefix.to_owned(), Arc::new(respond)));
    }
    /// Returns the number of running commands, including those that are still dialing.
    pub fn live(&self, addr: SocketAddr) -> usize {
        self.guest(addr, |g| g.live)
    }
    pub fn live_total(&self) -> usize {
        self.state.lock().guests.values().map(|g| g.live).sum()
    }
    /// Returns every command whose input has ended, in order of these ends.
    pub fn calls(&self) -> Vec<Call> {
        self.state.lock().calls.clone()
    }
    pub fn resizes(&self) -> Vec<PtySize> {
        self.state.lock().resizes.clone()
    }
    pub fn signals(&self) -> Vec<String> {
        self.state.lock().signals.clone()
    }
}

struct Live<'a>(&'a FakeTransport, SocketAddr);
impl Drop for Live<'_> {
    fn drop(&mut self) {
        self.0.guest(self.1, |g| g.live -= 1);
    }
}

impl Transport for FakeTransport {
    fn wait_ready(&self, target: &Target, deadline: Instant, cancel: &Cancel) -> Result<()> {
        let _blocking = region(Rank::GuestIo);
        let wait = Wait::new(cancel).deadline(Some(deadline));
        wait.check()?;
        match self.guest(target.addr, |g| g.readiness.clone()) {
            Readiness::Instant => Ok(()),
            Readiness::Fails(kind, message) => Err(Error::new(kind, message)),
            Readiness::Gated(gate) => {
                while !gate.is_open() {
                    wait.poll(&[gate.poll_fd()], None)
                        .map_err(|e| match e.kind() {
                            Kind::Timeout => Error::new(
                                Kind::BootTimeout,
                                "wait for the guest's SSH server: it does not respond",
                            ),
                            _ => e,
                        })?;
                }
                Ok(())
            }
        }
    }

    fn exec(
        &self,
        target: &Target,
        spec: &ExecSpec,
        streams: Streams<'_>,
        cancel: &Cancel,
    ) -> Result<Exit> {
        let _blocking = region(Rank::GuestIo);
        let guest = self.guest(target.addr, |g| {
            g.live += 1;
            g.lost.get_or_insert_with(Gate::closed);
            g.clone()
        });
        let _live = Live(self, target.addr);
        let wait = Wait::new(cancel)
            .deadline(spec.deadline)
            .hangup(streams.hangup)
            .idle(spec.idle);
        wait.check()?;
        if let Some(on_dial) = &guest.on_dial {
            return Err(Error::new(
                on_dial(),
                format!("reach the guest at {}: connection refused", target.addr),
            ));
        }
        let call = Call {
            addr: target.addr,
            command: spec.command.clone(),
            stdin: Vec::new(),
            stdin_bytes: 0,
        };
        Run {
            fake: self,
            guest,
            wait,
            call,
            streams,
            signalled: None,
        }
        .run()
    }
}

struct Run<'f, 'w, 'a> {
    fake: &'f FakeTransport,
    guest: Guest,
    wait: Wait<'w>,
    call: Call,
    streams: Streams<'a>,
    signalled: Option<String>,
}

impl Run<'_, '_, '_> {
    fn run(mut self) -> Result<Exit> {
        while self.guest.cut {
            self.step(None)?;
        }
        if let Some(source) = self.streams.stdin.take() {
            self.read_all(source)?;
        }
        let respond = {
            let mut state = self.fake.state.lock();
            state.calls.push(self.call.clone());
            state
                .answers
                .iter()
                .rev()
                .find(|(prefix, _)| self.call.command.starts_with(prefix))
                .map(|(_, r)| r.clone())
        };
        let answer = match respond {
            Some(respond) => self.answer(respond)?,
            None => Answer::default(),
        };
        for (sink, bytes) in [
            (self.streams.stdout.take(), answer.stdout),
            (self.streams.stderr.take(), answer.stderr),
        ] {
            if let Some(sink) = sink {
                self.write_all(sink, &bytes)?;
            }
        }
        while let Some(gate) = answer
            .hold
            .as_ref()
            .filter(|gate| !gate.is_open() && self.signalled.is_none())
        {
            self.step(Some(gate.poll_fd()))?;
        }
        Ok(self.signalled.map_or(answer.exit, Exit::Signal))
    }

    /// Calls the responder on a new thread, because a real guest runs outside the caller's lock
    /// regions.
    fn answer(&self, respond: Respond) -> Result<Answer> {
        let call = self.call.clone();
        let guest = crate::host::thread::spawn("fake-guest", move || respond(&call))?;
        guest
            .join()
            .map_err(|panic| std::panic::resume_unwind(panic))
    }

    /// Polls once, for `fd` and for everything that can end the wait.
    fn step(&mut self, fd: Option<PollFd<'_>>) -> Result<()> {
        let lost = self
            .guest
            .lost
            .as_ref()
            .expect("made when the command began");
        let controls = self
            .streams
            .controls
            .as_ref()
            .map(|c| PollFd::new(c.fd(), PollFlags::POLLIN));
        let fds: Vec<_> = [Some(lost.poll_fd()), controls, fd]
            .into_iter()
            .flatten()
            .collect();
        self.wait.poll(&fds, None)?;
        if lost.is_open() {
            return Err(Error::new(
                Kind::GuestLost,
                "the connection to the guest broke",
            ));
        }
        while let Some(control) = self.streams.controls.as_mut().and_then(|c| c.next()) {
            match control {
                Control::Resize(size) => self.fake.state.lock().resizes.push(size),
                Control::Signal(name) => {
                    self.fake.state.lock().signals.push(name.clone());
                    self.signalled = Some(name);
                }
                Control::HangUp => {}
            }
        }
        Ok(())
    }

    fn read_all(&mut self, source: &mut dyn Source) -> Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        while self.signalled.is_none() {
            self.wait.check()?;
            let stall = self.guest.stall.clone().filter(|(_, gate)| !gate.is_open());
            let room = stall.as_ref().map_or(u64::MAX, |(after, _)| {
                after.saturating_sub(self.call.stdin_bytes)
            });
            if let Some((_, gate)) = stall.filter(|_| room == 0) {
                self.step(Some(gate.poll_fd()))?;
                continue;
            }
            let max = buffer
                .len()
                .min(usize::try_from(room).unwrap_or(usize::MAX));
            match source.read(&mut buffer[..max]) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    let kept = n.min(STDIN_KEPT_MAX - self.call.stdin.len());
                    self.call.stdin.extend_from_slice(&buffer[..kept]);
                    self.call.stdin_bytes += n as u64;
                    self.wait.progress();
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.step(source.fd().map(|fd| PollFd::new(fd, PollFlags::POLLIN)))?;
                }
                Err(e) => return Err(stream::error("read the command's input", e)),
            }
        }
        Ok(())
    }

    fn write_all(&mut self, sink: &mut dyn Sink, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            self.wait.check()?;
            match sink.write(bytes) {
                Ok(n) => {
                    bytes = &bytes[n..];
                    self.wait.progress();
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.step(sink.fd().map(|fd| PollFd::new(fd, PollFlags::POLLOUT)))?;
                }
                Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(()),
                Err(e) => return Err(stream::error("write the command's output", e)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::io::fifo::{Direction, accept};
    use crate::guest::io::{BytesSource, FdSource, VecSink};
    use crate::guest::{control_queue, run_script};
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::os::fd::{AsFd, OwnedFd};
    use std::time::Duration;

    fn target() -> Target {
        let addr = "127.0.0.1:1".parse().unwrap();
        Target {
            addr,
            user: "root".into(),
            private_key: String::new(),
            host_key: Vec::new(),
            owner: None,
        }
    }
    fn cancel() -> Cancel {
        Cancel::try_new().unwrap()
    }
    fn spec(command: &str) -> ExecSpec {
        let deadline = Some(Instant::now() + Duration::from_secs(10));
        ExecSpec {
            command: command.into(),
            deadline,
            ..ExecSpec::default()
        }
    }
    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn fake_answers_by_prefix_with_the_input() {
        let fake = FakeTransport::new();
        fake.on("cat", |call| {
            Answer::status(3).stdout(call.stdin.clone()).stderr("e")
        });
        let script = crate::guest::Script {
            command: "cat -u",
            stdin: b"hello",
            deadline: Instant::now() + Duration::from_secs(10),
            output_bytes_max: 100,
        };
        let output = run_script(&fake, &target(), &script, &cancel()).unwrap();
        assert_eq!(output.exit, Exit::Status(3));
        assert_eq!(
            (output.stdout, output.stderr),
            (b"hello".to_vec(), b"e".to_vec())
        );
        assert_eq!(fake.calls()[0].stdin_bytes, 5);
        let cut = crate::guest::Script {
            output_bytes_max: 2,
            ..script
        };
        assert_eq!(
            run_script(&fake, &target(), &cut, &cancel())
                .unwrap_err()
                .kind(),
            Kind::GuestCommandFailed
        );
    }

    #[test]
    fn fake_gated_guest_waits_for_its_gate_or_a_cancel() {
        let (fake, gate, cancel) = (FakeTransport::new(), Gate::closed(), cancel());
        fake.set_readiness(target().addr, Readiness::Gated(gate.clone()));
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(
            fake.wait_ready(&target(), soon, &cancel)
                .unwrap_err()
                .kind(),
            Kind::BootTimeout
        );
        gate.open();
        let later = Instant::now() + Duration::from_secs(10);
        fake.wait_ready(&target(), later, &cancel).unwrap();
        fake.set_readiness(target().addr, Readiness::Gated(Gate::closed()));
        cancel.cancel(crate::locks::CancelCause::VmStopped);
        assert_eq!(
            fake.wait_ready(&target(), later, &cancel)
                .unwrap_err()
                .kind(),
            Kind::Cancelled
        );
    }

    #[test]
    fn fake_stalled_read_can_be_ended_by_every_limit() {
        let (fake, cancel) = (FakeTransport::new(), cancel());
        let gate = fake.stall_reads(target().addr, 3);
        let run = |spec: &ExecSpec, hangup: Option<BorrowedFd<'_>>, cancel: &Cancel| {
            let mut stdin = BytesSource::new("hello");
            fake.exec(
                &target(),
                spec,
                Streams {
                    stdin: Some(&mut stdin),
                    hangup,
                    ..Streams::default()
                },
                cancel,
            )
        };
        let idle = ExecSpec {
            idle: Some(Duration::from_millis(20)),
            ..spec("x")
        };
        assert_eq!(
            run(&idle, None, &cancel).unwrap_err().kind(),
            Kind::TransferIdle
        );
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(
            run(&spec("x"), Some(ours.as_fd()), &cancel)
                .unwrap_err()
                .kind(),
            Kind::Cancelled
        );
        gate.open();
        assert_eq!(run(&spec("x"), None, &cancel).unwrap(), Exit::Status(0));
        cancel.cancel(crate::locks::CancelCause::VmStopped);
        assert_eq!(
            run(&spec("x"), None, &cancel).unwrap_err().to_string(),
            "cancelled: the VM was stopped"
        );
        assert_eq!(fake.live_total(), 0);
    }

    #[test]
    fn fake_running_commands_are_counted_signalled_and_lost() {
        let fake = FakeTransport::new();
        let addr = target().addr;
        fake.on("sleep", |_| {
            Answer::default().stdout("x").hold(&Gate::closed())
        });
        for end in ["signal", "lose"] {
            let (sender, mut receiver) = control_queue().unwrap();
            let (r, w) = pipe();
            let there = fake.clone();
            let thread = crate::host::thread::spawn("exec", move || {
                let mut stdout =
                    crate::guest::io::FdSink::new(accept(w, Direction::Write).unwrap());
                let streams = Streams {
                    stdout: Some(&mut stdout),
                    controls: Some(&mut receiver),
                    ..Streams::default()
                };
                there.exec(&target(), &spec("sleep 9"), streams, &cancel())
            })
            .unwrap();
            assert_eq!(rustix::io::read(&r, &mut [0; 1]), Ok(1), "it runs");
            assert_eq!(fake.live(addr), 1);
            if end == "signal" {
                sender.send(Control::Signal("TERM".into())).unwrap();
                assert_eq!(thread.join().unwrap().unwrap(), Exit::Signal("TERM".into()));
            } else {
                fake.lose(addr);
                assert_eq!(thread.join().unwrap().unwrap_err().kind(), Kind::GuestLost);
            }
        }
        assert_eq!(
            (fake.live(addr), fake.signals()),
            (0, vec!["TERM".to_owned()])
        );
    }

    #[test]
    fn fake_input_from_a_silent_pipe_ends_at_the_deadline() {
        let fake = FakeTransport::new();
        let (r, _w) = pipe();
        let mut stdin = FdSource::new(accept(r, Direction::Read).unwrap());
        let mut stdout = VecSink::new(10);
        let spec = ExecSpec {
            deadline: Some(Instant::now() + Duration::from_millis(20)),
            ..spec("x")
        };
        let streams = Streams {
            stdin: Some(&mut stdin),
            stdout: Some(&mut stdout),
            ..Streams::default()
        };
        assert_eq!(
            fake.exec(&target(), &spec, streams, &cancel())
                .unwrap_err()
                .kind(),
            Kind::Timeout
        );
    }
}
