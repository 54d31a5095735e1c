//! One command: everything that can move is moved, then one poll waits for whatever may move next.

use super::channel::{Channel, STDERR, STDOUT, WINDOW_BYTES};
use super::flow::{Inlet, Outlet, Trouble, Turn};
use super::signal::Signaller;
use super::wire::Shared;
use crate::api::exec::{Exit, PtySize};
use crate::error::{Error, Kind, Result};
use crate::guest::wait::{Wait, hung_up, is_hang_up};
use crate::guest::{Control, Controls, Streams};
use nix::poll::{PollFd, PollFlags};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A connection that is quiet for so long is asked whether it lives, and again.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Unanswered for so long, the connection is lost.
const KEEPALIVE_PATIENCE: Duration = Duration::from_secs(75);
/// How long a command that is given up may take to get its SIGHUP.
const FAREWELL: Duration = Duration::from_secs(2);

/// A command's last output may come after its exit status: what comes after so long a silence, or after so long in all, is
/// of programs that it has left in the background.
const LAST_OUTPUT_QUIET: Duration = Duration::from_millis(100);
const LAST_OUTPUT_MAX: Duration = Duration::from_secs(2);

fn lost(what: impl std::fmt::Display) -> Error {
    Error::new(Kind::GuestLost, format!("the connection to the guest broke: {what}"))
        .hint("see whether the VM still runs (fcctl ps) and what it says (fcctl logs {vm})")
}

pub(in crate::guest) struct Pump<'w, 'a> {
    // The channel drops before the session.
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
    /// The end of the command is the end, whoever else holds its output.
    no_wait_children: bool,
    leaving: Option<Leaving>,
}

/// The command has ended, and its output has not.
#[derive(Clone, Copy)]
struct Leaving {
    since: Instant,
    quiet_since: Instant,
}

impl Leaving {
    fn until(self) -> Instant {
        (self.quiet_since + LAST_OUTPUT_QUIET).min(self.since + LAST_OUTPUT_MAX)
    }
}

