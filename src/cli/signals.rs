//! Decides what each signal does in each phase of a command, and runs the thread that acts on
//! signals.

use super::terminal;
use crate::client::{Client, Failure, Hangup, Result};
use crate::error::{Error, Kind};
use crate::host::thread;
use crate::host::wait::{WaitResult, wait_any};
use crate::locks::{Cancel, CancelCause, Mutex, Rank};
use crossbeam_channel::{Receiver, Sender, bounded};
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many signals are forwarded to the guest's command before the next one detaches.
pub(super) const FORWARDED_MAX: u8 = 2;
/// The most signals and resizes that may wait for the daemon. Further ones are dropped.
const CONTROLS_MAX: usize = 16;
/// How long a command may take to end after `--timeout`, before it is killed. After that, fcctl
/// waits this long again before it hangs up.
const TIMEOUT_GRACE: Duration = Duration::from_secs(10);
const CAUGHT: [i32; 5] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH];

/// The phase of a command, as far as signals are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// No command runs in the guest. The current call can be cancelled.
    Working,
    /// The guest's command is running.
    Command { forwarded: u8 },
    /// The guest's command has ended and its results are being fetched.
    Collecting,
    /// The VM that was created is being deleted.
    CleaningUp { asked: bool },
}

/// The reaction to a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Nothing,
    /// End the current call and the command.
    Cancel,
    /// Forward the signal to the guest's command under this name.
    Forward(&'static str),
    /// Send the terminal's size to the guest.
    Resize,
    /// Leave the guest's command running and exit.
    Detach,
    /// Print that cleaning up takes a moment.
    SayWait,
    /// Exit and leave cleaning up to the daemon.
    Leave,
}

/// Returns the next phase and what to do. It is a pure function, so that tests can print it as a
/// transcript.
pub(super) fn on_signal(phase: Phase, signal: i32) -> (Phase, Action) {
    if signal == SIGWINCH {
        let action = if matches!(phase, Phase::Command { .. }) {
            Action::Resize
        } else {
            Action::Nothing
        };
        return (phase, action);
    }
    match phase {
        Phase::Working | Phase::Collecting => (phase, Action::Cancel),
        Phase::Command { forwarded } if forwarded < FORWARDED_MAX => (
            Phase::Command {
                forwarded: forwarded + 1,
            },
            Action::Forward(name(signal)),
        ),
        Phase::Command { .. } => (phase, Action::Detach),
        Phase::CleaningUp { asked: false } => (Phase::CleaningUp { asked: true }, Action::SayWait),
        Phase::CleaningUp { asked: true } => (phase, Action::Leave),
    }
}

fn name(signal: i32) -> &'static str {
    match signal {
        SIGTERM => "TERM",
        SIGHUP => "HUP",
        SIGQUIT => "QUIT",
        _ => "INT",
    }
}

/// The source of signals.
pub(super) enum SignalSource {
    /// The signals of this process.
    Process,
    /// A channel, in tests.
    #[cfg(test)]
    Channel(Receiver<i32>),
}

/// Ends the watching thread when it is dropped.
struct Watch(Option<signal_hook::iterator::Handle>, Sender<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(handle) = &self.0 {
            handle.close();
        }
        // If the channel is full or closed, the thread is ending already.
        let _ = self.1.try_send(());
    }
}

impl SignalSource {
    fn watch(&self, handler: impl Fn(i32) + Send + 'static) -> Result<Watch> {
        let (stop, _stopped) = bounded(1);
        match self {
            SignalSource::Process => {
                let ignored = ignored_mask();
                // Signals that the caller ignores (nohup, a background job) stay ignored.
                let wanted = CAUGHT.into_iter().filter(|s| ignored & (1 << (s - 1)) == 0);
                let mut signals = signal_hook::iterator::Signals::new(wanted)
                    .map_err(|e| Error::io("catch signals", e))?;
                let handle = signals.handle();
                thread::spawn("signals", move || signals.forever().for_each(handler))?;
                Ok(Watch(Some(handle), stop))
            }
            #[cfg(test)]
            SignalSource::Channel(signals) => {
                let signals = signals.clone();
                thread::spawn("signals", move || {
                    loop {
                        crossbeam_channel::select! {
                            recv(_stopped) -> _ => return,
                            recv(signals) -> signal => match signal {
                                Ok(signal) => handler(signal),
                                Err(_) => return,
                            },
                        }
                    }
                })?;
                Ok(Watch(None, stop))
            }
        }
    }
}

/// Returns the signals that were ignored when this process started (proc(5), `SigIgn`).
fn ignored_mask() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    field
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// A message to the session, sent on a second connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Control {
    Signal(&'static str),
    Resize,
}

struct State {
    phase: Phase,
    /// Hangs up the current call.
    hangup: Option<Hangup>,
    controls: Option<Sender<Control>>,
    /// The signal that ended the command.
    cause: Option<i32>,
    detached: bool,
    timed_out: bool,
}

