//! Tests with helpers that a guest controls. The daemon kills and replaces a misbehaving helper,
//! and keeps running.

use super::process::{ask_until_answered, helper_pid};
use super::{Lab, Names, Web, ask};
use crate::host::confine::{Channel, Writer};
use crate::net::dns::helper::packet::{Query, TYPE_A};
use crate::net::dns::protocol::{ANSWER_BYTES_MAX, Order, Request, TO_HELPER_BYTES_MAX, Ticket};
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

pub(crate) const NAME: &str = "hostile-dns";
/// The number of clients whose answers the helper never reads. This is far more than a channel
/// holds.
const DEAF_TO: usize = 400;

/// Runs the hostile helper. The first label of a query chooses how it misbehaves. Any other query
/// is answered with the query itself. The helper is not confined, because confinement does not
/// limit what it can send.
pub(crate) fn run() -> ExitCode {
    let channel = Channel::inherited();
    let mut buffer = vec![0; TO_HELPER_BYTES_MAX];
    loop {
        let _ = poll(
            &mut [PollFd::new(channel.fd(), PollFlags::POLLIN)],
            PollTimeout::NONE,
        );
        let Ok(received) = channel.receive_with_fds(&mut buffer) else {
            return ExitCode::FAILURE;
        };
        let order = Order::decode(&buffer[..received.len]).expect("a valid order");
        if let Order::Question { ticket, packet, .. } = order {
            let label = Query::parse(&packet)
                .expect("a valid query")
                .labels
                .swap_remove(0);
            misbehave(&channel, ticket, &String::from_utf8_lossy(&label));
            let _ = channel.send(
                &Request::Answer {
                    ticket,
                    packet: &packet,
                }
                .encode(),
                &[],
            );
        }
    }
}

fn misbehave(channel: &Channel, ticket: Ticket, how: &str) {
    let say = |request: Request<'_>| drop(channel.send(&request.encode(), &[]));
    let lookup = |ticket| Request::Address {
        ticket,
        name: "web".parse().expect("a valid name"),
    };
    match how {
        "garbage" => drop(channel.send(&[0xff; 100], &[])),
        "oversize" => drop(channel.send(&[7; ANSWER_BYTES_MAX + 1000], &[])),
        "stranger" => say(Request::Answer {
            ticket: ticket.wrapping_add(1000),
            packet: b"x",
        }),
        "twice" => (0..2).for_each(|_| {
            say(Request::Answer {
                ticket,
                packet: b"x",
            })
        }),
        "path" => drop(channel.send(&Writer::new(4).word(ticket).bytes(b"../x").finish(), &[])),
        "greedy" => (0..4).for_each(|skip| say(Request::Resolver { ticket, skip })),
        "curious" => (0..10).for_each(|_| say(lookup(ticket))),
        "failed" => say(Request::Failed("cannot \x1b[2J".to_owned())),
        "exit" => std::process::exit(0),
        "passes-a-descriptor" => drop(channel.send(
            &Request::Done { ticket }.encode(),
            &[channel.fd(), channel.fd()],
        )),
        "deaf" => {
            let mut buffer = vec![0; TO_HELPER_BYTES_MAX];
            let mut tickets = vec![ticket];
            while tickets.len() < DEAF_TO {
                match channel.receive(&mut buffer) {
                    Ok(len) => match Order::decode(&buffer[..len]) {
                        Some(Order::Question { ticket, .. }) => tickets.push(ticket),
                        _ => return,
                    },
                    Err(_) => std::thread::yield_now(),
                }
            }
            for ticket in tickets.iter().flat_map(|ticket| [ticket; 3]) {
                while channel
                    .send(&lookup(*ticket).encode(), &[])
                    .is_err_and(|e| e.kind() == ErrorKind::WouldBlock)
                {
                    std::thread::yield_now();
                }
            }
            let _ = poll(&mut [], PollTimeout::NONE);
        }
        // The helper answers normally.
        _ => {}
    }
}

#[test]
fn helper_that_breaks_the_protocol_is_killed_and_replaced() {
    let lab = Lab::with_helper(NAME, Arc::new(Web), "nameserver 127.0.0.1\n");
    let good = ask("good.example", TYPE_A);
    assert_eq!(ask_until_answered(&lab, &good), good);
    for how in [
        "garbage",
        "oversize",
        "stranger",
        "twice",
        "path",
        "greedy",
        "curious",
        "failed",
        "exit",
        "passes-a-descriptor",
    ] {
        let pid = helper_pid(lab.server());
        lab.client()
            .send(&ask(&format!("{how}.example"), TYPE_A))
            .unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while helper_pid(lab.server()) == pid {
            assert!(Instant::now() < until, "the helper survived {how}");
            ask_until_answered(&lab, &good);
        }
        assert_eq!(ask_until_answered(&lab, &good), good, "after {how}");
    }
}

#[test]
fn helper_that_does_not_read_its_answers_is_killed_and_replaced() {
    let lab = Lab::with_helper(NAME, Arc::new(Web), "nameserver 127.0.0.1\n");
    let good = ask("good.example", TYPE_A);
    assert_eq!(ask_until_answered(&lab, &good), good);
    let pid = helper_pid(lab.server());
    let client = lab.client();
    client
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    client.send(&ask("deaf.example", TYPE_A)).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while helper_pid(lab.server()) == pid {
        assert!(Instant::now() < until, "the helper was not killed");
        // The next helper answers the remaining queries.
        (0..50).for_each(|_| drop(client.send(&ask("fill.example", TYPE_A))));
        let _ = client.recv(&mut [0; 512]);
    }
    // The first client has used up its rate, so another client asks.
    let other = UdpSocket::bind("127.0.0.2:0").unwrap();
    other.connect(lab.at).unwrap();
    other
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let is_answered = || other.send(&good).is_ok() && other.recv(&mut [0; 512]).is_ok();
    while !is_answered() {
        assert!(Instant::now() < until, "no answer");
    }
}

#[test]
fn helper_can_look_up_names_only_for_its_client() {
    /// An implementation of `Names` that checks and counts the clients that lookups are made for.
    struct Clients(AtomicUsize);
    impl Names for Clients {
        fn addresses(&self, _: &str, client: IpAddr) -> Option<crate::net::dns::Addresses> {
            assert_eq!(client, Ipv4Addr::LOCALHOST);
            self.0.fetch_add(1, Ordering::Relaxed);
            None
        }
        fn name(&self, _: Ipv4Addr, _: IpAddr) -> Option<String> {
            None
        }
    }
    let names = Arc::new(Clients(AtomicUsize::new(0)));
    let lab = Lab::with_helper(NAME, names.clone(), "nameserver 127.0.0.1\n");
    let pid = helper_pid(lab.server());
    lab.client().send(&ask("curious.example", TYPE_A)).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while names.0.load(Ordering::Relaxed) < 3 || helper_pid(lab.server()) == pid {
        assert!(Instant::now() < until);
        ask_until_answered(&lab, &ask("good.example", TYPE_A));
    }
    assert_eq!(
        names.0.load(Ordering::Relaxed),
        3,
        "as many as one query may need"
    );
}
