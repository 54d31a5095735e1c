//! The fuzz target for what the daemon reads of a guest's scripts. `scripts/fuzz` runs it.

use super::listeners::{LISTENER_PORT_MIN, LISTENERS_MAX, parse};
use std::net::Ipv4Addr;

/// Reads a list of listeners, and checks that the ports are few and allowed.
pub fn listeners(list: &[u8]) {
    let Some(listeners) = parse(list, Ipv4Addr::new(10, 0, 2, 15)) else {
        return;
    };
    let (reachable, blocked) = (&listeners.reachable, &listeners.blocked);
    assert!(reachable.len() <= LISTENERS_MAX, "{listeners:?}");
    assert!(blocked.len() <= 2 * LISTENERS_MAX, "{listeners:?}");
    assert!(reachable.iter().all(|port| *port >= LISTENER_PORT_MIN));
    assert!(blocked.keys().all(|port| !reachable.contains(port)));
}
