//! Tests of the name server. Many of them send hostile packets. `simple-dns`, an independent
//! parser, reads the answers.

mod bench;
pub(crate) mod hostile;
mod process;

use super::helper::packet::{Query, TYPE_A, TYPE_AAAA, TYPE_ANY, TYPE_PTR};
use super::helper::zone::{Found, Lookup, Verdict, answer, judge};
use super::supervisor::served;
use super::{Addresses, Names, Server, Setup};
use crate::host::Credentials;
use crate::sched::Instant;
use proptest::prelude::*;
use simple_dns::rdata::RData;
use simple_dns::{Packet, RCODE};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// A zone in which web is 10.89.0.5. The client 10.89.0.66 must not learn this address.
struct Web;

impl Names for Web {
    fn addresses(&self, name: &str, client: IpAddr) -> Option<Addresses> {
        assert!(name.parse::<crate::ids::VmName>().is_ok());
        let ipv6 = (name == "web6").then_some(Ipv6Addr::LOCALHOST);
        let is_known = matches!(name, "web" | "web6") && client != stranger();
        is_known.then(|| Addresses { ipv4: web(), ipv6 })
    }
    fn name(&self, address: Ipv4Addr, client: IpAddr) -> Option<String> {
        (address == web() && client != stranger()).then(|| "web".to_owned())
    }
}

fn web() -> Ipv4Addr {
    [10, 89, 0, 5].into()
}
fn guest() -> IpAddr {
    [10, 89, 0, 7].into()
}
fn stranger() -> IpAddr {
    [10, 89, 0, 66].into()
}
fn subnet() -> crate::config::Subnet {
    "10.89.0.0/24".parse().unwrap()
}

/// Builds a query with EDNS, as resolvers send it.
fn ask(name: &str, kind: u16) -> Vec<u8> {
    let mut packet = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
    for label in name.split('.').filter(|l| !l.is_empty()) {
        packet.push(u8::try_from(label.len()).unwrap());
        packet.extend(label.as_bytes());
    }
    packet.push(0);
    packet.extend(kind.to_be_bytes());
    packet.extend([0, 1]);
    packet.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0]);
    packet
}

fn reply(packet: &[u8], client: IpAddr) -> Vec<u8> {
    reply_for(judge(packet, subnet()), packet, client)
}

/// Returns the reply for a verdict, with the result of a lookup if the verdict needs one.
fn reply_for(verdict: Verdict<'_>, packet: &[u8], client: IpAddr) -> Vec<u8> {
    let found = match verdict {
        Verdict::Reply(reply) => return reply,
        Verdict::LookUp(Lookup::Address(name)) => {
            Found::Address(Web.addresses(name.as_str(), client))
        }
        Verdict::LookUp(Lookup::Name(address)) => {
            Found::Name(Web.name(address, client).map(|name| name.parse().unwrap()))
        }
        other => panic!("{other:?}"),
    };
    answer(packet, subnet(), &found).unwrap()
}

#[test]
fn vm_name_resolves_to_ipv6_address_if_there_is_one() {
    let with = reply(&ask("web6.vm", TYPE_AAAA), guest());
    let read = Packet::parse(&with).unwrap();
    let RData::AAAA(a) = &read.answers[0].rdata else {
        panic!("{read:?}")
    };
    assert_eq!(Ipv6Addr::from(a.address), Ipv6Addr::LOCALHOST);
    for (name, kind) in [("web.vm", TYPE_AAAA), ("web6.vm", TYPE_PTR)] {
        let without = reply(&ask(name, kind), guest());
        let read = Packet::parse(&without).unwrap();
        assert_eq!((read.rcode(), read.answers.len()), (RCODE::NoError, 0));
    }
}

