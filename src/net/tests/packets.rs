//! What passes and what does not. "Does not" is never a wait: behind what must be dropped goes, the same way, what must arrive,
//! and that is the first to do so. Where a rule is what drops it, taking the rules away lets it through.

use super::lab::{GATEWAY, HOST, INSTALL, Lab, METADATA, Machine, Ns, OUTSIDE, Udp, config, is_root, tag};
use crate::api::port::{Port, Protocol};
use crate::host::confine::Owner;
use crate::locks::Cancel;
use crate::net::Access;
use crate::net::dns::Names;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

const ANY: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

/// Sends "bad" by `bad`, then "good" from the guest to `good_at`, which must be the first to arrive there.
#[track_caller]
fn assert_dropped(guest: &Machine, bad: impl FnOnce(), good: &Udp, good_at: SocketAddr) {
    bad();
    guest.udp().send("good", good_at);
    assert_eq!(good.next().0, "good");
    assert!(!good.has_any());
}

#[test]
fn guests_reach_the_outside_by_the_hosts_address() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    let listener = lab.outside.run(|| TcpListener::bind((OUTSIDE, 80)).unwrap());
    let mut stream = guest.ns.run(|| TcpStream::connect((OUTSIDE, 80)).unwrap());
    let (mut peer, from) = listener.accept().unwrap();
    assert_eq!(from.ip(), HOST, "masqueraded");
    // More than a window, both ways.
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
fn nothing_from_outside_reaches_a_guest_unasked() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    lab.outside.sh(&format!("ip route add 10.89.0.0/24 via {HOST}"));
    let at_guest = guest.ns.udp((ANY, 9000));
    let (outside, host) = (lab.outside.udp((ANY, 0)), lab.host.udp((ANY, 9001)));
    outside.send("bad", (guest.address(), 9000));
    // The host has had it when it has what came behind it.
    outside.send("mark", (HOST, 9001));
    assert_eq!(host.next().0, "mark");
    host.send("good", (guest.address(), 9000));
    assert_eq!(at_guest.next().0, "good");
    // Nor is the name server there for the outside.
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
        for at in [GATEWAY, HOST, Ipv4Addr::new(10, 89, 0, 255), Ipv4Addr::BROADCAST, Ipv4Addr::new(224, 0, 0, 1)] {
            let socket = guest.udp();
            socket.0.set_broadcast(true).unwrap();
            socket.send(what, (at, 9000));
        }
    };
    assert_dropped(&guest, || ask("bad"), &names, (GATEWAY, 53).into());
    assert!(!service.has_any());
    // What another table turns to a service of the host's is none the less one.
    lab.host.sh("nft add table ip other; nft 'add chain ip other pre { type nat hook prerouting priority -100; }'");
    lab.host.sh(&format!("nft add rule ip other pre ip daddr {OUTSIDE} udp dport 9002 dnat to {HOST}:9000"));
    assert_dropped(&guest, || guest.udp().send("bad", (OUTSIDE, 9002)), &names, (GATEWAY, 53).into());
    assert!(!service.has_any());
    assert!(answers_echo(&guest), "the bridge");
    // The control: without our rules it does come.
    lab.host.sh(&format!("nft delete table inet fcd_{INSTALL}"));
    ask("open");
    assert_eq!(service.next().0, "open");
}

