//! Who has asked, and what the helper may do for them. Pure: what it allows is for the supervisor to carry out.
//!
//! Each datagram and each connection gets a ticket, which stands for the asker's address as the kernel gave it. The helper
//! names tickets, never addresses, so it can act only for an asker who has just asked, as often as their questions can need.
//! Anything else is a [`Breach`], after which the helper is not worth talking to.

use super::limit::Bucket;
use super::protocol::{Request, Ticket};
use crate::ids::VmName;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

/// Datagrams without an answer.
pub const DATAGRAMS_MAX: usize = 512;
pub const CONNECTIONS_MAX: usize = 32;
pub const CONNECTIONS_PER_ASKER_MAX: usize = 4;
/// Most resolvers that are asked one question.
pub const TRIES_MAX: u8 = 3;
/// Questions of one connection.
pub const QUESTIONS_PER_CONNECTION_MAX: u16 = 64;
/// A question is one of ours, or one for resolvers.
const REQUESTS_PER_QUESTION_MAX: u16 = TRIES_MAX as u16;
/// A helper that keeps an asker longer hangs. It gives up much earlier by itself.
const DATAGRAM_KEPT_MAX: Duration = Duration::from_secs(20);
const CONNECTION_KEPT_MAX: Duration = Duration::from_secs(120);
/// Sockets to resolvers.
const SOCKETS_PER_S: u32 = 2000;
const SOCKETS_BURST: u32 = 4000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Datagram,
    Connection,
}

#[derive(Debug)]
struct Asker {
    address: SocketAddrV4,
    kind: Kind,
    /// Lookups and sockets that the helper may still ask for.
    requests_left: u16,
    until: Instant,
}

/// What no helper does that is still ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breach {
    /// Not a message of the protocol.
    Nonsense,
    UnknownTicket,
    /// More lookups or sockets than an asker's questions need.
    TooManyRequests,
    /// A datagram's answer for a connection.
    WrongKind,
    /// It has not answered somebody for too long.
    Hangs,
    /// It does not read what it asked for.
    DoesNotRead,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Breach::Nonsense => "it sent what is not in its protocol",
            Breach::UnknownTicket => "it named an asker who is not there",
            Breach::TooManyRequests => "it asked for more than a question needs",
            Breach::WrongKind => "it answered a connection with a datagram",
            Breach::Hangs => "it kept a question for too long",
            Breach::DoesNotRead => "it does not read what it asked for",
        })
    }
}

/// What a request of the helper comes to.
#[derive(Debug, PartialEq)]
pub enum Action<'a> {
    FindAddress {
        ticket: Ticket,
        asker: Ipv4Addr,
        name: VmName,
    },
    FindName {
        ticket: Ticket,
        asker: Ipv4Addr,
        address: Ipv4Addr,
    },
    /// `is_allowed`: whether sockets are made this fast.
    OpenSocket {
        ticket: Ticket,
        kind: Kind,
        skip: usize,
        is_allowed: bool,
    },
    Send {
        to: SocketAddrV4,
        packet: &'a [u8],
    },
    Nothing,
    /// The helper cannot do its work, and says why.
    GiveUp(String),
}

#[derive(Debug)]
pub struct Desk {
    askers: BTreeMap<Ticket, Asker>,
    connections: usize,
    next: Ticket,
    sockets: Bucket,
}

impl Desk {
    pub fn new(now: Instant) -> Self {
        Self { askers: BTreeMap::new(), connections: 0, next: 0, sockets: Bucket::new(SOCKETS_PER_S, SOCKETS_BURST, now) }
    }

    /// Whether one more datagram has room.
    pub fn has_room(&self) -> bool {
        self.askers.len() - self.connections < DATAGRAMS_MAX
    }

