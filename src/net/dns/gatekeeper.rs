//! Keeps track of clients with open queries, and decides what the helper may do for them. It does
//! no I/O: the supervisor performs the allowed actions.
//!
//! Each datagram and each connection gets a ticket that stands for the client's address. The helper
//! sends only tickets and no addresses, so it can act only for a client with an open query, and
//! only as often as a query needs. Anything else is a [`Breach`], after which the supervisor kills
//! the helper.

use super::limit::Bucket;
use super::protocol::{Request, Ticket};
use crate::ids::VmName;
use crate::sched::Instant;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

/// The maximum number of datagrams without an answer.
pub(super) const DATAGRAMS_MAX: usize = 512;
pub(super) const CONNECTIONS_MAX: usize = 32;
pub(super) const CONNECTIONS_PER_CLIENT_MAX: usize = 4;
/// The maximum number of resolvers that are tried for one query.
pub(super) const TRIES_MAX: u8 = 3;
/// The maximum number of queries on one connection.
pub(super) const QUESTIONS_PER_CONNECTION_MAX: u16 = 64;
/// The maximum number of requests from the helper for one query. A query needs either one lookup in
/// the daemon, or one socket for each resolver that is tried.
const REQUESTS_PER_QUESTION_MAX: u16 = TRIES_MAX as u16;
/// How long the helper may keep a query over UDP before the helper counts as hanging. The helper
/// normally gives up much earlier.
const DATAGRAM_KEPT_MAX: Duration = Duration::from_secs(20);
const CONNECTION_KEPT_MAX: Duration = Duration::from_secs(120);
/// The rate limit for opening sockets to resolvers, in sockets per second.
const SOCKETS_PER_S: u32 = 2000;
const SOCKETS_BURST: u32 = 4000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Datagram,
    Connection,
}

#[derive(Debug)]
struct Client {
    address: SocketAddrV4,
    kind: Kind,
    /// The number of lookups and sockets that the helper may still request.
    requests_left: u16,
    until: Instant,
}

/// A violation of the protocol. Only a helper that a guest controls commits a breach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Breach {
    /// The helper sent an invalid message.
    Nonsense,
    UnknownTicket,
    /// The helper requested more lookups or sockets than a client's queries need.
    TooManyRequests,
    /// The helper answered a query over TCP with a datagram.
    WrongKind,
    /// The helper has kept a query for too long.
    Hangs,
    /// The helper does not read the daemon's answers.
    DoesNotRead,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Breach::Nonsense => "it sent an invalid message",
            Breach::UnknownTicket => "it named an unknown ticket",
            Breach::TooManyRequests => "it requested more than a query needs",
            Breach::WrongKind => "it answered a connection with a datagram",
            Breach::Hangs => "it did not respond to a query in time",
            Breach::DoesNotRead => "it did not read its messages",
        })
    }
}

/// The action that the supervisor must perform for a request.
#[derive(Debug, PartialEq)]
pub(super) enum Action<'a> {
    FindAddress {
        ticket: Ticket,
        client: Ipv4Addr,
        name: VmName,
    },
    FindName {
        ticket: Ticket,
        client: Ipv4Addr,
        address: Ipv4Addr,
    },
    /// Opens a socket to a resolver. `is_allowed` is false if sockets are being opened too fast.
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
    /// The helper cannot work. The text is its reason.
    GiveUp(String),
}

#[derive(Debug)]
pub(super) struct Gatekeeper {
    clients: BTreeMap<Ticket, Client>,
    connections: usize,
    next: Ticket,
    sockets: Bucket,
}

