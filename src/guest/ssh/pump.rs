//! Runs one command: moves all data that can move, then waits in one poll for whatever may move
//! next.

use super::channel::{Channel, STDERR, STDOUT, WINDOW_BYTES};
use super::flow::{Inlet, Outlet, Turn, TurnError};
use super::signal::Signaller;
use super::wire::Shared;
use crate::api::exec::{Exit, PtySize};
use crate::error::{Error, Kind, Result};
use crate::guest::wait::{Wait, hung_up, is_hang_up};
use crate::guest::{Control, Controls, Streams};
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use std::rc::Rc;
use std::time::Duration;

/// How long a connection may be quiet before a keepalive is sent, and the interval between
/// keepalives after that.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// How long a keepalive may stay unanswered before the connection is treated as lost.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(75);
/// How long to try to send SIGHUP to an abandoned command.
const HANGUP_TIMEOUT: Duration = Duration::from_secs(2);

/// A command's last output may arrive after its exit status. Output that comes after a pause of
/// this length, or more than `LAST_OUTPUT_MAX` after the exit status, is attributed to programs
/// that the command left in the background.
const LAST_OUTPUT_QUIET: Duration = Duration::from_millis(100);
const LAST_OUTPUT_MAX: Duration = Duration::from_secs(2);

fn lost(what: impl std::fmt::Display) -> Error {
    Error::new(
        Kind::GuestLost,
        format!("the connection to the guest broke: {what}"),
    )
    .hint("check that the VM still runs (fcctl ps) and read its console (fcctl logs {vm})")
}

pub(in crate::guest) struct Pump<'w, 'a> {
    // The channel must be dropped before the session.
    channel: Channel,
    signaller: Signaller,
    shared: Rc<Shared>,
    wait: Wait<'w>,
    stdin: Inlet<'a>,
    stdout: Outlet<'a>,
    stderr: Outlet<'a>,
    controls: Option<&'a mut dyn Controls>,
    has_pty: bool,
    /// A resize that could not be sent yet.
    resize: Option<PtySize>,
    keepalive: Keepalive,
    flood: Flood,
    /// If true, the session ends with the command, even if other processes still hold its output
    /// open.
    no_wait_children: bool,
    last_output: Option<LastOutput>,
}

/// The time when the exit status of a command arrived, and the time since when its output has been
/// quiet.
#[derive(Clone, Copy)]
struct LastOutput {
    since: Instant,
    quiet_since: Instant,
}

impl LastOutput {
    fn until(self) -> Instant {
        (self.quiet_since + LAST_OUTPUT_QUIET).min(self.since + LAST_OUTPUT_MAX)
    }
}

impl<'w, 'a> Pump<'w, 'a> {
    pub(crate) fn new(
        shared: Rc<Shared>,
        channel: Channel,
        has_pty: bool,
        streams: Streams<'a>,
        wait: Wait<'w>,
    ) -> Self {
        let keepalive = Keepalive::new(&shared);
        Self {
            channel,
            signaller: Signaller::default(),
            shared,
            wait,
            stdin: Inlet::new(streams.stdin, has_pty),
            stdout: Outlet::new(STDOUT, streams.stdout),
            stderr: Outlet::new(STDERR, streams.stderr),
            controls: streams.controls,
            has_pty,
            resize: None,
            keepalive,
            flood: Flood::default(),
            no_wait_children: false,
            last_output: None,
        }
    }

    /// Ends the run when the command ends, even if other processes still hold its output open.
    pub(crate) fn no_wait_children(self, is_so: bool) -> Self {
        Self {
            no_wait_children: is_so,
            ..self
        }
    }

    /// Runs until the command ends or something else ends the wait.
    pub(crate) fn run(mut self) -> Result<Exit> {
        loop {
            match self.round() {
                Ok(None) => {}
                Ok(Some(exit)) => return Ok(exit),
                Err(e) => {
                    self.send_hangup(&e);
                    return Err(e);
                }
            }
        }
    }

    fn round(&mut self) -> Result<Option<Exit>> {
        if !self.flood.is_held {
            self.shared.fill();
        }
        let turn = self.move_all().map_err(|trouble| match trouble {
            TurnError::Ssh(e) => lost(e.message()),
            TurnError::Caller(e) => e,
        })?;
        self.shared.flush();
        let Some(turn) = turn else {
            return self.finish().map(Some);
        };
        // No keepalive answer can arrive while reading from the server is suspended, so skip the
        // check for one.
        let next = if self.flood.is_held {
            Instant::now() + KEEPALIVE_INTERVAL
        } else {
            self.keepalive.check(&self.shared)?
        };
        let next = self
            .last_output
            .map(LastOutput::until)
            .filter(|end| *end > Instant::now())
            .map_or(next, |end| end.min(next));
        self.poll(if turn == Turn::More {
            Instant::now()
        } else {
            next
        })?;
        Ok(None)
    }

