//! Tests of which packets pass. To show that a packet is dropped, a test never waits for it. It
//! sends a packet that must arrive behind it on the same way, and checks that this one arrives
//! first. As a control, some tests then remove the rule and let the packet pass.

use super::lab::{
    GATEWAY, HOST, INSTALL, Lab, METADATA, Machine, Ns, OUTSIDE, Udp, config, is_root, tag,
};
use crate::api::port::{Port, Protocol};
use crate::host::confine::Owner;
use crate::locks::Cancel;
use crate::net::Access;
use crate::net::dns::Names;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

const ANY: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

/// Sends "bad" with `bad`, and then "good" from the guest to `good_at`. There, "good" must be the
/// first to arrive.
#[track_caller]
fn assert_dropped(guest: &Machine, bad: impl FnOnce(), good: &Udp, good_at: SocketAddr) {
    bad();
    guest.udp().send("good", good_at);
    assert_eq!(good.next().0, "good");
    assert!(!good.has_any());
}

#[test]
fn guests_reach_the_outside_through_the_hosts_address() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    let listener = lab
        .outside
        .run(|| TcpListener::bind((OUTSIDE, 80)).unwrap());
    let mut stream = guest.ns.run(|| TcpStream::connect((OUTSIDE, 80)).unwrap());
    let (mut peer, from) = listener.accept().unwrap();
    assert_eq!(from.ip(), HOST, "masqueraded");
    // Send more than a TCP window in both directions.
    let sent = vec![7; 300_000];
    std::thread::scope(|s| {
        s.spawn(|| stream.write_all(&sent).unwrap());
        let mut received = vec![0; sent.len()];
        peer.read_exact(&mut received).unwrap();
        assert_eq!(received, sent);
    });
    peer.write_all(b"back").unwrap();
    let mut back = [0; 4];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"back");
}

#[test]
fn unsolicited_packets_from_outside_do_not_reach_guests() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    lab.outside
        .sh(&format!("ip route add 10.89.0.0/24 via {HOST}"));
    let at_guest = guest.ns.udp((ANY, 9000));
    let (outside, host) = (lab.outside.udp((ANY, 0)), lab.host.udp((ANY, 9001)));
    outside.send("bad", (guest.address(), 9000));
    // Once "mark" has arrived, the host has handled everything before it.
    outside.send("mark", (HOST, 9001));
    assert_eq!(host.next().0, "mark");
    host.send("good", (guest.address(), 9000));
    assert_eq!(at_guest.next().0, "good");
    // The name server cannot be reached from outside either.
    let names = lab.host.udp((GATEWAY, 53));
    outside.send("bad", (GATEWAY, 53));
    outside.send("mark", (HOST, 9001));
    assert_eq!(host.next().0, "mark");
    assert!(!names.has_any());
}

#[test]
fn guests_do_not_reach_the_hosts_services() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    let (service, names) = (lab.host.udp((ANY, 9000)), lab.host.udp((GATEWAY, 53)));
    let ask = |what: &str| {
        for at in [
            GATEWAY,
            HOST,
            Ipv4Addr::new(10, 89, 0, 255),
            Ipv4Addr::BROADCAST,
            Ipv4Addr::new(224, 0, 0, 1),
        ] {
            let socket = guest.udp();
            socket.0.set_broadcast(true).unwrap();
            socket.send(what, (at, 9000));
        }
    };
    assert_dropped(&guest, || ask("bad"), &names, (GATEWAY, 53).into());
    assert!(!service.has_any());
    // A packet that another table redirects to a service of the host is dropped as well.
    lab.host.sh("nft add table ip other; nft 'add chain ip other pre { type nat hook prerouting priority -100; }'");
    lab.host.sh(&format!(
        "nft add rule ip other pre ip daddr {OUTSIDE} udp dport 9002 dnat to {HOST}:9000"
    ));
    assert_dropped(
        &guest,
        || guest.udp().send("bad", (OUTSIDE, 9002)),
        &names,
        (GATEWAY, 53).into(),
    );
    assert!(!service.has_any());
    assert!(answers_echo(&guest), "the bridge must answer echo requests");
    // The control: without our rules it arrives.
    lab.host.sh(&format!("nft delete table inet fcd_{INSTALL}"));
    ask("open");
    assert_eq!(service.next().0, "open");
}

