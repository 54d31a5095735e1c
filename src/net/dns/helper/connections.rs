//! Queries over TCP. A connection handles one query at a time: it sends an answer before it reads
//! the next query.

use super::packet::{Query, Rcode, is_answer};
use super::zone::{Found, Verdict, answer, judge};
use super::{Daemon, Disconnected};
use crate::config::Subnet;
use crate::net::dns::gatekeeper::{QUESTIONS_PER_CONNECTION_MAX, TRIES_MAX};
use crate::net::dns::protocol::{QUESTION_BYTES_MAX, Request, Ticket};
use crate::sched::Instant;
use nix::poll::PollFlags;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// The time that a client has to send a query, and to read its answer.
const CLIENT_DEADLINE: Duration = Duration::from_secs(5);
/// The time that all resolvers together have to answer a query.
const RESOLVERS_DEADLINE: Duration = Duration::from_secs(4);
/// The maximum duration of a connection.
const LIFE_MAX: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct Connections {
    open: Vec<Connection>,
}

struct Connection {
    ticket: Ticket,
    stream: TcpStream,
    state: State,
    /// The deadline of the current state. While a query is forwarded, [`Forwarded::until`] applies
    /// instead.
    deadline: Instant,
    ends: Instant,
    questions_left: u16,
}

enum State {
    Question(Incoming),
    /// The daemon looks up a name or an address.
    LookedUp(Vec<u8>),
    /// The daemon opens a socket to a resolver.
    Opening(Forwarded),
    Sending(Forwarded, TcpStream, Outgoing),
    Receiving(Forwarded, TcpStream, Incoming),
    Reply(Outgoing),
}

/// A query that is forwarded to the host's resolvers.
struct Forwarded {
    packet: Vec<u8>,
    tries: u8,
    /// The deadline for all tries together.
    until: Instant,
}

/// The next action for a connection after one step.
enum Step {
    /// The connection has to wait in this state.
    Stay(State),
    Next(State),
    Close,
}

impl Connections {
    pub(super) fn open(&mut self, ticket: Ticket, fd: OwnedFd, now: Instant) {
        self.open.push(Connection {
            ticket,
            stream: fd.into(),
            state: State::Question(Incoming::new(QUESTION_BYTES_MAX)),
            deadline: now + CLIENT_DEADLINE,
            ends: now + LIFE_MAX,
            questions_left: QUESTIONS_PER_CONNECTION_MAX,
        });
    }

    pub(super) fn has(&self, ticket: Ticket) -> bool {
        self.open.iter().any(|c| c.ticket == ticket)
    }

    /// Returns the descriptor that each connection waits for, or None for a connection that waits
    /// for the daemon.
    pub(super) fn waits(&self) -> impl Iterator<Item = Option<(BorrowedFd<'_>, PollFlags)>> {
        self.open.iter().map(|c| match &c.state {
            State::Question(_) => Some((c.stream.as_fd(), PollFlags::POLLIN)),
            State::LookedUp(_) | State::Opening(_) => None,
            State::Sending(_, resolver, _) => Some((resolver.as_fd(), PollFlags::POLLOUT)),
            State::Receiving(_, resolver, _) => Some((resolver.as_fd(), PollFlags::POLLIN)),
            State::Reply(_) => Some((c.stream.as_fd(), PollFlags::POLLOUT)),
        })
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.open.iter().map(|c| c.due().min(c.ends)).min()
    }

    /// Advances the connections that are ready or whose deadline has passed, and closes those that
    /// are finished. `ready` corresponds to [`Self::waits`].
    pub(super) fn advance(
        &mut self,
        ready: &[bool],
        daemon: &Daemon,
        subnet: Subnet,
        now: Instant,
    ) -> Result<(), Disconnected> {
        // Iterate backwards, because closed connections are removed.
        for at in (0..ready.len().min(self.open.len())).rev() {
            let connection = &mut self.open[at];
            let is_open = if now >= connection.ends {
                false
            } else if ready[at] {
                connection.advance(daemon, subnet, now)?
            } else if now >= connection.due() {
                connection.time_out(now)
            } else {
                true
            };
            if !is_open {
                let closed = self.open.swap_remove(at);
                daemon.ask(&Request::Done {
                    ticket: closed.ticket,
                })?;
            }
        }
        Ok(())
    }