impl<'w, 'a> Pump<'w, 'a> {
    pub fn new(shared: Rc<Shared>, channel: Channel, has_pty: bool, streams: Streams<'a>, wait: Wait<'w>) -> Self {
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
            leaving: None,
        }
    }

    /// The end of the command is the end, though others still hold its output.
    pub fn no_wait_children(self, is_so: bool) -> Self {
        Self { no_wait_children: is_so, ..self }
    }

    /// To the end of the command, or to whatever ends it before.
    pub fn run(mut self) -> Result<Exit> {
        loop {
            match self.round() {
                Ok(None) => {}
                Ok(Some(exit)) => return Ok(exit),
                Err(e) => {
                    self.farewell(&e);
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
            Trouble::Ssh(e) => lost(e.message()),
            Trouble::Caller(e) => e,
        })?;
        self.shared.flush();
        let Some(turn) = turn else { return self.finish().map(Some) };
        // While nothing is read from the server, no sign of life can arrive either.
        let next = if self.flood.is_held { Instant::now() + KEEPALIVE_INTERVAL } else { self.keepalive.check(&self.shared)? };
        let next = self.leaving.map(Leaving::until).filter(|end| *end > Instant::now()).map_or(next, |end| end.min(next));
        self.poll(if turn == Turn::More { Instant::now() } else { next })?;
        Ok(None)
    }

    /// Moves what can be moved. `None`: the command has ended and everything is delivered.
    fn move_all(&mut self) -> Result<Option<Turn>, Trouble> {
        let mut progress = false;
        self.channel.take_in()?;
        let out = self.stdout.turn(&mut self.channel, &mut progress)?;
        let err = self.stderr.turn(&mut self.channel, &mut progress)?;
        let closed = self.channel.remote_closed()?;
        if closed && self.stdout.is_empty() && self.stderr.is_empty() && self.channel.is_drained() {
            return Ok(None);
        }
        // A control may end the wait for the output, so it comes before the decision whether to wait.
        self.control()?;
        if self.leaves_children(progress) {
            return Ok(None);
        }
        if !closed && self.shared.ended() {
            return Err(Trouble::Caller(lost("the guest's side ended it")));
        }
        let input = if closed { Turn::Waits } else { self.stdin.turn(&self.shared, &mut self.channel, &mut progress)? };
        let waits_for_caller = !(self.stdout.is_empty() && self.stderr.is_empty());
        self.flood.check(self.shared.received(), progress, waits_for_caller).map_err(Trouble::Caller)?;
        Ok(Some(if [out, err, input].contains(&Turn::More) { Turn::More } else { Turn::Waits }))
    }

    /// Whether the command has ended, nobody waits for what else holds its output, and its own output was delivered.
    fn leaves_children(&mut self, progress: bool) -> bool {
        if !self.no_wait_children || self.channel.exit().is_none() {
            return false;
        }
        let now = Instant::now();
        let leaving = self.leaving.get_or_insert(Leaving { since: now, quiet_since: now });
        if progress {
            leaving.quiet_since = now;
        }
        now >= leaving.until() && self.stdout.is_empty() && self.stderr.is_empty()
    }

    fn control(&mut self) -> Result<(), Trouble> {
        while let Some(control) = self.controls.as_mut().and_then(|c| c.next()) {
            match control {
                Control::Resize(size) => self.resize = Some(size).filter(|_| self.has_pty),
                // There is nothing left to signal, so it is the wait for the output that ends.
                Control::Signal(_) if self.channel.exit().is_some() => self.no_wait_children = true,
                Control::Signal(name) => self.signaller.push(name),
                Control::HangUp => return Err(Trouble::Caller(hung_up())),
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
        self.channel.exit().ok_or_else(|| lost("its SSH server closed the channel and told no exit status"))
    }

    fn poll(&mut self, until: Instant) -> Result<()> {
        let places = [self.stdin.poll_fd(), self.stdout.poll_fd(), self.stderr.poll_fd()];
        let controls = self.controls.as_ref().map(|c| PollFd::new(c.fd(), PollFlags::POLLIN));
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

    /// A command without a terminal does not notice that its connection goes, and takes the end of its input for
    /// an ordinary one; so it gets a SIGHUP first, as one with a terminal does. Not after a cancel: the VM goes too,
    /// or somebody waits for the worker.
    fn farewell(&mut self, why: &Error) {
        let too_late = why.kind() == Kind::GuestLost || (why.kind() == Kind::Cancelled && !is_hang_up(why));
        if self.has_pty || too_late {
            return;
        }
        self.signaller.push("HUP".to_owned());
        let wait = self.wait.without_ends(Instant::now() + FAREWELL);
        loop {
            self.shared.fill();
            if self.channel.take_in().is_err() || self.shared.ended() {
                return;
            }
            self.signaller.step(&self.shared);
            self.shared.flush();
            if self.signaller.is_idle() || wait.poll(self.shared.poll_fd().as_slice(), None).is_err() {
                return;
            }
        }
    }
}

/// Sees that what a server sends is for the command. libssh2 queues every message that it does not expect, without limit, and
/// answers requests that nobody wants; both grow with what has come since the last byte of a stream moved.
#[derive(Default)]
struct Flood {
    /// Bytes received when a stream last moved.
    at_progress: u64,
    since: Option<Instant>,
    /// Nothing more is read, until the caller takes what has come for it.
    is_held: bool,
}

/// Most bytes from a server that move no stream. A command needs little of it: answers, wider windows, new keys.
const FLOOD_BYTES_MAX: u64 = 1024 * 1024;
/// With so much of it the rest is held back, where the caller has yet to take what came before. Well above a full window.
const HELD_BYTES: u64 = 4 * WINDOW_BYTES as u64;
/// Allowance per second for a quiet command's server, which may ask for signs of life for days.
const QUIET_BYTES_PER_S: u64 = 4 * 1024;

impl Flood {
    /// `guest_lost` for a flood. While the caller is what everything waits for, the rest is held back instead: output in
    /// small messages is a flood by its size, too.
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
            return Err(lost(format!("its SSH server sent {unused} bytes that belong to no stream of the command")));
        }
        Ok(())
    }
}

/// Asks a quiet peer for a sign of life.
struct Keepalive {
    received: u64,
    quiet_since: Instant,
    asked_last: Option<Instant>,
    unanswered_since: Option<Instant>,
}

impl Keepalive {
    fn new(shared: &Shared) -> Self {
        // libssh2 sends none by itself in non-blocking mode; the shortest interval leaves the timing to us.
        shared.session.borrow().set_keepalive(true, 2);
        Self { received: shared.received(), quiet_since: Instant::now(), asked_last: None, unanswered_since: None }
    }

    /// When to look again. `guest_lost` when nothing came for too long.
    fn check(&mut self, shared: &Shared) -> Result<Instant> {
        let now = Instant::now();
        if shared.received() != self.received {
            self.received = shared.received();
            (self.quiet_since, self.asked_last, self.unanswered_since) = (now, None, None);
        }
        if self.unanswered_since.is_some_and(|since| now.duration_since(since) >= KEEPALIVE_PATIENCE) {
            return Err(lost(format!("no sign of life for {} s", now.duration_since(self.quiet_since).as_secs())));
        }
        let due = self.asked_last.unwrap_or(self.quiet_since) + KEEPALIVE_INTERVAL;
        if now < due {
            return Ok(due);
        }
        self.asked_last = Some(now);
        let before = shared.outbox_len();
        let asked = shared.session.borrow().keepalive_send();
        // libssh2 goes by the wall clock and may not send after it was set back: then nothing is unanswered.
        if asked.is_ok() && shared.outbox_len() > before {
            self.unanswered_since.get_or_insert(now);
            shared.flush();
        }
        Ok(now + KEEPALIVE_INTERVAL)
    }
}
