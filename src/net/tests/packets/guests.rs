//! Tests of the effects of one guest on another, and of packets with false addresses.

use super::super::lab::{GATEWAY, INSTALL, Lab, Machine, OUTSIDE, config, is_root};
use super::{ANY, assert_dropped, udp_packet};
use crate::net::Access;
use std::net::SocketAddr;

/// Runs `bad`, which sends a packet from `a` to `b`. Returns true if this packet arrives at `b`
/// before a later packet from the host.
fn passes(lab: &Lab, a: &Machine, b: &Machine, bad: impl FnOnce()) -> bool {
    let (outside, at_b) = (lab.outside.udp((ANY, 9001)), b.ns.udp((ANY, 9000)));
    bad();
    // When "mark" arrives outside, the host has handled every earlier packet.
    a.udp().send("mark", (OUTSIDE, 9001));
    assert_eq!(outside.next().0, "mark");
    lab.host.udp((ANY, 0)).send("good", (b.address(), 9000));
    at_b.next().0 == "bad"
}

/// Tells each guest the other's MAC address. Otherwise a later packet would overtake a packet that
/// waits for ARP.
fn introduce(a: &Machine, b: &Machine) {
    for (here, there) in [(a, b), (b, a)] {
        here.ns.sh(&format!(
            "ip neighbour replace {} lladdr {} dev eth0 nud permanent",
            there.address(),
            there.guest.lease.mac
        ));
    }
}

#[test]
fn guests_do_not_reach_each_other() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let (a, b) = (lab.start(0, Access::Nat), lab.start(1, Access::Nat));
    let send = || a.udp().send("bad", (b.address(), 9000));
    introduce(&a, &b);
    assert!(!passes(&lab, &a, &b, send), "through the bridge");
    a.ns.sh(&format!("ip route add {}/32 via {GATEWAY}", b.address()));
    assert!(!passes(&lab, &a, &b, send), "through the host");
    lab.host.sh(&format!("nft delete table inet fcd_{INSTALL}; ip link set up0 down; ip link set up0 up; ip route add default via {OUTSIDE} || true"));
    // Without fcd's rules the packet arrives, so the rules dropped it.
    let at_b = b.ns.udp((ANY, 9000));
    send();
    assert_eq!(at_b.next().0, "bad");
}

#[test]
fn guests_reach_each_other_if_allowed() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&crate::config::Network {
        allow_between_vms: true,
        ..config()
    });
    let (a, b, none) = (
        lab.start(0, Access::Nat),
        lab.start(1, Access::Nat),
        lab.start(2, Access::None),
    );
    introduce(&a, &b);
    assert!(passes(&lab, &a, &b, || a
        .udp()
        .send("bad", (b.address(), 9000))));
    a.ns.sh(&format!("ip route add {}/32 via {GATEWAY}", none.address()));
    assert!(
        !passes(&lab, &a, &none, || a
            .udp()
            .send("bad", (none.address(), 9000))),
        "a guest without a network is unreachable through the host"
    );
}

#[test]
fn guest_cannot_spoof_addresses() {
    if !is_root() {
        return;
    }
    // Spoofing matters most if guests may reach each other, so this lab allows it.
    let lab = Lab::new(&crate::config::Network {
        allow_between_vms: true,
        ..config()
    });
    let (a, b) = (lab.start(0, Access::Nat), lab.start(1, Access::Nat));
    let outside = lab.outside.udp((ANY, 9000));
    let at = SocketAddr::from((OUTSIDE, 9000));
    a.ns.sh(&format!(
        "ip address add 10.89.0.99/32 dev eth0; ip address add {}/32 dev eth0",
        b.address()
    ));
    a.ns.sh("ip address add 203.0.113.9/32 dev eth0");
    for source in [[10, 89, 0, 99].into(), b.address(), [203, 0, 113, 9].into()] {
        assert_dropped(&a, || a.ns.udp((source, 0)).send("bad", at), &outside, at);
    }
    a.ns.sh(&format!(
        "ip address del 10.89.0.99/32 dev eth0; ip address del {}/32 dev eth0",
        b.address()
    ));
    // A MAC address that does not belong to the guest is dropped, including the other guest's.
    for mac in ["02:fc:0a:59:00:63", &b.guest.lease.mac.to_string()] {
        let forge = || {
            a.ns.sh(&format!("ip link set eth0 address {mac}; ip neighbour replace {GATEWAY} lladdr 06:fc:1a:2b:3c:4d dev eth0"));
            a.udp().send("bad", at);
            a.ns.sh(&format!("ip link set eth0 address {}", a.guest.lease.mac));
        };
        assert_dropped(&a, forge, &outside, at);
    }
    // In an unsolicited ARP answer, a claims to have the gateway's address.
    let gateway_of_b = || b.ns.sh(&format!("ip neighbour show {GATEWAY} dev eth0"));
    b.udp().send("hello", at);
    assert_eq!(outside.next().0, "hello");
    let before = gateway_of_b();
    assert!(before.contains("06:fc:1a:2b:3c:4d"), "{before}");
    let claim = |sender: [u8; 4]| {
        let (own, peer) = (a.guest.lease.mac.0, b.guest.lease.mac.0);
        let arp = [0, 1, 8, 0, 6, 4, 0, 2];
        [
            &peer[..],
            &own,
            &[8, 6],
            &arp,
            &own,
            &sender,
            &peer,
            &b.address().octets(),
        ]
        .concat()
    };
    assert!(!passes(&lab, &a, &b, || a.inject(&claim(GATEWAY.octets()))));
    assert_eq!(gateway_of_b().split(' ').nth(2), before.split(' ').nth(2));
    // In another ARP answer, a claims its own address, which is correct.
    assert!(!passes(&lab, &a, &b, || a.inject(&claim(a.address().octets()))));
    let own =
        b.ns.sh(&format!("ip neighbour show {} dev eth0", a.address()));
    assert!(
        own.is_empty() || own.contains(&a.guest.lease.mac.to_string()),
        "{own}"
    );
}

#[test]
fn ipv6_and_vlans_do_not_pass() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&crate::config::Network {
        allow_between_vms: true,
        ..config()
    });
    let (a, b) = (lab.start(0, Access::Nat), lab.start(1, Access::Nat));
    for (machine, own, other, mac) in [
        (&a, "fd00::1", "fd00::2", b.guest.lease.mac),
        (&b, "fd00::2", "fd00::1", a.guest.lease.mac),
    ] {
        machine.ns.sh(&format!("ip -6 address add {own}/64 dev eth0 nodad; ip -6 neighbour add {other} lladdr {mac} dev eth0"));
    }
    let v6: SocketAddr = "[fd00::2]:9000".parse().unwrap();
    let at_b = b.ns.udp(v6);
    assert!(!passes(&lab, &a, &b, || a
        .ns
        .udp("[fd00::1]:0".parse::<SocketAddr>().unwrap())
        .send("bad", v6)));
    assert!(!at_b.has_any());
    // Untagging would turn a priority-tagged frame into plain IPv4.
    let mut frame = [
        &b.guest.lease.mac.0[..],
        &a.guest.lease.mac.0,
        &[0x81, 0, 0, 0, 8, 0],
    ]
    .concat();
    frame.extend(udp_packet(a.address(), b.address(), 9000, b"bad"));
    assert!(!passes(&lab, &a, &b, || a.inject(&frame)));
    frame.drain(12..16);
    assert!(
        passes(&lab, &a, &b, || a.inject(&frame)),
        "as a control, the same frame without a tag passes"
    );
}
