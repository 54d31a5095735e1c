//! The daemon's side of one helper: starts it, feeds it, validates every reply, and ends it.

use super::NAME;
use super::orders::Orders;
use super::protocol::{
    Command, FROM_HELPER_BYTES_MAX, Failure, Job, Order, Passed, Reply, TO_HELPER_BYTES_MAX,
};
use super::pumps::{HelperEnds, Inward, Outward, Pumps, Turn};
use crate::api::exec::Exit;
use crate::error::{Error, Kind, Result};
use crate::guest::connect::{DIAL_TIMEOUT, LogIn, connect, unavailable};
use crate::guest::wait::{Wait, is_hang_up};
use crate::guest::{ExecSpec, Streams, Target};
use crate::host::confine::{self, Helper};
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Duration;

/// How long a helper may take to end an abandoned command. The helper itself gives up after 2 s.
const HANGUP_TIMEOUT: Duration = Duration::from_millis(2500);
/// How long to wait for the exit status of a helper whose channel has ended.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// One helper, its streams and the limits of its session.
pub(super) struct Session<'w, 'a> {
    helper: Helper,
    target: &'w Target,
    wait: Wait<'w>,
    /// The wait until the command has started, with its shorter deadline.
    dial: Wait<'w>,
    idle: Option<Duration>,
    pumps: Pumps<'a>,
    orders: Orders<'a>,
    is_started: bool,
    is_key_refused: bool,
    result: Option<Result<Exit>>,
}

fn lost(what: impl std::fmt::Display) -> Error {
    Error::new(
        Kind::GuestLost,
        format!("the connection to the guest broke: {what}"),
    )
    .hint("check that the VM still runs (fcctl ps) and read its console (fcctl logs {vm})")
}

fn job(target: &Target, command: Option<Command>) -> Job {
    let Target {
        user,
        private_key,
        host_key,
        ..
    } = target.clone();
    Job {
        user,
        private_key,
        host_key,
        command,
    }
}

/// Builds the error for a failure that the helper reported.
fn error_of(failure: Failure, text: &str, target: &Target) -> Error {
    match failure {
        Failure::Confinement => Error::new(
            Kind::Host,
            format!("confine the helper process for the guest: {text}"),
        )
        .hint("run fcctl doctor"),
        Failure::Unavailable => unavailable(text, target),
        Failure::KeyRefused => unavailable(
            format!(
                "log in as {}: its SSH server refuses our key ({text})",
                target.user
            ),
            target,
        ),
        Failure::HostKeyMismatch => Error::new(
            Kind::HostKeyMismatch,
            format!(
                "the guest at {} has a different host key than its VM was given",
                target.addr
            ),
        )
        .hint("restart the VM to give the guest its own key again: fcctl restart {vm}"),
        Failure::Lost => lost(text.trim_start_matches("the connection to the guest broke: ")),
        Failure::Stream => Error::new(Kind::Host, text),
    }
}

impl<'w, 'a> Session<'w, 'a> {
    fn new(helper: Helper, target: &'w Target, wait: Wait<'w>) -> Self {
        let dial = wait.tighten(Instant::now() + DIAL_TIMEOUT);
        Self {
            helper,
            target,
            wait,
            dial,
            idle: None,
            pumps: Pumps::default(),
            orders: Orders::default(),
            is_started: false,
            is_key_refused: false,
            result: None,
        }
    }

    /// Starts a helper that only logs in over a connected socket. Returns an error only if another
    /// attempt cannot help.
    pub(super) fn log_in(target: &'w Target, socket: TcpStream, wait: &Wait<'w>) -> Result<LogIn> {
        let mut session = Self::new(confine::spawn(NAME, target.owner)?, target, wait.clone());
        let passed = Passed {
            socket: socket.as_fd(),
            stdin: None,
            stdout: None,
            stderr: None,
        };
        session.send_job(&job(target, None), &passed)?;
        drop(socket);
        let ended = loop {
            session.receive();
            if session.is_started {
                return Ok(LogIn::Accepted);
            }
            if let Some(result) = session.result.take() {
                break result;
            }
            if let Err(e) = session.poll(Turn::default()) {
                break Err(e);
            }
        };
        match ended {
            Ok(_) => Ok(LogIn::Refused(lost(
                "its helper process sent an unexpected reply",
            ))),
            Err(e) if e.kind() == Kind::GuestLost || session.is_key_refused => {
                Ok(LogIn::Refused(e))
            }
            Err(e) if matches!(e.kind(), Kind::GuestUnavailable | Kind::Timeout) => {
                Ok(LogIn::NotYet(e))
            }
            Err(e) => Err(e),
        }
    }

