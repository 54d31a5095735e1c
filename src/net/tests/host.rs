//! Tests of the host's network state: fcd creates, finds, repairs and removes its own state and
//! leaves everything else alone.

use super::lab::{INSTALL, Lab, Machine, Ns, OUTSIDE, config, is_root, open, tag};
use crate::api::daemon::Severity;
use crate::api::port::{Port, Protocol};
use crate::error::{Error, Kind, Result};
use crate::host::{Command, Commands, HostCommands, Output};
use crate::locks::{Cancel, CancelCause};
use crate::net::{Access, Net, checks};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

fn cancel() -> Cancel {
    Cancel::try_new().unwrap()
}

#[test]
fn tap_is_owned_by_its_vm_and_removed_with_it() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    lab.await_taps(2);
    let empty = lab.census();
    let (a, b) = (lab.guest(0, Access::Nat), lab.guest(1, Access::None));
    let (tap_a, tap_b) = (lab.take(&a), lab.take(&b));
    assert_ne!(tap_a, tap_b);
    assert_eq!(lab.host.run(|| lab.net.list()).unwrap(), [tag(0), tag(1)]);
    let details = lab.host.sh(&format!("ip -d link show dev {}", tap_a.name));
    for part in [
        "master fcbr0",
        "isolated on",
        "user 4711",
        &format!("alias {}", tag(0)),
        ",UP",
    ] {
        assert!(details.contains(part), "{part} is not in {details}");
    }
    assert_eq!(
        lab.elements(),
        [
            "10.89.0.2",
            "10.89.0.2",
            "10.89.0.2",
            "10.89.0.3",
            "10.89.0.3"
        ]
    );
    // A second take for the same guest replaces the guest's tap.
    let again = lab.take(&a);
    assert_ne!(again, tap_a);
    lab.release(0);
    lab.release(0);
    lab.release(1);
    assert_eq!(lab.host.run(|| lab.net.list()).unwrap(), [""; 0]);
    lab.await_taps(2);
    let strip = |census: String| census.replace(|c: char| c.is_ascii_digit(), "");
    assert_eq!(
        strip(lab.census()),
        strip(empty),
        "the state differs in more than numbers"
    );
    assert!(
        lab.host
            .run(|| lab.net.release("fc-00000000-0123456789ab-1"))
            .is_err(),
        "a tag of another installation is refused"
    );
}

#[test]
fn killed_daemons_network_is_adopted_by_next_one() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    lab.await_taps(2);
    let guest = lab.guest(0, Access::Nat);
    let tap = lab.take(&guest);
    lab.await_taps(2);
    // Adds a tap that was left before it got its alias.
    lab.host.sh(&format!(
        "ip tuntap add dev fc{INSTALL}-77 mode tap; ip tuntap add dev tap0 mode tap"
    ));
    let machine = Machine::start(&lab.host, &tap.name, guest.clone());
    let Lab { net, host, outside } = lab;
    std::mem::forget(net);
    let net = open(&host, &config(), Arc::new(HostCommands)).unwrap();
    let lab = Lab { net, host, outside };
    lab.await_taps(2);
    let taps = lab.host.sh("ip -o link show type tun");
    assert_eq!(
        taps.lines().count(),
        4,
        "two spare taps, the VM's, and a foreign one: {taps}"
    );
    assert!(!taps.contains("-77:") && taps.contains("tap0:"), "{taps}");
    lab.host
        .run(|| lab.net.adopt(std::slice::from_ref(&guest)))
        .unwrap();
    assert_eq!(
        lab.host.run(|| lab.net.mend()).unwrap(),
        [""; 0],
        "there is nothing to repair"
    );
    let outside = lab.outside.udp((Ipv4Addr::UNSPECIFIED, 9000));
    machine.udp().send("still there", (OUTSIDE, 9000));
    assert_eq!(outside.next().0, "still there");
    lab.release(0);
    assert_eq!(lab.elements(), [""; 0]);
}

