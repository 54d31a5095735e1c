//! Waits for processes to exit: one thread polls the pidfds of all of them.

use crate::error::{Error, Result};
use crate::host::pidfd_info;
use crate::host::process::{Exit, Process};
use crate::host::wait::poll_until;
use crate::locks::{Mutex, Rank};
use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long to wait after an error such as a lack of memory, instead of spinning.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

pub(super) type Died = Box<dyn FnOnce(Exit) + Send>;

#[derive(Default)]
struct State {
    incoming: Vec<(Process, Died)>,
    thread: Option<JoinHandle<()>>,
    is_closed: bool,
}

struct Shared {
    state: Mutex<State>,
    wake: EventFd,
}

/// Watches processes. Dropping the watcher ends its thread, and exits are no longer reported.
pub(super) struct Watcher {
    shared: Arc<Shared>,
}

impl Watcher {
    /// Creates the watcher. Its thread starts with the first process. Fails if no eventfd can be
    /// created (EMFILE, ENFILE).
    pub(super) fn try_new() -> Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::io("create an eventfd for the process watcher", e))?;
        Ok(Self {
            shared: Arc::new(Shared {
                state: Mutex::new(Rank::Consoles, State::default()),
                wake,
            }),
        })
    }

    /// Calls `died` on a separate thread once the process has exited.
    pub(super) fn add(&self, process: Process, died: Died) -> Result<()> {
        let mut state = self.shared.state.lock();
        if state.thread.is_none() {
            let shared = self.shared.clone();
            state.thread = Some(crate::host::thread::spawn("vmm-watch", move || {
                run(&shared)
            })?);
        }
        state.incoming.push((process, died));
        drop(state);
        let _ = self.shared.wake.write(1);
        Ok(())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.is_closed = true;
        let thread = state.thread.take();
        drop(state);
        let _ = self.shared.wake.write(1);
        // A callback may be the last owner of the watcher, and a thread cannot join itself.
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared) {
    let mut watched: Vec<(Process, Died)> = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(shared.wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(
            watched
                .iter()
                .map(|(p, _)| PollFd::new(p.fd(), PollFlags::POLLIN)),
        );
        if let Err(e) = poll_until(&mut fds, None) {
            log::error!("poll the processes: {e}");
            let _ = poll_until(&mut [], Some(Instant::now() + ERROR_PAUSE));
        }
        drop(fds);
        let _ = shared.wake.read();
        let mut state = shared.state.lock();
        let (incoming, is_closed) = (std::mem::take(&mut state.incoming), state.is_closed);
        drop(state);
        if is_closed {
            return;
        }
        watched.extend(incoming);
        let (living, dead): (Vec<_>, Vec<_>) = watched
            .into_iter()
            .map(|(p, died)| (p.exit(), p, died))
            .partition(|(exit, ..)| exit.is_none());
        watched = living.into_iter().map(|(_, p, died)| (p, died)).collect();
        for (exit, process, died) in dead {
            // Query the exit on the reporting thread, because the answer may take a moment.
            let ask = Box::new(move |exit| {
                died(if exit == Exit::Unknown {
                    pidfd_info::wait_exit(&process)
                } else {
                    exit
                });
            });
            report(exit.unwrap_or(Exit::Unknown), ask);
        }
    }
}

/// Calls `died` on a separate thread, because `died` takes locks and waits for commits, while other
/// VMMs may exit. If no thread can be started, calls `died` on this thread.
pub(super) fn report(exit: Exit, died: Died) {
    let died = Arc::new(Mutex::new(Rank::Consoles, Some(died)));
    let call = move |died: &Mutex<Option<Died>>| {
        let taken = died.lock().take();
        if let Some(died) = taken {
            died(exit);
        }
    };
    let theirs = died.clone();
    if let Err(e) = crate::host::thread::spawn("vmm-died", move || call(&theirs)) {
        log::error!("{e}");
        call(&died);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::process::{Spawn, spawn};
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    fn process(program: &str, args: &[&str]) -> Process {
        let args = args.iter().map(Into::into).collect();
        spawn(Spawn {
            program: program.into(),
            args,
            env: vec![],
            cwd: "/".into(),
            output: None,
            credentials: None,
            groups: Vec::new(),
        })
        .unwrap()
    }

    #[test]
    fn each_exit_is_reported_once_with_its_status() {
        let watcher = Watcher::try_new().unwrap();
        let (sender, exits) = channel();
        let sleeper = process("/bin/sleep", &["1000"]);
        for (name, p) in [
            ("sleep", Process::open(sleeper.identity()).unwrap().unwrap()),
            ("true", process("/bin/true", &[])),
            ("false", process("/bin/false", &[])),
        ] {
            let sender = sender.clone();
            watcher
                .add(
                    p,
                    Box::new(move |how| sender.send((name, how.to_string())).unwrap()),
                )
                .unwrap();
        }
        let next = || exits.recv_timeout(Duration::from_secs(10)).unwrap();
        let mut first = [next(), next()];
        first.sort();
        assert_eq!(
            first,
            [
                ("false", "exit status 1".to_owned()),
                ("true", "exit status 0".to_owned())
            ]
        );
        assert_eq!(
            exits.recv_timeout(Duration::from_millis(20)),
            Err(RecvTimeoutError::Timeout)
        );
        sleeper.signal(rustix::process::Signal::KILL).unwrap();
        assert_eq!(next(), ("sleep", "signal 9 (SIGKILL)".to_owned()));
    }

    #[test]
    fn dropped_watcher_reports_nothing() {
        let watcher = Watcher::try_new().unwrap();
        let (sender, exits) = channel();
        let sleeper = process("/bin/sleep", &["1000"]);
        let same = Process::open(sleeper.identity()).unwrap().unwrap();
        watcher
            .add(
                same,
                Box::new(move |how| sender.send(how.to_string()).unwrap()),
            )
            .unwrap();
        drop(watcher);
        sleeper.signal(rustix::process::Signal::KILL).unwrap();
        assert_eq!(
            exits.recv_timeout(Duration::from_secs(10)),
            Err(RecvTimeoutError::Disconnected)
        );
        assert!(
            sleeper
                .wait(
                    std::time::Instant::now() + Duration::from_secs(10),
                    &crate::locks::Cancel::try_new().unwrap()
                )
                .unwrap()
        );
    }
}
