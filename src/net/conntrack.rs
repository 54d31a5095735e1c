//! Deletes entries from the kernel's connection tracking table (nf_conntrack). The address
//! translation of a connection is fixed when the connection begins, so packets of an old connection
//! would bypass a newer rule, or reach a newer guest with the same address.
//!
//! Sources: linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nfnetlink_conntrack.h.

use crate::error::{Error, Result};
use crate::locks::{Rank, region};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

/// How long to wait for the kernel's answer, in seconds.
const ANSWER_S: i64 = 5;
/// The size of one read. The kernel sends at most 32 KiB at once (net/netlink/af_netlink.c).
const READ_BYTES: usize = 64 << 10;
/// The maximum number of reads per request, enough for more entries than any host keeps.
const READS_MAX: usize = 100_000;

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// The types of messages. Each type is `NFNL_SUBSYS_CTNETLINK << 8` plus the number of the message.
const CT_NEW: u16 = 0x100;
const CT_GET: u16 = 0x101;
const CT_DELETE: u16 = 0x102;
/// The length of the `struct nfgenmsg` of every message: family, version and resource.
const GENERIC: usize = 4;
/// The family of a request for the entries of all families.
const ALL: i32 = libc::AF_UNSPEC;
const TYPE_MASK: u16 = 0x3fff;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;

/// One direction of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tuple {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// The number of the protocol (`IPPROTO_*`).
    pub protocol: u8,
    /// The destination port, or 0 if the protocol has no ports.
    pub destination_port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    pub original: Tuple,
    pub reply: Tuple,
}

impl Flow {
    pub(super) fn is_of(&self, address: IpAddr) -> bool {
        [self.original, self.reply]
            .iter()
            .any(|t| t.source == address || t.destination == address)
    }
}

/// Deletes the entries of this network namespace for which `is_stale` is true. Returns the
/// number of deleted entries.
pub(super) fn forget(is_stale: &dyn Fn(&Flow) -> bool) -> Result<usize> {
    let doing = "delete conntrack entries";
    let io = |e: nix::Error| Error::io(doing, e);
    let _blocking = region(Rank::HostCmd);
    let socket = open().map_err(io)?;
    let mut stale = Vec::new();
    ask(
        &socket,
        &message(CT_GET, NLM_F_DUMP, ALL, &[]),
        &mut |attributes| {
            if let Some(flow) = read_flow(attributes).filter(|flow| is_stale(flow)) {
                let family = match flow.original.source {
                    IpAddr::V4(_) => libc::AF_INET,
                    IpAddr::V6(_) => libc::AF_INET6,
                };
                stale.push(message(CT_DELETE, NLM_F_ACK, family, &which(attributes)));
            }
        },
    )
    .map_err(io)?;
    for delete in &stale {
        match ask(&socket, delete, &mut |_| {}) {
            // The connection has ended since the entries were listed.
            Ok(()) | Err(nix::Error::ENOENT) => {}
            Err(e) => return Err(io(e)),
        }
    }
    Ok(stale.len())
}

fn open() -> nix::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(ANSWER_S))?;
    connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(socket)
}

/// Sends one request and calls `each` with the attributes of every entry in the answer.
fn ask(socket: &OwnedFd, question: &[u8], each: &mut dyn FnMut(&[u8])) -> nix::Result<()> {
    send(socket.as_raw_fd(), question, MsgFlags::empty())?;
    let mut buffer = vec![0; READ_BYTES];
    for _ in 0..READS_MAX {
        let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..len];
        while let Some((answer, after)) = next_message(rest) {
            match answer.kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = answer.body.get(..4).map_or(libc::EBADMSG, |b| {
                        -i32::from_ne_bytes([b[0], b[1], b[2], b[3]])
                    });
                    return if code == 0 {
                        Ok(())
                    } else {
                        Err(nix::Error::from_raw(code))
                    };
                }
                CT_NEW => each(answer.body.get(GENERIC..).unwrap_or_default()),
                _ => {}
            }
            rest = after;
        }
    }
    Err(nix::Error::ETIMEDOUT)
}

/// `family` is one of `AF_*`.
fn message(kind: u16, flags: u16, family: i32, attributes: &[u8]) -> Vec<u8> {
    let len = (HEADER + GENERIC + attributes.len()) as u32;
    let mut bytes = len.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family as u8, 0, 0, 0]);
    bytes.extend(attributes);
    bytes
}

struct Message<'a> {
    kind: u16,
    body: &'a [u8],
}

/// Returns the first message and the rest of the bytes, or None if there is no complete message.
fn next_message(bytes: &[u8]) -> Option<(Message<'_>, &[u8])> {
    let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER..len)?;
    let rest = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((Message { kind, body }, rest))
}

struct Attribute<'a> {
    kind: u16,
    value: &'a [u8],
    /// The attribute with its header and padding.
    whole: &'a [u8],
}

