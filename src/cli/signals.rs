//! Signals: what each one means in each phase of a command, and the thread that acts on them.

use super::terminal;
use crate::client::{Client, Failure, Hangup, Result};
use crate::error::{Error, Kind};
use crate::host::thread;
use crate::locks::{Cancel, Mutex, Rank};
use crossbeam_channel::{Receiver, Sender, bounded};
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use std::fs::File;
use std::io::Write;
use std::sync::Arc;

/// Signals that go to the guest's command before the next one detaches.
pub const FORWARDED_MAX: u8 = 2;
/// Signals and resizes that wait for the daemon; more than so many are dropped.
const CONTROLS_MAX: usize = 16;
const CAUGHT: [i32; 5] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH];

/// Where a command is, as far as signals care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before the guest's command, or a command without one: whatever is under way can be cancelled.
    Working,
    /// The guest's command runs.
    Command { forwarded: u8 },
    /// It has ended; its results are being fetched.
    Collecting,
    /// What was made is being removed.
    CleaningUp { asked: bool },
}

/// What a signal leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Nothing,
    /// End the call under way, and with it the command.
    Cancel,
    /// To the guest's command, by this name.
    Forward(&'static str),
    /// Tell the guest the terminal's size.
    Resize,
    /// Leave the guest's command.
    Detach,
    /// Say that cleaning up takes a moment.
    SayWait,
    /// Leave the cleaning up to the daemon.
    Leave,
}

/// Pure: the next phase and what to do.
pub fn on_signal(phase: Phase, signal: i32) -> (Phase, Action) {
    if signal == SIGWINCH {
        let action = if matches!(phase, Phase::Command { .. }) { Action::Resize } else { Action::Nothing };
        return (phase, action);
    }
    match phase {
        Phase::Working | Phase::Collecting => (phase, Action::Cancel),
        Phase::Command { forwarded } if forwarded < FORWARDED_MAX => {
            (Phase::Command { forwarded: forwarded + 1 }, Action::Forward(name(signal)))
        }
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

/// Where signals come from.
pub enum SignalSource {
    /// This process.
    Process,
    /// A test.
    #[cfg(test)]
    Channel(Receiver<i32>),
}

/// Ends the thread that watches.
struct Watch(Option<signal_hook::iterator::Handle>, Sender<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(handle) = &self.0 {
            handle.close();
        }
        // Full or gone: it ends anyway.
        let _ = self.1.try_send(());
    }
}

impl SignalSource {
    fn watch(&self, handler: impl Fn(i32) + Send + 'static) -> Result<Watch> {
        let (stop, _stopped) = bounded(1);
        match self {
            SignalSource::Process => {
                let ignored = ignored_mask();
                // What the caller ignores (nohup, a job in the background) stays ignored.
                let wanted = CAUGHT.into_iter().filter(|s| ignored & (1 << (s - 1)) == 0);
                let mut signals = signal_hook::iterator::Signals::new(wanted).map_err(|e| Error::io("catch signals", e))?;
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

/// The signals that this process was started to ignore (proc(5), `SigIgn`).
fn ignored_mask() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    field.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// What goes to the session on a second connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    Signal(&'static str),
    Resize,
}

struct State {
    phase: Phase,
    /// Of the call under way.
    hangup: Option<Hangup>,
    controls: Option<Sender<Control>>,
    /// The signal that ended the command.
    cause: Option<i32>,
    detached: bool,
}

/// The signals of one command, from when it is made until it is dropped. Without one they have their default effect.
pub struct Interrupts {
    state: Arc<Mutex<State>>,
    cancel: Cancel,
    _watch: Watch,
}

impl Interrupts {
    pub fn start(source: &SignalSource, stderr: &File) -> Result<Self> {
        let cancel = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
        let state = State { phase: Phase::Working, hangup: None, controls: None, cause: None, detached: false };
        let state = Arc::new(Mutex::new(Rank::Connections, state));
        let stderr = stderr.try_clone().map_err(|e| Error::io("duplicate stderr", e))?;
        let (shared, token) = (state.clone(), cancel.clone());
        let watch = source.watch(move |signal| act(&shared, &token, signal, &stderr))?;
        Ok(Self { state, cancel, _watch: watch })
    }

    /// Fires at the signal that ends the command. For whatever blocks outside a call.
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// From here on signals mean something else. Fails when one has ended the command before this.
    pub fn enter(&self, phase: Phase) -> Result<()> {
        let mut state = self.state.lock();
        if state.cause.is_some() && !matches!(phase, Phase::CleaningUp { .. }) {
            return Err(interrupted());
        }
        state.phase = phase;
        Ok(())
    }

    /// While the guard lives, a signal that ends the command hangs up `client`. Fails when one has ended it.
    pub fn guard(&self, client: &Client) -> Result<Guard<'_>> {
        let hangup = client.hangup()?;
        let mut state = self.state.lock();
        if state.cause.is_some() && !matches!(state.phase, Phase::CleaningUp { .. }) {
            return Err(interrupted());
        }
        state.hangup = Some(hangup);
        Ok(Guard(self))
    }

    /// Where signals and resizes go while the guest's command runs; a bounded channel.
    pub fn controls(&self) -> Receiver<Control> {
        let (sender, receiver) = bounded(CONTROLS_MAX);
        self.state.lock().controls = Some(sender);
        receiver
    }

    /// Tells the guest the terminal's size.
    pub fn resized(&self) {
        send(&self.state.lock(), Control::Resize);
    }

    /// The guest's command has begun: the session's note came.
    pub fn command_began(&self) -> bool {
        !matches!(self.state.lock().phase, Phase::Working)
    }

    /// The signal that ended the command, if one did.
    pub fn cause(&self) -> Option<i32> {
        self.state.lock().cause
    }

    /// It left a guest's command behind.
    pub fn detached(&self) -> bool {
        self.state.lock().detached
    }

    /// 128+n for the signal that ended the command.
    pub fn status(&self) -> Option<u8> {
        self.cause().map(|signal| 128 + signal as u8)
    }

    /// What a call gave, but `interrupted` where a signal cut it off.
    pub fn told<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() && self.cause().is_some() { Err(interrupted()) } else { result }
    }

    /// Calls `act` when a signal ends the command, or now if one has. It must not block.
    pub fn on_end(&self, act: impl Fn() + Send + Sync + 'static) {
        let subscription = self.cancel.on_cancel(act);
        // As long as the command itself.
        std::mem::forget(subscription);
    }

    /// Cuts off the call under way, for a reason of our own.
    pub fn hang_up(&self) -> impl Fn() + Send + Sync + 'static {
        let state = self.state.clone();
        move || {
            if let Some(hangup) = &state.lock().hangup {
                hangup.hang_up();
            }
        }
    }
}

/// See [`Interrupts::guard`].
pub struct Guard<'a>(&'a Interrupts);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.hangup = None;
        state.controls = None;
    }
}

