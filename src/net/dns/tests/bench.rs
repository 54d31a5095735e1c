//! Questions per second and their latency, of names of our own and of forwarded ones: `scripts/bench dns`.

use super::{Lab, Web, ask};
use crate::host::thread;
use crate::net::dns::helper::packet::TYPE_A;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Askers, each with one question under way.
const WINDOW: usize = 32;
/// Questions of one asker, which are fewer than its burst.
const EACH: usize = 600;
const LATENCIES: usize = 900;

/// Sockets of askers nobody has seen yet: each asker has a rate.
struct Askers {
    at: SocketAddr,
    next: u16,
}

impl Askers {
    fn next(&mut self) -> UdpSocket {
        self.next += 1;
        let [high, low] = self.next.to_be_bytes();
        let socket = UdpSocket::bind((Ipv4Addr::new(127, 77, high, low), 0)).unwrap();
        socket.connect(self.at).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        socket
    }
}

/// Answers every question, with the question.
fn resolver(socket: UdpSocket) {
    let mut buffer = [0; 4096];
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        if len < 12 {
            return;
        }
        buffer[2] |= 0x80;
        let _ = socket.send_to(&buffer[..len], from);
    }
}

fn measure(what: &str, name: &str, askers: &mut Askers) {
    let packet = ask(name, TYPE_A);
    let mut buffer = [0; 4096];
    let alone = askers.next();
    let mut exchange = |asker: &UdpSocket| -> Option<Duration> {
        let begun = Instant::now();
        asker.send(&packet).unwrap();
        asker.recv(&mut buffer).ok().map(|_| begun.elapsed())
    };
    let mut took: Vec<_> = (0..LATENCIES).filter_map(|_| exchange(&alone)).collect();
    took.sort_unstable();
    let (p50, p99) = (took[took.len() / 2], took[took.len() * 99 / 100]);
    let many: Vec<_> = (0..WINDOW).map(|_| askers.next()).collect();
    let (mut answered, begun) = (0usize, Instant::now());
    for asker in &many {
        asker.send(&packet).unwrap();
    }
    for _ in 0..EACH {
        for asker in &many {
            answered += usize::from(asker.recv(&mut buffer).is_ok());
            asker.send(&packet).unwrap();
        }
    }
    let per_s = answered as f64 / begun.elapsed().as_secs_f64();
    let lost = LATENCIES - took.len() + WINDOW * EACH - answered;
    println!("{what}: p50 {} us, p99 {} us, {per_s:.0} questions/s, {lost} lost", p50.as_micros(), p99.as_micros());
}

#[test]
#[ignore = "a measurement: scripts/bench dns"]
fn bench() {
    let rounds: usize = std::env::var("FCD_BENCH_ROUNDS").map_or(3, |n| n.parse().unwrap());
    let lab = Lab::with_resolvers(Arc::new(Web), "nameserver 127.0.0.1\n");
    let socket = lab.upstream.try_clone().unwrap();
    let upstream = thread::spawn("resolver", move || resolver(socket)).unwrap();
    let mut askers = Askers { at: lab.at, next: 0 };
    for _ in 0..rounds {
        measure("own name", "web.vm", &mut askers);
        measure("forwarded", "example.com", &mut askers);
    }
    let end = UdpSocket::bind("127.0.0.1:0").unwrap();
    end.send_to(b"end", lab.upstream.local_addr().unwrap()).unwrap();
    upstream.join().unwrap();
}