impl Gatekeeper {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            clients: BTreeMap::new(),
            connections: 0,
            next: 0,
            sockets: Bucket::new(SOCKETS_PER_S, SOCKETS_BURST, now),
        }
    }

    /// True if one more datagram can be admitted.
    pub(super) fn has_room(&self) -> bool {
        self.clients.len() - self.connections < DATAGRAMS_MAX
    }

    /// Returns a ticket for a datagram or a connection, or None if there are too many.
    pub(super) fn admit(
        &mut self,
        address: SocketAddrV4,
        kind: Kind,
        now: Instant,
    ) -> Option<Ticket> {
        let (questions, kept_max) = match kind {
            Kind::Datagram if !self.has_room() => return None,
            Kind::Datagram => (1, DATAGRAM_KEPT_MAX),
            Kind::Connection => {
                let is_same =
                    |a: &&Client| a.kind == Kind::Connection && a.address.ip() == address.ip();
                let of_client = self.clients.values().filter(is_same).count();
                if self.connections >= CONNECTIONS_MAX || of_client >= CONNECTIONS_PER_CLIENT_MAX {
                    return None;
                }
                self.connections += 1;
                (QUESTIONS_PER_CONNECTION_MAX, CONNECTION_KEPT_MAX)
            }
        };
        while self.clients.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let ticket = self.next;
        self.next = ticket.wrapping_add(1);
        let requests_left = questions * REQUESTS_PER_QUESTION_MAX;
        self.clients.insert(
            ticket,
            Client {
                address,
                kind,
                requests_left,
                until: now + kept_max,
            },
        );
        Some(ticket)
    }

    /// Decides what to do about one message from the helper. Fails if the message is a breach.
    pub(super) fn judge<'a>(
        &mut self,
        message: &'a [u8],
        now: Instant,
    ) -> Result<Action<'a>, Breach> {
        Ok(match Request::decode(message).ok_or(Breach::Nonsense)? {
            Request::Address { ticket, name } => {
                let client = *self.spend(ticket)?.address.ip();
                Action::FindAddress {
                    ticket,
                    client,
                    name,
                }
            }
            Request::Name { ticket, address } => {
                let client = *self.spend(ticket)?.address.ip();
                Action::FindName {
                    ticket,
                    client,
                    address,
                }
            }
            Request::Resolver { ticket, skip } => {
                let kind = self.spend(ticket)?.kind;
                if skip >= TRIES_MAX {
                    return Err(Breach::TooManyRequests);
                }
                Action::OpenSocket {
                    ticket,
                    kind,
                    skip: skip.into(),
                    is_allowed: self.sockets.take(now),
                }
            }
            Request::Answer { ticket, packet } => match self.end(ticket)? {
                Client {
                    kind: Kind::Datagram,
                    address: to,
                    ..
                } => Action::Send { to, packet },
                _ => return Err(Breach::WrongKind),
            },
            Request::Done { ticket } => {
                self.end(ticket)?;
                Action::Nothing
            }
            Request::Failed(text) => Action::GiveUp(text),
        })
    }

    fn spend(&mut self, ticket: Ticket) -> Result<&Client, Breach> {
        let client = self.clients.get_mut(&ticket).ok_or(Breach::UnknownTicket)?;
        client.requests_left = client
            .requests_left
            .checked_sub(1)
            .ok_or(Breach::TooManyRequests)?;
        Ok(client)
    }

    fn end(&mut self, ticket: Ticket) -> Result<Client, Breach> {
        let client = self.clients.remove(&ticket).ok_or(Breach::UnknownTicket)?;
        self.connections -= usize::from(client.kind == Kind::Connection);
        Ok(client)
    }

    /// Returns the time by which the helper must have answered, or None if there are no open
    /// queries.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.clients.values().map(|client| client.until).min()
    }

    /// Fails if the helper has kept a query for too long.
    pub(super) fn check(&self, now: Instant) -> Result<(), Breach> {
        if self.deadline().is_some_and(|until| until <= now) {
            Err(Breach::Hangs)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(last: u8) -> SocketAddrV4 {
        SocketAddrV4::new([10, 89, 0, last].into(), 1000)
    }

    fn judge(gatekeeper: &mut Gatekeeper, request: &Request<'_>) -> Result<(), Breach> {
        gatekeeper
            .judge(&request.encode(), Instant::now())
            .map(drop)
    }

    #[test]
    fn answer_is_sent_once_to_client_of_ticket() {
        let now = Instant::now();
        let mut gatekeeper = Gatekeeper::new(now);
        let ticket = gatekeeper.admit(client(7), Kind::Datagram, now).unwrap();
        let answer = Request::Answer {
            ticket,
            packet: b"x",
        }
        .encode();
        assert_eq!(
            gatekeeper.judge(&answer, now),
            Ok(Action::Send {
                to: client(7),
                packet: b"x"
            })
        );
        assert_eq!(gatekeeper.judge(&answer, now), Err(Breach::UnknownTicket));
        assert_eq!(
            judge(&mut gatekeeper, &Request::Done { ticket }),
            Err(Breach::UnknownTicket)
        );
        assert_eq!(gatekeeper.deadline(), None);
    }

    #[test]
    fn requests_are_limited_to_tickets_and_query_needs() {
        let now = Instant::now();
        let mut gatekeeper = Gatekeeper::new(now);
        let ticket = gatekeeper.admit(client(7), Kind::Datagram, now).unwrap();
        let name: VmName = "web".parse().unwrap();
        let lookup = Request::Address {
            ticket,
            name: name.clone(),
        }
        .encode();
        let found = Action::FindAddress {
            ticket,
            client: *client(7).ip(),
            name,
        };
        assert_eq!(gatekeeper.judge(&lookup, now), Ok(found));
        for skip in 1..TRIES_MAX {
            let opened = gatekeeper
                .judge(&Request::Resolver { ticket, skip }.encode(), now)
                .map(|a| format!("{a:?}"));
            let wanted = format!(
                "OpenSocket {{ ticket: {ticket}, kind: Datagram, skip: {skip}, is_allowed: true }}"
            );
            assert_eq!(opened, Ok(wanted));
        }
        assert_eq!(gatekeeper.judge(&lookup, now), Err(Breach::TooManyRequests));
        let ticket = gatekeeper.admit(client(8), Kind::Datagram, now).unwrap();
        assert_eq!(
            judge(
                &mut gatekeeper,
                &Request::Resolver {
                    ticket,
                    skip: TRIES_MAX
                }
            ),
            Err(Breach::TooManyRequests)
        );
        let unknown = Request::Name {
            ticket: ticket + 1,
            address: *client(7).ip(),
        };
        assert_eq!(judge(&mut gatekeeper, &unknown), Err(Breach::UnknownTicket));
    }

    #[test]
    fn opening_sockets_is_rate_limited() {
        let now = Instant::now();
        let mut gatekeeper = Gatekeeper::new(now);
        let mut allowed = |at: Instant| {
            let mut one = || {
                let ticket = gatekeeper.admit(client(7), Kind::Datagram, at).unwrap();
                let request = Request::Resolver { ticket, skip: 0 }.encode();
                let is_allowed = matches!(
                    gatekeeper.judge(&request, at),
                    Ok(Action::OpenSocket {
                        is_allowed: true,
                        ..
                    })
                );
                judge(&mut gatekeeper, &Request::Done { ticket }).unwrap();
                is_allowed
            };
            (0..10_000).filter(|_| one()).count()
        };
        assert_eq!(allowed(now), SOCKETS_BURST as usize);
        assert_eq!(
            allowed(now + Duration::from_secs(1)),
            SOCKETS_PER_S as usize
        );
    }

    #[test]
    fn clients_are_bounded_and_hanging_helper_is_detected() {
        let now = Instant::now();
        let mut gatekeeper = Gatekeeper::new(now);
        let connections = (0..100)
            .filter(|n| {
                gatekeeper
                    .admit(client(*n), Kind::Connection, now)
                    .is_some()
            })
            .count();
        assert_eq!(connections, CONNECTIONS_MAX);
        let datagrams = (0..2 * DATAGRAMS_MAX)
            .filter(|_| gatekeeper.admit(client(7), Kind::Datagram, now).is_some())
            .count();
        assert_eq!((datagrams, gatekeeper.has_room()), (DATAGRAMS_MAX, false));
        let late = now + DATAGRAM_KEPT_MAX;
        assert_eq!(
            (gatekeeper.deadline(), gatekeeper.check(now)),
            (Some(late), Ok(()))
        );
        assert_eq!(gatekeeper.check(late), Err(Breach::Hangs));
    }

    #[test]
    fn connections_per_client_are_bounded_and_freed_when_done() {
        let now = Instant::now();
        let mut gatekeeper = Gatekeeper::new(now);
        let admit =
            |gatekeeper: &mut Gatekeeper| gatekeeper.admit(client(7), Kind::Connection, now);
        let tickets: Vec<_> = (0..10).filter_map(|_| admit(&mut gatekeeper)).collect();
        assert_eq!(tickets.len(), CONNECTIONS_PER_CLIENT_MAX);
        judge(&mut gatekeeper, &Request::Done { ticket: tickets[0] }).unwrap();
        let again = admit(&mut gatekeeper).unwrap();
        assert_eq!(
            judge(
                &mut gatekeeper,
                &Request::Answer {
                    ticket: again,
                    packet: b"x"
                }
            ),
            Err(Breach::WrongKind)
        );
        for _ in 0..2 * CONNECTIONS_MAX {
            let ticket = admit(&mut gatekeeper).unwrap();
            judge(&mut gatekeeper, &Request::Done { ticket }).unwrap();
        }
    }
}