/// True if the bridge's address answers an echo request (RFC 792).
fn answers_echo(guest: &Machine) -> bool {
    use rustix::net::{AddressFamily, SocketType, ipproto, recv, sendto};
    guest.ns.run(|| {
        let socket =
            rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).unwrap();
        let request = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
        sendto(
            &socket,
            &request,
            rustix::net::SendFlags::empty(),
            &SocketAddr::from((GATEWAY, 0)),
        )
        .unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let ready = crate::host::wait::wait_uncancelled(
            &[(
                std::os::fd::AsFd::as_fd(&socket),
                nix::poll::PollFlags::POLLIN,
            )],
            deadline,
        );
        let mut buffer = [0; 64];
        ready.unwrap() == crate::host::wait::WaitResult::Ready
            && recv(&socket, &mut buffer, rustix::net::RecvFlags::empty())
                .unwrap()
                .0
                == 28
            && buffer[20] == 0
    })
}

#[test]
fn link_local_addresses_are_unreachable() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    lab.outside
        .sh(&format!("ip address add {METADATA}/32 dev lo"));
    let outside = lab.outside.udp((ANY, 80));
    let ask = |what: &str| guest.udp().send(what, (METADATA, 80));
    assert_dropped(&guest, || ask("bad"), &outside, (OUTSIDE, 80).into());
    // Not even if the host itself has the address.
    lab.host.sh(&format!("ip address add {METADATA}/32 dev lo"));
    let host = lab.host.udp((ANY, 80));
    assert_dropped(&guest, || ask("bad"), &outside, (OUTSIDE, 80).into());
    assert!(!host.has_any());
    lab.host.sh(&format!("nft delete table inet fcd_{INSTALL}"));
    ask("open");
    assert_eq!(host.next().0, "open");
}

/// Sends a packet from `a` to `b` with `bad`. Returns true if it arrives at `b` before a later
/// packet from the host.
fn passes(lab: &Lab, a: &Machine, b: &Machine, bad: impl FnOnce()) -> bool {
    let (outside, at_b) = (lab.outside.udp((ANY, 9001)), b.ns.udp((ANY, 9000)));
    bad();
    // Once this arrives outside, the host has handled everything before it.
    a.udp().send("mark", (OUTSIDE, 9001));
    assert_eq!(outside.next().0, "mark");
    lab.host.udp((ANY, 0)).send("good", (b.address(), 9000));
    at_b.next().0 == "bad"
}

/// Tells each guest the other's MAC address. Otherwise a packet that waits for ARP would be
/// overtaken by a later one.
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
    // The control: without our rules it arrives.
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
    // Spoofing matters most if guests may reach each other.
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
    // A MAC address that is not its own, including that of the other guest.
    for mac in ["02:fc:0a:59:00:63", &b.guest.lease.mac.to_string()] {
        let forge = || {
            a.ns.sh(&format!("ip link set eth0 address {mac}; ip neighbour replace {GATEWAY} lladdr 06:fc:1a:2b:3c:4d dev eth0"));
            a.udp().send("bad", at);
            a.ns.sh(&format!("ip link set eth0 address {}", a.guest.lease.mac));
        };
        assert_dropped(&a, forge, &outside, at);
    }
    // An unsolicited ARP answer claims that the gateway is at a, sent from a's address and from
    // b's.
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
    // The control: a's claim for its own address is accepted.
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
        "the control: the same without a tag"
    );
}

/// Builds an IPv4 packet with UDP, without a UDP checksum.
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

#[test]
fn guest_without_network_is_reachable_but_reaches_nothing() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let (guest, other) = (lab.start(0, Access::None), lab.start(1, Access::Nat));
    let (outside, names) = (lab.outside.udp((ANY, 9000)), lab.host.udp((GATEWAY, 53)));
    let ask = || {
        guest.udp().send("bad", (OUTSIDE, 9000));
        guest.udp().send("bad", (GATEWAY, 53));
        guest.udp().send("bad", (HOST, 53));
    };
    // A frame has been handled when the write returns, and the other guest's frames come after it.
    let served = guest.ns.run(|| TcpListener::bind((ANY, 22)).unwrap());
    ask();
    let mut ssh = lab
        .host
        .run(|| TcpStream::connect((guest.address(), 22)).unwrap());
    served.accept().unwrap().0.write_all(b"SSH-2.0").unwrap();
    let mut banner = [0; 7];
    ssh.read_exact(&mut banner).unwrap();
    assert_eq!(&banner, b"SSH-2.0");
    assert_dropped(&other, || {}, &outside, (OUTSIDE, 9000).into());
    assert_dropped(&other, || {}, &names, (GATEWAY, 53).into());
}