/// Whether the bridge's address answers to an echo request (RFC 792).
fn answers_echo(guest: &Machine) -> bool {
    use rustix::net::{AddressFamily, SocketType, ipproto, recv, sendto};
    guest.ns.run(|| {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).unwrap();
        let request = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
        sendto(&socket, &request, rustix::net::SendFlags::empty(), &SocketAddr::from((GATEWAY, 0))).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let ready =
            crate::host::wait::wait_uncancelled(&[(std::os::fd::AsFd::as_fd(&socket), nix::poll::PollFlags::POLLIN)], deadline);
        let mut buffer = [0; 64];
        ready.unwrap() == crate::host::wait::WaitResult::Ready
            && recv(&socket, &mut buffer, rustix::net::RecvFlags::empty()).unwrap().0 == 28
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
    lab.outside.sh(&format!("ip address add {METADATA}/32 dev lo"));
    let outside = lab.outside.udp((ANY, 80));
    let ask = |what: &str| guest.udp().send(what, (METADATA, 80));
    assert_dropped(&guest, || ask("bad"), &outside, (OUTSIDE, 80).into());
    // Nor if the host itself has the address.
    lab.host.sh(&format!("ip address add {METADATA}/32 dev lo"));
    let host = lab.host.udp((ANY, 80));
    assert_dropped(&guest, || ask("bad"), &outside, (OUTSIDE, 80).into());
    assert!(!host.has_any());
    lab.host.sh(&format!("nft delete table inet fcd_{INSTALL}"));
    ask("open");
    assert_eq!(host.next().0, "open");
}

/// Sends by `bad` from `a`; what then comes first at `b` from the host says whether it passed.
fn passes(lab: &Lab, a: &Machine, b: &Machine, bad: impl FnOnce()) -> bool {
    let (outside, at_b) = (lab.outside.udp((ANY, 9001)), b.ns.udp((ANY, 9000)));
    bad();
    // Once this is outside, the host has done with what came before it.
    a.udp().send("mark", (OUTSIDE, 9001));
    assert_eq!(outside.next().0, "mark");
    lab.host.udp((ANY, 0)).send("good", (b.address(), 9000));
    at_b.next().0 == "bad"
}

/// Both know each other's Ethernet address: what waits for an answer to ARP would be overtaken by what was sent after it.
fn introduce(a: &Machine, b: &Machine) {
    for (here, there) in [(a, b), (b, a)] {
        here.ns.sh(&format!("ip neighbour replace {} lladdr {} dev eth0 nud permanent", there.address(), there.guest.lease.mac));
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
    assert!(!passes(&lab, &a, &b, send), "over the bridge");
    a.ns.sh(&format!("ip route add {}/32 via {GATEWAY}", b.address()));
    assert!(!passes(&lab, &a, &b, send), "by the host");
    lab.host.sh(&format!("nft delete table inet fcd_{INSTALL}; ip link set up0 down; ip link set up0 up; ip route add default via {OUTSIDE} || true"));
    // The control: it was our rules that dropped it.
    let at_b = b.ns.udp((ANY, 9000));
    send();
    assert_eq!(at_b.next().0, "bad");
}

#[test]
fn guests_reach_each_other_if_they_are_allowed_to() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&crate::config::Network { allow_between_vms: true, ..config() });
    let (a, b, none) = (lab.start(0, Access::Nat), lab.start(1, Access::Nat), lab.start(2, Access::None));
    introduce(&a, &b);
    assert!(passes(&lab, &a, &b, || a.udp().send("bad", (b.address(), 9000))));
    a.ns.sh(&format!("ip route add {}/32 via {GATEWAY}", none.address()));
    assert!(!passes(&lab, &a, &none, || a.udp().send("bad", (none.address(), 9000))), "not one that has no network, by the host");
}

#[test]
fn a_guest_is_who_it_is() {
    if !is_root() {
        return;
    }
    // Where guests reach each other, one could take the other's place.
    let lab = Lab::new(&crate::config::Network { allow_between_vms: true, ..config() });
    let (a, b) = (lab.start(0, Access::Nat), lab.start(1, Access::Nat));
    let outside = lab.outside.udp((ANY, 9000));
    let at = SocketAddr::from((OUTSIDE, 9000));
    a.ns.sh(&format!("ip address add 10.89.0.99/32 dev eth0; ip address add {}/32 dev eth0", b.address()));
    a.ns.sh("ip address add 203.0.113.9/32 dev eth0");
    for source in [[10, 89, 0, 99].into(), b.address(), [203, 0, 113, 9].into()] {
        assert_dropped(&a, || a.ns.udp((source, 0)).send("bad", at), &outside, at);
    }
    a.ns.sh(&format!("ip address del 10.89.0.99/32 dev eth0; ip address del {}/32 dev eth0", b.address()));
    // Another Ethernet address, the other guest's too.
    for mac in ["02:fc:0a:59:00:63", &b.guest.lease.mac.to_string()] {
        let forge = || {
            a.ns.sh(&format!("ip link set eth0 address {mac}; ip neighbour replace {GATEWAY} lladdr 06:fc:1a:2b:3c:4d dev eth0"));
            a.udp().send("bad", at);
            a.ns.sh(&format!("ip link set eth0 address {}", a.guest.lease.mac));
        };
        assert_dropped(&a, forge, &outside, at);
    }
    // "The gateway is at a", in an answer nobody asked for, from a's own address and from b's.
    let gateway_of_b = || b.ns.sh(&format!("ip neighbour show {GATEWAY} dev eth0"));
    b.udp().send("hello", at);
    assert_eq!(outside.next().0, "hello");
    let before = gateway_of_b();
    assert!(before.contains("06:fc:1a:2b:3c:4d"), "{before}");
    let claim = |sender: [u8; 4]| {
        let (own, peer) = (a.guest.lease.mac.0, b.guest.lease.mac.0);
        let arp = [0, 1, 8, 0, 6, 4, 0, 2];
        [&peer[..], &own, &[8, 6], &arp, &own, &sender, &peer, &b.address().octets()].concat()
    };
    assert!(!passes(&lab, &a, &b, || a.inject(&claim(GATEWAY.octets()))));
    assert_eq!(gateway_of_b().split(' ').nth(2), before.split(' ').nth(2));
    // The control: a's own claim for its own address is believed.
    assert!(!passes(&lab, &a, &b, || a.inject(&claim(a.address().octets()))));
    let own = b.ns.sh(&format!("ip neighbour show {} dev eth0", a.address()));
    assert!(own.is_empty() || own.contains(&a.guest.lease.mac.to_string()), "{own}");
}

