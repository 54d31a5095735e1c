//! Decides which ports to forward from what a guest listens on.

use crate::api::port::{AutoPorts, Port, Protocol, RefusalCause, RefusedPort};
use crate::guest::listeners::{Listeners, Obstacle};

/// The distance between a port below 1024 and the host's port that is suggested for it.
const UNPRIVILEGED: u16 = 8000;

/// The changes that make the forwards match the listeners.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Guest ports to forward, lowest first.
    pub open: Vec<u16>,
    /// Ports to stop forwarding, because their listeners have ended.
    pub close: Vec<Port>,
    /// Listeners that cannot be forwarded and are not recorded yet, lowest port first.
    pub refuse: Vec<RefusedPort>,
    /// Guest ports that were refused. The cause has gone, so they may be tried again.
    pub forget: Vec<u16>,
}

/// Compares the ports of a VM with the guest's listeners. `ports` are all published ports, those in
/// `auto` included.
pub(super) fn plan(ports: &[Port], auto: &AutoPorts, listeners: &Listeners) -> Plan {
    let has_ended =
        |port: &Port| auto.open.contains(port) && !listeners.reachable.contains(&port.guest_port);
    let is_published = |port: u16| {
        ports
            .iter()
            .any(|p| p.guest_port == port && p.protocol == Protocol::Tcp && !has_ended(p))
    };
    let lasts = |refused: &RefusedPort| {
        let blocked = listeners.blocked.get(&refused.guest_port);
        let has_cause = match refused.cause {
            RefusalCause::Conflict | RefusalCause::Removed => {
                listeners.reachable.contains(&refused.guest_port)
            }
            RefusalCause::Loopback => blocked == Some(&Obstacle::Loopback),
            RefusalCause::Privileged => blocked == Some(&Obstacle::Privileged),
        };
        has_cause && !is_published(refused.guest_port)
    };
    let (lasting, ended): (Vec<_>, Vec<_>) = auto.refused.iter().partition(|r| lasts(r));
    let is_new =
        |port: u16| !is_published(port) && lasting.iter().all(|refused| refused.guest_port != port);
    Plan {
        open: listeners
            .reachable
            .iter()
            .copied()
            .filter(|port| is_new(*port))
            .collect(),
        close: auto.open.iter().copied().filter(has_ended).collect(),
        refuse: listeners
            .blocked
            .iter()
            .filter(|(port, _)| is_new(**port))
            .map(|(port, obstacle)| blocked(*port, *obstacle))
            .collect(),
        forget: ended.iter().map(|refused| refused.guest_port).collect(),
    }
}

fn blocked(guest_port: u16, obstacle: Obstacle) -> RefusedPort {
    let (cause, reason) = match obstacle {
        Obstacle::Loopback => (
            RefusalCause::Loopback,
            "the process listens on the guest's loopback only; let it listen on 0.0.0.0".to_owned(),
        ),
        Obstacle::Privileged => (
            RefusalCause::Privileged,
            format!(
                "it is below 1024; publish it on another: fcctl port add VM {}:{guest_port}",
                guest_port + UNPRIVILEGED
            ),
        ),
    };
    RefusedPort {
        guest_port,
        cause,
        reason,
    }
}