#[test]
fn mend_repairs_what_others_break() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let machine = lab.start(0, Access::Nat);
    let outside = lab.outside.udp((Ipv4Addr::UNSPECIFIED, 9000));
    for (harm, found) in [
        ("nft flush ruleset", "restored the rules of guests"),
        (
            "nft flush set inet fcd_1a2b3c4d nat",
            "restored the rules of fc-1a2b3c4d-0123456789ab-0",
        ),
        ("ip link delete fcbr0", "created bridge fcbr0"),
        ("ip link set fcbr0 down", "set bridge fcbr0 up"),
        (
            "ip address flush dev fcbr0; ip address add 10.1.1.1/24 dev fcbr0",
            "added address 10.89.0.1/24 to bridge fcbr0",
        ),
        (
            "sysctl -q -w net.ipv4.ip_forward=0",
            "turned IPv4 forwarding on",
        ),
    ] {
        lab.host.sh(harm);
        let done = lab.host.run(|| lab.net.mend()).unwrap();
        assert!(done.iter().any(|d| d == found), "{harm}: {done:?}");
        assert_eq!(
            lab.host.run(|| lab.net.mend()).unwrap(),
            [""; 0],
            "the second time after {harm}"
        );
        machine.udp().send(harm, (OUTSIDE, 9000));
        assert_eq!(outside.next().0, harm);
    }
    // Mending removes the rules of a tap that no longer exists.
    lab.host.sh("ip link delete \"$(ip -o link show master fcbr0 | cut -d: -f2 | tr -d ' ' | cut -d@ -f1)\"");
    lab.host.run(|| lab.net.release(&tag(0))).unwrap();
    assert_eq!(lab.elements(), [""; 0]);
}

#[test]
fn foreign_bridge_taps_and_tables_are_kept() {
    if !is_root() {
        return;
    }
    let host = Ns::new();
    host.sh("ip link add fcbr0 type bridge; ip link set fcbr0 alias mine; ip tuntap add dev fctap mode tap");
    host.sh(
        "nft 'add table inet fcd_00000000; add chain inet fcd_00000000 c { type filter hook forward priority 0; policy drop; }'",
    );
    let of_others = "ip -o link show; nft list table inet fcd_00000000";
    let before = host.sh(of_others);
    let e = open(&host, &config(), Arc::new(HostCommands))
        .err()
        .unwrap();
    assert_eq!(e.kind(), Kind::Conflict);
    assert!(e.hint_text().unwrap().contains("[network]"), "{e}");
    assert_eq!(host.sh(of_others), before);
    let other_name = crate::config::Network {
        bridge: "fcbr1".into(),
        ..config()
    };
    let net = open(&host, &other_name, Arc::new(HostCommands)).unwrap();
    host.run(|| net.remove_all()).unwrap();
    assert_eq!(host.sh(of_others), before);
    assert!(!host.sh("nft list tables").contains(INSTALL));
}

#[test]
fn second_installation_is_refused_before_creating_anything() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    lab.await_taps(2);
    let all = "ip -o link show; ip -4 -o address show; ip -4 route show table all; nft list tables";
    let before = lab.host.sh(all);
    let second = |config: crate::config::Network| {
        lab.host.run(|| {
            Net::open(&config, "00000002", Arc::new(HostCommands), &cancel())
                .map(|net| net.remove_all().unwrap())
        })
    };
    let named = |bridge: &str, subnet: &str| {
        let subnet = subnet.parse().unwrap();
        crate::config::Network {
            bridge: bridge.into(),
            subnet,
            taps_ahead: 0,
            ..config()
        }
    };
    for (config, hints) in [
        (named("fcbr0", "10.89.0.0/24"), ["bridge = ", "subnet = "]),
        (
            named("fcbr0", "10.90.0.0/24"),
            ["another name", "bridge = "],
        ),
        (
            named("fcbr1", "10.89.0.0/24"),
            ["another subnet", "subnet = "],
        ),
        (
            named("fcbr1", "10.89.0.0/16"),
            ["another subnet", "subnet = "],
        ),
    ] {
        let shown = format!("{} {}", config.bridge, config.subnet);
        let e = second(config).unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict, "{shown}: {e}");
        assert!(
            hints
                .iter()
                .all(|hint| e.hint_text().unwrap().contains(hint)),
            "{shown}: {:?}",
            e.hint_text()
        );
        assert_eq!(lab.host.sh(all), before, "{shown}: something was created");
    }
    // A route to a network that contains the subnet, such as a VPN's, is not a conflict.
    lab.host
        .sh("ip link add vpn type bridge; ip link set vpn up; ip route add 10.88.0.0/14 dev vpn");
    second(named("fcbr1", "10.90.0.0/24")).unwrap();
    // Once fcd's bridge has the subnet, a route into the subnet from another program does not
    // prevent a restart.
    lab.host.sh("ip route add 10.89.0.128/25 dev vpn");
    open(&lab.host, &config(), Arc::new(HostCommands)).unwrap();
}

