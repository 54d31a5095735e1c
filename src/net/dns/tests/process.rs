//! Tests of the helper process and of its replacement when it exits.

use super::{Lab, Web, ask, owner, rcode_of};
use crate::net::dns::Server;
use crate::net::dns::helper::packet::TYPE_A;
use crate::sched::Instant;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The maximum time that a new helper may take to start.
const SOON: Duration = Duration::from_secs(20);

pub(super) fn helper_pid(server: &Server) -> u32 {
    server.health.pid.load(Ordering::Relaxed)
}

/// Repeats a query until it is answered, because open queries are lost when a helper exits. Returns
/// the answer.
#[track_caller]
pub(super) fn ask_until_answered(lab: &Lab, packet: &[u8]) -> Vec<u8> {
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(lab.at).unwrap();
    client
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
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
    fields
        .map(|(key, value)| {
            (
                key.to_owned(),
                value.split_whitespace().collect::<Vec<_>>().join(" "),
            )
        })
        .collect()
}

#[test]
fn helper_is_confined_and_has_no_server_sockets() {
    let lab = Lab::new(Arc::new(Web));
    assert_eq!(rcode_of(&lab.exchange(&ask("web.vm", TYPE_A))), 0);
    let pid = helper_pid(lab.server());
    let status = proc_fields(pid, "status");
    assert_eq!(
        (
            status["NoNewPrivs"].as_str(),
            status["Seccomp"].as_str(),
            status["Threads"].as_str()
        ),
        ("1", "2", "1")
    );
    let Some(owner) = owner() else { return };
    let four = |id: u32| [id.to_string().as_str(); 4].join(" ");
    assert_eq!(
        (&status["Uid"], &status["Gid"]),
        (&four(owner.uid), &four(owner.gid))
    );
    assert_eq!(
        (status["Groups"].as_str(), status["CapEff"].as_str()),
        ("", "0000000000000000")
    );
    // The helper has the channel, and /dev/null twice. The daemon passes sockets to resolvers only
    // when they are needed.
    assert_eq!(
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .count(),
        3
    );
}

#[test]
fn killed_helper_is_replaced() {
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
        // The answer may still come from the killed helper.
        let until = Instant::now() + SOON;
        while helper_pid(lab.server()) == pid {
            assert!(Instant::now() < until, "the helper was not replaced");
            ask_until_answered(&lab, &packet);
        }
    }
    assert_eq!(rcode_of(&ask_until_answered(&lab, &packet)), 0);
    assert!(
        lab.server().trouble().unwrap().contains("3 times in a row"),
        "{:?}",
        lab.server().trouble()
    );
}

#[test]
fn stop_with_open_queries_and_connections_is_prompt() {
    let mut lab = Lab::new(Arc::new(Web));
    let client = lab.client();
    for n in 0..50 {
        client.send(&ask(&format!("n{n}.example"), TYPE_A)).unwrap();
    }
    let mut stream = TcpStream::connect(lab.at).unwrap();
    let packet = ask("example.com", TYPE_A);
    stream
        .write_all(
            &[
                &u16::try_from(packet.len()).unwrap().to_be_bytes(),
                packet.as_slice(),
            ]
            .concat(),
        )
        .unwrap();
    // Waits until one of the queries has reached the resolver.
    lab.upstream.recv_from(&mut [0; 512]).unwrap();
    let pid = helper_pid(lab.server());
    let begun = Instant::now();
    lab.server.take().unwrap().stop().unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn tcp_query_falls_back_to_next_resolver() {
    // Nothing listens at the first of the two resolvers.
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
    let message = [
        &u16::try_from(packet.len()).unwrap().to_be_bytes(),
        packet.as_slice(),
    ]
    .concat();
    stream.write_all(&message).unwrap();
    let mut reply = vec![0; message.len()];
    stream.read_exact(&mut reply).unwrap();
    let mut wanted = message;
    wanted[4] |= 0x80;
    assert_eq!(reply, wanted);
    thread.join().unwrap();
}

#[test]
fn query_without_resolvers_fails_at_once() {
    let lab = Lab::with_resolvers(Arc::new(Web), "# none\n");
    assert_eq!(rcode_of(&lab.exchange(&ask("example.com", TYPE_A))), 2);
}
