//! Tests of IPv6: what guests reach, and what they cannot forge.

use super::super::lab::{
    HOST, HOST_IPV6, INSTALL, Lab, Machine, OUTSIDE, OUTSIDE_IPV6, Udp, config, is_root,
};
use super::ANY;
use crate::config::{Ipv6, Ipv6Network, Network as Config};
use crate::net::{Access, LeaseIpv6};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

const ANY_IPV6: Ipv6Addr = Ipv6Addr::UNSPECIFIED;
const NEIGHBOR_ADVERT: u8 = 136;
const ROUTER_ADVERT: u8 = 134;

fn with_ipv6() -> Config {
    Config {
        ipv6: Ipv6::Auto,
        ..config()
    }
}

fn network() -> Ipv6Network {
    Ipv6Network::of_installation(u32::from_str_radix(INSTALL, 16).unwrap())
}

fn ipv6(guest: &Machine) -> LeaseIpv6 {
    guest.guest.lease.ipv6.unwrap()
}

/// Opens a socket at the guest's IPv6 address.
fn udp(guest: &Machine) -> Udp {
    guest.ns.udp((ipv6(guest).address, 0))
}

/// Waits until everything that the guest has sent so far has been handled by the host. The guest
/// must know the bridge's MAC address.
fn flush(lab: &Lab, guest: &Machine) {
    let outside = lab.outside.udp((ANY, 9100));
    guest.udp().send("mark", (OUTSIDE, 9100));
    assert_eq!(outside.next().0, "mark");
}

/// Makes the guest find the bridge, so that its later packets do not wait for that.
fn find_bridge(lab: &Lab, guest: &Machine) {
    let outside = lab.outside.udp((OUTSIDE_IPV6, 9101));
    udp(guest).send("hello", (OUTSIDE_IPV6, 9101));
    assert_eq!(outside.next().0, "hello");
    flush(lab, guest);
}

/// True if a packet from the host is the next one that the guest receives on this socket.
fn next_is_from_host(lab: &Lab, at_guest: &Udp, to: SocketAddr) -> bool {
    let any = IpAddr::from(ANY_IPV6);
    lab.host.udp((any, 0)).send("good", to);
    at_guest.next().0 == "good"
}