    /// Starts a helper, connects to the guest and sends the helper its job.
    pub(super) fn start(
        target: &'w Target,
        spec: &ExecSpec,
        streams: Streams<'a>,
        wait: Wait<'w>,
    ) -> Result<Self> {
        // The helper starts up while the connection is established.
        let helper = confine::spawn(NAME, target.owner)?;
        Self::start_with(helper, target, spec, streams, wait)
    }

    pub(super) fn start_with(
        helper: Helper,
        target: &'w Target,
        spec: &ExecSpec,
        streams: Streams<'a>,
        wait: Wait<'w>,
    ) -> Result<Self> {
        let mut session = Self::new(helper, target, wait);
        let socket = connect(target, &session.dial).map_err(|e| session.at_dial(e))?;
        let mut helper_ends = HelperEnds::default();
        let Streams {
            stdin,
            stdout,
            stderr,
            controls,
            hangup: _,
        } = streams;
        session.orders.controls = controls;
        session.idle = spec.idle;
        // With an idle limit the daemon must see every byte, so descriptors cannot be passed on.
        let may_pass = spec.idle.is_none();
        let input = session
            .pumps
            .take_stdin(stdin, may_pass, &mut helper_ends)?;
        helper_ends.stdout = session.pumps.take_output(stdout, may_pass)?;
        helper_ends.stderr = session.pumps.take_output(stderr, may_pass)?;
        let command = Command {
            line: spec.command.clone().into(),
            pty: spec.pty.clone(),
            stdin: input,
            has_stdout: helper_ends.stdout.is_some(),
            has_stderr: helper_ends.stderr.is_some(),
            no_wait_children: spec.no_wait_children,
        };
        let passed = Passed {
            socket: socket.as_fd(),
            stdin: helper_ends.stdin.as_ref().map(AsFd::as_fd),
            stdout: helper_ends.stdout.as_ref().map(AsFd::as_fd),
            stderr: helper_ends.stderr.as_ref().map(AsFd::as_fd),
        };
        session.send_job(&job(target, Some(command)), &passed)?;
        Ok(session)
    }

    fn send_job(&mut self, job: &Job, passed: &Passed<'_>) -> Result<()> {
        let message = job.encode();
        if message.len() > TO_HELPER_BYTES_MAX {
            let text = format!(
                "a command of {} bytes with its environment is too long",
                message.len()
            );
            return Err(Error::invalid(text).hint("pass less on the command line"));
        }
        // This is the first message in an empty channel, so sending it fails only if the helper has
        // died.
        if self.helper.channel.send(&message, &passed.list()).is_err() {
            return Err(self.died());
        }
        Ok(())
    }

    /// Runs until the command ends or something else ends the wait.
    pub(super) fn run(mut self) -> Result<Exit> {
        let ended = self.supervise();
        if let Err(e) = &ended {
            self.send_hangup(e);
        }
        ended
    }

    fn supervise(&mut self) -> Result<Exit> {
        loop {
            self.receive();
            let turn = self.move_streams()?;
            if turn.progress {
                self.wait.progress();
            }
            match &self.result {
                Some(Ok(exit)) if self.pumps.outputs.iter().all(Outward::is_finished) => {
                    return Ok(exit.clone());
                }
                Some(Err(e)) => {
                    let e = e.clone();
                    self.pumps.deliver_rest();
                    return Err(e);
                }
                _ => {}
            }
            self.poll(turn)?;
        }
    }