    /// Answers a query with the daemon's result. Does nothing if no connection waits for that
    /// result.
    pub(super) fn found(&mut self, ticket: Ticket, found: &Found, subnet: Subnet, now: Instant) {
        let waiting = self.open.iter_mut().find(|c| c.ticket == ticket);
        let Some((connection, reply)) = waiting.and_then(|c| match &c.state {
            State::LookedUp(packet) => answer(packet, subnet, found).map(|reply| (c, reply)),
            _ => None,
        }) else {
            return;
        };
        connection.enter(State::Reply(Outgoing::new(&reply)), now);
    }

    /// Forwards a query through the socket that the daemon has opened. If `fd` is None, answers the
    /// query with an error. Does nothing if no connection waits for a socket.
    pub(super) fn resolver(&mut self, ticket: Ticket, fd: Option<OwnedFd>, now: Instant) {
        let Some(connection) = self.open.iter_mut().find(|c| c.ticket == ticket) else {
            return;
        };
        let state = match (
            std::mem::replace(&mut connection.state, State::Reply(Outgoing::default())),
            fd,
        ) {
            (State::Opening(forwarded), Some(fd)) => {
                let out = Outgoing::new(&forwarded.packet);
                State::Sending(forwarded, TcpStream::from(fd), out)
            }
            (State::Opening(forwarded), None) => State::Reply(failure(&forwarded.packet)),
            // The socket arrived after the deadline.
            (other, _) => {
                connection.state = other;
                return;
            }
        };
        connection.enter(state, now);
    }
}

fn failure(packet: &[u8]) -> Outgoing {
    Query::parse(packet).map_or_else(
        |_| Outgoing::default(),
        |query| Outgoing::new(&query.refuse(Rcode::ServFail)),
    )
}

impl Connection {
    fn enter(&mut self, state: State, now: Instant) {
        self.deadline = now + CLIENT_DEADLINE;
        self.state = state;
    }

    fn due(&self) -> Instant {
        match &self.state {
            State::Opening(f) | State::Sending(f, ..) | State::Receiving(f, ..) => f.until,
            _ => self.deadline,
        }
    }

    /// Answers a forwarded query whose deadline has passed with an error. Returns false in all
    /// other states, because the connection is finished then.
    fn time_out(&mut self, now: Instant) -> bool {
        match &self.state {
            State::Opening(f) | State::Sending(f, ..) | State::Receiving(f, ..) => {
                let reply = State::Reply(failure(&f.packet));
                self.enter(reply, now);
                true
            }
            _ => false,
        }
    }

    /// Advances as far as possible without waiting. Returns false if the connection is finished.
    fn advance(
        &mut self,
        daemon: &Daemon,
        subnet: Subnet,
        now: Instant,
    ) -> Result<bool, Disconnected> {
        loop {
            let state = std::mem::replace(&mut self.state, State::Reply(Outgoing::default()));
            match self.step(state, daemon, subnet, now)? {
                Step::Stay(state) => {
                    self.state = state;
                    return Ok(true);
                }
                Step::Next(state) => self.enter(state, now),
                Step::Close => return Ok(false),
            }
        }
    }

