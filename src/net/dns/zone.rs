//! What is answered and what is passed on. Pure, but for what the daemon knows.

use super::Names;
use super::packet::{Bad, CLASS_ANY, CLASS_IN, Outcome, Query, Rcode, TYPE_A, TYPE_ANY, TYPE_PTR};
use crate::config::Subnet;
use crate::ids::VmName;
use std::net::{IpAddr, Ipv4Addr};

/// Transfers of zones (RFC 5936) and the like (251 to 254): nobody's business.
const TYPES_REFUSED: std::ops::RangeInclusive<u16> = 251..=254;

/// What is done with a packet.
#[derive(Debug)]
pub enum Verdict<'a> {
    Drop,
    Reply(Vec<u8>),
    Forward(Query<'a>),
}

/// Judges a packet from `asker`.
pub fn judge<'a>(packet: &'a [u8], asker: IpAddr, subnet: Subnet, names: &dyn Names) -> Verdict<'a> {
    // The host's own questions come from the bridge's address.
    if !matches!(asker, IpAddr::V4(a) if subnet.contains(a) || a.is_loopback()) {
        return Verdict::Drop;
    }
    let query = match Query::parse(packet) {
        Ok(query) => query,
        Err(Bad::Drop) => return Verdict::Drop,
        Err(Bad::Answer(reply)) => return Verdict::Reply(reply),
    };
    if !matches!(query.qclass, CLASS_IN | CLASS_ANY) || TYPES_REFUSED.contains(&query.qtype) {
        return Verdict::Reply(query.refuse(Rcode::Refused));
    }
    if let Some((outcome, zone_labels)) = own(&query, asker, subnet, names) {
        return Verdict::Reply(query.answer(&outcome, zone_labels));
    }
    if query.recursion_desired { Verdict::Forward(query) } else { Verdict::Reply(query.refuse(Rcode::Refused)) }
}

/// The answer, and of how many labels the zone's name is; none for what is not ours to say.
fn own(query: &Query<'_>, asker: IpAddr, subnet: Subnet, names: &dyn Names) -> Option<(Outcome, usize)> {
    let labels: Vec<&[u8]> = query.labels.iter().map(Vec::as_slice).collect();
    match labels.as_slice() {
        [b"vm"] => Some((Outcome::NoData, 1)),
        [name, b"vm"] => {
            let name: Option<VmName> = std::str::from_utf8(name).ok().and_then(|n| n.parse().ok());
            let address = name.and_then(|n| names.address(n.as_str(), asker));
            let outcome = match address {
                Some(address) if matches!(query.qtype, TYPE_A | TYPE_ANY) => Outcome::Address(address),
                Some(_) => Outcome::NoData,
                None => Outcome::NoName,
            };
            Some((outcome, 1))
        }
        [.., b"vm"] => Some((Outcome::NoName, 1)),
        [d, c, b, a, b"in-addr", b"arpa"] => {
            let octet = |label: &[u8]| std::str::from_utf8(label).ok()?.parse::<u8>().ok();
            let address = Ipv4Addr::new(octet(a)?, octet(b)?, octet(c)?, octet(d)?);
            if !subnet.contains(address) {
                return None;
            }
            let outcome = match names.name(address, asker) {
                Some(name) if matches!(query.qtype, TYPE_PTR | TYPE_ANY) => Outcome::Name(name),
                Some(_) => Outcome::NoData,
                None => Outcome::NoName,
            };
            Some((outcome, 5))
        }
        _ => None,
    }
}
