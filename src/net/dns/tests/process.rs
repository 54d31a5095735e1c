//! The helper as a process: what it is, and what happens when it ends.

use super::{Lab, Web, ask, owner, rcode_of};
use crate::net::dns::Server;
use crate::net::dns::helper::packet::TYPE_A;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// For a helper to be started again.
const SOON: Duration = Duration::from_secs(20);

pub fn helper_pid(server: &Server) -> u32 {
    server.health.pid.load(Ordering::Relaxed)
}

/// Asks until there is an answer: a question that a helper took with it is lost.
#[track_caller]
pub fn ask_until_answered(lab: &Lab, packet: &[u8]) -> Vec<u8> {
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(lab.at).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let until = Instant::now() + SOON;
    let mut buffer = vec![0; 4096];
    loop {
        client.send(packet).unwrap();
        if let Ok(len) = client.recv(&mut buffer) {
            buffer.truncate(len);
            return buffer;
        }
        assert!(Instant::now() < until, "no answer");
    }
}

fn proc_fields(pid: u32, file: &str) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let fields = text.lines().filter_map(|l| l.split_once(':'));
    fields.map(|(key, value)| (key.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" "))).collect()
}

#[test]
fn helper_is_confined_and_has_no_socket_of_the_servers() {
    let lab = Lab::new(Arc::new(Web));
    assert_eq!(rcode_of(&lab.exchange(&ask("web.vm", TYPE_A))), 0);
    let pid = helper_pid(lab.server());
    let status = proc_fields(pid, "status");
    assert_eq!((status["NoNewPrivs"].as_str(), status["Seccomp"].as_str(), status["Threads"].as_str()), ("1", "2", "1"));
    let Some(owner) = owner() else { return };
    let four = |id: u32| [id.to_string().as_str(); 4].join(" ");
    assert_eq!((&status["Uid"], &status["Gid"]), (&four(owner.uid), &four(owner.gid)));
    assert_eq!((status["Groups"].as_str(), status["CapEff"].as_str()), ("", "0000000000000000"));
    // The channel and /dev/null twice; nothing else until somebody has to be asked.
    assert_eq!(std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 3);
}

#[test]
fn killed_helper_is_replaced_and_the_next_one_answers() {
    let lab = Lab::new(Arc::new(Web));
    let packet = ask("web.vm", TYPE_A);
    assert_eq!(rcode_of(&lab.exchange(&packet)), 0);
    assert_eq!(lab.server().trouble(), None);
    let mut killed = Vec::new();
    for _ in 0..3 {
        let pid = helper_pid(lab.server());
        assert!(!killed.contains(&pid));
        kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
        killed.push(pid);
        // The answer may still be that of a helper that has not died yet.
        let until = Instant::now() + SOON;
        while helper_pid(lab.server()) == pid {
            assert!(Instant::now() < until, "no other helper");
            ask_until_answered(&lab, &packet);
        }
    }
    assert_eq!(rcode_of(&ask_until_answered(&lab, &packet)), 0);
    assert!(lab.server().trouble().unwrap().contains("3 times in a row"), "{:?}", lab.server().trouble());
}

#[test]
fn stop_is_prompt_with_questions_and_connections_under_way() {
    let mut lab = Lab::new(Arc::new(Web));
    let client = lab.client();
    for n in 0..50 {
        client.send(&ask(&format!("n{n}.example"), TYPE_A)).unwrap();
    }
    let mut stream = TcpStream::connect(lab.at).unwrap();
    let packet = ask("example.com", TYPE_A);
    stream.write_all(&[&u16::try_from(packet.len()).unwrap().to_be_bytes(), packet.as_slice()].concat()).unwrap();
    // They have arrived: one of them is at the resolver.
    lab.upstream.recv_from(&mut [0; 512]).unwrap();
    let pid = helper_pid(lab.server());
    let begun = Instant::now();
    lab.server.take().unwrap().stop().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn over_tcp_the_next_resolver_is_asked_when_one_refuses() {
    // The first of the two is where nobody listens.
    let lab = Lab::new(Arc::new(Web));
    let resolver = std::net::TcpListener::bind(lab.upstream.local_addr().unwrap()).unwrap();
    let thread = crate::host::thread::spawn("resolver", move || {
        let (mut asked, from) = resolver.accept().unwrap();
        assert!(from.ip().is_loopback());
        let mut len = [0; 2];
        asked.read_exact(&mut len).unwrap();
        let mut message = vec![0; u16::from_be_bytes(len).into()];
        asked.read_exact(&mut message).unwrap();
        message[2] |= 0x80;
        asked.write_all(&[&len[..], &message].concat()).unwrap();
    })
    .unwrap();
    let mut stream = TcpStream::connect(lab.at).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let packet = ask("example.com", TYPE_A);
    let message = [&u16::try_from(packet.len()).unwrap().to_be_bytes(), packet.as_slice()].concat();
    stream.write_all(&message).unwrap();
    let mut reply = vec![0; message.len()];
    stream.read_exact(&mut reply).unwrap();
    let mut wanted = message;
    wanted[4] |= 0x80;
    assert_eq!(reply, wanted);
    thread.join().unwrap();
}

#[test]
fn without_a_resolver_a_question_fails_at_once() {
    let lab = Lab::with_resolvers(Arc::new(Web), "# none\n");
    assert_eq!(rcode_of(&lab.exchange(&ask("example.com", TYPE_A))), 2);
}
