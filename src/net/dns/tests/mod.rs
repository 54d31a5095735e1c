//! What hostile packets do to the name server: nothing. `simple-dns` reads its answers as somebody else would.

mod bench;
pub(crate) mod hostile;
mod process;

use super::helper::packet::{Query, TYPE_A, TYPE_AAAA, TYPE_ANY, TYPE_PTR};
use super::helper::zone::{Found, Lookup, Verdict, answer, judge};
use super::supervisor::served;
use super::{Names, Server, Setup};
use crate::host::confine::Owner;
use proptest::prelude::*;
use simple_dns::rdata::RData;
use simple_dns::{Packet, RCODE};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Knows web as 10.89.0.5, for everybody but 10.89.0.66.
struct Web;

impl Names for Web {
    fn address(&self, name: &str, asker: IpAddr) -> Option<Ipv4Addr> {
        assert!(name.parse::<crate::ids::VmName>().is_ok());
        (name == "web" && asker != stranger()).then(web)
    }
    fn name(&self, address: Ipv4Addr, asker: IpAddr) -> Option<String> {
        (address == web() && asker != stranger()).then(|| "web".to_owned())
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

/// A question as resolvers send it, with EDNS.
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

fn reply(packet: &[u8], asker: IpAddr) -> Vec<u8> {
    reply_for(judge(packet, subnet()), packet, asker)
}

/// With what the daemon would look up.
fn reply_for(verdict: Verdict<'_>, packet: &[u8], asker: IpAddr) -> Vec<u8> {
    let found = match verdict {
        Verdict::Reply(reply) => return reply,
        Verdict::LookUp(Lookup::Address(name)) => Found::Address(Web.address(name.as_str(), asker)),
        Verdict::LookUp(Lookup::Name(address)) => Found::Name(Web.name(address, asker).map(|name| name.parse().unwrap())),
        other => panic!("{other:?}"),
    };
    answer(packet, subnet(), &found).unwrap()
}

#[test]
fn names_of_vms() {
    for name in ["web.vm", "WeB.Vm", "web.vm."] {
        let packet = ask(name, TYPE_A);
        let reply = reply(&packet, guest());
        assert_eq!(&reply[12..12 + name.trim_end_matches('.').len() + 6], &packet[12..12 + name.trim_end_matches('.').len() + 6]);
        let read = Packet::parse(&reply).unwrap();
        assert_eq!((read.id(), read.rcode(), read.answers.len(), read.opt().is_some()), (0x1234, RCODE::NoError, 1, true));
        let RData::A(a) = &read.answers[0].rdata else { panic!("{read:?}") };
        assert_eq!(Ipv4Addr::from(a.address), web());
        assert_eq!(read.answers[0].name.to_string().to_lowercase(), "web.vm");
    }
    let any = reply(&ask("web.vm", TYPE_ANY), guest());
    assert_eq!(Packet::parse(&any).unwrap().answers.len(), 1);
}

#[track_caller]
fn check_negative(name: &str, kind: u16, asker: IpAddr, rcode: RCODE, zone: &str) {
    let reply = reply(&ask(name, kind), asker);
    let read = Packet::parse(&reply).unwrap();
    assert_eq!((read.rcode(), read.answers.len(), read.name_servers.len()), (rcode, 0, 1), "{read:?}");
    assert!(matches!(read.name_servers[0].rdata, RData::SOA(_)));
    assert_eq!(read.name_servers[0].name.to_string(), zone);
}

#[test]
fn what_is_not_there() {
    check_negative("web.vm", TYPE_AAAA, guest(), RCODE::NoError, "vm");
    check_negative("vm", TYPE_A, guest(), RCODE::NoError, "vm");
    check_negative("other.vm", TYPE_A, guest(), RCODE::NameError, "vm");
    check_negative("x.web.vm", TYPE_A, guest(), RCODE::NameError, "vm");
    check_negative("-web.vm", TYPE_A, guest(), RCODE::NameError, "vm");
    check_negative("w\u{e4}b.vm", TYPE_A, guest(), RCODE::NameError, "vm");
    // Of whom it may not know.
    check_negative("web.vm", TYPE_A, stranger(), RCODE::NameError, "vm");
    check_negative("9.0.89.10.in-addr.arpa", TYPE_PTR, guest(), RCODE::NameError, "0.89.10.in-addr.arpa");
    check_negative("5.0.89.10.in-addr.arpa", TYPE_A, guest(), RCODE::NoError, "0.89.10.in-addr.arpa");
}

#[test]
fn names_of_addresses() {
    let reply = reply(&ask("5.0.89.10.in-addr.arpa", TYPE_PTR), guest());
    let read = Packet::parse(&reply).unwrap();
    let RData::PTR(name) = &read.answers[0].rdata else { panic!("{read:?}") };
    assert_eq!(name.0.to_string(), "web.vm");
}

#[test]
fn the_rest_is_passed_on_or_refused() {
    let forwards = |name: &str, kind: u16| matches!(judge(&ask(name, kind), subnet()), Verdict::Forward(_));
    // 65: HTTPS; 12345: nobody knows yet.
    for (name, kind) in
        [("example.com", TYPE_A), ("", 2), ("vm.example", 65), ("1.0.0.127.in-addr.arpa", TYPE_PTR), ("a.b", 12_345)]
    {
        assert!(forwards(name, kind), "{name}");
    }
    let rcode = |packet: &[u8]| Packet::parse(&reply(packet, guest())).unwrap().rcode();
    let changed = |at: usize, to: u8| {
        let mut packet = ask("example.com", TYPE_A);
        packet[at] = to;
        packet
    };
    assert_eq!(rcode(&ask("example.com", 252)), RCODE::Refused, "a transfer");
    assert_eq!(rcode(&ask("vm", 252)), RCODE::Refused);
    assert_eq!(rcode(&changed(2, 0)), RCODE::Refused, "what we know of others is not told");
    assert_eq!(rcode(&changed(2, 0x21)), RCODE::NotImplemented, "notify");
    assert_eq!(rcode(&changed(5, 2)), RCODE::FormatError, "two questions");
    assert_eq!(rcode(&changed(7, 1)), RCODE::FormatError, "an answer in a question");
    assert_eq!(rcode(&changed(28, 3)), RCODE::Refused, "class chaos");
}

#[test]
fn what_is_no_question_has_no_answer() {
    let drops = |packet: &[u8]| matches!(judge(packet, subnet()), Verdict::Drop);
    let packet = ask("web.vm", TYPE_A);
    assert!((0..12).all(|len| drops(&packet[..len])));
    let mut answer = packet.clone();
    answer[2] |= 0x80;
    assert!(drops(&answer), "two servers would talk for ever");
}

#[test]
fn outsiders_are_not_served() {
    let is_served = |asker: &str| served(SocketAddr::new(asker.parse().unwrap(), 1000), subnet()).is_some();
    for outsider in ["192.0.2.1", "10.89.1.1", "::1", "0.0.0.0"] {
        assert!(!is_served(outsider), "{outsider}");
    }
    assert!(is_served("10.89.0.7") && is_served("127.0.0.1"));
}

#[test]
fn names_that_point_are_malformed() {
    // To itself, to the header, forward, behind the end, and a label with a reserved length.
    for pointer in [[0xc0, 12], [0xc0, 0], [0xc0, 14], [0xff, 0xff], [0x80, 1], [0x40, 1]] {
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
    assert!(matches!(judge(&ask(&longest, TYPE_A), subnet()), Verdict::Forward(_)), "255 bytes");
}

/// Whatever comes in: an answer is an answer to it, and at most so large.
fn check_any(packet: &[u8]) {
    match judge(packet, subnet()) {
        Verdict::Drop => {}
        Verdict::Forward(query) => assert!(packet[12..].starts_with(query.question())),
        verdict => {
            let reply = reply_for(verdict, packet, guest());
            assert!(reply.len() >= 12 && reply.len() <= packet.len() + 128, "no amplification");
            assert_eq!((&reply[..2], reply[2] & 0x80), (&packet[..2], 0x80));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(packet in proptest::collection::vec(any::<u8>(), 0..600)) {
        check_any(&packet);
    }

    #[test]
    fn any_body_behind_a_good_header(body in proptest::collection::vec(prop_oneof![any::<u8>(), 0u8..4, Just(0xc0), Just(12)], 0..300), additional in 0u8..4) {
        let mut packet = vec![1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, additional];
        packet.extend(body);
        check_any(&packet);
    }

    #[test]
    fn good_questions_with_a_few_changes(
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
    fn a_name_is_read_as_it_was_written(name in "([a-z0-9-]{1,40}\\.){0,4}[a-z]{1,9}", kind in any::<u16>()) {
        let packet = ask(&name, kind);
        let query = Query::parse(&packet).unwrap();
        let labels: Vec<_> = query.labels.iter().map(|l| String::from_utf8(l.clone()).unwrap()).collect();
        prop_assert_eq!(labels.join("."), name);
        prop_assert_eq!(query.qtype, kind);
    }
}

/// A server on the loopback, with a real helper process, and a resolver of the "host" that it forwards to.
struct Lab {
    server: Option<Server>,
    at: SocketAddr,
    upstream: UdpSocket,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new(names: Arc<dyn Names>) -> Self {
        // The first is where nobody listens: the second is asked as well.
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
        upstream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let upstream_port = upstream.local_addr().unwrap().port();
        // A port that is free for both.
        let (at, server) = (0..100)
            .find_map(|_| {
                // Not where the resolver is: it does not ask itself.
                let at = UdpSocket::bind("127.0.0.3:0").unwrap().local_addr().unwrap();
                let names = names.clone();
                let resolv_conf = resolv_conf.clone();
                let setup = Setup { listen: at, subnet: subnet(), names, resolv_conf, upstream_port, owner: owner() };
                Server::start_with(helper, setup).ok().map(|server| (at, server))
            })
            .expect("a free port");
        Self { server: Some(server), at, upstream, _dir: dir }
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    fn client(&self) -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(self.at).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
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

/// Whom the helper is to run as, where the tests may choose.
fn owner() -> Option<Owner> {
    rustix::process::geteuid().is_root().then_some(Owner { uid: 1_900_065_535, gid: 1_900_065_535 })
}

fn rcode_of(reply: &[u8]) -> u8 {
    reply[3] & 15
}

#[test]
fn a_question_is_passed_on_and_its_answer_back() {
    let lab = Lab::new(Arc::new(Web));
    let packet = ask("example.com", TYPE_A);
    let client = lab.client();
    client.send(&packet).unwrap();
    // Again before there is an answer: one question under way is enough.
    client.send(&packet).unwrap();
    let mut buffer = [0; 4096];
    let (len, from) = lab.upstream.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[2..len], &packet[2..], "with another id, else as it was");
    let answer = |id: [u8; 2], name: &str| {
        let mut answer = ask(name, TYPE_A);
        answer[..2].copy_from_slice(&id);
        answer[2] |= 0x80;
        answer
    };
    let id = [buffer[0], buffer[1]];
    // Neither another id nor another question is taken for the answer.
    lab.upstream.send_to(&answer([id[0] ^ 1, id[1]], "example.com"), from).unwrap();
    lab.upstream.send_to(&answer(id, "example.org"), from).unwrap();
    lab.upstream.send_to(&answer(id, "eXample.com"), from).unwrap();
    let len = client.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], answer([0x12, 0x34], "eXample.com"));
    lab.upstream.set_nonblocking(true).unwrap();
    assert!(lab.upstream.recv_from(&mut buffer).is_err(), "the repeated question went on as well");
}

#[test]
fn questions_under_way_are_bounded_and_end() {
    let mut lab = Lab::new(Arc::new(Web));
    let client = lab.client();
    for n in 0..100 {
        client.send(&ask(&format!("n{n}.example"), TYPE_A)).unwrap();
    }
    // The 65th and further ones are refused at once; those under way do not keep names of our own from being answered.
    let mut buffer = [0; 4096];
    for _ in 64..100 {
        let len = client.recv(&mut buffer).unwrap();
        assert_eq!(rcode_of(&buffer[..len]), 2);
    }
    assert_eq!(rcode_of(&lab.exchange(&ask("web.vm", TYPE_A))), 0);
    // Nobody answers the rest: each ends with an answer that says so.
    for _ in 0..64 {
        let len = client.recv(&mut buffer).unwrap();
        assert_eq!(rcode_of(&buffer[..len]), 2);
    }
    lab.server.take().unwrap().stop().unwrap();
}

#[test]
fn over_tcp() {
    let lab = Lab::new(Arc::new(Web));
    let mut stream = TcpStream::connect(lab.at).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    for name in ["web.vm", "other.vm"] {
        let packet = ask(name, TYPE_A);
        let mut bytes = u16::try_from(packet.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(&packet);
        // In two parts: the length does not come alone by chance only.
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
    let streams: Vec<_> = (0..40).map(|_| TcpStream::connect(lab.at).unwrap()).collect();
    // Four of one asker are served, the rest are closed.
    let mut served = 0;
    for mut stream in streams.iter() {
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        served += usize::from(!matches!(stream.read(&mut [0]), Ok(0)));
    }
    assert!((1..=4).contains(&served), "{served}");
    let begun = Instant::now();
    lab.server.take().unwrap().stop().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3), "a silent connection does not keep it");
    drop(streams);
}

#[test]
fn a_flood_is_dropped_and_others_are_answered() {
    let lab = Lab::new(Arc::new(Web));
    let loud = lab.client();
    // From 127.0.0.2: another asker.
    let quiet = UdpSocket::bind("127.0.0.2:0").unwrap();
    quiet.connect(lab.at).unwrap();
    quiet.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    for n in 0..20_000u32 {
        let junk = n.to_be_bytes().repeat(usize::try_from(n % 40).unwrap());
        let _ = loud.send(if n % 3 == 0 { &junk } else { b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\xc0\x0c\0\x01\0\x01" });
    }
    let answered = (0..20).any(|_| {
        quiet.send(&ask("web.vm", TYPE_A)).unwrap();
        quiet.recv(&mut [0; 512]).is_ok()
    });
    assert!(answered);
}

#[test]
fn a_panic_of_the_daemons_costs_one_answer() {
    struct Panics(AtomicUsize);
    impl Names for Panics {
        fn address(&self, _: &str, _: IpAddr) -> Option<Ipv4Addr> {
            assert!(self.0.fetch_add(1, Ordering::Relaxed) > 0, "the first time");
            Some(web())
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
fn a_port_that_is_taken_is_a_conflict() {
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
    let e = Server::start(setup).err().expect("it is taken");
    assert_eq!(e.kind(), crate::error::Kind::Conflict);
}