/// Returns the forward for a guest port: the same port on the host's loopback.
pub(super) fn forward_of(guest_port: u16) -> Port {
    Port {
        host_addr: crate::api::port::loopback(),
        host_port: guest_port,
        guest_port,
        protocol: Protocol::Tcp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(guest_port: u16, cause: RefusalCause) -> RefusedPort {
        RefusedPort {
            guest_port,
            cause,
            reason: "taken".into(),
        }
    }

    fn auto(open: &[u16], conflicts: &[u16]) -> AutoPorts {
        AutoPorts {
            open: open.iter().copied().map(forward_of).collect(),
            refused: conflicts
                .iter()
                .map(|port| refused(*port, RefusalCause::Conflict))
                .collect(),
        }
    }

    fn reachable(ports: &[u16]) -> Listeners {
        Listeners {
            reachable: ports.iter().copied().collect(),
            ..Listeners::default()
        }
    }

    fn loopback(port: u16) -> Listeners {
        Listeners {
            blocked: [(port, Obstacle::Loopback)].into(),
            ..Listeners::default()
        }
    }

    #[track_caller]
    fn check(ports: &[Port], auto: &AutoPorts, listeners: &Listeners, expected: &Plan) {
        let all: Vec<Port> = ports.iter().chain(&auto.open).copied().collect();
        assert_eq!(plan(&all, auto, listeners), *expected);
    }

    fn open(ports: &[u16]) -> Plan {
        Plan {
            open: ports.to_vec(),
            ..Plan::default()
        }
    }

    fn forget(port: u16) -> Plan {
        Plan {
            forget: vec![port],
            ..Plan::default()
        }
    }

    #[test]
    fn forwards_follow_listeners() {
        let none = auto(&[], &[]);
        check(&[], &none, &reachable(&[]), &Plan::default());
        check(&[], &none, &reachable(&[8080, 3000]), &open(&[3000, 8080]));
        let web = auto(&[3000], &[]);
        check(&[], &web, &reachable(&[8080, 3000]), &open(&[8080]));
        let close = Plan {
            close: vec![forward_of(3000)],
            ..Plan::default()
        };
        let both = auto(&[3000, 8080], &[]);
        check(&[], &both, &reachable(&[8080]), &close);
    }

    #[test]
    fn refused_port_is_tried_again_after_its_listener_has_ended() {
        let conflict = auto(&[], &[3000]);
        check(&[], &conflict, &reachable(&[3000]), &Plan::default());
        check(&[], &conflict, &reachable(&[]), &forget(3000));
        check(&[], &auto(&[], &[]), &reachable(&[3000]), &open(&[3000]));
        check(
            &[forward_of(3000)],
            &conflict,
            &reachable(&[3000]),
            &forget(3000),
        );
    }

    #[test]
    fn blocked_listener_is_refused_once_until_it_can_be_reached() {
        let none = auto(&[], &[]);
        let refuse = plan(&[], &none, &loopback(3000)).refuse;
        assert_eq!(refuse, [blocked(3000, Obstacle::Loopback)]);
        let known = AutoPorts {
            open: Vec::new(),
            refused: refuse,
        };
        check(&[], &known, &loopback(3000), &Plan::default());
        let reached = Plan {
            open: vec![3000],
            ..forget(3000)
        };
        check(&[], &known, &reachable(&[3000]), &reached);
        check(&[], &known, &reachable(&[]), &forget(3000));
        let moved = plan(&[forward_of(3000)], &auto(&[3000], &[]), &loopback(3000));
        assert_eq!((moved.close.len(), moved.refuse.len()), (1, 1));
        check(
            &[forward_of(3000)],
            &none,
            &loopback(3000),
            &Plan::default(),
        );
        let conflict = plan(&[], &auto(&[], &[3000]), &loopback(3000));
        assert_eq!((conflict.forget.len(), conflict.refuse.len()), (1, 1));
        let low = blocked(80, Obstacle::Privileged);
        assert!(low.reason.ends_with("fcctl port add VM 8080:80"), "{low:?}");
    }

    #[test]
    fn ports_that_the_owner_published_are_left_alone() {
        let own = Port {
            host_port: 9000,
            ..forward_of(3000)
        };
        let none = auto(&[], &[]);
        check(&[own], &none, &reachable(&[3000]), &Plan::default());
        check(&[own], &none, &reachable(&[]), &Plan::default());
        let udp = Port {
            protocol: Protocol::Udp,
            ..own
        };
        check(&[udp], &none, &reachable(&[3000]), &open(&[3000]));
    }
}
