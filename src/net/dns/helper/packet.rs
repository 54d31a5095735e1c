//! Parses queries and writes answers (RFC 1035, RFC 6891) without doing any I/O.
//!
//! A query begins with its name, so the name has nothing that a compression pointer could refer to.
//! Compressed names are therefore rejected, and parsing cannot loop. Records that follow the
//! question are not parsed. An answer repeats the question byte by byte, which keeps its upper and
//! lower case.

use std::net::{Ipv4Addr, Ipv6Addr};

pub const HEADER_LEN: usize = 12;
/// The length of the longest name on the wire, including the final zero.
const NAME_LEN_MAX: usize = 255;
const LABEL_LEN_MAX: u8 = 63;
/// The maximum number of additional records of a query, which may be EDNS and a signature.
const ADDITIONAL_MAX: u16 = 2;
/// The UDP payload size that our answers advertise.
const UDP_PAYLOAD_MAX: u16 = 1232;

pub const TYPE_A: u16 = 1;
const TYPE_SOA: u16 = 6;
pub const TYPE_PTR: u16 = 12;
pub const TYPE_AAAA: u16 = 28;
const TYPE_OPT: u16 = 41;
pub const TYPE_ANY: u16 = 255;
pub const CLASS_IN: u16 = 1;
pub const CLASS_ANY: u16 = 255;

const FLAG_RESPONSE: u16 = 0x8000;
const OPCODE: u16 = 0x7800;
const FLAG_AUTHORITATIVE: u16 = 0x0400;
const FLAG_RECURSION_DESIRED: u16 = 0x0100;
const FLAG_RECURSION_AVAILABLE: u16 = 0x0080;
const RCODE: u16 = 0x000f;

/// How long resolvers may cache an answer, in seconds. VMs' names and addresses are reused, so
/// answers must not be cached for long.
const TTL_S: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rcode {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
}

/// A well-formed query and the bytes that it was parsed from.
#[derive(Debug)]
pub struct Query<'a> {
    packet: &'a [u8],
    question_end: usize,
    /// The labels of the name, in lower case.
    pub labels: Vec<Vec<u8>>,
    pub qtype: u16,
    pub qclass: u16,
    pub recursion_desired: bool,
    has_edns: bool,
}

/// The way to handle a packet that is not a valid query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bad {
    /// Ignore the packet, because it is an answer or too short to be answered.
    Drop,
    Answer(Vec<u8>),
}

fn u16_at(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]))
}

impl<'a> Query<'a> {
    pub fn parse(packet: &'a [u8]) -> Result<Self, Bad> {
        let field = |at| u16_at(packet, at).ok_or(Bad::Drop);
        let (flags, questions, answers, authorities, additional) =
            (field(2)?, field(4)?, field(6)?, field(8)?, field(10)?);
        if packet.len() < HEADER_LEN || flags & FLAG_RESPONSE != 0 {
            return Err(Bad::Drop);
        }
        let bad = |rcode| Bad::Answer(header_only(packet, rcode));
        if flags & OPCODE != 0 {
            return Err(bad(Rcode::NotImp));
        }
        if questions != 1 || answers != 0 || authorities != 0 || additional > ADDITIONAL_MAX {
            return Err(bad(Rcode::FormErr));
        }
        let (labels, end) = read_name(packet, HEADER_LEN).ok_or_else(|| bad(Rcode::FormErr))?;
        let (Some(qtype), Some(qclass)) = (u16_at(packet, end), u16_at(packet, end + 2)) else {
            return Err(bad(Rcode::FormErr));
        };
        let question_end = end + 4;
        // An EDNS record begins with the root name (one zero byte), followed by the record type
        // OPT.
        let has_edns = additional > 0
            && packet.get(question_end) == Some(&0)
            && u16_at(packet, question_end + 1) == Some(TYPE_OPT);
        let recursion_desired = flags & FLAG_RECURSION_DESIRED != 0;
        Ok(Self {
            packet,
            question_end,
            labels,
            qtype,
            qclass,
            recursion_desired,
            has_edns,
        })
    }

    pub fn id(&self) -> u16 {
        u16_at(self.packet, 0).unwrap_or_default()
    }

