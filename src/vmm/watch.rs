//! Waits for processes to exit: one thread polls the pidfds of all of them.

use super::poll_thread::{Inbox, PollThread};
use crate::error::Result;
use crate::host::pidfd_info;
use crate::host::process::{Exit, Process};
use crate::locks::{Mutex, Rank};
use std::sync::Arc;

pub(super) type Died = Box<dyn FnOnce(Exit) + Send>;

struct Watched {
    process: Process,
    died: Died,
}

/// Watches processes. Dropping the watcher ends its thread, and exits are no longer reported.
pub(super) struct Watcher {
    thread: PollThread<Watched>,
}

impl Watcher {
    /// Creates the watcher. Its thread starts with the first process. Fails if no eventfd can be
    /// created (EMFILE, ENFILE).
    pub(super) fn try_new() -> Result<Self> {
        let thread = PollThread::try_new("vmm-watch")?;
        Ok(Self { thread })
    }

    /// Calls `died` on a separate thread once the process has exited.
    pub(super) fn add(&self, process: Process, died: Died) -> Result<()> {
        self.thread.add(Watched { process, died }, run)
    }
}

fn run(inbox: &Inbox<Watched>) {
    let mut watched: Vec<Watched> = Vec::new();
    loop {
        inbox.poll(watched.iter().map(|w| w.process.fd()), None);
        let Some(incoming) = inbox.take() else {
            return;
        };
        watched.extend(incoming);
        let (living, dead): (Vec<_>, Vec<_>) = watched
            .into_iter()
            .map(|w| (w.process.exit(), w))
            .partition(|(exit, _)| exit.is_none());
        watched = living.into_iter().map(|(_, w)| w).collect();
        for (exit, Watched { process, died }) in dead {
            // Query the exit on the reporting thread, because the answer may take a moment.
            let query = Box::new(move |exit| {
                died(if exit == Exit::Unknown {
                    pidfd_info::wait_exit(&process)
                } else {
                    exit
                });
            });
            report(exit.unwrap_or(Exit::Unknown), query);
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
                    crate::sched::Instant::now() + Duration::from_secs(10),
                    &crate::locks::Cancel::try_new().unwrap()
                )
                .unwrap()
        );
    }
}
