//! Signals for a running command, through a second, short-lived channel of the same session and thread.
//!
//! Why not the `signal` request (RFC 4254, 6.9): OpenSSH 9.2 refuses it for root's sessions ("session signalling
//! requires privilege separation", session.c), and other servers do not know it. On the second channel a shell asks
//! the kernel for the other children of the process that serves this connection, its own parent: each is the leader
//! of the process group of one command.

use super::channel::{Channel, READ_BYTES, STDERR, STDOUT};
use super::wire::Shared;
use crate::api::exec::signal_number;
use std::collections::VecDeque;
use std::rc::Rc;

/// Signals that wait for the one under way; later ones are dropped.
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
    // /proc/PID/task/TID/children needs CONFIG_PROC_CHILDREN; else the parent is in each stat, after the name.
    let children = "cat /proc/$P/task/$P/children 2>/dev/null || for s in /proc/[0-9]*/stat; do \
        read -r pid rest 2>/dev/null <$s && set -- ${rest##*) } && [ \"$2\" = $P ] && echo $pid; done";
    let script = format!(
        "P=$PPID; for c in $({children}); do [ $c = $$ ] || kill -s {signal} -- -$c 2>/dev/null || kill -s {signal} $c; done"
    );
    format!("exec /bin/sh -c {}", crate::guest::quote(&script))
}

impl Signaller {
    /// `signal`: without `SIG`. One that is not known, and so cannot go into a script, is dropped.
    pub fn push(&mut self, signal: String) {
        if self.queue.len() < QUEUE_MAX && signal_number(&signal) != 0 {
            self.queue.push_back(signal);
        }
    }

    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && matches!(self.state, State::Idle)
    }

    /// Goes as far as it can with what has come. That the server has no room for a second channel costs the
    /// signal, not the command.
    pub fn step(&mut self, shared: &Rc<Shared>) {
        while let Some(signal) = self.queue.front() {
            let next = match &mut self.state {
                State::Idle => Ok(Some(State::Opening)),
                State::Opening => Channel::open(shared).map(|c| c.map(State::Starting)),
                State::Starting(channel) => channel.exec(&command(signal)).map(|done| done.map(|_| State::Idle)),
                State::Running(channel) => drain(channel).map(|closed| closed.then_some(State::Idle)),
            };
            let was = match next {
                Ok(None) => return,
                Ok(Some(next)) => std::mem::replace(&mut self.state, next),
                Err(e) => {
                    log::warn!("signal {signal} to a command in a guest: {}", e.message().escape_debug());
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

/// Drops what it prints. Whether it has ended.
fn drain(channel: &mut Channel) -> Result<bool, ssh2::Error> {
    let mut scratch = [0; READ_BYTES];
    for stream in [STDOUT, STDERR] {
        while channel.read(stream, &mut scratch)?.is_some_and(|n| n > 0) {}
    }
    channel.remote_closed()
}