/// Host commands of which the `fail_at`-th fails. None fails if `fail_at` is 0.
struct Failing {
    count: AtomicUsize,
    fail_at: AtomicUsize,
}

impl Commands for Failing {
    fn run(
        &self,
        command: &Command,
        cancel: &Cancel,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Output> {
        if self.count.fetch_add(1, Ordering::SeqCst) + 1 == self.fail_at.load(Ordering::SeqCst) {
            return Err(Error::new(Kind::CommandFailed, "failed by the test"));
        }
        HostCommands.run(command, cancel, on_line)
    }
}

impl Failing {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            count: AtomicUsize::new(0),
            fail_at: AtomicUsize::new(0),
        })
    }
    /// Makes the n-th command from now on fail, or none if `n` is 0.
    fn arm(&self, n: usize) {
        self.count.store(0, Ordering::SeqCst);
        self.fail_at.store(n, Ordering::SeqCst);
    }
}

#[test]
fn failed_spare_tap_is_made_later() {
    if !is_root() {
        return;
    }
    let commands = Failing::new();
    let one = crate::config::Network {
        taps_ahead: 1,
        ..config()
    };
    let lab = Lab::with(&one, commands.clone());
    lab.await_taps(1);
    // The take runs four commands, and the fifth tags the next spare tap.
    commands.arm(5);
    lab.take(&lab.guest(0, Access::Nat));
    let deadline = Instant::now() + Duration::from_secs(20);
    while lab.net.pool.making() > 0 {
        assert!(Instant::now() < deadline, "the failed tap still counts");
        std::thread::yield_now();
    }
    assert_eq!(lab.net.taps_ready(), 0);
    commands.arm(0);
    lab.take(&lab.guest(1, Access::Nat));
    lab.await_taps(1);
}

/// Lets no spare tap be finished before the pool closes.
#[derive(Default)]
struct FinishedLate {
    is_waiting: AtomicBool,
}

impl Commands for FinishedLate {
    fn run(
        &self,
        command: &Command,
        cancel: &Cancel,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Output> {
        let output = HostCommands.run(command, cancel, on_line);
        let deadline = Instant::now() + Duration::from_secs(20);
        let input = String::from_utf8_lossy(&command.stdin);
        let is_spare = input.starts_with(&format!("link set dev fc{INSTALL}-"))
            && input.contains("addrgenmode none");
        self.is_waiting.fetch_or(is_spare, Ordering::SeqCst);
        while is_spare && !cancel.is_cancelled() {
            assert!(Instant::now() < deadline, "the pool does not close");
            std::thread::yield_now();
        }
        output
    }
}

#[test]
fn spare_tap_that_is_finished_after_close_is_removed() {
    if !is_root() {
        return;
    }
    let commands = Arc::new(FinishedLate::default());
    let lab = Lab::with(&config(), commands.clone());
    let deadline = Instant::now() + Duration::from_secs(20);
    while !commands.is_waiting.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "no spare tap is made");
        std::thread::yield_now();
    }
    lab.host.run(|| lab.net.close());
    assert_eq!(lab.net.taps_ready(), 0);
    assert_eq!(lab.census(), "fcbr0");
}

#[test]
fn ports_that_could_not_be_published_are_free() {
    if !is_root() {
        return;
    }
    let commands = Failing::new();
    let lab = Lab::with(&config(), commands.clone());
    let guest = lab.guest(0, Access::Nat);
    lab.take(&guest);
    let port = Port {
        host_addr: Ipv4Addr::UNSPECIFIED,
        host_port: 8080,
        guest_port: 80,
        protocol: Protocol::Tcp,
    };
    lab.await_taps(2);
    let mut failed = 0;
    loop {
        commands.arm(failed + 1);
        let published = lab
            .host
            .run(|| lab.net.forward(&guest, &[port], &cancel()).is_ok());
        commands.arm(0);
        if published {
            break;
        }
        let is_free = || crate::net::require_free_ports(&[port]).is_ok();
        assert!(lab.host.run(is_free), "after command {}", failed + 1);
        failed += 1;
    }
    assert!(failed > 0);
}