/// Handles signals for one command, from its creation until it is dropped. Without it, signals have
/// their default effect.
pub(super) struct Interrupts {
    state: Arc<Mutex<State>>,
    cancel: Cancel,
    _watch: Watch,
}

impl Interrupts {
    pub(super) fn start(source: &SignalSource, stderr: &File) -> Result<Self> {
        let cancel = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
        let state = State {
            phase: Phase::Working,
            hangup: None,
            controls: None,
            cause: None,
            detached: false,
            timed_out: false,
        };
        let state = Arc::new(Mutex::new(Rank::Connections, state));
        let stderr = stderr
            .try_clone()
            .map_err(|e| Error::io("duplicate stderr", e))?;
        let (shared, token) = (state.clone(), cancel.clone());
        let watch = source.watch(move |signal| act(&shared, &token, signal, &stderr))?;
        Ok(Self {
            state,
            cancel,
            _watch: watch,
        })
    }

    /// Returns a token that fires when a signal ends the command, for waits outside a call.
    pub(super) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Enters a phase, which decides what signals do. Fails if a signal has already ended the
    /// command.
    pub(super) fn enter(&self, phase: Phase) -> Result<()> {
        let mut state = self.state.lock();
        if state.cause.is_some() && !matches!(phase, Phase::CleaningUp { .. }) {
            return Err(interrupted());
        }
        state.phase = phase;
        Ok(())
    }

    /// While the guard lives, a signal that ends the command hangs up `client`. Fails if a signal
    /// has already ended it.
    pub(super) fn guard(&self, client: &Client) -> Result<Guard<'_>> {
        let hangup = client.hangup()?;
        let mut state = self.state.lock();
        if state.cause.is_some() && !matches!(state.phase, Phase::CleaningUp { .. }) {
            return Err(interrupted());
        }
        state.hangup = Some(hangup);
        Ok(Guard(self))
    }

    /// Returns a bounded channel that receives signals and resizes while the guest's command runs.
    pub(super) fn controls(&self) -> Receiver<Control> {
        let (sender, receiver) = bounded(CONTROLS_MAX);
        self.state.lock().controls = Some(sender);
        receiver
    }

    /// Sends the terminal's size to the guest.
    pub(super) fn resized(&self) {
        send(&self.state.lock(), Control::Resize);
    }

    /// True once the guest's command has begun, which the session's note reports.
    pub(super) fn command_began(&self) -> bool {
        !matches!(self.state.lock().phase, Phase::Working)
    }

    /// Returns the signal that ended the command, if one did.
    pub(super) fn cause(&self) -> Option<i32> {
        self.state.lock().cause
    }

    /// True if the signal detached from a command that still runs in the guest.
    pub(super) fn detached(&self) -> bool {
        self.state.lock().detached
    }

    /// Returns the exit status 128+n for the signal that ended the command.
    pub(super) fn status(&self) -> Option<u8> {
        self.cause().map(|signal| 128 + signal as u8)
    }

    /// Replaces the error of a call that a signal cut off with `interrupted`.
    pub(super) fn or_interrupted<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() && self.cause().is_some() {
            Err(interrupted())
        } else {
            result
        }
    }

    /// Calls `act` when a signal ends the command, or now if one already has. `act` must not block.
    pub(super) fn on_end(&self, act: impl Fn() + Send + Sync + 'static) {
        let subscription = self.cancel.on_cancel(act);
        // The subscription lasts as long as the process.
        std::mem::forget(subscription);
    }

    /// Ends the guest's command when it has run for `limit`: sends SIGTERM, then SIGKILL, and
    /// finally hangs up. Nothing happens after the returned timer was dropped.
    pub(super) fn end_after(&self, limit: Duration) -> Result<Timer> {
        let dropped = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
        let (state, done) = (self.state.clone(), dropped.clone());
        thread::spawn("timeout", move || end_in_steps(&state, limit, &done))?;
        Ok(Timer(dropped))
    }

    /// True if the guest's command ran for too long.
    pub(super) fn timed_out(&self) -> bool {
        self.state.lock().timed_out
    }

    /// Returns a function that hangs up the current call for a reason other than a signal.
    pub(super) fn hang_up(&self) -> impl Fn() + Send + Sync + 'static {
        let state = self.state.clone();
        move || {
            if let Some(hangup) = &state.lock().hangup {
                hangup.hang_up();
            }
        }
    }
}

/// See [`Interrupts::guard`].
pub(super) struct Guard<'a>(&'a Interrupts);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.hangup = None;
        state.controls = None;
    }
}

/// See [`Interrupts::end_after`].
pub(super) struct Timer(Cancel);

impl Drop for Timer {
    fn drop(&mut self) {
        self.0.cancel(CancelCause::Finished);
    }
}