#[test]
fn ipv6_and_vlans_do_not_pass() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&crate::config::Network { allow_between_vms: true, ..config() });
    let (a, b) = (lab.start(0, Access::Nat), lab.start(1, Access::Nat));
    for (machine, own, other, mac) in
        [(&a, "fd00::1", "fd00::2", b.guest.lease.mac), (&b, "fd00::2", "fd00::1", a.guest.lease.mac)]
    {
        machine.ns.sh(&format!("ip -6 address add {own}/64 dev eth0 nodad; ip -6 neighbour add {other} lladdr {mac} dev eth0"));
    }
    let v6: SocketAddr = "[fd00::2]:9000".parse().unwrap();
    let at_b = b.ns.udp(v6);
    assert!(!passes(&lab, &a, &b, || a.ns.udp("[fd00::1]:0".parse::<SocketAddr>().unwrap()).send("bad", v6)));
    assert!(!at_b.has_any());
    // Priority-tagged IPv4 would be taken for untagged.
    let mut frame = [&b.guest.lease.mac.0[..], &a.guest.lease.mac.0, &[0x81, 0, 0, 0, 8, 0]].concat();
    frame.extend(udp_packet(a.address(), b.address(), 9000, b"bad"));
    assert!(!passes(&lab, &a, &b, || a.inject(&frame)));
    frame.drain(12..16);
    assert!(passes(&lab, &a, &b, || a.inject(&frame)), "the control: the same without a tag");
}