#[test]
fn take_failing_at_any_step_leaves_nothing() {
    if !is_root() {
        return;
    }
    let commands = Failing::new();
    // Without spare taps, the take itself runs every command.
    let lab = Lab::with(
        &crate::config::Network {
            taps_ahead: 0,
            ..config()
        },
        commands.clone(),
    );
    let empty = lab.census();
    let guest = lab.guest(0, Access::Nat);
    let mut failed = 0;
    loop {
        commands.count.store(0, Ordering::SeqCst);
        commands.fail_at.store(failed + 1, Ordering::SeqCst);
        let taken = lab.host.run(|| lab.net.take(&guest, 4711, &cancel()));
        if taken.is_ok() {
            break;
        }
        assert_eq!(
            lab.census(),
            empty,
            "after a failure of command {}",
            failed + 1
        );
        failed += 1;
    }
    assert_eq!(
        failed, 5,
        "the commands are: list, tag as spare, tag as the VM's, rules, join"
    );
    // A failed release can be repeated.
    for step in 1..=4 {
        commands.count.store(0, Ordering::SeqCst);
        commands.fail_at.store(step, Ordering::SeqCst);
        let _ = lab.host.run(|| lab.net.release(&guest.tag));
    }
    commands.fail_at.store(0, Ordering::SeqCst);
    lab.host.run(|| lab.net.release(&guest.tag)).unwrap();
    assert_eq!(lab.census(), empty);
    // A cancelled take also leaves nothing.
    let cancelled = cancel();
    cancelled.cancel(CancelCause::Requested);
    let e = lab
        .host
        .run(|| lab.net.take(&guest, 4711, &cancelled))
        .unwrap_err();
    assert_eq!((e.kind(), lab.census()), (Kind::Cancelled, empty));
}

#[test]
fn concurrent_takes_releases_and_mends_are_consistent() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    std::thread::scope(|s| {
        for thread in 0..4 {
            let lab = &lab;
            s.spawn(move || {
                for round in 0..3 {
                    let guest = lab.guest(thread * 3 + round, Access::Nat);
                    let tap = lab.take(&guest);
                    lab.host.sh(&format!(
                        "ip link show dev {} master fcbr0 | grep -q .",
                        tap.name
                    ));
                    if round > 0 {
                        lab.release(thread * 3 + round);
                    }
                }
            });
        }
        s.spawn(|| (0..6).for_each(|_| drop(lab.host.run(|| lab.net.mend()).unwrap())));
    });
    let mut left = lab.host.run(|| lab.net.list()).unwrap();
    assert_eq!(left.len(), 4, "{left:?}");
    assert_eq!(
        lab.host.run(|| lab.net.mend()).unwrap(),
        [""; 0],
        "connected guests have their rules"
    );
    left.drain(..)
        .for_each(|tag| lab.host.run(|| lab.net.release(&tag)).unwrap());
    assert_eq!(lab.elements(), [""; 0]);
    lab.host.run(|| lab.net.remove_all()).unwrap();
    assert_eq!(
        lab.host
            .sh("ip -o link show type tun; ip -o link show type bridge; nft list ruleset"),
        ""
    );
}

#[test]
fn doctor_reports_blocking_firewall_and_its_fix_works() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&config());
    let machine = lab.start(0, Access::Nat);
    let look = || {
        let checks = lab.host.run(|| checks(&config(), &HostCommands, &cancel()));
        checks
            .into_iter()
            .filter(|c| c.severity != Severity::Ok && c.id.starts_with("network"))
            .collect::<Vec<_>>()
    };
    assert_eq!(look(), [], "nothing blocks guests");
    lab.host.sh("nft 'add table inet mine; add chain inet mine others { type filter hook forward priority 10; policy drop; }'");
    let found = look();
    assert_eq!(found.len(), 1, "{found:?}");
    let outside = lab.outside.udp((Ipv4Addr::UNSPECIFIED, 9000));
    machine.udp().send("blocked", (OUTSIDE, 9000));
    lab.host.sh(found[0].fix.as_ref().unwrap());
    machine.udp().send("open", (OUTSIDE, 9000));
    assert_eq!(outside.next().0, "open");
    assert_eq!(look(), []);
    lab.host.sh("ip route add 10.89.0.128/25 via 192.0.2.1");
    let found = look();
    assert!(
        found.len() == 1 && found[0].found.contains("10.89.0.128/25 on up0"),
        "{found:?}"
    );
}
