//! Decides, without doing any I/O, which queries are answered, looked up or forwarded.

use super::packet::{
    Bad, CLASS_ANY, CLASS_IN, Outcome, Query, Rcode, TYPE_A, TYPE_AAAA, TYPE_ANY, TYPE_PTR,
};
use crate::config::Subnet;
use crate::ids::VmName;
use crate::net::dns::Addresses;
use crate::net::dns::protocol::{Request, Ticket};
use std::net::Ipv4Addr;

/// The types of zone transfers (RFC 5936) and the related types. Queries of these types are
/// refused.
const TYPES_REFUSED: std::ops::RangeInclusive<u16> = 251..=254;
/// The numbers of labels in the names of our zones: `vm`, and the subnet's reverse zone.
const FORWARD_ZONE_LABELS: usize = 1;
const REVERSE_ZONE_LABELS: usize = 5;

/// The decision about a packet.
#[derive(Debug)]
pub enum Verdict<'a> {
    Drop,
    Reply(Vec<u8>),
    /// Ask the daemon, and then write the answer with [`answer`].
    LookUp(Lookup),
    Forward(Query<'a>),
}

/// A request for data that only the daemon has.
#[derive(Clone, Debug, PartialEq)]
pub enum Lookup {
    Address(VmName),
    Name(Ipv4Addr),
}

/// The daemon's answer to a [`Lookup`].
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    Address(Option<Addresses>),
    Name(Option<VmName>),
}

impl Lookup {
    pub fn request(self, ticket: Ticket) -> Request<'static> {
        match self {
            Lookup::Address(name) => Request::Address { ticket, name },
            Lookup::Name(address) => Request::Name { ticket, address },
        }
    }
}

/// Decides what to do with a packet.
pub fn judge(packet: &[u8], subnet: Subnet) -> Verdict<'_> {
    let query = match Query::parse(packet) {
        Ok(query) => query,
        Err(Bad::Drop) => return Verdict::Drop,
        Err(Bad::Answer(reply)) => return Verdict::Reply(reply),
    };
    if !matches!(query.qclass, CLASS_IN | CLASS_ANY) || TYPES_REFUSED.contains(&query.qtype) {
        return Verdict::Reply(query.refuse(Rcode::Refused));
    }
    match own(&query, subnet) {
        Some(Own::Known(outcome)) => Verdict::Reply(query.answer(&outcome, FORWARD_ZONE_LABELS)),
        Some(Own::LookUp(lookup)) => Verdict::LookUp(lookup),
        None if query.recursion_desired => Verdict::Forward(query),
        None => Verdict::Reply(query.refuse(Rcode::Refused)),
    }
}

/// Answers a packet for which [`judge`] returned a lookup. Returns None if the result does not
/// match the query in the packet.
pub fn answer(packet: &[u8], subnet: Subnet, found: &Found) -> Option<Vec<u8>> {
    let query = Query::parse(packet).ok()?;
    let Some(Own::LookUp(lookup)) = own(&query, subnet) else {
        return None;
    };
    let asks = |kind: u16| query.qtype == kind || query.qtype == TYPE_ANY;
    let (outcome, zone_labels) = match (lookup, found) {
        (Lookup::Address(_), Found::Address(Some(found))) => {
            let outcome = match found.ipv6 {
                _ if asks(TYPE_A) => Outcome::Address(found.ipv4),
                Some(ipv6) if query.qtype == TYPE_AAAA => Outcome::Ipv6Address(ipv6),
                _ => Outcome::NoData,
            };
            (outcome, FORWARD_ZONE_LABELS)
        }
        (Lookup::Address(_), Found::Address(None)) => (Outcome::NoName, FORWARD_ZONE_LABELS),
        (Lookup::Name(_), Found::Name(Some(name))) if asks(TYPE_PTR) => {
            (Outcome::Name(name.to_string()), REVERSE_ZONE_LABELS)
        }
        (Lookup::Name(_), Found::Name(Some(_))) => (Outcome::NoData, REVERSE_ZONE_LABELS),
        (Lookup::Name(_), Found::Name(None)) => (Outcome::NoName, REVERSE_ZONE_LABELS),
        _ => return None,
    };
    Some(query.answer(&outcome, zone_labels))
}

/// A query for one of our zones.
enum Own {
    /// The query is for a name in the zone `vm`, and its answer is known.
    Known(Outcome),
    LookUp(Lookup),
}

/// Returns how to answer a query for a name in our zones, or None for a name outside them.
fn own(query: &Query<'_>, subnet: Subnet) -> Option<Own> {
    let labels: Vec<&[u8]> = query.labels.iter().map(Vec::as_slice).collect();
    match labels.as_slice() {
        [b"vm"] => Some(Own::Known(Outcome::NoData)),
        [name, b"vm"] => {
            let name: Option<VmName> = std::str::from_utf8(name).ok().and_then(|n| n.parse().ok());
            Some(name.map_or(Own::Known(Outcome::NoName), |name| {
                Own::LookUp(Lookup::Address(name))
            }))
        }
        [.., b"vm"] => Some(Own::Known(Outcome::NoName)),
        [d, c, b, a, b"in-addr", b"arpa"] => {
            let octet = |label: &[u8]| std::str::from_utf8(label).ok()?.parse::<u8>().ok();
            let address = Ipv4Addr::new(octet(a)?, octet(b)?, octet(c)?, octet(d)?);
            subnet
                .contains(address)
                .then_some(Own::LookUp(Lookup::Name(address)))
        }
        _ => None,
    }
}