/// Builds an Ethernet frame with an ICMPv6 message.
fn icmpv6(macs: [[u8; 6]; 2], from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> Vec<u8> {
    let [dst, src] = macs;
    let len = u16::try_from(message.len()).unwrap();
    let mut summed = [from.octets(), to.octets()].concat();
    summed.extend([0, 0]);
    summed.extend(len.to_be_bytes());
    summed.extend([0, 0, 0, 58]);
    summed.extend(message);
    let mut sum: u32 = summed
        .chunks(2)
        .map(|c| u32::from(c[0]) << 8 | u32::from(c.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let mut message = message.to_vec();
    message[2..4].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
    let mut frame = [&dst[..], &src, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend(len.to_be_bytes());
    frame.extend([58, 255]);
    frame.extend([from.octets(), to.octets()].concat());
    frame.extend(message);
    frame
}

/// An unsolicited neighbor advertisement of `a` to `b` that claims `target`.
fn claim(a: &Machine, b: &Machine, target: Ipv6Addr) -> Vec<u8> {
    let (own, peer) = (a.guest.lease.mac, b.guest.lease.mac);
    let mut message = vec![NEIGHBOR_ADVERT, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(target.octets());
    message.extend([2, 1]);
    message.extend(own.0);
    icmpv6([peer.0, own.0], ipv6(a).address, ipv6(b).address, &message)
}

/// Adds a VLAN tag with this ethertype and VLAN 0 to a frame. Linux treats such a frame like one
/// without a tag.
fn tagged(mut frame: Vec<u8>, ethertype: u16) -> Vec<u8> {
    let [high, low] = ethertype.to_be_bytes();
    frame.splice(12..12, [high, low, 0, 0]);
    frame
}

/// A router advertisement of `a` to `b`.
fn advertise(a: &Machine, b: &Machine) -> Vec<u8> {
    let (own, peer) = (a.guest.lease.mac, b.guest.lease.mac);
    let message = [ROUTER_ADVERT, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let to = ipv6(b).address;
    icmpv6([peer.0, own.0], own.link_local(), to, &message)
}

#[test]
fn guests_reach_the_outside_over_ipv6_through_the_hosts_address() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&with_ipv6());
    let guest = lab.start(0, Access::Nat);
    assert_eq!(ipv6(&guest).address, network().guest(0));
    let listener = lab
        .outside
        .run(|| TcpListener::bind((OUTSIDE_IPV6, 80)).unwrap());
    let mut stream = guest
        .ns
        .run(|| TcpStream::connect((OUTSIDE_IPV6, 80)).unwrap());
    let (mut peer, from) = listener.accept().unwrap();
    assert_eq!(from.ip(), HOST_IPV6, "masqueraded");
    stream.write_all(b"there").unwrap();
    peer.read_exact(&mut [0; 5]).unwrap();
    peer.write_all(b"back").unwrap();
    let mut back = [0; 4];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"back");
    // IPv4 works beside it.
    flush(&lab, &guest);
    let forwarding = lab.host.sh("cat /proc/sys/net/ipv6/conf/all/forwarding");
    assert_eq!(forwarding.trim(), "1");
}

#[test]
fn guests_do_not_reach_the_hosts_services_over_ipv6() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&with_ipv6());
    let guest = lab.start(0, Access::Nat);
    find_bridge(&lab, &guest);
    let service = lab.host.udp((ANY_IPV6, 9000));
    let gateway = ipv6(&guest).gateway;
    let ask = |what: &str| {
        for at in [gateway, HOST_IPV6, network().guest(0)] {
            udp(&guest).send(what, (at, 9000));
        }
    };
    ask("bad");
    flush(&lab, &guest);
    assert!(!service.has_any());
    assert!(answers_echo(&guest), "the bridge must answer echo requests");
    // Without fcd's rules the packets arrive, so the rules dropped them.
    lab.host.sh(&format!("nft delete table inet fcd_{INSTALL}"));
    ask("open");
    assert_eq!(service.next().0, "open");
}

/// True if the bridge's address answers an echo request (RFC 4443, 4.1 and 4.2). The kernel fills
/// in the checksum.
fn answers_echo(guest: &Machine) -> bool {
    use rustix::net::{AddressFamily, SocketType, ipproto, recv, sendto};
    let to = SocketAddr::from((ipv6(guest).gateway, 0));
    guest.ns.run(|| {
        let kind = SocketType::RAW;
        let socket =
            rustix::net::socket(AddressFamily::INET6, kind, Some(ipproto::ICMPV6)).unwrap();
        let request = [128, 0, 0, 0, 0, 1, 0, 1];
        sendto(&socket, &request, rustix::net::SendFlags::empty(), &to).unwrap();
        let deadline = crate::sched::Instant::now() + std::time::Duration::from_secs(20);
        let mut buffer = [0; 64];
        loop {
            let fd = std::os::fd::AsFd::as_fd(&socket);
            let waits = [(fd, nix::poll::PollFlags::POLLIN)];
            let ready = crate::host::wait::wait_uncancelled(&waits, deadline).unwrap();
            if ready != crate::host::wait::WaitResult::Ready {
                return false;
            }
            recv(&socket, &mut buffer, rustix::net::RecvFlags::empty()).unwrap();
            // Messages of neighbor discovery arrive at the socket, too.
            if buffer[0] == 129 {
                return true;
            }
        }
    })
}

#[test]
fn unsolicited_ipv6_packets_from_outside_do_not_reach_guests() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&with_ipv6());
    let guest = lab.start(0, Access::Nat);
    let to = SocketAddr::from((ipv6(&guest).address, 9000));
    let at_guest = guest.ns.udp((ANY_IPV6, 9000));
    lab.outside
        .sh(&format!("ip -6 route add {} via {HOST_IPV6}", network()));
    lab.outside.udp((ANY_IPV6, 0)).send("bad", to);
    // When "mark" has arrived, the host has handled the earlier packet.
    let host = lab.host.udp((HOST_IPV6, 9001));
    lab.outside
        .udp((ANY_IPV6, 0))
        .send("mark", (HOST_IPV6, 9001));
    assert_eq!(host.next().0, "mark");
    assert!(next_is_from_host(&lab, &at_guest, to));
}