    /// A ticket for a datagram or a connection; none where there are as many as there may be.
    pub fn admit(&mut self, address: SocketAddrV4, kind: Kind, now: Instant) -> Option<Ticket> {
        let (questions, kept_max) = match kind {
            Kind::Datagram if !self.has_room() => return None,
            Kind::Datagram => (1, DATAGRAM_KEPT_MAX),
            Kind::Connection => {
                let is_same = |a: &&Asker| a.kind == Kind::Connection && a.address.ip() == address.ip();
                let of_asker = self.askers.values().filter(is_same).count();
                if self.connections >= CONNECTIONS_MAX || of_asker >= CONNECTIONS_PER_ASKER_MAX {
                    return None;
                }
                self.connections += 1;
                (QUESTIONS_PER_CONNECTION_MAX, CONNECTION_KEPT_MAX)
            }
        };
        while self.askers.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let ticket = self.next;
        self.next = ticket.wrapping_add(1);
        let requests_left = questions * REQUESTS_PER_QUESTION_MAX;
        self.askers.insert(ticket, Asker { address, kind, requests_left, until: now + kept_max });
        Some(ticket)
    }

    /// Judges one message of the helper.
    pub fn judge<'a>(&mut self, message: &'a [u8], now: Instant) -> Result<Action<'a>, Breach> {
        Ok(match Request::decode(message).ok_or(Breach::Nonsense)? {
            Request::Address { ticket, name } => {
                let asker = *self.spend(ticket)?.address.ip();
                Action::FindAddress { ticket, asker, name }
            }
            Request::Name { ticket, address } => {
                let asker = *self.spend(ticket)?.address.ip();
                Action::FindName { ticket, asker, address }
            }
            Request::Resolver { ticket, skip } => {
                let kind = self.spend(ticket)?.kind;
                if skip >= TRIES_MAX {
                    return Err(Breach::TooManyRequests);
                }
                Action::OpenSocket { ticket, kind, skip: skip.into(), is_allowed: self.sockets.take(now) }
            }
            Request::Answer { ticket, packet } => match self.end(ticket)? {
                Asker { kind: Kind::Datagram, address: to, .. } => Action::Send { to, packet },
                _ => return Err(Breach::WrongKind),
            },
            Request::Done { ticket } => {
                self.end(ticket)?;
                Action::Nothing
            }
            Request::Failed(text) => Action::GiveUp(text),
        })
    }

    fn spend(&mut self, ticket: Ticket) -> Result<&Asker, Breach> {
        let asker = self.askers.get_mut(&ticket).ok_or(Breach::UnknownTicket)?;
        asker.requests_left = asker.requests_left.checked_sub(1).ok_or(Breach::TooManyRequests)?;
        Ok(asker)
    }

    fn end(&mut self, ticket: Ticket) -> Result<Asker, Breach> {
        let asker = self.askers.remove(&ticket).ok_or(Breach::UnknownTicket)?;
        self.connections -= usize::from(asker.kind == Kind::Connection);
        Ok(asker)
    }

    /// When the helper must have done something; none where nobody has asked.
    pub fn deadline(&self) -> Option<Instant> {
        self.askers.values().map(|asker| asker.until).min()
    }

    /// Fails for a helper that has kept somebody for too long.
    pub fn check(&self, now: Instant) -> Result<(), Breach> {
        if self.deadline().is_some_and(|until| until <= now) { Err(Breach::Hangs) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(last: u8) -> SocketAddrV4 {
        SocketAddrV4::new([10, 89, 0, last].into(), 1000)
    }

    fn judge(desk: &mut Desk, request: &Request<'_>) -> Result<(), Breach> {
        desk.judge(&request.encode(), Instant::now()).map(drop)
    }

    #[test]
    fn an_answer_goes_to_whoever_asked_and_once() {
        let now = Instant::now();
        let mut desk = Desk::new(now);
        let ticket = desk.admit(asker(7), Kind::Datagram, now).unwrap();
        let answer = Request::Answer { ticket, packet: b"x" }.encode();
        assert_eq!(desk.judge(&answer, now), Ok(Action::Send { to: asker(7), packet: b"x" }));
        assert_eq!(desk.judge(&answer, now), Err(Breach::UnknownTicket));
        assert_eq!(judge(&mut desk, &Request::Done { ticket }), Err(Breach::UnknownTicket));
        assert_eq!(desk.deadline(), None);
    }

    #[test]
    fn lookups_are_those_of_who_has_asked_and_as_many_as_a_question_needs() {
        let now = Instant::now();
        let mut desk = Desk::new(now);
        let ticket = desk.admit(asker(7), Kind::Datagram, now).unwrap();
        let name: VmName = "web".parse().unwrap();
        let lookup = Request::Address { ticket, name: name.clone() }.encode();
        let found = Action::FindAddress { ticket, asker: *asker(7).ip(), name };
        assert_eq!(desk.judge(&lookup, now), Ok(found));
        for skip in 1..TRIES_MAX {
            let opened = desk.judge(&Request::Resolver { ticket, skip }.encode(), now).map(|a| format!("{a:?}"));
            let wanted = format!("OpenSocket {{ ticket: {ticket}, kind: Datagram, skip: {skip}, is_allowed: true }}");
            assert_eq!(opened, Ok(wanted));
        }
        assert_eq!(desk.judge(&lookup, now), Err(Breach::TooManyRequests));
        let ticket = desk.admit(asker(8), Kind::Datagram, now).unwrap();
        assert_eq!(judge(&mut desk, &Request::Resolver { ticket, skip: TRIES_MAX }), Err(Breach::TooManyRequests));
        let unknown = Request::Name { ticket: ticket + 1, address: *asker(7).ip() };
        assert_eq!(judge(&mut desk, &unknown), Err(Breach::UnknownTicket));
    }

    #[test]
    fn sockets_have_a_rate() {
        let now = Instant::now();
        let mut desk = Desk::new(now);
        let mut allowed = |at: Instant| {
            let mut one = || {
                let ticket = desk.admit(asker(7), Kind::Datagram, at).unwrap();
                let request = Request::Resolver { ticket, skip: 0 }.encode();
                let is_allowed = matches!(desk.judge(&request, at), Ok(Action::OpenSocket { is_allowed: true, .. }));
                judge(&mut desk, &Request::Done { ticket }).unwrap();
                is_allowed
            };
            (0..10_000).filter(|_| one()).count()
        };
        assert_eq!(allowed(now), SOCKETS_BURST as usize);
        assert_eq!(allowed(now + Duration::from_secs(1)), SOCKETS_PER_S as usize);
    }

    #[test]
    fn askers_are_bounded_and_a_helper_that_keeps_them_is_seen() {
        let now = Instant::now();
        let mut desk = Desk::new(now);
        let connections = (0..100).filter(|n| desk.admit(asker(*n), Kind::Connection, now).is_some()).count();
        assert_eq!(connections, CONNECTIONS_MAX);
        let datagrams = (0..2 * DATAGRAMS_MAX).filter(|_| desk.admit(asker(7), Kind::Datagram, now).is_some()).count();
        assert_eq!((datagrams, desk.has_room()), (DATAGRAMS_MAX, false));
        let late = now + DATAGRAM_KEPT_MAX;
        assert_eq!((desk.deadline(), desk.check(now)), (Some(late), Ok(())));
        assert_eq!(desk.check(late), Err(Breach::Hangs));
    }

    #[test]
    fn one_asker_has_few_connections_and_their_end_makes_room() {
        let now = Instant::now();
        let mut desk = Desk::new(now);
        let admit = |desk: &mut Desk| desk.admit(asker(7), Kind::Connection, now);
        let tickets: Vec<_> = (0..10).filter_map(|_| admit(&mut desk)).collect();
        assert_eq!(tickets.len(), CONNECTIONS_PER_ASKER_MAX);
        judge(&mut desk, &Request::Done { ticket: tickets[0] }).unwrap();
        let again = admit(&mut desk).unwrap();
        assert_eq!(judge(&mut desk, &Request::Answer { ticket: again, packet: b"x" }), Err(Breach::WrongKind));
    }
}