#[test]
fn vm_name_resolves_to_address() {
    for name in ["web.vm", "WeB.Vm", "web.vm."] {
        let packet = ask(name, TYPE_A);
        let reply = reply(&packet, guest());
        assert_eq!(
            &reply[12..12 + name.trim_end_matches('.').len() + 6],
            &packet[12..12 + name.trim_end_matches('.').len() + 6]
        );
        let read = Packet::parse(&reply).unwrap();
        assert_eq!(
            (
                read.id(),
                read.rcode(),
                read.answers.len(),
                read.opt().is_some()
            ),
            (0x1234, RCODE::NoError, 1, true)
        );
        let RData::A(a) = &read.answers[0].rdata else {
            panic!("{read:?}")
        };
        assert_eq!(Ipv4Addr::from(a.address), web());
        assert_eq!(read.answers[0].name.to_string().to_lowercase(), "web.vm");
    }
    let any = reply(&ask("web.vm", TYPE_ANY), guest());
    assert_eq!(Packet::parse(&any).unwrap().answers.len(), 1);
}

#[track_caller]
fn check_negative(name: &str, kind: u16, client: IpAddr, rcode: RCODE, zone: &str) {
    let reply = reply(&ask(name, kind), client);
    let read = Packet::parse(&reply).unwrap();
    assert_eq!(
        (read.rcode(), read.answers.len(), read.name_servers.len()),
        (rcode, 0, 1),
        "{read:?}"
    );
    assert!(matches!(read.name_servers[0].rdata, RData::SOA(_)));
    assert_eq!(read.name_servers[0].name.to_string(), zone);
}

#[test]
fn unknown_names_and_types_get_negative_answers() {
    check_negative("web.vm", TYPE_AAAA, guest(), RCODE::NoError, "vm");
    check_negative("vm", TYPE_A, guest(), RCODE::NoError, "vm");
    check_negative("other.vm", TYPE_A, guest(), RCODE::NameError, "vm");
    check_negative("x.web.vm", TYPE_A, guest(), RCODE::NameError, "vm");
    check_negative("-web.vm", TYPE_A, guest(), RCODE::NameError, "vm");
    check_negative("w\u{e4}b.vm", TYPE_A, guest(), RCODE::NameError, "vm");
    // This client must not learn the address of web.
    check_negative("web.vm", TYPE_A, stranger(), RCODE::NameError, "vm");
    check_negative(
        "9.0.89.10.in-addr.arpa",
        TYPE_PTR,
        guest(),
        RCODE::NameError,
        "0.89.10.in-addr.arpa",
    );
    check_negative(
        "5.0.89.10.in-addr.arpa",
        TYPE_A,
        guest(),
        RCODE::NoError,
        "0.89.10.in-addr.arpa",
    );
}

#[test]
fn address_resolves_to_vm_name() {
    let reply = reply(&ask("5.0.89.10.in-addr.arpa", TYPE_PTR), guest());
    let read = Packet::parse(&reply).unwrap();
    let RData::PTR(name) = &read.answers[0].rdata else {
        panic!("{read:?}")
    };
    assert_eq!(name.0.to_string(), "web.vm");
}

#[test]
fn other_names_are_forwarded_or_refused() {
    let forwards =
        |name: &str, kind: u16| matches!(judge(&ask(name, kind), subnet()), Verdict::Forward(_));
    // Type 65 is HTTPS, and 12345 is unassigned.
    for (name, kind) in [
        ("example.com", TYPE_A),
        ("", 2),
        ("vm.example", 65),
        ("1.0.0.127.in-addr.arpa", TYPE_PTR),
        ("a.b", 12_345),
    ] {
        assert!(forwards(name, kind), "{name}");
    }
    let rcode = |packet: &[u8]| Packet::parse(&reply(packet, guest())).unwrap().rcode();
    let changed = |at: usize, to: u8| {
        let mut packet = ask("example.com", TYPE_A);
        packet[at] = to;
        packet
    };
    assert_eq!(
        rcode(&ask("example.com", 252)),
        RCODE::Refused,
        "a zone transfer"
    );
    assert_eq!(rcode(&ask("vm", 252)), RCODE::Refused);
    assert_eq!(
        rcode(&changed(2, 0)),
        RCODE::Refused,
        "other zones without recursion"
    );
    assert_eq!(rcode(&changed(2, 0x21)), RCODE::NotImplemented, "notify");
    assert_eq!(rcode(&changed(5, 2)), RCODE::FormatError, "two questions");
    assert_eq!(
        rcode(&changed(7, 1)),
        RCODE::FormatError,
        "an answer in a question"
    );
    assert_eq!(rcode(&changed(28, 3)), RCODE::Refused, "class chaos");
}

