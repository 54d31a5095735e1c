//! Sends signals to a running command through a second, short-lived channel of the same session and
//! thread.
//!
//! The `signal` request (RFC 4254, 6.9) is not enough: OpenSSH 9.2 refuses it for root's sessions
//! ("session signalling requires privilege separation", session.c), and other servers do not
//! implement it. Instead a shell on the second channel asks the kernel for the other children of
//! its own parent, the process that serves this connection. Each child leads the process group of
//! one command. If the connection ends before the shell looks, the shell's parent is the process
//! that adopts orphans, and that process's children have nothing to do with this connection.
//! Therefore the shell sends a signal only if its parent is an SSH server.

use super::channel::{Channel, READ_BYTES, STDERR, STDOUT};
use super::wire::Shared;
use crate::api::exec::signal_number;
use crate::host::shell::quote;
use std::collections::VecDeque;
use std::rc::Rc;

/// Maximum number of queued signals. Further ones are dropped.
const QUEUE_MAX: usize = 64;

#[derive(Default)]
pub(super) struct Signaller {
    queue: VecDeque<String>,
    state: State,
}

#[derive(Default)]
enum State {
    #[default]
    Idle,
    Opening,
    Starting(Channel),
    Running(Channel),
}

fn command(signal: &str) -> String {
    // /proc/PID/task/TID/children requires CONFIG_PROC_CHILDREN. Without it, the script finds each
    // process's parent in its stat file, after the name.
    let children = "cat /proc/$P/task/$P/children 2>/dev/null || for s in /proc/[0-9]*/stat; do \
        read -r pid rest 2>/dev/null <$s && set -- ${rest##*) } && [ \"$2\" = $P ] && echo $pid; done";
    let script = format!(
        "P=$PPID; read -r name </proc/$P/comm; case $name in sshd*) ;; *) exit ;; esac; for c in $({children}); do [ $c = $$ ] || kill -s {signal} -- -$c 2>/dev/null || kill -s {signal} $c; done"
    );
    // An image may have no /bin/sh, but the search path ends with a directory that has a shell. In
    // a guest that boots with a guest runtime, the first line makes root run the script, because
    // the command may belong to any user.
    format!("#fcd-user 0\nexec sh -c {}", quote(&script))
}

impl Signaller {
    /// Queues a signal, named without `SIG`. Drops the signal if the queue is full or if the name
    /// is unknown, because an unknown name must not get into a script.
    pub(super) fn push(&mut self, signal: String) {
        if self.queue.len() < QUEUE_MAX && signal_number(&signal) != 0 {
            self.queue.push_back(signal);
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && matches!(self.state, State::Idle)
    }

    /// Sends the queued signals as far as possible without waiting. If the server has no room for a
    /// second channel, the signal is lost but the command is not affected.
    pub(super) fn step(&mut self, shared: &Rc<Shared>) {
        while let Some(signal) = self.queue.front() {
            let next = match &mut self.state {
                State::Idle => Ok(Some(State::Opening)),
                State::Opening => Channel::open(shared).map(|c| c.map(State::Starting)),
                State::Starting(channel) => channel
                    .exec(command(signal).as_bytes())
                    .map(|done| done.map(|_| State::Idle)),
                State::Running(channel) => {
                    drain(channel).map(|closed| closed.then_some(State::Idle))
                }
            };
            let was = match next {
                Ok(None) => return,
                Ok(Some(next)) => std::mem::replace(&mut self.state, next),
                // Skip this signal without a message, because a helper has nowhere to log.
                Err(_) => {
                    self.state = State::Idle;
                    self.queue.pop_front();
                    continue;
                }
            };
            match was {
                State::Starting(channel) => self.state = State::Running(channel),
                State::Running(_) => drop(self.queue.pop_front()),
                State::Idle | State::Opening => {}
            }
        }
    }
}

/// Discards the channel's output. Returns true if the server has closed the channel.
fn drain(channel: &mut Channel) -> Result<bool, ssh2::Error> {
    let mut scratch = [0; READ_BYTES];
    for stream in [STDOUT, STDERR] {
        while channel.read(stream, &mut scratch)?.is_some_and(|n| n > 0) {}
    }
    channel.remote_closed()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If the connection ends before the shell runs, the shell's parent is the process that adopts
    /// orphans, and that process's children have nothing to do with the connection. The test runs
    /// in a PID namespace, whose init adopts the orphans.
    #[test]
    fn signal_after_lost_connection_reaches_nobody() {
        let is_orphan =
            "while read -r _ _ _ parent _ </proc/self/stat && [ $parent != 1 ]; do :; done";
        let late = command("USR1");
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("its-end");
        let fifo = fifo.display();
        let script = format!(
            "sleep 1000 & bystander=$!; mkfifo {fifo}; ( ( {is_orphan}; {late} ) 7>{fifo} & ); cat {fifo}; \
             kill -TERM $bystander; wait $bystander; [ $? = 143 ] && echo it lived"
        );
        let unshare = [
            "--user",
            "--map-root-user",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            &script,
        ];
        let command = crate::host::Command::new("unshare")
            .args(unshare)
            .deadline(std::time::Duration::from_secs(20));
        let cancel = crate::locks::Cancel::try_new().unwrap();
        let out = crate::host::command::run_any_status(&command, &cancel, &mut |_| {}).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&out.stdout),
            "it lived\n",
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
}
