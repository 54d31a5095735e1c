//! Tests of the rate limits of a tap.

use super::super::lab::{INSTALL, Lab, OUTSIDE, Udp, config, is_root, tag};
use super::ANY;
use crate::net::Access;
use std::net::SocketAddr;

/// Sends up to `most` datagrams one by one. Returns how many arrive before the first is lost.
fn arrivals(from: &Udp, to: &Udp, at: SocketAddr, most: usize) -> usize {
    to.0.set_read_timeout(Some(std::time::Duration::from_secs(1)))
        .unwrap();
    let (sent, mut buffer) = ([7; 1400], [0; 2048]);
    (0..most)
        .find(|_| from.0.send_to(&sent, at).is_err() || to.0.recv(&mut buffer).is_err())
        .unwrap_or(most)
}

#[test]
fn guest_traffic_is_limited_by_its_rates() {
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
    let counts = |most| {
        [
            arrivals(&inside, &outside, (OUTSIDE, 9000).into(), most),
            arrivals(&outside, &inside, back, most),
        ]
    };
    // The number of datagrams to send, three times the burst. Beyond the burst, each datagram would
    // take seconds at this rate.
    const FLOOD: usize = 600;
    let burst = 256 * 1024 / 1442;
    assert_eq!(counts(FLOOD), [FLOOD; 2]);
    for (rx, tx) in [(None, Some(1)), (Some(1), None), (Some(1), Some(1))] {
        set(rx.map(|_: u64| 1000), tx.map(|_: u64| 1000));
        let limited = counts(FLOOD);
        for (count, is_limited) in limited.into_iter().zip([tx.is_some(), rx.is_some()]) {
            assert!(
                if is_limited {
                    (burst / 2..FLOOD).contains(&count)
                } else {
                    count == FLOOD
                },
                "{limited:?}"
            );
        }
        // Mending restores the limits after a flush.
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
    // Releasing the guest removes its limits.
    set(Some(1 << 20), Some(1 << 20));
    drop(guest);
    lab.release(0);
    let left = lab.host.sh(&format!("nft list table bridge fcd_{INSTALL}"));
    assert!(!left.contains("burst"), "{left}");
    assert!(
        lab.host
            .run(|| lab.net.set_rates(&tag(0), None, None))
            .is_err(),
        "the guest is gone"
    );
}