fn port(host_addr: Ipv4Addr, host_port: u16, guest_port: u16, protocol: Protocol) -> Port {
    Port {
        host_addr,
        host_port,
        guest_port,
        protocol,
    }
}

/// Connects to `at` from a namespace, and returns the client address that the guest's server sees.
fn seen_by(server: &TcpListener, from: &Ns, at: (Ipv4Addr, u16)) -> IpAddr {
    let mut stream = from
        .run(|| TcpStream::connect(at))
        .unwrap_or_else(|e| panic!("connect to {at:?}: {e}"));
    let (mut accepted, peer) = server.accept().unwrap();
    accepted.write_all(b"hello").unwrap();
    let mut said = [0; 5];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hello");
    peer.ip()
}

#[test]
fn published_ports_forward_to_guest() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let (guest, other) = (lab.start(0, Access::Nat), lab.start(1, Access::Nat));
    let server = guest.ns.run(|| TcpListener::bind((ANY, 80)).unwrap());
    let datagrams = guest.ns.udp((ANY, 53));
    let ports = [
        port(Ipv4Addr::LOCALHOST, 8080, 80, Protocol::Tcp),
        port(ANY, 8081, 80, Protocol::Tcp),
        port(HOST, 8082, 53, Protocol::Udp),
        port(Ipv4Addr::LOCALHOST, 8083, 53, Protocol::Udp),
    ];
    let forward = || {
        lab.host.run(|| {
            lab.net
                .forward(&guest.guest, &ports, &Cancel::try_new().unwrap())
        })
    };
    forward().unwrap();
    forward().unwrap();
    let check = || {
        assert_eq!(
            seen_by(&server, &lab.host, (Ipv4Addr::LOCALHOST, 8080)),
            IpAddr::from(GATEWAY)
        );
        assert_eq!(
            seen_by(&server, &lab.host, (Ipv4Addr::LOCALHOST, 8081)),
            IpAddr::from(GATEWAY)
        );
        assert_eq!(
            seen_by(&server, &lab.host, (HOST, 8081)),
            IpAddr::from(HOST)
        );
        assert_eq!(
            seen_by(&server, &lab.outside, (HOST, 8081)),
            IpAddr::from(OUTSIDE)
        );
        lab.outside.udp((ANY, 0)).send("asked", (HOST, 8082));
        let (what, from) = datagrams.next();
        assert_eq!((what.as_str(), from.ip()), ("asked", IpAddr::from(OUTSIDE)));
    };
    check();
    // A loopback port is for this host only. A neighbour that sends to that address must not reach
    // it.
    lab.outside.sh(&format!(
        "sysctl -qw net.ipv4.conf.down0.route_localnet=1; ip address del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via {HOST} src {OUTSIDE}"
    ));
    let neighbour = lab.outside.udp((OUTSIDE, 0));
    neighbour.send("bad", (Ipv4Addr::LOCALHOST, 8083));
    neighbour.send("good", (HOST, 8082));
    assert_eq!(datagrams.next().0, "good");
    // The control: without that rule it arrives.
    lab.host
        .sh("nft flush chain inet fcd_1a2b3c4d published_in");
    lab.host.sh("nft add rule inet fcd_1a2b3c4d published_in dnat ip to ip daddr . meta l4proto . th dport map @published");
    lab.outside
        .udp((OUTSIDE, 0))
        .send("open", (Ipv4Addr::LOCALHOST, 8083));
    assert_eq!(datagrams.next().0, "open");
    lab.host.run(|| lab.net.mend()).unwrap();
    // No other guest can use the published ports.
    assert!(
        lab.outside
            .run(|| TcpStream::connect((HOST, 8080)))
            .is_err()
    );
    let names = lab.host.udp((GATEWAY, 53));
    let ask = || {
        [GATEWAY, HOST]
            .iter()
            .for_each(|at| other.udp().send("bad", (*at, 8082)))
    };
    assert_dropped(&other, ask, &names, (GATEWAY, 53).into());
    assert!(!datagrams.has_any());
    // Mending restores the ports, also with a new bridge.
    for harm in [
        "nft flush ruleset",
        "nft flush map inet fcd_1a2b3c4d published_any",
        "ip link delete fcbr0",
    ] {
        lab.host.sh(harm);
        lab.host.run(|| lab.net.mend()).unwrap();
        assert_eq!(
            lab.host.run(|| lab.net.mend()).unwrap(),
            [""; 0],
            "the second time after {harm}"
        );
        check();
    }
    // No other program on the host can bind a published port.
    assert!(
        lab.host
            .run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 8080)))
            .is_err()
    );
    assert_eq!(lab.host.run(|| lab.net.forwarded()).unwrap(), [tag(0)]);
    lab.host.run(|| lab.net.unforward(&tag(0))).unwrap();
    lab.host.run(|| lab.net.unforward(&tag(0))).unwrap();
    assert_eq!(lab.host.run(|| lab.net.forwarded()).unwrap(), [""; 0]);
    for at in [(Ipv4Addr::LOCALHOST, 8080), (HOST, 8081)] {
        assert!(lab.host.run(|| TcpStream::connect(at)).is_err(), "{at:?}");
    }
    lab.host
        .run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 8080)))
        .unwrap();
}

