//! Tests of the packets that the rules let pass. A test that expects a dropped packet does not wait
//! until a timeout. It sends another packet on the same path that must arrive, and checks that this
//! one arrives first. As a control, some tests then remove the rule and check that the packet
//! passes.

mod guests;
mod host;
mod ipv6;
mod ports;
mod rates;

use super::lab::{Machine, Udp};
use std::net::{Ipv4Addr, SocketAddr};

const ANY: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

/// Runs `bad`, which sends "bad", and then sends "good" from the guest to `good_at`. Checks that
/// "good" arrives there first.
#[track_caller]
fn assert_dropped(guest: &Machine, bad: impl FnOnce(), good: &Udp, good_at: SocketAddr) {
    bad();
    guest.udp().send("good", good_at);
    assert_eq!(good.next().0, "good");
    assert!(!good.has_any());
}

/// Builds an IPv4 packet with UDP but without a UDP checksum.
fn udp_packet(from: Ipv4Addr, to: Ipv4Addr, port: u16, data: &[u8]) -> Vec<u8> {
    let total = u16::try_from(28 + data.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend([from.octets(), to.octets()].concat());
    let sum: u32 = packet
        .chunks(2)
        .map(|c| u32::from(c[0]) << 8 | u32::from(c[1]))
        .sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(9u16.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend(u16::try_from(8 + data.len()).unwrap().to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(data);
    packet
}