/// Returns the first attribute and the rest of the bytes, or None if there is no complete
/// attribute.
fn next_attribute(bytes: &[u8]) -> Option<(Attribute<'_>, &[u8])> {
    let len = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & TYPE_MASK;
    let value = bytes.get(4..len)?;
    let (whole, rest) = bytes.split_at(len.next_multiple_of(4).min(bytes.len()));
    Some((Attribute { kind, value, whole }, rest))
}

fn attributes(bytes: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let (attribute, after) = next_attribute(rest)?;
        rest = after;
        Some(attribute)
    })
}

fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|a| a.kind == wanted)
        .map(|a| a.value)
}

/// Returns the attributes that identify an entry in a delete request.
fn which(flow: &[u8]) -> Vec<u8> {
    let names = attributes(flow).filter(|a| [CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE].contains(&a.kind));
    names.flat_map(|a| a.whole.to_vec()).collect()
}

fn read_flow(bytes: &[u8]) -> Option<Flow> {
    Some(Flow {
        original: read_tuple(find(bytes, CTA_TUPLE_ORIG)?)?,
        reply: read_tuple(find(bytes, CTA_TUPLE_REPLY)?)?,
    })
}

fn read_tuple(bytes: &[u8]) -> Option<Tuple> {
    let (ip, protocol) = (find(bytes, CTA_TUPLE_IP)?, find(bytes, CTA_TUPLE_PROTO)?);
    let address = |ipv4, ipv6| {
        let four = || Some(Ipv4Addr::from(<[u8; 4]>::try_from(find(ip, ipv4)?).ok()?).into());
        let six = || Some(Ipv6Addr::from(<[u8; 16]>::try_from(find(ip, ipv6)?).ok()?).into());
        four().or_else(six)
    };
    let port = find(protocol, CTA_PROTO_DST_PORT)
        .and_then(|v| <[u8; 2]>::try_from(v).ok())
        .map_or(0, u16::from_be_bytes);
    Some(Tuple {
        source: address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?,
        destination: address(CTA_IP_V4_DST, CTA_IP_V6_DST)?,
        protocol: *find(protocol, CTA_PROTO_NUM)?.first()?,
        destination_port: port,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn tuple(kind: u16, source: [u8; 4], destination: [u8; 4], port: u16) -> Vec<u8> {
        let ip = [
            attribute(CTA_IP_V4_SRC, &source),
            attribute(CTA_IP_V4_DST, &destination),
        ]
        .concat();
        let protocol = [
            attribute(CTA_PROTO_NUM, &[17]),
            attribute(CTA_PROTO_DST_PORT, &port.to_be_bytes()),
        ]
        .concat();
        // The kernel marks attributes that hold other attributes with this bit.
        attribute(
            kind | 0x8000,
            &[
                attribute(CTA_TUPLE_IP | 0x8000, &ip),
                attribute(CTA_TUPLE_PROTO | 0x8000, &protocol),
            ]
            .concat(),
        )
    }

    #[test]
    fn flow_is_parsed_with_its_key() {
        let original = tuple(CTA_TUPLE_ORIG, [192, 0, 2, 1], [192, 0, 2, 2], 8080);
        let reply = tuple(CTA_TUPLE_REPLY, [10, 89, 0, 5], [192, 0, 2, 1], 4000);
        let id = attribute(CTA_ID, &[1, 2, 3, 4]);
        let bytes = [original.clone(), reply, attribute(3, &[0; 4]), id.clone()].concat();
        let flow = read_flow(&bytes).unwrap();
        assert_eq!(
            (flow.original.destination_port, flow.original.protocol),
            (8080, 17)
        );
        assert!(
            flow.is_of(IpAddr::from([10, 89, 0, 5]))
                && flow.is_of(IpAddr::from([192, 0, 2, 2]))
                && !flow.is_of(IpAddr::from([10, 89, 0, 6]))
        );
        assert_eq!(which(&bytes), [original, id].concat());
    }

    #[test]
    fn truncated_messages_are_rejected() {
        let whole = [
            tuple(CTA_TUPLE_ORIG, [1; 4], [2; 4], 1),
            tuple(CTA_TUPLE_REPLY, [2; 4], [1; 4], 1),
        ]
        .concat();
        for len in 0..whole.len() {
            assert_eq!(read_flow(&whole[..len]), None, "{len}");
        }
        let sent = message(CT_GET, NLM_F_DUMP, ALL, &[]);
        assert_eq!(
            next_message(&sent).map(|(sent, _)| (sent.kind, sent.body.len())),
            Some((CT_GET, 4))
        );
        assert!((0..sent.len()).all(|len| next_message(&sent[..len]).is_none()));
        assert!(
            next_attribute(&[2, 0, 1, 0]).is_none(),
            "shorter than its header"
        );
    }
}