    fn step(
        &mut self,
        state: State,
        daemon: &Daemon,
        subnet: Subnet,
        now: Instant,
    ) -> Result<Step, Disconnected> {
        let ticket = self.ticket;
        Ok(match state {
            State::Question(mut incoming) => match incoming.read(&self.stream) {
                Progress::Waits => Step::Stay(State::Question(incoming)),
                Progress::Failed => Step::Close,
                Progress::Done => {
                    self.questions_left -= 1;
                    let packet = incoming.message();
                    match judge(&packet, subnet) {
                        Verdict::Drop => Step::Close,
                        Verdict::Reply(reply) => Step::Next(State::Reply(Outgoing::new(&reply))),
                        Verdict::LookUp(lookup) => {
                            daemon.ask(&lookup.request(ticket))?;
                            Step::Next(State::LookedUp(packet))
                        }
                        Verdict::Forward(_) => {
                            daemon.ask(&Request::Resolver { ticket, skip: 0 })?;
                            Step::Next(State::Opening(Forwarded {
                                packet,
                                tries: 1,
                                until: now + RESOLVERS_DEADLINE,
                            }))
                        }
                    }
                }
            },
            State::Sending(forwarded, resolver, mut out) => match out.write(&resolver) {
                Progress::Waits => Step::Stay(State::Sending(forwarded, resolver, out)),
                Progress::Failed => try_again(forwarded, ticket, daemon)?,
                Progress::Done => Step::Next(State::Receiving(
                    forwarded,
                    resolver,
                    Incoming::new(u16::MAX.into()),
                )),
            },
            State::Receiving(forwarded, resolver, mut incoming) => match incoming.read(&resolver) {
                Progress::Waits => Step::Stay(State::Receiving(forwarded, resolver, incoming)),
                Progress::Failed => try_again(forwarded, ticket, daemon)?,
                Progress::Done => {
                    let reply = incoming.message();
                    let is_its = Query::parse(&forwarded.packet)
                        .is_ok_and(|q| is_answer(&reply, q.id(), q.question()));
                    if is_its {
                        Step::Next(State::Reply(Outgoing::new(&reply)))
                    } else {
                        try_again(forwarded, ticket, daemon)?
                    }
                }
            },
            State::Reply(mut out) => match out.write(&self.stream) {
                Progress::Waits => Step::Stay(State::Reply(out)),
                Progress::Done if self.questions_left > 0 => {
                    Step::Next(State::Question(Incoming::new(QUESTION_BYTES_MAX)))
                }
                Progress::Done | Progress::Failed => Step::Close,
            },
            waits @ (State::LookedUp(_) | State::Opening(_)) => Step::Stay(waits),
        })
    }
}

fn try_again(forwarded: Forwarded, ticket: Ticket, daemon: &Daemon) -> Result<Step, Disconnected> {
    if forwarded.tries >= TRIES_MAX {
        return Ok(Step::Next(State::Reply(failure(&forwarded.packet))));
    }
    daemon.ask(&Request::Resolver {
        ticket,
        skip: forwarded.tries,
    })?;
    Ok(Step::Next(State::Opening(Forwarded {
        tries: forwarded.tries + 1,
        ..forwarded
    })))
}

enum Progress {
    Done,
    Waits,
    Failed,
}

/// A message that is being received, prefixed with its length (RFC 1035, 4.2.2).
struct Incoming {
    len: [u8; 2],
    len_filled: usize,
    message: Vec<u8>,
    filled: usize,
    bytes_max: usize,
}

impl Incoming {
    fn new(bytes_max: usize) -> Self {
        Self {
            len: [0; 2],
            len_filled: 0,
            message: Vec::new(),
            filled: 0,
            bytes_max,
        }
    }

    fn message(self) -> Vec<u8> {
        self.message
    }

    /// Reads the available bytes of the message, and nothing beyond its end.
    fn read(&mut self, mut stream: &TcpStream) -> Progress {
        loop {
            let reads_len = self.len_filled < self.len.len();
            let free = if reads_len {
                &mut self.len[self.len_filled..]
            } else {
                &mut self.message[self.filled..]
            };
            if free.is_empty() {
                return Progress::Done;
            }
            match stream.read(free) {
                Ok(0) => return Progress::Failed,
                Ok(n) if reads_len => {
                    self.len_filled += n;
                    let len = usize::from(u16::from_be_bytes(self.len));
                    if self.len_filled == self.len.len() {
                        if len > self.bytes_max {
                            return Progress::Failed;
                        }
                        self.message = vec![0; len];
                    }
                }
                Ok(n) => self.filled += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Progress::Waits,
                Err(_) => return Progress::Failed,
            }
        }
    }
}

/// A message that is being sent, prefixed with its length. The default value is empty and counts as
/// failed.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
}

impl Outgoing {
    fn new(message: &[u8]) -> Self {
        let Ok(len) = u16::try_from(message.len()) else {
            return Self::default();
        };
        Self {
            bytes: [&len.to_be_bytes(), message].concat(),
            sent: 0,
        }
    }

    fn write(&mut self, mut stream: &TcpStream) -> Progress {
        if self.bytes.is_empty() {
            return Progress::Failed;
        }
        while self.sent < self.bytes.len() {
            match stream.write(&self.bytes[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Progress::Waits,
                Err(_) => return Progress::Failed,
            }
        }
        Progress::Done
    }
}