    /// Receives the replies that have arrived, up to the final one. Kills the helper after the
    /// final reply or an invalid one.
    fn receive(&mut self) {
        let mut buffer = [0; FROM_HELPER_BYTES_MAX];
        while self.result.is_none() {
            let reply = match self.helper.channel.receive(&mut buffer) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                Ok(0) => {
                    self.result = Some(Err(self.died()));
                    return;
                }
                Ok(len) => Reply::decode(&buffer[..len]),
                Err(_) => None,
            };
            match reply {
                Some(Reply::Started) if !self.is_started => {
                    self.is_started = true;
                    self.wait = self.wait.clone().idle(self.idle);
                    self.wait.progress();
                }
                Some(Reply::Exited(exit)) if self.is_started => self.result = Some(Ok(exit)),
                Some(Reply::Failed(failure, text)) => {
                    self.is_key_refused = failure == Failure::KeyRefused;
                    self.result = Some(Err(error_of(failure, &text, self.target)));
                }
                _ => self.result = Some(Err(lost("its helper process sent an invalid reply"))),
            }
        }
        // Output from before the final reply is still in the pipes. Killing the helper closes its
        // ends of the pipes.
        self.helper.kill();
    }

    /// Builds the error for a helper whose channel ended without a final reply. Waits a moment for
    /// the helper's exit status, which the error contains.
    fn died(&mut self) -> Error {
        let how = match self.helper.wait(Instant::now() + EXIT_TIMEOUT) {
            Some(exit) => exit.to_string(),
            None => "it closed its channel but is still running".to_owned(),
        };
        lost(format!(
            "the helper process that speaks SSH with it failed ({how})"
        ))
    }

    fn move_streams(&mut self) -> Result<Turn> {
        let mut turn = Turn::default();
        if let Some(stdin) = self
            .pumps
            .stdin
            .as_mut()
            .filter(|_| self.is_started && self.result.is_none())
        {
            turn = stdin.turn()?;
            if stdin.is_finished() && self.orders.is_empty() {
                self.orders.push(Order::InputEnded, &self.helper.channel);
                // Close the pipe only after `Order::InputEnded` was sent; see `Input::Pumped`.
                if self.orders.is_empty() {
                    self.pumps.stdin = None;
                }
            }
        }
        for output in &mut self.pumps.outputs {
            turn = turn.and(output.turn()?);
        }
        self.orders.send(&self.helper.channel);
        if self.is_started && self.result.is_none() {
            self.orders.take_controls(&self.helper.channel);
        }
        Ok(turn)
    }

    fn poll(&mut self, turn: Turn) -> Result<()> {
        let mut fds = Vec::with_capacity(6);
        if self.result.is_none() {
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, !self.orders.is_empty());
            fds.push(PollFd::new(self.helper.channel.fd(), events));
        }
        let takes_controls = self.is_started && self.orders.is_empty() && self.result.is_none();
        let controls = self.orders.controls.as_ref().filter(|_| takes_controls);
        fds.extend(controls.map(|c| PollFd::new(c.fd(), PollFlags::POLLIN)));
        let stdin = self
            .pumps
            .stdin
            .as_ref()
            .filter(|_| self.is_started && self.result.is_none());
        fds.extend(stdin.and_then(Inward::poll_fd));
        fds.extend(self.pumps.outputs.iter().filter_map(Outward::poll_fd));
        let until = turn.has_more.then(Instant::now);
        let polled = if self.is_started {
            self.wait.poll(&fds, until)
        } else {
            self.dial.poll(&fds, until)
        };
        match polled {
            Ok(_) => Ok(()),
            Err(e)
                if e.kind() == Kind::TransferIdle
                    && self.pumps.stdin.as_mut().is_some_and(Inward::has_drained) =>
            {
                self.wait.progress();
                Ok(())
            }
            Err(e) if self.is_started => Err(e),
            Err(e) => Err(self.at_dial(e)),
        }
    }

    fn at_dial(&self, e: Error) -> Error {
        match e.kind() {
            Kind::Timeout if self.dial.is_tightened() => unavailable(
                format!("no answer within {} s", DIAL_TIMEOUT.as_secs()),
                self.target,
            ),
            _ => e,
        }
    }

    /// Lets the helper send SIGHUP to the command before the connection closes; see
    /// `ssh::Pump::send_hangup`. Sends nothing after a cancel, because either the VM stops too or
    /// another thread waits for this worker.
    fn send_hangup(&mut self, why: &Error) {
        let is_cancelled = why.kind() == Kind::Cancelled && !is_hang_up(why);
        if !self.is_started || self.result.is_some() || is_cancelled {
            return;
        }
        self.orders.push(Order::HangUp, &self.helper.channel);
        let wait = self.wait.without_ends(Instant::now() + HANGUP_TIMEOUT);
        loop {
            self.orders.send(&self.helper.channel);
            let channel = (!self.orders.is_empty())
                .then(|| PollFd::new(self.helper.channel.fd(), PollFlags::POLLOUT));
            let fds: Vec<_> = [PollFd::new(self.helper.exited(), PollFlags::POLLIN)]
                .into_iter()
                .chain(channel)
                .collect();
            match wait.poll(&fds, None) {
                Ok(ready) if !ready[0] => {}
                _ => return,
            }
        }
    }
}