#[test]
fn published_loopback_port_does_not_expose_host_loopback() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    let ports = [port(Ipv4Addr::LOCALHOST, 8080, 80, Protocol::Tcp)];
    lab.host
        .run(|| {
            lab.net
                .forward(&guest.guest, &ports, &Cancel::try_new().unwrap())
        })
        .unwrap();
    let (service, names) = (
        lab.host.udp((Ipv4Addr::LOCALHOST, 9000)),
        lab.host.udp((GATEWAY, 53)),
    );
    let bridge = [0x06, 0xfc, 0x1a, 0x2b, 0x3c, 0x4d];
    let send = || {
        let packet = udp_packet(guest.address(), Ipv4Addr::LOCALHOST, 9000, b"bad");
        guest.inject(&[&bridge[..], &guest.guest.lease.mac.0, &[8, 0], &packet].concat());
    };
    assert_dropped(&guest, send, &names, (GATEWAY, 53).into());
    assert!(!service.has_any());
    // The control: without our rules it arrives.
    lab.host.sh(&format!("nft delete table inet fcd_{INSTALL}"));
    send();
    assert_eq!(service.next().0, "bad");
}

#[test]
fn connection_ends_when_network_access_is_removed() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let outside = lab.outside.udp((ANY, 9000));
    let names = lab.host.udp((GATEWAY, 53));
    let guest = lab.start(0, Access::Nat);
    let socket = guest.ns.udp((guest.address(), 5000));
    for (at, there) in [(OUTSIDE, &outside), (GATEWAY, &names)] {
        let port = there.0.local_addr().unwrap().port();
        socket.send("hello", (at, port));
        let (_, from) = there.next();
        there.send("answer", from);
        assert_eq!(socket.next().0, "answer");
    }
    drop((socket, guest));
    lab.release(0);
    let again = lab.start(0, Access::None);
    let socket = again.ns.udp((again.address(), 5000));
    socket.send("bad", (OUTSIDE, 9000));
    socket.send("bad", (GATEWAY, 53));
    // The host answers this after it has handled both.
    let at_host = lab.host.udp((ANY, 9001));
    let at_guest = again.ns.udp((ANY, 9002));
    at_host.send("mark", (again.address(), 9002));
    let (_, from) = at_guest.next();
    at_guest.send("back", from);
    assert_eq!(at_host.next().0, "back");
    let other = lab.start(1, Access::Nat);
    assert_dropped(&other, || {}, &outside, (OUTSIDE, 9000).into());
    assert!(!names.has_any());
}

/// Conntrack entries may be older than a published port, and older than the guest that has the
/// address now.
#[test]
fn old_flows_are_dropped_for_new_port_and_new_guest() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let client = lab.outside.udp((OUTSIDE, 7000));
    let service = lab.host.udp((HOST, 8082));
    client.send("to the host", (HOST, 8082));
    assert_eq!(service.next().0, "to the host");
    drop(service);
    let guest = lab.start(0, Access::Nat);
    let datagrams = guest.ns.udp((ANY, 53));
    let ports = [port(HOST, 8082, 53, Protocol::Udp)];
    lab.host
        .run(|| {
            lab.net
                .forward(&guest.guest, &ports, &Cancel::try_new().unwrap())
        })
        .unwrap();
    client.send("to the guest", (HOST, 8082));
    assert_eq!(datagrams.next().0, "to the guest");
    drop((datagrams, guest));
    lab.host.run(|| lab.net.unforward(&tag(0))).unwrap();
    lab.release(0);
    let next = lab.start(0, Access::Nat);
    let datagrams = next.ns.udp((ANY, 53));
    client.send("bad", (HOST, 8082));
    // The host sends this after that.
    lab.host
        .udp((GATEWAY, 0))
        .send("mark", (next.address(), 53));
    assert_eq!(datagrams.next().0, "mark");
}

