//! Queries over UDP. Each is answered at once, or waits for the daemon or for one of the host's
//! resolvers.

use super::packet::{Rcode, is_answer, set_id};
use super::zone::{Found, Verdict, answer, judge};
use super::{Daemon, Disconnected};
use crate::config::Subnet;
use crate::host::random;
use crate::net::dns::gatekeeper::TRIES_MAX;
use crate::net::dns::protocol::{ANSWER_BYTES_MAX, Request, Ticket};
use crate::sched::Instant;
use nix::poll::PollFlags;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// The maximum numbers of queries that wait for resolvers, in total and for one client.
const PENDING_MAX: usize = 256;
const PENDING_PER_CLIENT_MAX: usize = 64;
/// How long to wait for one resolver before the next one is tried.
const RESOLVER_DEADLINE: Duration = Duration::from_secs(2);

pub(super) struct Datagrams {
    /// Queries that wait for the daemon's lookup.
    looked_up: HashMap<Ticket, Vec<u8>>,
    pending: Vec<Pending>,
    buffer: Vec<u8>,
}

/// A query that is forwarded to the host's resolvers.
struct Pending {
    ticket: Ticket,
    client: SocketAddrV4,
    client_id: u16,
    packet: Vec<u8>,
    question: Vec<u8>,
    /// The current try, or None while the daemon opens a socket.
    asked: Option<Asked>,
    tries: u8,
    /// The answer to send if all resolvers fail.
    failure: Vec<u8>,
}

struct Asked {
    /// A random id that is used for this try only.
    id: u16,
    socket: UdpSocket,
    deadline: Instant,
}

impl Default for Datagrams {
    fn default() -> Self {
        Self {
            looked_up: HashMap::new(),
            pending: Vec::new(),
            buffer: vec![0; ANSWER_BYTES_MAX],
        }
    }
}

impl Datagrams {
    /// Returns the descriptor that each pending query waits for, or None while the daemon opens a
    /// socket for the query.
    pub(super) fn waits(&self) -> impl Iterator<Item = Option<(BorrowedFd<'_>, PollFlags)>> {
        self.pending.iter().map(|p| {
            p.asked
                .as_ref()
                .map(|asked| (asked.socket.as_fd(), PollFlags::POLLIN))
        })
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.pending
            .iter()
            .filter_map(|p| p.asked.as_ref())
            .map(|asked| asked.deadline)
            .min()
    }

    /// Drops, answers or forwards a query, or asks the daemon to look it up.
    pub(super) fn question(
        &mut self,
        (ticket, client): (Ticket, SocketAddrV4),
        packet: Vec<u8>,
        daemon: &Daemon,
        subnet: Subnet,
    ) -> Result<(), Disconnected> {
        match judge(&packet, subnet) {
            Verdict::Drop => daemon.ask(&Request::Done { ticket }),
            Verdict::Reply(reply) => daemon.ask(&Request::Answer {
                ticket,
                packet: &reply,
            }),
            Verdict::LookUp(lookup) => {
                daemon.ask(&lookup.request(ticket))?;
                self.looked_up.insert(ticket, packet);
                Ok(())
            }
            Verdict::Forward(query) => {
                let (client_id, question) = (query.id(), query.question().to_vec());
                // The client repeats a query that is still open. The answer to the first query is
                // enough.
                if self.pending.iter().any(|p| {
                    p.client == client && p.client_id == client_id && p.question == question
                }) {
                    return daemon.ask(&Request::Done { ticket });
                }
                let of_client = self
                    .pending
                    .iter()
                    .filter(|p| p.client.ip() == client.ip())
                    .count();
                let failure = query.refuse(Rcode::ServFail);
                if self.pending.len() >= PENDING_MAX || of_client >= PENDING_PER_CLIENT_MAX {
                    return daemon.ask(&Request::Answer {
                        ticket,
                        packet: &failure,
                    });
                }
                daemon.ask(&Request::Resolver { ticket, skip: 0 })?;
                self.pending.push(Pending {
                    ticket,
                    client,
                    client_id,
                    packet,
                    question,
                    asked: None,
                    tries: 1,
                    failure,
                });
                Ok(())
            }
        }
    }

