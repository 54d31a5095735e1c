//! The protocol between the daemon and the helper. A message is a tag followed by its fields. Most
//! messages carry the ticket of a client, and no field is optional.
//!
//! The daemon sends [`Order`]s, beginning with [`Order::Serve`]. The helper sends [`Request`]s.
//! Both sides reject messages with an unknown tag, and messages that are too short or too long.
//! This matters most in the daemon, because a guest may control the helper.

use super::Addresses;
use crate::config::Subnet;
use crate::host::confine::{Reader, Writer};
use crate::host::text::printable;
use crate::ids::VmName;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};

/// The length of the longest query that is accepted, which is far more than a query needs.
pub(super) const QUESTION_BYTES_MAX: usize = 4096;
/// The length of the longest answer.
pub(super) const ANSWER_BYTES_MAX: usize = 65_535;
/// The room in a message for a tag, a ticket, an address with its port, and a length.
const FIELDS_BYTES_MAX: usize = 32;
pub(super) const TO_HELPER_BYTES_MAX: usize = QUESTION_BYTES_MAX + FIELDS_BYTES_MAX;
pub(super) const FROM_HELPER_BYTES_MAX: usize = ANSWER_BYTES_MAX + FIELDS_BYTES_MAX;
/// The length of the longest text in a message from the helper.
const TEXT_BYTES_MAX: usize = 512;

/// Identifies one datagram or one connection of a client.
pub(super) type Ticket = u32;

/// A message from the daemon to the helper.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Order {
    /// The first message, with the guests' addresses for which the reverse zone is answered.
    Serve(Subnet),
    /// A datagram from a client.
    Question {
        ticket: Ticket,
        client: SocketAddrV4,
        packet: Vec<u8>,
    },
    /// A new connection. The descriptor comes with the message.
    Connection { ticket: Ticket },
    /// The answer to [`Request::Address`].
    Address {
        ticket: Ticket,
        found: Option<Addresses>,
    },
    /// The answer to [`Request::Name`].
    Name {
        ticket: Ticket,
        name: Option<VmName>,
    },
    /// The answer to [`Request::Resolver`]. The socket comes with the message unless it could not
    /// be opened.
    Resolver { ticket: Ticket },
}

/// A message from the helper to the daemon.
#[derive(Clone, Debug, PartialEq)]
pub enum Request<'a> {
    /// Asks for the address of this VM. The daemon checks that the client may know it.
    Address { ticket: Ticket, name: VmName },
    /// Asks for the name of the VM with this address. The daemon checks that the client may know
    /// it.
    Name { ticket: Ticket, address: Ipv4Addr },
    /// Asks for a connected socket to a resolver. Resolvers are tried in order, starting with
    /// number `skip`.
    Resolver { ticket: Ticket, skip: u8 },
    /// Sends this packet to the client and ends the ticket.
    Answer { ticket: Ticket, packet: &'a [u8] },
    /// Ends the ticket without an answer.
    Done { ticket: Ticket },
    /// The helper cannot confine itself.
    Failed(String),
}

const SERVE: u8 = 1;
const QUESTION: u8 = 2;
const CONNECTION: u8 = 3;
const ADDRESS: u8 = 4;
const NAME: u8 = 5;
const RESOLVER: u8 = 6;
const ANSWER: u8 = 7;
const DONE: u8 = 8;
const FAILED: u8 = 9;

fn address(r: &mut Reader<'_>) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = r.take(4)?.try_into().ok()?;
    Some(octets.into())
}

impl Order {
    pub(super) fn encode(&self) -> Vec<u8> {
        let of = |tag, ticket: &Ticket| Writer::new(tag).word(*ticket);
        match self {
            Order::Serve(subnet) => Writer::new(SERVE)
                .word(subnet.base().into())
                .byte(subnet.prefix()),
            Order::Question {
                ticket,
                client,
                packet,
            } => {
                let client_address = u32::from_le_bytes(client.ip().octets());
                of(QUESTION, ticket)
                    .word(client_address)
                    .short(client.port())
                    .bytes(packet)
            }
            Order::Connection { ticket } => of(CONNECTION, ticket),
            Order::Address {
                ticket,
                found: None,
            } => of(ADDRESS, ticket).byte(0),
            Order::Address {
                ticket,
                found: Some(Addresses { ipv4, ipv6 }),
            } => {
                let ipv4 = u32::from_le_bytes(ipv4.octets());
                let message = of(ADDRESS, ticket).byte(1).word(ipv4);
                match ipv6 {
                    None => message.byte(0),
                    Some(ipv6) => {
                        let octets = ipv6.octets();
                        octets.into_iter().fold(message.byte(1), Writer::byte)
                    }
                }
            }
            Order::Name { ticket, name } => {
                of(NAME, ticket).bytes(name.as_ref().map_or("", VmName::as_str).as_bytes())
            }
            Order::Resolver { ticket } => of(RESOLVER, ticket),
        }
        .finish()
    }

    pub(super) fn decode(message: &[u8]) -> Option<Self> {
        let mut r = Reader::new(message);
        let tag = r.byte()?;
        let first = r.word()?;
        let ticket = first;
        let order = match tag {
            SERVE => {
                let prefix = r.byte()?;
                Order::Serve(format!("{}/{prefix}", Ipv4Addr::from(first)).parse().ok()?)
            }
            QUESTION => {
                let client = SocketAddrV4::new(address(&mut r)?, r.short()?);
                Order::Question {
                    ticket,
                    client,
                    packet: r.bytes()?.to_vec(),
                }
            }
            CONNECTION => Order::Connection { ticket },
            ADDRESS if r.flag()? => {
                let ipv4 = address(&mut r)?;
                let ipv6 = match r.flag()? {
                    true => Some(Ipv6Addr::from(<[u8; 16]>::try_from(r.take(16)?).ok()?)),
                    false => None,
                };
                Order::Address {
                    ticket,
                    found: Some(Addresses { ipv4, ipv6 }),
                }
            }
            ADDRESS => Order::Address {
                ticket,
                found: None,
            },
            NAME => match r.text()? {
                none if none.is_empty() => Order::Name { ticket, name: None },
                name => Order::Name {
                    ticket,
                    name: Some(name.parse().ok()?),
                },
            },
            RESOLVER => Order::Resolver { ticket },
            _ => return None,
        };
        r.end()?;
        Some(order)
    }
}

