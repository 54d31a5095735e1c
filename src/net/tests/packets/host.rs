//! Tests of the services on the host, and in the networks behind it, that a guest can reach.

use super::super::lab::{
    GATEWAY, HOST, INSTALL, Lab, METADATA, Machine, OUTSIDE, config, is_root, tag,
};
use super::{ANY, assert_dropped};
use crate::host::Credentials;
use crate::net::Access;
use crate::net::dns::Names;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

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
    // Sends more than a TCP window in both directions.
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
    // When "mark" has arrived, the host has handled every earlier packet.
    outside.send("mark", (HOST, 9001));
    assert_eq!(host.next().0, "mark");
    host.send("good", (guest.address(), 9000));
    assert_eq!(at_guest.next().0, "good");
    // Outside hosts cannot reach the name server either.
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
    // Without fcd's rules the packet arrives, so the rules dropped it.
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
        let deadline = crate::sched::Instant::now() + std::time::Duration::from_secs(20);
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
    // The address stays unreachable even if the host itself has it.
    lab.host.sh(&format!("ip address add {METADATA}/32 dev lo"));
    let host = lab.host.udp((ANY, 80));
    assert_dropped(&guest, || ask("bad"), &outside, (OUTSIDE, 80).into());
    assert!(!host.has_any());
    lab.host.sh(&format!("nft delete table inet fcd_{INSTALL}"));
    ask("open");
    assert_eq!(host.next().0, "open");
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
    // The bridge has handled the frame when the write returns. The other guest sends its frames
    // later.
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

#[test]
fn dns_answers_guests_and_host() {
    if !is_root() {
        return;
    }
    struct Web(Ipv4Addr);
    impl Names for Web {
        fn addresses(&self, name: &str, _: IpAddr) -> Option<crate::net::dns::Addresses> {
            (name == "web").then_some(self.0.into())
        }
        fn name(&self, _: Ipv4Addr, _: IpAddr) -> Option<String> {
            None
        }
    }
    const OWNER: Credentials = Credentials {
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