#[test]
fn packets_that_are_not_queries_are_dropped() {
    let drops = |packet: &[u8]| matches!(judge(packet, subnet()), Verdict::Drop);
    let packet = ask("web.vm", TYPE_A);
    assert!((0..12).all(|len| drops(&packet[..len])));
    let mut answer = packet.clone();
    answer[2] |= 0x80;
    assert!(
        drops(&answer),
        "otherwise two servers could answer each other forever"
    );
}

#[test]
fn outsiders_are_not_served() {
    let is_served =
        |client: &str| served(SocketAddr::new(client.parse().unwrap(), 1000), subnet()).is_some();
    for outsider in ["192.0.2.1", "10.89.1.1", "::1", "0.0.0.0"] {
        assert!(!is_served(outsider), "{outsider}");
    }
    assert!(is_served("10.89.0.7") && is_served("127.0.0.1"));
}

#[test]
fn compressed_or_long_names_are_rejected() {
    // The pointers point to themselves, to the header, forward and beyond the end. Some labels have
    // a reserved length.
    for pointer in [
        [0xc0, 12],
        [0xc0, 0],
        [0xc0, 14],
        [0xff, 0xff],
        [0x80, 1],
        [0x40, 1],
    ] {
        let mut packet = ask("", TYPE_A);
        packet.splice(12..13, pointer);
        assert_eq!(reply(&packet, guest())[3] & 15, 1, "{pointer:?}");
        let mut packet = ask("a", TYPE_A);
        packet.splice(14..15, pointer);
        assert_eq!(reply(&packet, guest())[3] & 15, 1, "{pointer:?}");
    }
    let long = vec!["a".repeat(63); 4].join(".");
    assert_eq!(reply(&ask(&long, TYPE_A), guest())[3] & 15, 1, "257 bytes");
    let longest = [&long[..63 * 3 + 3], &"b".repeat(61)].concat();
    assert!(
        matches!(judge(&ask(&longest, TYPE_A), subnet()), Verdict::Forward(_)),
        "255 bytes"
    );
}

