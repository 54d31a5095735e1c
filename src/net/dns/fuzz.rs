//! Targets of `scripts/fuzz`: what the helper reads of guests and resolvers, and what the daemon reads of the helper.

use super::desk::{Action, Desk, Kind, QUESTIONS_PER_CONNECTION_MAX, TRIES_MAX};
use super::helper::packet::is_answer;
use super::helper::zone::{Found, Lookup, Verdict, answer, judge};
use super::protocol::Request;
use crate::config::Subnet;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

const HEADER_LEN: usize = 12;
/// What an answer of ours adds to its question, at most.
const ADDED_BYTES_MAX: usize = 128;
const ASKERS: u8 = 6;

fn subnet() -> Subnet {
    "10.89.0.0/24".parse().expect("a subnet")
}

/// A question as a guest sends it, and the same bytes as a resolver's answer. No answer of ours is much longer than its question,
/// and each has the question's id.
pub fn packets(packet: &[u8]) {
    let check_reply = |reply: &[u8]| {
        assert!(reply.len() >= HEADER_LEN && reply.len() <= packet.len() + ADDED_BYTES_MAX, "{} bytes", reply.len());
        assert_eq!((&reply[..2], reply[2] & 0x80), (&packet[..2], 0x80));
    };
    let name = "a".repeat(32).parse().expect("a name");
    let found = [Found::Address(Some(Ipv4Addr::BROADCAST)), Found::Address(None), Found::Name(Some(name)), Found::Name(None)];
    match judge(packet, subnet()) {
        Verdict::Drop => {}
        Verdict::Reply(reply) => check_reply(&reply),
        Verdict::LookUp(lookup) => {
            for found in found {
                let fits = matches!(lookup, Lookup::Address(_)) == matches!(found, Found::Address(_));
                let reply = answer(packet, subnet(), &found);
                assert_eq!(reply.is_some(), fits, "{lookup:?} and {found:?}");
                reply.iter().for_each(|reply| check_reply(reply));
            }
        }
        Verdict::Forward(query) => {
            assert!(packet[HEADER_LEN..].starts_with(query.question()));
            let mut echo = packet.to_vec();
            echo[2] |= 0x80;
            assert!(is_answer(&echo, query.id(), query.question()), "the question itself, as an answer");
            assert!(!is_answer(&echo, query.id() ^ 1, query.question()), "an answer with another id");
            assert!(!is_answer(packet, query.id(), query.question()), "a question is not an answer");
        }
    }
    // As an answer to a question that is its own first half.
    let (_, half) = packet.split_at(packet.len() / 2);
    let id = packet.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
    let _ = is_answer(packet, id, half);
}

/// Messages of the helper, each with its length before it in two bytes. Whatever it says, it acts only for those who have
/// asked, and only so often.
pub fn requests(input: &[u8]) {
    let begun = Instant::now();
    let mut desk = Desk::new(begun);
    let mut askers = BTreeMap::new();
    for n in 0..ASKERS {
        let address = SocketAddrV4::new([10, 89, 0, n + 2].into(), 1000 + u16::from(n));
        let kind = if n % 2 == 0 { Kind::Datagram } else { Kind::Connection };
        askers.insert(desk.admit(address, kind, begun).expect("room for few"), (address, 0u16));
    }
    let mut now = begun;
    let mut rest = input;
    while let Some((len, behind)) = rest.split_first_chunk() {
        let (message, next) = behind.split_at(behind.len().min(usize::from(u16::from_be_bytes(*len))));
        rest = next;
        now += Duration::from_millis(1);
        if let Some(request) = Request::decode(message).filter(|request| !matches!(request, Request::Failed(_))) {
            assert_eq!(request.encode(), message, "more than one way to say it");
        }
        // After a breach the helper is killed.
        let Ok(action) = desk.judge(message, now) else { return };
        match action {
            Action::FindAddress { ticket, asker, .. } | Action::FindName { ticket, asker, .. } => {
                let known = askers.get_mut(&ticket).expect("a ticket");
                assert_eq!(*known.0.ip(), asker);
                known.1 += 1;
            }
            Action::OpenSocket { ticket, skip, .. } => {
                assert!(skip < TRIES_MAX.into());
                askers.get_mut(&ticket).expect("a ticket").1 += 1;
            }
            Action::Send { to, packet } => {
                assert!(packet.len() <= message.len());
                let ticket = askers.iter().find(|(_, (address, _))| *address == to).map(|(ticket, _)| *ticket);
                assert!(askers.remove(&ticket.expect("somebody who has asked")).is_some());
            }
            Action::Nothing => {}
            Action::GiveUp(text) => assert!(text.chars().all(|c| !c.is_control() && c != '\u{202e}'), "{text:?}"),
        }
        assert!(askers.values().all(|(_, requests)| *requests <= QUESTIONS_PER_CONNECTION_MAX * u16::from(TRIES_MAX)));
    }
}