/// IPv4 and UDP without its checksum.
fn udp_packet(from: Ipv4Addr, to: Ipv4Addr, port: u16, data: &[u8]) -> Vec<u8> {
    let total = u16::try_from(28 + data.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend([from.octets(), to.octets()].concat());
    let sum: u32 = packet.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(c[1])).sum();
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
fn a_guest_without_a_network_is_reached_and_reaches_nothing() {
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
    // A frame is through with the host when its write has returned; the other guest's comes after.
    let served = guest.ns.run(|| TcpListener::bind((ANY, 22)).unwrap());
    ask();
    let mut ssh = lab.host.run(|| TcpStream::connect((guest.address(), 22)).unwrap());
    served.accept().unwrap().0.write_all(b"SSH-2.0").unwrap();
    let mut banner = [0; 7];
    ssh.read_exact(&mut banner).unwrap();
    assert_eq!(&banner, b"SSH-2.0");
    assert_dropped(&other, || {}, &outside, (OUTSIDE, 9000).into());
    assert_dropped(&other, || {}, &names, (GATEWAY, 53).into());
}

fn port(host_addr: Ipv4Addr, host_port: u16, guest_port: u16, protocol: Protocol) -> Port {
    Port { host_addr, host_port, guest_port, protocol }
}

/// Whom the guest's server sees when somebody connects to this address from there.
fn seen_by(server: &TcpListener, from: &Ns, at: (Ipv4Addr, u16)) -> IpAddr {
    let mut stream = from.run(|| TcpStream::connect(at)).unwrap_or_else(|e| panic!("connect to {at:?}: {e}"));
    let (mut accepted, peer) = server.accept().unwrap();
    accepted.write_all(b"hello").unwrap();
    let mut said = [0; 5];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hello");
    peer.ip()
}

#[test]
fn ports_of_the_host_lead_to_a_guest() {
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
    let forward = || lab.host.run(|| lab.net.forward(&guest.guest, &ports, &Cancel::try_new().unwrap()));
    forward().unwrap();
    forward().unwrap();
    let check = || {
        assert_eq!(seen_by(&server, &lab.host, (Ipv4Addr::LOCALHOST, 8080)), IpAddr::from(GATEWAY));
        assert_eq!(seen_by(&server, &lab.host, (Ipv4Addr::LOCALHOST, 8081)), IpAddr::from(GATEWAY));
        assert_eq!(seen_by(&server, &lab.host, (HOST, 8081)), IpAddr::from(HOST));
        assert_eq!(seen_by(&server, &lab.outside, (HOST, 8081)), IpAddr::from(OUTSIDE));
        lab.outside.udp((ANY, 0)).send("asked", (HOST, 8082));
        let (what, from) = datagrams.next();
        assert_eq!((what.as_str(), from.ip()), ("asked", IpAddr::from(OUTSIDE)));
    };
    check();
    // The loopback's is for this host alone, also for a neighbour that sends to that address.
    lab.outside.sh(&format!(
        "sysctl -qw net.ipv4.conf.down0.route_localnet=1; ip address del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via {HOST} src {OUTSIDE}"
    ));
    let neighbour = lab.outside.udp((OUTSIDE, 0));
    neighbour.send("bad", (Ipv4Addr::LOCALHOST, 8083));
    neighbour.send("good", (HOST, 8082));
    assert_eq!(datagrams.next().0, "good");
    // The control: without that rule it does come.
    lab.host.sh("nft flush chain inet fcd_1a2b3c4d published_in");
    lab.host.sh("nft add rule inet fcd_1a2b3c4d published_in dnat ip to ip daddr . meta l4proto . th dport map @published");
    lab.outside.udp((OUTSIDE, 0)).send("open", (Ipv4Addr::LOCALHOST, 8083));
    assert_eq!(datagrams.next().0, "open");
    lab.host.run(|| lab.net.mend()).unwrap();
    // No guest gets to another by any of them.
    assert!(lab.outside.run(|| TcpStream::connect((HOST, 8080))).is_err());
    let names = lab.host.udp((GATEWAY, 53));
    let ask = || [GATEWAY, HOST].iter().for_each(|at| other.udp().send("bad", (*at, 8082)));
    assert_dropped(&other, ask, &names, (GATEWAY, 53).into());
    assert!(!datagrams.has_any());
    // What others break is mended; a bridge made anew passes the loopback on again.
    for harm in ["nft flush ruleset", "nft flush map inet fcd_1a2b3c4d published_any", "ip link delete fcbr0"] {
        lab.host.sh(harm);
        lab.host.run(|| lab.net.mend()).unwrap();
        assert_eq!(lab.host.run(|| lab.net.mend()).unwrap(), [""; 0], "the second time after {harm}");
        check();
    }
    // Nothing else of the host's gets a port that leads into a guest.
    assert!(lab.host.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 8080))).is_err());
    assert_eq!(lab.host.run(|| lab.net.forwarded()).unwrap(), [tag(0)]);
    lab.host.run(|| lab.net.unforward(&tag(0))).unwrap();
    lab.host.run(|| lab.net.unforward(&tag(0))).unwrap();
    assert_eq!(lab.host.run(|| lab.net.forwarded()).unwrap(), [""; 0]);
    for at in [(Ipv4Addr::LOCALHOST, 8080), (HOST, 8081)] {
        assert!(lab.host.run(|| TcpStream::connect(at)).is_err(), "{at:?}");
    }
    lab.host.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 8080))).unwrap();
}

#[test]
fn a_guest_does_not_reach_the_hosts_loopback_because_a_port_of_it_is_forwarded() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    let ports = [port(Ipv4Addr::LOCALHOST, 8080, 80, Protocol::Tcp)];
    lab.host.run(|| lab.net.forward(&guest.guest, &ports, &Cancel::try_new().unwrap())).unwrap();
    let (service, names) = (lab.host.udp((Ipv4Addr::LOCALHOST, 9000)), lab.host.udp((GATEWAY, 53)));
    let bridge = [0x06, 0xfc, 0x1a, 0x2b, 0x3c, 0x4d];
    let send = || {
        let packet = udp_packet(guest.address(), Ipv4Addr::LOCALHOST, 9000, b"bad");
        guest.inject(&[&bridge[..], &guest.guest.lease.mac.0, &[8, 0], &packet].concat());
    };
    assert_dropped(&guest, send, &names, (GATEWAY, 53).into());
    assert!(!service.has_any());
    // The control: without our rules it does come.
    lab.host.sh(&format!("nft delete table inet fcd_{INSTALL}"));
    send();
    assert_eq!(service.next().0, "bad");
}