/// Checks that a packet is dropped, is forwarded, or gets an answer with its id and a bounded size.
fn check_any(packet: &[u8]) {
    match judge(packet, subnet()) {
        Verdict::Drop => {}
        Verdict::Forward(query) => assert!(packet[12..].starts_with(query.question())),
        verdict => {
            let reply = reply_for(verdict, packet, guest());
            assert!(
                reply.len() >= 12 && reply.len() <= packet.len() + 128,
                "the reply is too large for its query"
            );
            assert_eq!((&reply[..2], reply[2] & 0x80), (&packet[..2], 0x80));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_get_bounded_answer(packet in proptest::collection::vec(any::<u8>(), 0..600)) {
        check_any(&packet);
    }

    #[test]
    fn any_body_after_good_header_gets_bounded_answer(body in proptest::collection::vec(prop_oneof![any::<u8>(), 0u8..4, Just(0xc0), Just(12)], 0..300), additional in 0u8..4) {
        let mut packet = vec![1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, additional];
        packet.extend(body);
        check_any(&packet);
    }

    #[test]
    fn mutated_queries_get_bounded_answer(
        name in "([a-zA-Z0-9-]{1,63}\\.){0,3}(vm|in-addr\\.arpa|example)", kind in any::<u16>(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), cut in any::<prop::sample::Index>(),
    ) {
        let mut packet = ask(&name, kind);
        for (at, to) in changes {
            let at = at.index(packet.len());
            packet[at] = to;
        }
        check_any(&packet);
        packet.truncate(cut.index(packet.len() + 1));
        check_any(&packet);
    }

    #[test]
    fn name_round_trips(name in "([a-z0-9-]{1,40}\\.){0,4}[a-z]{1,9}", kind in any::<u16>()) {
        let packet = ask(&name, kind);
        let query = Query::parse(&packet).unwrap();
        let labels: Vec<_> = query.labels.iter().map(|l| String::from_utf8(l.clone()).unwrap()).collect();
        prop_assert_eq!(labels.join("."), name);
        prop_assert_eq!(query.qtype, kind);
    }
}

/// A server on the loopback with a real helper process, and a socket in the role of the host's
/// resolver.
struct Lab {
    server: Option<Server>,
    at: SocketAddr,
    upstream: UdpSocket,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new(names: Arc<dyn Names>) -> Self {
        // Nothing listens at the first address, so the server also tries the second.
        Self::with_resolvers(names, "nameserver 127.0.0.9\nnameserver 127.0.0.1\n")
    }

    fn with_resolvers(names: Arc<dyn Names>, resolvers: &str) -> Self {
        Self::with_helper(super::NAME, names, resolvers)
    }

    fn with_helper(helper: &'static str, names: Arc<dyn Names>, resolvers: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let resolv_conf = dir.path().join("resolv.conf");
        std::fs::write(&resolv_conf, resolvers).unwrap();
        let upstream = UdpSocket::bind("127.0.0.1:0").unwrap();
        upstream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let upstream_port = upstream.local_addr().unwrap().port();
        // Finds a port that is free for both UDP and TCP.
        let (at, server) = (0..100)
            .find_map(|_| {
                // This is not the server's address, because the server skips its own address among
                // the resolvers.
                let at = UdpSocket::bind("127.0.0.3:0")
                    .unwrap()
                    .local_addr()
                    .unwrap();
                let names = names.clone();
                let resolv_conf = resolv_conf.clone();
                let setup = Setup {
                    listen: at,
                    subnet: subnet(),
                    names,
                    resolv_conf,
                    upstream_port,
                    owner: owner(),
                };
                Server::start_with(helper, setup)
                    .ok()
                    .map(|server| (at, server))
            })
            .expect("no free port");
        Self {
            server: Some(server),
            at,
            upstream,
            _dir: dir,
        }
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    fn client(&self) -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(self.at).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        socket
    }

    fn exchange(&self, packet: &[u8]) -> Vec<u8> {
        let client = self.client();
        client.send(packet).unwrap();
        let mut buffer = vec![0; 65_535];
        let len = client.recv(&mut buffer).unwrap();
        buffer.truncate(len);
        buffer
    }
}

/// Returns the user to run the helper as, or `None` if the tests do not run as root and cannot
/// choose a user.
fn owner() -> Option<Credentials> {
    rustix::process::geteuid().is_root().then_some(Credentials {
        uid: 1_900_065_535,
        gid: 1_900_065_535,
    })
}

fn rcode_of(reply: &[u8]) -> u8 {
    reply[3] & 15
}

#[test]
fn query_is_forwarded_and_its_answer_returned() {
    let lab = Lab::new(Arc::new(Web));
    let packet = ask("example.com", TYPE_A);
    let client = lab.client();
    client.send(&packet).unwrap();
    // A repeated query is not forwarded while the first has no answer.
    client.send(&packet).unwrap();
    let mut buffer = [0; 4096];
    let (len, from) = lab.upstream.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[2..len], &packet[2..], "only the id differs");
    let answer = |id: [u8; 2], name: &str| {
        let mut answer = ask(name, TYPE_A);
        answer[..2].copy_from_slice(&id);
        answer[2] |= 0x80;
        answer
    };
    let id = [buffer[0], buffer[1]];
    // An answer with another id or another question is ignored.
    lab.upstream
        .send_to(&answer([id[0] ^ 1, id[1]], "example.com"), from)
        .unwrap();
    lab.upstream
        .send_to(&answer(id, "example.org"), from)
        .unwrap();
    lab.upstream
        .send_to(&answer(id, "eXample.com"), from)
        .unwrap();
    let len = client.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], answer([0x12, 0x34], "eXample.com"));
    lab.upstream.set_nonblocking(true).unwrap();
    assert!(
        lab.upstream.recv_from(&mut buffer).is_err(),
        "the repeated query was forwarded as well"
    );
}