/// The failure of whatever a signal ended.
pub fn interrupted() -> Failure {
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
            cancel.cancel("interrupted");
        }
        Action::SayWait => {
            drop(state);
            let _ = (&mut &*stderr).write_all(b"fcctl: cleaning up; interrupt again to leave that to fcd\n");
        }
    }
}

fn send(state: &State, control: Control) {
    if let Some(controls) = &state.controls {
        // Full: the daemon does not answer, and a third signal detaches.
        let _ = controls.try_send(control);
    }
}

/// Sends what comes to the session until the channel closes. On a connection of its own.
pub fn send_controls(
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
            Control::Signal(name) => {
                fresh.call::<ExecSignal>(&ExecSignalRequest { session: session.clone(), signal: name.to_owned() })
            }
            Control::Resize => match tty.and_then(terminal::size) {
                Some(size) => fresh.call::<ExecResize>(&ExecResizeRequest { session: session.clone(), size }),
                None => continue,
            },
        };
        // The session may just have ended; that is no news. A broken connection is made anew.
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
    fn before_the_command_a_signal_cancels() {
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
    fn two_go_to_the_guest_and_the_third_detaches() {
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
    fn cleaning_up_is_left_only_when_asked_twice() {
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
    fn what_the_caller_ignores_is_known() {
        // Rust ignores SIGPIPE from the start.
        assert_ne!(ignored_mask() & (1 << (libc::SIGPIPE - 1)), 0);
    }
}