    /// Answers a query with the daemon's result. Does nothing if the query is no longer open.
    pub(super) fn found(
        &mut self,
        ticket: Ticket,
        found: &Found,
        daemon: &Daemon,
        subnet: Subnet,
    ) -> Result<(), Disconnected> {
        let Some(packet) = self.looked_up.remove(&ticket) else {
            return Ok(());
        };
        match answer(&packet, subnet, found) {
            Some(reply) => daemon.ask(&Request::Answer {
                ticket,
                packet: &reply,
            }),
            None => daemon.ask(&Request::Done { ticket }),
        }
    }

    /// Forwards a query through the socket that the daemon has opened. If `fd` is None, answers the
    /// query with an error. Does nothing if the query no longer waits for a socket.
    pub(super) fn resolver(
        &mut self,
        ticket: Ticket,
        fd: Option<OwnedFd>,
        daemon: &Daemon,
        now: Instant,
    ) -> Result<(), Disconnected> {
        let Some(at) = self
            .pending
            .iter()
            .position(|p| p.ticket == ticket && p.asked.is_none())
        else {
            return Ok(());
        };
        let Some(socket) = fd.map(UdpSocket::from) else {
            return self.fail(at, daemon);
        };
        let pending = &mut self.pending[at];
        let id = u16::from_ne_bytes(random::bytes());
        set_id(&mut pending.packet, id);
        match socket.send(&pending.packet) {
            Ok(_) => {
                pending.asked = Some(Asked {
                    id,
                    socket,
                    deadline: now + RESOLVER_DEADLINE,
                });
                Ok(())
            }
            Err(_) => self.try_again(at, daemon),
        }
    }

    /// Forwards the answers that have arrived, and retries queries whose deadline has passed.
    /// `ready` corresponds to [`Self::waits`].
    pub(super) fn take_answers(
        &mut self,
        ready: &[bool],
        daemon: &Daemon,
        now: Instant,
    ) -> Result<(), Disconnected> {
        // Iterate backwards, because finished queries are removed.
        for at in (0..ready.len().min(self.pending.len())).rev() {
            let Some(asked) = &self.pending[at].asked else {
                continue;
            };
            let is_late = asked.deadline <= now;
            if ready[at] {
                self.take_answer(at, daemon)?;
            } else if is_late {
                self.try_again(at, daemon)?;
            }
        }
        Ok(())
    }

    fn take_answer(&mut self, at: usize, daemon: &Daemon) -> Result<(), Disconnected> {
        let pending = &self.pending[at];
        let Some(asked) = &pending.asked else {
            return Ok(());
        };
        match asked.socket.recv(&mut self.buffer) {
            Ok(len) if is_answer(&self.buffer[..len], asked.id, &pending.question) => {
                let pending = self.pending.swap_remove(at);
                set_id(&mut self.buffer[..len], pending.client_id);
                daemon.ask(&Request::Answer {
                    ticket: pending.ticket,
                    packet: &self.buffer[..len],
                })
            }
            // This is a stray packet, so keep waiting.
            Ok(_) => Ok(()),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            // Nothing listens on the resolver's port.
            Err(_) => self.try_again(at, daemon),
        }
    }

    fn try_again(&mut self, at: usize, daemon: &Daemon) -> Result<(), Disconnected> {
        let pending = &mut self.pending[at];
        pending.asked = None;
        if pending.tries >= TRIES_MAX {
            return self.fail(at, daemon);
        }
        let request = Request::Resolver {
            ticket: pending.ticket,
            skip: pending.tries,
        };
        pending.tries += 1;
        daemon.ask(&request)
    }

    fn fail(&mut self, at: usize, daemon: &Daemon) -> Result<(), Disconnected> {
        let pending = self.pending.swap_remove(at);
        daemon.ask(&Request::Answer {
            ticket: pending.ticket,
            packet: &pending.failure,
        })
    }
}