#[test]
fn open_queries_are_bounded_and_time_out() {
    let mut lab = Lab::new(Arc::new(Web));
    let client = lab.client();
    for n in 0..100 {
        client.send(&ask(&format!("n{n}.example"), TYPE_A)).unwrap();
    }
    // From the 65th on, queries are refused immediately. Names of VMs are still answered.
    let mut buffer = [0; 4096];
    for _ in 64..100 {
        let len = client.recv(&mut buffer).unwrap();
        assert_eq!(rcode_of(&buffer[..len]), 2);
    }
    assert_eq!(rcode_of(&lab.exchange(&ask("web.vm", TYPE_A))), 0);
    // No resolver answers the other queries, so each of them ends with an error.
    for _ in 0..64 {
        let len = client.recv(&mut buffer).unwrap();
        assert_eq!(rcode_of(&buffer[..len]), 2);
    }
    lab.server.take().unwrap().stop().unwrap();
}

#[test]
fn tcp_connection_answers_several_queries() {
    let lab = Lab::new(Arc::new(Web));
    let mut stream = TcpStream::connect(lab.at).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    for name in ["web.vm", "other.vm"] {
        let packet = ask(name, TYPE_A);
        let mut bytes = u16::try_from(packet.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(&packet);
        // The query arrives in two parts.
        stream.write_all(&bytes[..1]).unwrap();
        stream.write_all(&bytes[1..]).unwrap();
        let mut len = [0; 2];
        stream.read_exact(&mut len).unwrap();
        let mut reply = vec![0; u16::from_be_bytes(len).into()];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(rcode_of(&reply), if name == "web.vm" { 0 } else { 3 });
    }
}

#[test]
fn connections_are_bounded_and_end_with_the_server() {
    let mut lab = Lab::new(Arc::new(Web));
    let streams: Vec<_> = (0..40)
        .map(|_| TcpStream::connect(lab.at).unwrap())
        .collect();
    // The server accepts four connections of a client and closes the others.
    let mut served = 0;
    for mut stream in streams.iter() {
        stream
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        served += usize::from(!matches!(stream.read(&mut [0]), Ok(0)));
    }
    assert!((1..=4).contains(&served), "{served}");
    let begun = Instant::now();
    lab.server.take().unwrap().stop().unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "a silent connection must not delay the stop"
    );
    drop(streams);
}

#[test]
fn flood_of_one_client_does_not_block_others() {
    let lab = Lab::new(Arc::new(Web));
    let loud = lab.client();
    // 127.0.0.2 counts as another client.
    let quiet = UdpSocket::bind("127.0.0.2:0").unwrap();
    quiet.connect(lab.at).unwrap();
    quiet
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    for n in 0..20_000u32 {
        let junk = n.to_be_bytes().repeat(usize::try_from(n % 40).unwrap());
        let _ = loud.send(if n % 3 == 0 {
            &junk
        } else {
            b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\xc0\x0c\0\x01\0\x01"
        });
    }
    let answered = (0..20).any(|_| {
        quiet.send(&ask("web.vm", TYPE_A)).unwrap();
        quiet.recv(&mut [0; 512]).is_ok()
    });
    assert!(answered);
}

#[test]
fn panic_in_lookup_costs_one_answer() {
    struct Panics(AtomicUsize);
    impl Names for Panics {
        fn addresses(&self, _: &str, _: IpAddr) -> Option<Addresses> {
            assert!(
                self.0.fetch_add(1, Ordering::Relaxed) > 0,
                "panics the first time"
            );
            Some(web().into())
        }
        fn name(&self, _: Ipv4Addr, _: IpAddr) -> Option<String> {
            None
        }
    }
    let mut lab = Lab::new(Arc::new(Panics(AtomicUsize::new(0))));
    let client = lab.client();
    client.send(&ask("web.vm", TYPE_A)).unwrap();
    client.send(&ask("web.vm", TYPE_A)).unwrap();
    let len = client.recv(&mut [0; 512]).unwrap();
    assert!(len > 12);
    lab.server.take().unwrap().stop().unwrap();
}

#[test]
fn start_on_taken_port_is_conflict() {
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let setup = Setup {
        listen,
        subnet: subnet(),
        names: Arc::new(Web),
        resolv_conf: "/nonexistent".into(),
        upstream_port: 53,
        owner: None,
    };
    let e = Server::start(setup).err().expect("the port is taken");
    assert_eq!(e.kind(), crate::error::Kind::Conflict);
}