#[test]
fn guests_reach_each_other_over_ipv6_only_if_allowed() {
    if !is_root() {
        return;
    }
    for allow_between_vms in [false, true] {
        let lab = Lab::new(&Config {
            allow_between_vms,
            ..with_ipv6()
        });
        let (a, b) = (lab.start(0, Access::Nat), lab.start(1, Access::Nat));
        find_bridge(&lab, &a);
        find_bridge(&lab, &b);
        let to = SocketAddr::from((ipv6(&b).address, 9000));
        let at_b = b.ns.udp((ANY_IPV6, 9000));
        udp(&a).send("through the host", to);
        flush(&lab, &a);
        if allow_between_vms {
            assert_eq!(at_b.next().0, "through the host");
        }
        assert!(next_is_from_host(&lab, &at_b, to));
        // The other guest is not on the link, but a guest can act as if it were.
        a.ns.sh(&format!(
            "ip -6 route add {0} dev eth0; ip -6 neighbour add {0} lladdr {1} dev eth0",
            ipv6(&b).address,
            b.guest.lease.mac
        ));
        udp(&a).send("over the bridge", to);
        flush(&lab, &a);
        if allow_between_vms {
            assert_eq!(at_b.next().0, "over the bridge");
        }
        assert!(next_is_from_host(&lab, &at_b, to));
    }
}

#[test]
fn guest_without_network_has_no_ipv6() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&with_ipv6());
    let mut guest = lab.guest(0, Access::None);
    guest.lease.ipv6 = None;
    let tap = lab.take(&guest);
    let other = lab.guest(0, Access::Nat).lease.ipv6;
    let mut machine = Machine::start(&lab.host, &tap.name, guest);
    // The guest takes the addresses of its slot all the same.
    machine.guest.lease.ipv6 = other;
    machine.take_ipv6();
    let service = lab.host.udp((ANY_IPV6, 9000));
    let outside = lab.outside.udp((ANY_IPV6, 9000));
    let bridge = "06:fc:1a:2b:3c:4d";
    machine.ns.sh(&format!(
        "ip -6 neighbour replace {} lladdr {bridge} dev eth0",
        ipv6(&machine).gateway
    ));
    for at in [ipv6(&machine).gateway, HOST_IPV6, OUTSIDE_IPV6] {
        udp(&machine).send("bad", (at, 9000));
    }
    // When the guest receives this, the host has handled its earlier packets.
    let at_guest = machine.ns.udp((ANY, 9000));
    let sender = lab.host.udp((HOST, 0));
    sender.send("good", (machine.address(), 9000));
    let (text, from) = at_guest.next();
    assert_eq!(text, "good");
    at_guest.send("answer", from);
    assert_eq!(sender.next().0, "answer");
    assert!(!service.has_any() && !outside.has_any());
}

#[test]
fn guest_cannot_spoof_ipv6_addresses() {
    if !is_root() {
        return;
    }
    // Spoofing matters most if guests may reach each other, so this lab allows it.
    let lab = Lab::new(&Config {
        allow_between_vms: true,
        ..with_ipv6()
    });
    let (a, b) = (lab.start(0, Access::Nat), lab.start(1, Access::Nat));
    find_bridge(&lab, &a);
    find_bridge(&lab, &b);
    let outside = lab.outside.udp((OUTSIDE_IPV6, 9000));
    let others = [
        network().guest(99),
        ipv6(&b).address,
        "2001:db8:7::9".parse().unwrap(),
        "fd00::9".parse().unwrap(),
    ];
    for source in others {
        a.ns.sh(&format!(
            "ip -6 address add {source}/128 dev eth0 nodad preferred_lft 0"
        ));
        a.ns.udp((source, 0)).send("bad", (OUTSIDE_IPV6, 9000));
        flush(&lab, &a);
        assert!(!outside.has_any(), "{source}");
    }
    a.ns.sh(&format!(
        "ip -6 address del {}/128 dev eth0",
        ipv6(&b).address
    ));
    // A MAC address that does not belong to the guest is dropped.
    a.ns.sh("ip link set eth0 address 02:fc:0a:59:00:63");
    a.take_ipv6();
    let gateway = ipv6(&a).gateway;
    a.ns.sh(&format!(
        "ip -6 neighbour replace {gateway} lladdr 06:fc:1a:2b:3c:4d dev eth0"
    ));
    udp(&a).send("bad", (OUTSIDE_IPV6, 9000));
    a.ns.sh(&format!("ip link set eth0 address {}", a.guest.lease.mac));
    flush(&lab, &a);
    assert!(!outside.has_any());
    // The guest's own address still works.
    a.take_ipv6();
    udp(&a).send("good", (OUTSIDE_IPV6, 9000));
    assert_eq!(outside.next().0, "good");
}

