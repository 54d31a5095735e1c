//! Fuzz targets of `scripts/fuzz`: packets, which the helper parses, and the helper's messages,
//! which the daemon parses.

use super::Addresses;
use super::gatekeeper::{Action, Gatekeeper, Kind, QUESTIONS_PER_CONNECTION_MAX, TRIES_MAX};
use super::helper::packet::is_answer;
use super::helper::zone::{Found, Lookup, Verdict, answer, judge};
use super::protocol::Request;
use crate::config::Subnet;
use crate::sched::Instant;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};
use std::time::Duration;

const HEADER_LEN: usize = 12;
/// How much longer than its query an answer may be.
const ADDED_BYTES_MAX: usize = 128;
const ASKERS: u8 = 6;

fn subnet() -> Subnet {
    "10.89.0.0/24".parse().expect("a valid subnet")
}

/// Parses the bytes as a client's query and as a resolver's answer. Our answers must carry the
/// query's id and must not be much longer than the query.
pub fn packets(packet: &[u8]) {
    let check_reply = |reply: &[u8]| {
        assert!(
            reply.len() >= HEADER_LEN && reply.len() <= packet.len() + ADDED_BYTES_MAX,
            "{} bytes",
            reply.len()
        );
        assert_eq!((&reply[..2], reply[2] & 0x80), (&packet[..2], 0x80));
    };
    let name = "a".repeat(32).parse().expect("a valid name");
    let found = [
        Found::Address(Some(Ipv4Addr::BROADCAST.into())),
        Found::Address(Some(Addresses {
            ipv4: Ipv4Addr::BROADCAST,
            ipv6: Some(Ipv6Addr::LOCALHOST),
        })),
        Found::Address(None),
        Found::Name(Some(name)),
        Found::Name(None),
    ];
    match judge(packet, subnet()) {
        Verdict::Drop => {}
        Verdict::Reply(reply) => check_reply(&reply),
        Verdict::LookUp(lookup) => {
            for found in found {
                let fits =
                    matches!(lookup, Lookup::Address(_)) == matches!(found, Found::Address(_));
                let reply = answer(packet, subnet(), &found);
                assert_eq!(reply.is_some(), fits, "{lookup:?} and {found:?}");
                reply.iter().for_each(|reply| check_reply(reply));
            }
        }
        Verdict::Forward(query) => {
            assert!(packet[HEADER_LEN..].starts_with(query.question()));
            let mut echo = packet.to_vec();
            echo[2] |= 0x80;
            assert!(
                is_answer(&echo, query.id(), query.question()),
                "an echoed query must match"
            );
            assert!(
                !is_answer(&echo, query.id() ^ 1, query.question()),
                "another id must not match"
            );
            assert!(
                !is_answer(packet, query.id(), query.question()),
                "a query must not match"
            );
        }
    }
    // `is_answer` must not panic for an answer to a query that is its own second half.
    let (_, half) = packet.split_at(packet.len() / 2);
    let id = packet.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
    let _ = is_answer(packet, id, half);
}

/// Feeds messages to the daemon's side as if the helper had sent them. In the input, each message
/// is prefixed with its length in two bytes. For any messages, the daemon must act only for known
/// clients, and only a limited number of times.
pub fn requests(input: &[u8]) {
    let begun = Instant::now();
    let mut gatekeeper = Gatekeeper::new(begun);
    let mut clients = BTreeMap::new();
    for n in 0..ASKERS {
        let address = SocketAddrV4::new([10, 89, 0, n + 2].into(), 1000 + u16::from(n));
        let kind = if n % 2 == 0 {
            Kind::Datagram
        } else {
            Kind::Connection
        };
        clients.insert(
            gatekeeper
                .admit(address, kind, begun)
                .expect("there is room for a few"),
            (address, 0u16),
        );
    }
    let mut now = begun;
    let mut rest = input;
    while let Some((len, behind)) = rest.split_first_chunk() {
        let (message, next) =
            behind.split_at(behind.len().min(usize::from(u16::from_be_bytes(*len))));
        rest = next;
        now += Duration::from_millis(1);
        if let Some(request) =
            Request::decode(message).filter(|request| !matches!(request, Request::Failed(_)))
        {
            assert_eq!(request.encode(), message, "the encoding must be unique");
        }
        // The supervisor kills the helper after a breach.
        let Ok(action) = gatekeeper.judge(message, now) else {
            return;
        };
        match action {
            Action::FindAddress { ticket, client, .. }
            | Action::FindName { ticket, client, .. } => {
                let known = clients.get_mut(&ticket).expect("a known ticket");
                assert_eq!(*known.0.ip(), client);
                known.1 += 1;
            }
            Action::OpenSocket { ticket, skip, .. } => {
                assert!(skip < TRIES_MAX.into());
                clients.get_mut(&ticket).expect("a known ticket").1 += 1;
            }
            Action::Send { to, packet } => {
                assert!(packet.len() <= message.len());
                let ticket = clients
                    .iter()
                    .find(|(_, (address, _))| *address == to)
                    .map(|(ticket, _)| *ticket);
                assert!(
                    clients
                        .remove(&ticket.expect("a client with an open query"))
                        .is_some()
                );
            }
            Action::Nothing => {}
            Action::GiveUp(text) => assert!(
                text.chars().all(|c| !c.is_control() && c != '\u{202e}'),
                "{text:?}"
            ),
        }
        assert!(
            clients
                .values()
                .all(|(_, requests)| *requests
                    <= QUESTIONS_PER_CONNECTION_MAX * u16::from(TRIES_MAX))
        );
    }
}