#[test]
fn a_connection_does_not_outlive_the_right_to_it() {
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
    // The host answers it after both.
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

/// What the kernel remembers of a flow is older than the port that it goes to, and than the guest that has its address now.
#[test]
fn flows_begin_anew_with_a_port_and_with_a_guest() {
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
    lab.host.run(|| lab.net.forward(&guest.guest, &ports, &Cancel::try_new().unwrap())).unwrap();
    client.send("to the guest", (HOST, 8082));
    assert_eq!(datagrams.next().0, "to the guest");
    drop((datagrams, guest));
    lab.host.run(|| lab.net.unforward(&tag(0))).unwrap();
    lab.release(0);
    let next = lab.start(0, Access::Nat);
    let datagrams = next.ns.udp((ANY, 53));
    client.send("bad", (HOST, 8082));
    // The host's own comes after that.
    lab.host.udp((GATEWAY, 0)).send("mark", (next.address(), 53));
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
    const OWNER: Owner = Owner { uid: 1_900_065_535, gid: 1_900_065_535 };
    let lab = Lab::new(&config());
    let guest = lab.start(0, Access::Nat);
    let server = lab.host.run(|| lab.net.serve_names(Arc::new(Web(guest.address())), OWNER)).unwrap();
    let question = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03web\x02vm\0\0\x01\0\x01";
    for socket in [guest.udp(), lab.host.udp((ANY, 0))] {
        socket.0.send_to(question, (GATEWAY, 53)).unwrap();
        let mut buffer = [0; 512];
        let len = socket.0.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[len - 4..len], guest.address().octets(), "{:?}", &buffer[..len]);
    }
    // The host as it is in libc.
    let stream = guest.ns.run(|| TcpStream::connect((GATEWAY, 53)));
    assert!(stream.is_ok(), "over TCP");
    server.stop().unwrap();
    assert_eq!(lab.host.run(|| lab.net.list()).unwrap(), [tag(0)]);
}

/// How many datagrams arrive one after the other before one does not, of this many at most.
fn arrivals(from: &Udp, to: &Udp, at: SocketAddr, most: usize) -> usize {
    to.0.set_read_timeout(Some(std::time::Duration::from_secs(1))).unwrap();
    let (sent, mut buffer) = ([7; 1400], [0; 2048]);
    (0..most).find(|_| from.0.send_to(&sent, at).is_err() || to.0.recv(&mut buffer).is_err()).unwrap_or(most)
}

#[test]
fn a_guest_sends_and_receives_what_its_rates_let_pass() {
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
    let counts = |most| [arrivals(&inside, &outside, (OUTSIDE, 9000).into(), most), arrivals(&outside, &inside, back, most)];
    // Three times what passes at once, and what follows that takes seconds each.
    const FLOOD: usize = 600;
    let passes_at_once = 256 * 1024 / 1442;
    assert_eq!(counts(FLOOD), [FLOOD; 2]);
    for (rx, tx) in [(None, Some(1)), (Some(1), None), (Some(1), Some(1))] {
        set(rx.map(|_: u64| 1000), tx.map(|_: u64| 1000));
        let limited = counts(FLOOD);
        for (count, is_limited) in limited.into_iter().zip([tx.is_some(), rx.is_some()]) {
            assert!(if is_limited { (passes_at_once / 2..FLOOD).contains(&count) } else { count == FLOOD }, "{limited:?}");
        }
        // What others flush comes back with it.
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
    // Nothing of it is left of a guest that is gone.
    set(Some(1 << 20), Some(1 << 20));
    drop(guest);
    lab.release(0);
    let left = lab.host.sh(&format!("nft list table bridge fcd_{INSTALL}"));
    assert!(!left.contains("burst"), "{left}");
    assert!(lab.host.run(|| lab.net.set_rates(&tag(0), None, None)).is_err(), "it is gone");
}