impl<'a> Request<'a> {
    pub fn encode(&self) -> Vec<u8> {
        let of = |tag, ticket: &Ticket| Writer::new(tag).word(*ticket);
        match self {
            Request::Address { ticket, name } => {
                of(ADDRESS, ticket).bytes(name.as_str().as_bytes())
            }
            Request::Name { ticket, address } => {
                of(NAME, ticket).word(u32::from_le_bytes(address.octets()))
            }
            Request::Resolver { ticket, skip } => of(RESOLVER, ticket).byte(*skip),
            Request::Answer { ticket, packet } => of(ANSWER, ticket).bytes(packet),
            Request::Done { ticket } => of(DONE, ticket),
            Request::Failed(text) => Writer::new(FAILED)
                .bytes(&text.as_bytes()[..text.floor_char_boundary(TEXT_BYTES_MAX)]),
        }
        .finish()
    }

    /// Decodes a message, and makes text from the helper printable. Returns None if the message is
    /// invalid.
    pub fn decode(message: &'a [u8]) -> Option<Self> {
        if message.len() > FROM_HELPER_BYTES_MAX {
            return None;
        }
        let mut r = Reader::new(message);
        let tag = r.byte()?;
        if tag == FAILED {
            let text = r.bytes().filter(|text| text.len() <= TEXT_BYTES_MAX)?;
            r.end()?;
            return Some(Request::Failed(printable(&String::from_utf8_lossy(text))));
        }
        let ticket = r.word()?;
        let request = match tag {
            ADDRESS => Request::Address {
                ticket,
                name: std::str::from_utf8(r.bytes()?).ok()?.parse().ok()?,
            },
            NAME => Request::Name {
                ticket,
                address: address(&mut r)?,
            },
            RESOLVER => Request::Resolver {
                ticket,
                skip: r.byte()?,
            },
            ANSWER => Request::Answer {
                ticket,
                packet: r.bytes()?,
            },
            DONE => Request::Done { ticket },
            _ => return None,
        };
        r.end()?;
        Some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check<'a, T: PartialEq + std::fmt::Debug>(
        message: &'a [u8],
        decode: impl Fn(&'a [u8]) -> Option<T>,
        wanted: &T,
    ) {
        assert_eq!(decode(message).as_ref(), Some(wanted));
        for len in 0..message.len() {
            assert_eq!(decode(&message[..len]), None, "the first {len} bytes");
        }
    }

    #[test]
    fn messages_round_trip_and_other_lengths_are_rejected() {
        let (ticket, web) = (0x0102_0304, Ipv4Addr::new(10, 89, 0, 5));
        let name: VmName = "web".parse().unwrap();
        for order in [
            Order::Serve("10.89.0.0/24".parse().unwrap()),
            Order::Question {
                ticket,
                client: SocketAddrV4::new(web, 0x1234),
                packet: vec![0, 1, 255],
            },
            Order::Connection { ticket },
            Order::Address {
                ticket,
                found: Some(web.into()),
            },
            Order::Address {
                ticket,
                found: Some(Addresses {
                    ipv4: web,
                    ipv6: Some("fd00::5".parse().unwrap()),
                }),
            },
            Order::Address {
                ticket,
                found: None,
            },
            Order::Name {
                ticket,
                name: Some(name.clone()),
            },
            Order::Name { ticket, name: None },
            Order::Resolver { ticket },
        ] {
            check(&order.encode(), Order::decode, &order);
            assert_eq!(
                Order::decode(&[order.encode(), vec![0]].concat()),
                None,
                "one byte more"
            );
        }
        for request in [
            Request::Address { ticket, name },
            Request::Name {
                ticket,
                address: web,
            },
            Request::Resolver { ticket, skip: 2 },
            Request::Answer {
                ticket,
                packet: &[1, 2, 3],
            },
            Request::Done { ticket },
            Request::Failed("it's \"so\"".to_owned()),
        ] {
            check(&request.encode(), Request::decode, &request);
            assert_eq!(
                Request::decode(&[request.encode(), vec![0]].concat()),
                None,
                "one byte more"
            );
        }
    }

    #[test]
    fn names_and_texts_from_helper_are_bounded_and_printable() {
        for name in ["", "../x", "web\n", "Web", "a.b", &"a".repeat(33)] {
            let message = Writer::new(ADDRESS).word(7).bytes(name.as_bytes()).finish();
            assert_eq!(Request::decode(&message), None, "{name:?}");
        }
        let failed = Request::Failed("a\x1b[2J\u{202e}b".to_owned()).encode();
        assert_eq!(
            Request::decode(&failed),
            Some(Request::Failed("a\\u{1b}[2J\\u{202e}b".to_owned()))
        );
        let long = Writer::new(FAILED)
            .bytes(&[b'x'; TEXT_BYTES_MAX + 1])
            .finish();
        assert_eq!(Request::decode(&long), None);
        let longest = Request::Answer {
            ticket: 7,
            packet: &[0; ANSWER_BYTES_MAX + 100],
        }
        .encode();
        assert_eq!(Request::decode(&longest), None);
    }
}