#[test]
fn names_are_answered_to_guests_and_the_host() {
    if !is_root() {
        return;
    }
    struct Web(Ipv4Addr);
    impl Names for Web {
        fn address(&self, name: &str, _: IpAddr) -> Option<Ipv4Addr> {
            (name == "web").then_some(self.0)
        }
        fn name(&self, _: Ipv4Addr, _: IpAddr) -> Option<String> {
            None
        }
    }
    const OWNER: Owner = Owner {
        uid: 1_900_065_535,
        gid: 1_900_065_535,
    };
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    let server = lab
        .host
        .run(|| lab.net.serve_names(Arc::new(Web(guest.address())), OWNER))
        .unwrap();
    let question = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03web\x02vm\0\0\x01\0\x01";
    for socket in [guest.udp(), lab.host.udp((ANY, 0))] {
        socket.0.send_to(question, (GATEWAY, 53)).unwrap();
        let mut buffer = [0; 512];
        let len = socket.0.recv(&mut buffer).unwrap();
        assert_eq!(
            &buffer[len - 4..len],
            guest.address().octets(),
            "{:?}",
            &buffer[..len]
        );
    }
    // The server also answers over TCP.
    let stream = guest.ns.run(|| TcpStream::connect((GATEWAY, 53)));
    assert!(stream.is_ok(), "over TCP");
    server.stop().unwrap();
    assert_eq!(lab.host.run(|| lab.net.list()).unwrap(), [tag(0)]);
}

/// Sends up to `most` datagrams one by one, and returns how many arrive before one is lost.
fn arrivals(from: &Udp, to: &Udp, at: SocketAddr, most: usize) -> usize {
    to.0.set_read_timeout(Some(std::time::Duration::from_secs(1)))
        .unwrap();
    let (sent, mut buffer) = ([7; 1400], [0; 2048]);
    (0..most)
        .find(|_| from.0.send_to(&sent, at).is_err() || to.0.recv(&mut buffer).is_err())
        .unwrap_or(most)
}

#[test]
fn guest_traffic_is_limited_by_its_rates() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    let (outside, inside) = (lab.outside.udp((ANY, 9000)), guest.udp());
    let back: SocketAddr = {
        inside.send("hello", (OUTSIDE, 9000));
        outside.next().1
    };
    let set = |rx, tx| lab.host.run(|| lab.net.set_rates(&tag(0), rx, tx)).unwrap();
    let counts = |most| {
        [
            arrivals(&inside, &outside, (OUTSIDE, 9000).into(), most),
            arrivals(&outside, &inside, back, most),
        ]
    };
    // Three times the burst. At this rate every further datagram would take seconds.
    const FLOOD: usize = 600;
    let burst = 256 * 1024 / 1442;
    assert_eq!(counts(FLOOD), [FLOOD; 2]);
    for (rx, tx) in [(None, Some(1)), (Some(1), None), (Some(1), Some(1))] {
        set(rx.map(|_: u64| 1000), tx.map(|_: u64| 1000));
        let limited = counts(FLOOD);
        for (count, is_limited) in limited.into_iter().zip([tx.is_some(), rx.is_some()]) {
            assert!(
                if is_limited {
                    (burst / 2..FLOOD).contains(&count)
                } else {
                    count == FLOOD
                },
                "{limited:?}"
            );
        }
        // Mending restores the limits after a flush.
        lab.host.sh("nft flush ruleset");
        lab.host.run(|| lab.net.mend()).unwrap();
        let elements = lab.host.sh(&format!("nft list table bridge fcd_{INSTALL}"));
        assert_eq!(
            elements.matches("over 1000 bytes/second burst").count(),
            usize::from(rx.is_some()) + usize::from(tx.is_some()),
            "{elements}"
        );
    }
    set(None, None);
    assert_eq!(counts(FLOOD), [FLOOD; 2]);
    // Nothing is left after the guest is released.
    set(Some(1 << 20), Some(1 << 20));
    drop(guest);
    lab.release(0);
    let left = lab.host.sh(&format!("nft list table bridge fcd_{INSTALL}"));
    assert!(!left.contains("burst"), "{left}");
    assert!(
        lab.host
            .run(|| lab.net.set_rates(&tag(0), None, None))
            .is_err(),
        "the guest is gone"
    );
}
