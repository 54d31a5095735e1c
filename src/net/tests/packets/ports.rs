//! Tests of published ports, and of open connections when a rule changes.

use super::super::lab::{GATEWAY, HOST, INSTALL, Lab, Ns, OUTSIDE, config, is_root, tag};
use super::{ANY, assert_dropped, udp_packet};
use crate::api::port::{Port, Protocol};
use crate::locks::Cancel;
use crate::net::Access;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};

fn port(host_addr: Ipv4Addr, host_port: u16, guest_port: u16, protocol: Protocol) -> Port {
    Port {
        host_addr,
        host_port,
        guest_port,
        protocol,
    }
}

/// Connects to `at` from a namespace. Returns the client address that the guest's server sees.
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
    // Only this host may use a loopback port. A neighbor that sends packets to 127.0.0.1 must not
    // reach it.
    lab.outside.sh(&format!(
        "sysctl -qw net.ipv4.conf.down0.route_localnet=1; ip address del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via {HOST} src {OUTSIDE}"
    ));
    let neighbour = lab.outside.udp((OUTSIDE, 0));
    neighbour.send("bad", (Ipv4Addr::LOCALHOST, 8083));
    neighbour.send("good", (HOST, 8082));
    assert_eq!(datagrams.next().0, "good");
    // Without the rule the packet arrives, so the rule dropped it.
    lab.host
        .sh("nft flush chain inet fcd_1a2b3c4d published_in");
    lab.host.sh("nft add rule inet fcd_1a2b3c4d published_in dnat ip to ip daddr . meta l4proto . th dport map @published");
    lab.outside
        .udp((OUTSIDE, 0))
        .send("open", (Ipv4Addr::LOCALHOST, 8083));
    assert_eq!(datagrams.next().0, "open");
    lab.host.run(|| lab.net.mend()).unwrap();
    // The outside cannot use a port published on the loopback, and another guest cannot use any
    // published port.
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
    // Mending restores the ports, also after the bridge was deleted.
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
    // Without fcd's rules the packet arrives, so the rules dropped it.
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
    // When the host has answered, it has handled both packets.
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

/// Conntrack entries may be older than a published port, and older than the guest that now has the
/// address.
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
    // The host sends this after the outdated packets.
    lab.host
        .udp((GATEWAY, 0))
        .send("mark", (next.address(), 53));
    assert_eq!(datagrams.next().0, "mark");
}