    /// Returns the question section of the packet, unchanged.
    pub fn question(&self) -> &'a [u8] {
        &self.packet[HEADER_LEN..self.question_end]
    }

    /// Writes an answer from one of our zones. The last `zone_labels` labels of the question are
    /// the zone's name.
    pub fn answer(&self, outcome: &Outcome, zone_labels: usize) -> Vec<u8> {
        let rcode = if matches!(outcome, Outcome::NoName) {
            Rcode::NxDomain
        } else {
            Rcode::NoError
        };
        let is_negative = matches!(outcome, Outcome::NoName | Outcome::NoData);
        let mut out = self.begin(rcode, true, u16::from(!is_negative), u16::from(is_negative));
        match outcome {
            Outcome::Address(address) => {
                record(&mut out, POINTER_TO_QUESTION, TYPE_A, &address.octets())
            }
            Outcome::Ipv6Address(address) => {
                record(&mut out, POINTER_TO_QUESTION, TYPE_AAAA, &address.octets())
            }
            Outcome::Name(name) => {
                let mut data = Vec::new();
                for label in [name.as_bytes(), b"vm"] {
                    write_label(&mut data, label);
                }
                data.push(0);
                record(&mut out, POINTER_TO_QUESTION, TYPE_PTR, &data);
            }
            Outcome::NoName | Outcome::NoData => {
                let skipped = self
                    .labels
                    .iter()
                    .take(self.labels.len().saturating_sub(zone_labels));
                let at = HEADER_LEN + skipped.map(|l| l.len() + 1).sum::<usize>();
                let zone = 0xc000 | u16::try_from(at).unwrap_or_default();
                record(&mut out, zone, TYPE_SOA, &soa());
            }
        }
        self.end(out)
    }

    /// Writes an answer without records that only carries an error code.
    pub fn refuse(&self, rcode: Rcode) -> Vec<u8> {
        self.end(self.begin(rcode, false, 0, 0))
    }

    fn begin(
        &self,
        rcode: Rcode,
        is_authoritative: bool,
        answers: u16,
        authorities: u16,
    ) -> Vec<u8> {
        let mut flags = FLAG_RESPONSE | FLAG_RECURSION_AVAILABLE | rcode as u16;
        flags |= if self.recursion_desired {
            FLAG_RECURSION_DESIRED
        } else {
            0
        };
        flags |= if is_authoritative {
            FLAG_AUTHORITATIVE
        } else {
            0
        };
        let mut out = Vec::with_capacity(512);
        for field in [
            self.id(),
            flags,
            1,
            answers,
            authorities,
            u16::from(self.has_edns),
        ] {
            out.extend(field.to_be_bytes());
        }
        out.extend(self.question());
        out
    }

    fn end(&self, mut out: Vec<u8>) -> Vec<u8> {
        if self.has_edns {
            out.push(0);
            out.extend(TYPE_OPT.to_be_bytes());
            out.extend(UDP_PAYLOAD_MAX.to_be_bytes());
            // These bytes mean extended code 0, version 0, no flags and no options.
            out.extend([0; 6]);
        }
        out
    }
}

/// The result of a query in our zones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Address(Ipv4Addr),
    Ipv6Address(Ipv6Addr),
    /// A VM's name, without `.vm`.
    Name(String),
    /// The name exists, but not with a record of this type.
    NoData,
    NoName,
}

/// A compression pointer to the name in the question.
const POINTER_TO_QUESTION: u16 = 0xc000 | HEADER_LEN as u16;

fn record(out: &mut Vec<u8>, owner: u16, kind: u16, data: &[u8]) {
    out.extend(owner.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(CLASS_IN.to_be_bytes());
    out.extend(TTL_S.to_be_bytes());
    out.extend(u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
    out.extend(data);
}

/// Returns the data of an SOA record, which determines how long resolvers may cache a negative
/// answer (RFC 2308).
fn soa() -> Vec<u8> {
    let mut data = Vec::new();
    for name in [&[b"ns".as_slice(), b"vm"], &[b"nobody".as_slice(), b"vm"]] {
        name.iter().for_each(|label| write_label(&mut data, label));
        data.push(0);
    }
    for number in [1, 3600, 600, 86_400, TTL_S] {
        data.extend(number.to_be_bytes());
    }
    data
}

fn write_label(out: &mut Vec<u8>, label: &[u8]) {
    let label = &label[..label.len().min(LABEL_LEN_MAX.into())];
    out.push(u8::try_from(label.len()).unwrap_or_default());
    out.extend(label);
}

/// Returns the name's labels in lower case, and the offset at which the name ends. Returns None for
/// an invalid or compressed name. Every step advances by at least one byte.
fn read_name(packet: &[u8], begin: usize) -> Option<(Vec<Vec<u8>>, usize)> {
    let mut labels = Vec::new();
    let mut at = begin;
    loop {
        let len = *packet.get(at)?;
        at += 1;
        if len == 0 {
            return Some((labels, at));
        }
        let end = at + usize::from(len);
        if len > LABEL_LEN_MAX || end - begin >= NAME_LEN_MAX {
            return None;
        }
        labels.push(packet.get(at..end)?.to_ascii_lowercase());
        at = end;
    }
}

/// Writes an answer to a packet whose question cannot be repeated.
fn header_only(packet: &[u8], rcode: Rcode) -> Vec<u8> {
    let mut out = packet.get(..2).unwrap_or(&[0, 0]).to_vec();
    let asked = u16_at(packet, 2).unwrap_or_default();
    let flags = FLAG_RESPONSE
        | (asked & (OPCODE | FLAG_RECURSION_DESIRED))
        | FLAG_RECURSION_AVAILABLE
        | rcode as u16;
    out.extend(flags.to_be_bytes());
    out.extend([0; 8]);
    out
}

/// Replaces the packet's id.
pub fn set_id(packet: &mut [u8], id: u16) {
    if let Some(field) = packet.get_mut(..2) {
        field.copy_from_slice(&id.to_be_bytes());
    }
}

/// True if this packet answers the question that was sent with this id.
pub fn is_answer(packet: &[u8], id: u16, question: &[u8]) -> bool {
    let (Some(its), Some(flags), Some(questions)) =
        (u16_at(packet, 0), u16_at(packet, 2), u16_at(packet, 4))
    else {
        return false;
    };
    if packet.len() < HEADER_LEN || its != id || flags & FLAG_RESPONSE == 0 {
        return false;
    }
    let repeated = packet.get(HEADER_LEN..HEADER_LEN + question.len());
    match questions {
        1 => repeated.is_some_and(|q| q.eq_ignore_ascii_case(question)),
        // Some resolvers leave the question out of an error.
        0 => flags & RCODE != 0,
        _ => false,
    }
}
