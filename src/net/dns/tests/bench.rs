//! Measures the rate and latency of queries for names of VMs and for forwarded names
//! (`scripts/bench dns`).

use super::{Lab, Web, ask};
use crate::host::thread;
use crate::net::dns::helper::packet::TYPE_A;
use crate::sched::Instant;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

/// The number of clients. Each has one open query at a time.
const WINDOW: usize = 32;
/// The number of queries per client, which is less than its burst allows.
const EACH: usize = 600;
const LATENCIES: usize = 900;

/// A source of sockets with new client addresses, because every client has a rate limit.
struct Clients {
    at: SocketAddr,
    next: u16,
}

impl Clients {
    fn next(&mut self) -> UdpSocket {
        self.next += 1;
        let [high, low] = self.next.to_be_bytes();
        let socket = UdpSocket::bind((Ipv4Addr::new(127, 77, high, low), 0)).unwrap();
        socket.connect(self.at).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        socket
    }
}

/// Answers every query with the query itself, marked as a response, until a short packet arrives.
fn resolver(socket: UdpSocket) {
    let mut buffer = [0; 4096];
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        if len < 12 {
            return;
        }
        buffer[2] |= 0x80;
        let _ = socket.send_to(&buffer[..len], from);
    }
}

fn measure(what: &str, name: &str, clients: &mut Clients) {
    let packet = ask(name, TYPE_A);
    let mut buffer = [0; 4096];
    let alone = clients.next();
    let mut exchange = |client: &UdpSocket| -> Option<Duration> {
        let begun = Instant::now();
        client.send(&packet).unwrap();
        client.recv(&mut buffer).ok().map(|_| begun.elapsed())
    };
    let mut took: Vec<_> = (0..LATENCIES).filter_map(|_| exchange(&alone)).collect();
    took.sort_unstable();
    let (p50, p99) = (took[took.len() / 2], took[took.len() * 99 / 100]);
    let many: Vec<_> = (0..WINDOW).map(|_| clients.next()).collect();
    let (mut answered, begun) = (0usize, Instant::now());
    for client in &many {
        client.send(&packet).unwrap();
    }
    for _ in 0..EACH {
        for client in &many {
            answered += usize::from(client.recv(&mut buffer).is_ok());
            client.send(&packet).unwrap();
        }
    }
    let per_s = answered as f64 / begun.elapsed().as_secs_f64();
    let lost = LATENCIES - took.len() + WINDOW * EACH - answered;
    println!(
        "{what}: p50 {} us, p99 {} us, {per_s:.0} queries/s, {lost} lost",
        p50.as_micros(),
        p99.as_micros()
    );
}

#[test]
#[ignore = "a measurement: scripts/bench dns"]
fn bench() {
    let rounds: usize = std::env::var("FCD_BENCH_ROUNDS").map_or(3, |n| n.parse().unwrap());
    let lab = Lab::with_resolvers(Arc::new(Web), "nameserver 127.0.0.1\n");
    let socket = lab.upstream.try_clone().unwrap();
    let upstream = thread::spawn("resolver", move || resolver(socket)).unwrap();
    let mut clients = Clients {
        at: lab.at,
        next: 0,
    };
    for _ in 0..rounds {
        measure("own name", "web.vm", &mut clients);
        measure("forwarded", "example.com", &mut clients);
    }
    let end = UdpSocket::bind("127.0.0.1:0").unwrap();
    end.send_to(b"end", lab.upstream.local_addr().unwrap())
        .unwrap();
    upstream.join().unwrap();
}
