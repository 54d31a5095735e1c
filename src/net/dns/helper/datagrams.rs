//! Datagrams: each is answered at once, or waits for the daemon or for a resolver of the host.

use super::packet::{Rcode, is_answer, set_id};
use super::zone::{Found, Verdict, answer, judge};
use super::{Daemon, Gone};
use crate::config::Subnet;
use crate::net::dns::desk::TRIES_MAX;
use crate::net::dns::protocol::{ANSWER_BYTES_MAX, Request, Ticket};
use nix::poll::PollFlags;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Questions at the host's resolvers at a time, and of one asker.
const PENDING_MAX: usize = 256;
const PENDING_PER_ASKER_MAX: usize = 64;
/// For one resolver's answer; then the next is asked.
const PATIENCE: Duration = Duration::from_secs(2);

pub struct Datagrams {
    /// Questions for which the daemon looks something up.
    looked_up: HashMap<Ticket, Vec<u8>>,
    pending: Vec<Pending>,
    buffer: Vec<u8>,
}

/// A question for a resolver of the host.
struct Pending {
    ticket: Ticket,
    asker: SocketAddrV4,
    asker_id: u16,
    packet: Vec<u8>,
    question: Vec<u8>,
    /// None while the daemon opens a socket.
    asked: Option<Asked>,
    tries: u8,
    /// For when nobody answers.
    failure: Vec<u8>,
}

struct Asked {
    /// Which this try has of its own.
    id: u16,
    socket: UdpSocket,
    deadline: Instant,
}

impl Default for Datagrams {
    fn default() -> Self {
        Self { looked_up: HashMap::new(), pending: Vec::new(), buffer: vec![0; ANSWER_BYTES_MAX] }
    }
}

impl Datagrams {
    /// For each pending question what it waits for.
    pub fn waits(&self) -> impl Iterator<Item = Option<(BorrowedFd<'_>, PollFlags)>> {
        self.pending.iter().map(|p| p.asked.as_ref().map(|asked| (asked.socket.as_fd(), PollFlags::POLLIN)))
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.pending.iter().filter_map(|p| p.asked.as_ref()).map(|asked| asked.deadline).min()
    }

    /// Takes a question.
    pub fn question(
        &mut self,
        (ticket, asker): (Ticket, SocketAddrV4),
        packet: Vec<u8>,
        daemon: &Daemon,
        subnet: Subnet,
    ) -> Result<(), Gone> {
        match judge(&packet, subnet) {
            Verdict::Drop => daemon.ask(&Request::Done { ticket }),
            Verdict::Reply(reply) => daemon.ask(&Request::Answer { ticket, packet: &reply }),
            Verdict::LookUp(lookup) => {
                daemon.ask(&lookup.request(ticket))?;
                self.looked_up.insert(ticket, packet);
                Ok(())
            }
            Verdict::Forward(query) => {
                let (asker_id, question) = (query.id(), query.question().to_vec());
                // The asker has lost patience before we have.
                if self.pending.iter().any(|p| p.asker == asker && p.asker_id == asker_id && p.question == question) {
                    return daemon.ask(&Request::Done { ticket });
                }
                let of_asker = self.pending.iter().filter(|p| p.asker.ip() == asker.ip()).count();
                let failure = query.refuse(Rcode::ServFail);
                if self.pending.len() >= PENDING_MAX || of_asker >= PENDING_PER_ASKER_MAX {
                    return daemon.ask(&Request::Answer { ticket, packet: &failure });
                }
                daemon.ask(&Request::Resolver { ticket, skip: 0 })?;
                self.pending.push(Pending { ticket, asker, asker_id, packet, question, asked: None, tries: 1, failure });
                Ok(())
            }
        }
    }

    /// Answers with what the daemon has found; nothing happens where nobody waits for it any more.
    pub fn found(&mut self, ticket: Ticket, found: &Found, daemon: &Daemon, subnet: Subnet) -> Result<(), Gone> {
        let Some(packet) = self.looked_up.remove(&ticket) else { return Ok(()) };
        match answer(&packet, subnet, found) {
            Some(reply) => daemon.ask(&Request::Answer { ticket, packet: &reply }),
            None => daemon.ask(&Request::Done { ticket }),
        }
    }

    /// Asks a resolver by the socket that the daemon has opened; without one there is no resolver to ask.
    pub fn resolver(&mut self, ticket: Ticket, fd: Option<OwnedFd>, daemon: &Daemon, now: Instant) -> Result<(), Gone> {
        let Some(at) = self.pending.iter().position(|p| p.ticket == ticket && p.asked.is_none()) else { return Ok(()) };
        let Some(socket) = fd.map(UdpSocket::from) else { return self.fail(at, daemon) };
        let pending = &mut self.pending[at];
        let sent = random_id().and_then(|id| {
            set_id(&mut pending.packet, id);
            socket.send(&pending.packet).ok().map(|_| id)
        });
        match sent {
            Some(id) => {
                pending.asked = Some(Asked { id, socket, deadline: now + PATIENCE });
                Ok(())
            }
            None => self.try_again(at, daemon),
        }
    }

    /// Passes on the answers that have come and asks others where none has. `ready` is of what [`Self::waits`] gave.
    pub fn take_answers(&mut self, ready: &[bool], daemon: &Daemon, now: Instant) -> Result<(), Gone> {
        // Backwards, because what is done is taken out.
        for at in (0..ready.len().min(self.pending.len())).rev() {
            let Some(asked) = &self.pending[at].asked else { continue };
            let is_late = asked.deadline <= now;
            if ready[at] {
                self.take_answer(at, daemon)?;
            } else if is_late {
                self.try_again(at, daemon)?;
            }
        }
        Ok(())
    }

    fn take_answer(&mut self, at: usize, daemon: &Daemon) -> Result<(), Gone> {
        let pending = &self.pending[at];
        let Some(asked) = &pending.asked else { return Ok(()) };
        match asked.socket.recv(&mut self.buffer) {
            Ok(len) if is_answer(&self.buffer[..len], asked.id, &pending.question) => {
                let pending = self.pending.swap_remove(at);
                set_id(&mut self.buffer[..len], pending.asker_id);
                daemon.ask(&Request::Answer { ticket: pending.ticket, packet: &self.buffer[..len] })
            }
            // Not its answer: it waits on.
            Ok(_) => Ok(()),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            // Nobody listens there.
            Err(_) => self.try_again(at, daemon),
        }
    }

    fn try_again(&mut self, at: usize, daemon: &Daemon) -> Result<(), Gone> {
        let pending = &mut self.pending[at];
        pending.asked = None;
        if pending.tries >= TRIES_MAX {
            return self.fail(at, daemon);
        }
        let request = Request::Resolver { ticket: pending.ticket, skip: pending.tries };
        pending.tries += 1;
        daemon.ask(&request)
    }

    fn fail(&mut self, at: usize, daemon: &Daemon) -> Result<(), Gone> {
        let pending = self.pending.swap_remove(at);
        daemon.ask(&Request::Answer { ticket: pending.ticket, packet: &pending.failure })
    }
}

fn random_id() -> Option<u16> {
    let mut bytes = [0; 2];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).ok()?;
    (filled == bytes.len()).then(|| u16::from_ne_bytes(bytes))
}