fn end_in_steps(state: &Mutex<State>, limit: Duration, done: &Cancel) {
    let has_passed = |time: Duration| {
        let waited = wait_any(&[], Instant::now() + time, done);
        waited.is_ok_and(|waited| waited == WaitResult::Deadline)
    };
    if !has_passed(limit) {
        return;
    }
    {
        let mut state = state.lock();
        state.timed_out = true;
        send(&state, Control::Signal("TERM"));
    }
    if !has_passed(TIMEOUT_GRACE) {
        return;
    }
    send(&state.lock(), Control::Signal("KILL"));
    if has_passed(TIMEOUT_GRACE)
        && let Some(hangup) = &state.lock().hangup
    {
        hangup.hang_up();
    }
}

/// Returns the failure of anything that a signal ended.
pub(super) fn interrupted() -> Failure {
    Error::new(Kind::Cancelled, "interrupted").into()
}

fn act(state: &Mutex<State>, cancel: &Cancel, signal: i32, stderr: &File) {
    let mut state = state.lock();
    let (next, action) = on_signal(state.phase, signal);
    state.phase = next;
    match action {
        Action::Nothing => {}
        Action::Forward(name) => send(&state, Control::Signal(name)),
        Action::Resize => send(&state, Control::Resize),
        Action::Cancel | Action::Detach | Action::Leave => {
            state.detached |= action == Action::Detach;
            state.cause.get_or_insert(signal);
            if let Some(hangup) = &state.hangup {
                hangup.hang_up();
            }
            drop(state);
            cancel.cancel(CancelCause::Interrupted);
        }
        Action::SayWait => {
            drop(state);
            let _ = (&mut &*stderr)
                .write_all(b"fcctl: cleaning up; interrupt again to leave that to fcd\n");
        }
    }
}

fn send(state: &State, control: Control) {
    if let Some(controls) = &state.controls {
        // The channel is full if the daemon does not respond. A third signal then detaches.
        let _ = controls.try_send(control);
    }
}

/// Sends signals and resizes to the session on its own connection until the channel closes.
pub(super) fn send_controls(
    socket: &std::path::Path,
    session: &crate::ids::SessionId,
    tty: Option<&File>,
    controls: &Receiver<Control>,
) {
    use crate::api::exec::{ExecResize, ExecResizeRequest, ExecSignal, ExecSignalRequest};
    let mut client = None;
    for control in controls {
        let mut fresh = match client.take() {
            Some(client) => client,
            None => match Client::connect_again(socket) {
                Ok(fresh) => fresh,
                Err(_) => continue,
            },
        };
        let sent = match control {
            Control::Signal(name) => fresh.call::<ExecSignal>(&ExecSignalRequest {
                session: session.clone(),
                signal: name.to_owned(),
            }),
            Control::Resize => match tty.and_then(terminal::size) {
                Some(size) => fresh.call::<ExecResize>(&ExecResizeRequest {
                    session: session.clone(),
                    size,
                }),
                None => continue,
            },
        };
        // The session may just have ended, which is not an error. A broken connection is replaced.
        client = sent.is_ok().then_some(fresh);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(start: Phase, signals: &[i32], expected: Expect) {
        let mut phase = start;
        let mut text = String::new();
        for &signal in signals {
            let (next, action) = on_signal(phase, signal);
            text.push_str(&format!("{phase:?} + {signal} -> {action:?}\n"));
            phase = next;
        }
        expected.assert_eq(&text);
    }

    #[test]
    fn signal_before_command_cancels() {
        check(
            Phase::Working,
            &[SIGWINCH, SIGINT, SIGTERM],
            expect![[r#"
            Working + 28 -> Nothing
            Working + 2 -> Cancel
            Working + 15 -> Cancel
        "#]],
        );
    }

    #[test]
    fn third_signal_after_two_forwarded_detaches() {
        check(
            Phase::Command { forwarded: 0 },
            &[SIGINT, SIGWINCH, SIGTERM, SIGINT],
            expect![[r#"
            Command { forwarded: 0 } + 2 -> Forward("INT")
            Command { forwarded: 1 } + 28 -> Resize
            Command { forwarded: 1 } + 15 -> Forward("TERM")
            Command { forwarded: 2 } + 2 -> Detach
        "#]],
        );
    }

    #[test]
    fn signal_during_cleanup_leaves_only_when_repeated() {
        check(
            Phase::CleaningUp { asked: false },
            &[SIGINT, SIGINT],
            expect![[r#"
            CleaningUp { asked: false } + 2 -> SayWait
            CleaningUp { asked: true } + 2 -> Leave
        "#]],
        );
        check(
            Phase::Collecting,
            &[SIGHUP],
            expect![[r#"
            Collecting + 1 -> Cancel
        "#]],
        );
    }

    #[test]
    fn ignored_mask_contains_callers_ignored_signals() {
        // Rust's runtime ignores SIGPIPE at startup.
        assert_ne!(ignored_mask() & (1 << (libc::SIGPIPE - 1)), 0);
    }
}