    /// Moves all data that can move. `None` means that the command has ended and everything is
    /// delivered.
    fn move_all(&mut self) -> Result<Option<Turn>, TurnError> {
        let mut progress = false;
        self.channel.take_in()?;
        let out = self.stdout.turn(&mut self.channel, &mut progress)?;
        let err = self.stderr.turn(&mut self.channel, &mut progress)?;
        let closed = self.channel.remote_closed()?;
        if closed && self.stdout.is_empty() && self.stderr.is_empty() && self.channel.is_drained() {
            return Ok(None);
        }
        // A control may end the wait for output, so controls are handled before deciding whether to
        // wait.
        self.control()?;
        if self.leaves_children(progress) {
            return Ok(None);
        }
        if !closed && self.shared.ended() {
            return Err(TurnError::Caller(lost("the guest closed it")));
        }
        let input = if closed {
            Turn::Waits
        } else {
            self.stdin
                .turn(&self.shared, &mut self.channel, &mut progress)?
        };
        let waits_for_caller = !(self.stdout.is_empty() && self.stderr.is_empty());
        self.flood
            .check(self.shared.received(), progress, waits_for_caller)
            .map_err(TurnError::Caller)?;
        Ok(Some(if [out, err, input].contains(&Turn::More) {
            Turn::More
        } else {
            Turn::Waits
        }))
    }

    /// True if the command has ended, its own output was delivered, and other processes that hold
    /// its output do not matter.
    fn leaves_children(&mut self, progress: bool) -> bool {
        if !self.no_wait_children || self.channel.exit().is_none() {
            return false;
        }
        let now = Instant::now();
        let last_output = self.last_output.get_or_insert(LastOutput {
            since: now,
            quiet_since: now,
        });
        if progress {
            last_output.quiet_since = now;
        }
        now >= last_output.until() && self.stdout.is_empty() && self.stderr.is_empty()
    }

    fn control(&mut self) -> Result<(), TurnError> {
        while let Some(control) = self.controls.as_mut().and_then(|c| c.next()) {
            match control {
                Control::Resize(size) => self.resize = Some(size).filter(|_| self.has_pty),
                // The command has ended and cannot be signalled, so the signal ends the wait for
                // its output.
                Control::Signal(_) if self.channel.exit().is_some() => self.no_wait_children = true,
                Control::Signal(name) => self.signaller.push(name),
                Control::HangUp => return Err(TurnError::Caller(hung_up())),
            }
        }
        if let Some(size) = self.resize
            && self.channel.resize(size)?.is_some()
        {
            self.resize = None;
        }
        self.signaller.step(&self.shared);
        Ok(())
    }

    fn finish(&self) -> Result<Exit> {
        self.channel
            .exit()
            .ok_or_else(|| lost("its SSH server closed the channel without an exit status"))
    }

    fn poll(&mut self, until: Instant) -> Result<()> {
        let places = [
            self.stdin.poll_fd(),
            self.stdout.poll_fd(),
            self.stderr.poll_fd(),
        ];
        let controls = self
            .controls
            .as_ref()
            .map(|c| PollFd::new(c.fd(), PollFlags::POLLIN));
        let connection = self.shared.poll_fd().filter(|_| !self.flood.is_held);
        let mut fds: Vec<_> = connection.into_iter().chain(controls).collect();
        let first = fds.len();
        fds.extend(places.iter().flatten().cloned());
        let ready = self.wait.poll(&fds, Some(until))?;
        let mut fired = ready[first..].iter();
        let ready = places.map(|place| place.is_some_and(|_| fired.next() == Some(&true)));
        self.stdin.is_ready |= ready[0];
        self.stdout.is_ready |= ready[1];
        self.stderr.is_ready |= ready[2];
        Ok(())
    }