#[test]
fn guests_cannot_claim_addresses_or_advertise_routes() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&Config {
        allow_between_vms: true,
        ..with_ipv6()
    });
    let (a, b) = (lab.start(0, Access::Nat), lab.start(1, Access::Nat));
    find_bridge(&lab, &a);
    find_bridge(&lab, &b);
    let gateway = ipv6(&b).gateway;
    let own = a.guest.lease.mac.to_string();
    let gateway_of_b = || b.ns.sh(&format!("ip -6 neighbour show {gateway} dev eth0"));
    // Counts the router advertisements that arrive at the bridge and those that it forwards.
    lab.host.sh(
        "nft -f - <<'EOF'
         table bridge probe {
             counter arrived { }
             counter passed { }
             chain first { type filter hook prerouting priority -500; icmpv6 type nd-router-advert counter name arrived; }
             chain last { type filter hook forward priority 500; icmpv6 type nd-router-advert counter name passed; }
         }
EOF",
    );
    let advertised = |counter: &str| {
        let list = lab
            .host
            .sh(&format!("nft list counter bridge probe {counter}"));
        let after = list.split("packets ").nth(1).unwrap_or_default();
        after.split(' ').next().unwrap_or_default().to_owned()
    };
    let forge = || {
        a.inject(&advertise(&a, &b));
        for frame in [
            claim(&a, &b, gateway),
            tagged(claim(&a, &b, gateway), 0x8100),
            tagged(claim(&a, &b, gateway), 0x88a8),
        ] {
            a.inject(&frame);
        }
        flush(&lab, &a);
        let at_b = b.ns.udp((ANY, 9000));
        lab.host.udp((ANY, 0)).send("good", (b.address(), 9000));
        assert_eq!(at_b.next().0, "good");
    };
    forge();
    assert!(!gateway_of_b().contains(&own), "{}", gateway_of_b());
    assert_eq!([advertised("arrived"), advertised("passed")], ["1", "0"]);
    // The host keeps the address of the other guest, too.
    a.inject(&claim(&a, &b, ipv6(&b).address));
    flush(&lab, &a);
    let known = lab.host.sh(&format!(
        "ip -6 neighbour show {} dev fcbr0",
        ipv6(&b).address
    ));
    assert!(
        known.contains("PERMANENT") && known.contains(&b.guest.lease.mac.to_string()),
        "{known}"
    );
    // Without fcd's rules both messages pass, so the rules dropped them. The inet table sees the
    // messages, too, if the host's kernel has br_netfilter.
    lab.host.sh(&format!(
        "nft delete table bridge fcd_{INSTALL}; nft delete table inet fcd_{INSTALL}"
    ));
    forge();
    assert!(gateway_of_b().contains(&own), "{}", gateway_of_b());
    assert_eq!([advertised("arrived"), advertised("passed")], ["2", "1"]);
}

#[test]
fn elements_and_flows_of_ipv6_end_with_their_guest() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&with_ipv6());
    let words = || {
        let list = format!(
            "nft list set bridge fcd_{INSTALL} guests6; nft list set inet fcd_{INSTALL} nat6; ip -6 neighbour show nud permanent dev fcbr0"
        );
        let text = lab.host.sh(&list);
        let words = text.split([' ', ',', '\n']);
        words
            .filter(|w| w.starts_with("fd") || w.starts_with("fe80:"))
            .count()
    };
    let outside = lab.outside.udp((OUTSIDE_IPV6, 9000));
    let first = lab.start(0, Access::Nat);
    assert_eq!(words(), 4, "two in guests6, one in nat6, one neighbour");
    let port = 9002;
    let address = ipv6(&first).address;
    first
        .ns
        .udp((address, port))
        .send("hello", (OUTSIDE_IPV6, 9000));
    let (_, masqueraded) = outside.next();
    drop(first);
    // If something deletes the rules, they come back with the same elements.
    lab.host.sh(&format!(
        "nft delete table inet fcd_{INSTALL}; nft delete table bridge fcd_{INSTALL}; ip -6 address del {}/64 dev fcbr0",
        network().gateway()
    ));
    let done = lab.host.run(|| lab.net.mend()).unwrap();
    assert!(
        done.iter().any(|d| d.contains("restored the rules")),
        "{done:?}"
    );
    assert!(done.iter().any(|d| d.contains("added address")), "{done:?}");
    assert_eq!(lab.host.run(|| lab.net.mend()).unwrap(), [""; 0]);
    assert_eq!(words(), 4);
    lab.release(0);
    assert_eq!(words(), 0);
    // The next guest with this address does not receive packets of the first one's connections.
    let second = lab.start(0, Access::Nat);
    find_bridge(&lab, &second);
    let at_second = second.ns.udp((address, port));
    outside.send("bad", masqueraded);
    let host = lab.host.udp((HOST_IPV6, 9001));
    outside.send("mark", (HOST_IPV6, 9001));
    assert_eq!(host.next().0, "mark");
    assert!(next_is_from_host(&lab, &at_second, (address, port).into()));
}

#[test]
fn forwarding_stays_off_if_the_host_would_lose_its_route() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    lab.host.sh(&format!(
        "ip -6 address add {HOST_IPV6}/64 dev up0 nodad; ip -6 route add default via {OUTSIDE_IPV6} dev up0 proto ra; echo 1 >/proc/sys/net/ipv6/conf/up0/accept_ra"
    ));
    let forwarding = || lab.host.sh("cat /proc/sys/net/ipv6/conf/all/forwarding");
    lab.host.run(|| lab.net.remove_all()).unwrap();
    let open = || {
        let commands = std::sync::Arc::new(crate::host::HostCommands);
        drop(super::super::lab::open(&lab.host, &with_ipv6(), commands).unwrap());
    };
    open();
    assert_eq!(forwarding().trim(), "0");
    lab.host.sh("echo 2 >/proc/sys/net/ipv6/conf/up0/accept_ra");
    open();
    assert_eq!(forwarding().trim(), "1");
}

#[test]
fn ipv6_is_turned_off_again() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&with_ipv6());
    let guest = lab.start(0, Access::Nat);
    find_bridge(&lab, &guest);
    let commands = std::sync::Arc::new(crate::host::HostCommands);
    let _off = super::super::lab::open(&lab.host, &config(), commands).unwrap();
    assert_eq!(lab.host.sh("ip -6 address show dev fcbr0"), "");
    assert!(
        !lab.host.sh("nft list ruleset").contains("6 {"),
        "no sets of IPv6"
    );
    let outside = lab.outside.udp((OUTSIDE_IPV6, 9000));
    udp(&guest).send("bad", (OUTSIDE_IPV6, 9000));
    flush(&lab, &guest);
    assert!(!outside.has_any());
}

#[test]
fn host_without_ipv6_is_left_as_with_ipv6_off() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let state = || {
        lab.host.sh("nft list ruleset; ip address show dev fcbr0; cat /proc/sys/net/ipv6/conf/all/forwarding; cd /proc/sys/net/ipv6/conf/fcbr0; grep . disable_ipv6 accept_ra accept_dad autoconf")
    };
    let off = state();
    let open = || {
        let commands = std::sync::Arc::new(crate::host::HostCommands);
        super::super::lab::open(&lab.host, &with_ipv6(), commands).unwrap()
    };
    assert_eq!(open().lease(0).unwrap().ipv6, None);
    assert_eq!(state(), off);
    // The host has an address, but its administrator turns IPv6 off.
    lab.host.sh(&format!(
        "ip -6 address add {HOST_IPV6}/64 dev up0 nodad; echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6"
    ));
    assert_eq!(open().lease(0).unwrap().ipv6, None);
    assert_eq!(state(), off);
    lab.host.sh(&format!(
        "echo 0 >/proc/sys/net/ipv6/conf/up0/disable_ipv6; ip -6 address add {HOST_IPV6}/64 dev up0 nodad"
    ));
    assert!(open().lease(0).unwrap().ipv6.is_some());
    assert_ne!(state(), off);
}