    /// Sends SIGHUP to an abandoned command. Without a terminal, a command sees only EOF on its
    /// input and cannot tell that the connection was lost. After a cancel nothing is sent, because
    /// either the VM stops too or another thread waits for this worker.
    fn send_hangup(&mut self, why: &Error) {
        let too_late =
            why.kind() == Kind::GuestLost || (why.kind() == Kind::Cancelled && !is_hang_up(why));
        if self.has_pty || too_late {
            return;
        }
        self.signaller.push("HUP".to_owned());
        let wait = self.wait.without_ends(Instant::now() + HANGUP_TIMEOUT);
        loop {
            self.shared.fill();
            if self.channel.take_in().is_err() || self.shared.ended() {
                return;
            }
            self.signaller.step(&self.shared);
            self.shared.flush();
            if self.signaller.is_idle()
                || wait.poll(self.shared.poll_fd().as_slice(), None).is_err()
            {
                return;
            }
        }
    }
}

/// Detects floods. libssh2 queues every unexpected message without limit and answers unwanted
/// requests. The queue and the answers grow with the bytes received since a stream last made
/// progress.
#[derive(Default)]
struct Flood {
    /// Bytes received when a stream last made progress.
    at_progress: u64,
    since: Option<Instant>,
    /// True while reading from the server is suspended until the caller accepts output.
    is_held: bool,
}

/// Maximum number of bytes from a server without progress of a stream. A command needs few such
/// bytes, for answers, window adjustments and new keys.
const FLOOD_BYTES_MAX: u64 = 1024 * 1024;
/// If the caller must first accept earlier output, reading is suspended after this many bytes. This
/// is well above a full window.
const HELD_BYTES: u64 = 4 * WINDOW_BYTES as u64;
/// Number of additional bytes allowed for each second without progress, because the server of a
/// quiet command may send keepalives for days.
const QUIET_BYTES_PER_S: u64 = 4 * 1024;

impl Flood {
    /// Returns `guest_lost` for a flood. If output waits for the caller, suspends reading instead,
    /// because the output of a command in small messages can be as large as a flood.
    fn check(&mut self, received: u64, progress: bool, waits_for_caller: bool) -> Result<()> {
        let now = Instant::now();
        if progress {
            (self.at_progress, self.since, self.is_held) = (received, Some(now), false);
            return Ok(());
        }
        let quiet = now.duration_since(*self.since.get_or_insert(now)).as_secs();
        let allowed = FLOOD_BYTES_MAX + quiet.saturating_mul(QUIET_BYTES_PER_S);
        let unused = received - self.at_progress;
        self.is_held = waits_for_caller && unused > HELD_BYTES;
        if unused > allowed && !waits_for_caller {
            return Err(lost(format!(
                "its SSH server sent {unused} bytes that belong to no stream of the command"
            )));
        }
        Ok(())
    }
}

/// Sends keepalives to a quiet peer.
struct Keepalive {
    received: u64,
    quiet_since: Instant,
    asked_last: Option<Instant>,
    unanswered_since: Option<Instant>,
}

impl Keepalive {
    fn new(shared: &Shared) -> Self {
        // libssh2 sends no keepalives on its own in non-blocking mode. With the shortest interval
        // we control the timing.
        shared.session.borrow().set_keepalive(true, 2);
        Self {
            received: shared.received(),
            quiet_since: Instant::now(),
            asked_last: None,
            unanswered_since: None,
        }
    }

    /// Sends a keepalive if one is due. Returns the time of the next check, or `guest_lost` if
    /// nothing arrived for too long.
    fn check(&mut self, shared: &Shared) -> Result<Instant> {
        let now = Instant::now();
        if shared.received() != self.received {
            self.received = shared.received();
            (self.quiet_since, self.asked_last, self.unanswered_since) = (now, None, None);
        }
        if self
            .unanswered_since
            .is_some_and(|since| now.duration_since(since) >= KEEPALIVE_TIMEOUT)
        {
            return Err(lost(format!(
                "no sign of life for {} s",
                now.duration_since(self.quiet_since).as_secs()
            )));
        }
        let due = self.asked_last.unwrap_or(self.quiet_since) + KEEPALIVE_INTERVAL;
        if now < due {
            return Ok(due);
        }
        self.asked_last = Some(now);
        let before = shared.outbox_len();
        let asked = shared.session.borrow().keepalive_send();
        // libssh2 uses the wall clock and may not send after that clock was set back. In that case
        // no keepalive is outstanding.
        if asked.is_ok() && shared.outbox_len() > before {
            self.unanswered_since.get_or_insert(now);
            shared.flush();
        }
        Ok(now + KEEPALIVE_INTERVAL)
    }
}
