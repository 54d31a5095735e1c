//! A lab of unnamed network namespaces. A namespace disappears with its last thread, socket and
//! process, so a panicking test leaves nothing behind. [`Net`] works in `host`, and `outside` is
//! the network behind the host. Each guest is a namespace whose only interface is relayed to the
//! guest's tap, as a VMM relays its guest's interface.

use super::super::{Access, Guest, Net, Tap, tun};
use crate::config::{Ipv6, Network as Config};
use crate::host::{Command, Commands, HostCommands};
use crate::locks::Cancel;
use crate::sched::Instant;
use crate::sched::JoinHandle;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::io::{PipeWriter, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const INSTALL: &str = "1a2b3c4d";
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The host's address on the outside network.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
pub(crate) const OUTSIDE_IPV6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
pub(crate) const HOST_IPV6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 89, 0, 1);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The deadline of each wait. Only a failing test waits this long.
const DEADLINE: Duration = Duration::from_secs(30);

/// True if the tests run as root, which namespaces need. Otherwise prints that the test is skipped.
pub(crate) fn is_root() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        eprintln!(
            "SKIPPED because it needs root: {:?}",
            std::thread::current().name()
        );
    }
    is_root
}

pub(crate) struct Ns(File);

impl Ns {
    pub(crate) fn new() -> Self {
        let made = std::thread::scope(|s| {
            s.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("create a network namespace");
                Self(File::open("/proc/thread-self/ns/net").unwrap())
            })
            .join()
            .unwrap()
        });
        made.sh("ip link set lo up");
        made
    }

    /// Runs a closure on a new thread in this namespace.
    pub(crate) fn run<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        let done = std::thread::scope(|s| {
            s.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).expect("enter a network namespace");
                what()
            })
            .join()
        });
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs a line of shell and returns its output.
    #[track_caller]
    pub(crate) fn sh(&self, line: &str) -> String {
        match self.run(|| {
            HostCommands.run(
                &Command::new("sh").args(["-ec", line]),
                &Cancel::try_new().unwrap(),
                &mut |_| {},
            )
        }) {
            Ok(output) => String::from_utf8(output.stdout).unwrap(),
            Err(e) => panic!("{line}: {e}"),
        }
    }

    /// Returns a path for `ip link set ... netns`.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Binds a socket. Retries, because a closed socket with the same address stays open in a child
    /// process that has forked but not yet executed its program.
    pub(crate) fn udp(&self, at: impl Into<SocketAddr>) -> Udp {
        let (at, deadline) = (at.into(), Instant::now() + DEADLINE);
        self.run(|| {
            loop {
                match UdpSocket::bind(at) {
                    Ok(socket) => return Udp(socket),
                    Err(e)
                        if e.kind() == std::io::ErrorKind::AddrInUse
                            && Instant::now() < deadline =>
                    {
                        std::thread::yield_now()
                    }
                    Err(e) => panic!("bind {at}: {e}"),
                }
            }
        })
    }
}

pub(crate) struct Udp(pub UdpSocket);

impl Udp {
    pub(crate) fn send(&self, what: &str, to: impl Into<SocketAddr>) {
        // An error such as "not permitted" counts as a lost packet.
        let _ = self.0.send_to(what.as_bytes(), to.into());
    }

    /// Receives the next datagram. Returns its text and its sender.
    #[track_caller]
    pub(crate) fn next(&self) -> (String, SocketAddr) {
        self.0.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut buffer = [0; 2048];
        let (len, from) = self.0.recv_from(&mut buffer).expect("receive a datagram");
        (String::from_utf8_lossy(&buffer[..len]).into_owned(), from)
    }

    /// True if a datagram has arrived.
    pub(crate) fn has_any(&self) -> bool {
        self.0.set_nonblocking(true).unwrap();
        let any = self.0.peek_from(&mut [0; 1]).is_ok();
        self.0.set_nonblocking(false).unwrap();
        any
    }
}

pub(crate) struct Lab {
    pub net: Net,
    pub host: Ns,
    pub outside: Ns,
}

pub(crate) fn config() -> Config {
    Config {
        driver: crate::config::NetworkDriver::Bridge,
        taps_ahead: 2,
        ipv6: Ipv6::Off,
        ..Config::default()
    }
}

pub(crate) fn tag(n: u32) -> String {
    format!("fc-{INSTALL}-0123456789ab-{n}")
}

impl Lab {
    pub(crate) fn new(config: &Config) -> Self {
        Self::with(config, Arc::new(HostCommands))
    }

    pub(crate) fn with(config: &Config, commands: Arc<dyn Commands>) -> Self {
        let (host, outside) = (Ns::new(), Ns::new());
        host.sh(&format!(
            "ip link add up0 type veth peer name down0; ip link set down0 netns {}",
            outside.path()
        ));
        host.sh(&format!("ip address add {HOST}/24 dev up0; ip link set up0 up; ip route add default via {OUTSIDE}"));
        outside.sh(&format!(
            "ip address add {OUTSIDE}/24 dev down0; ip link set down0 up"
        ));
        if config.ipv6 == Ipv6::Auto {
            host.sh(&format!("ip -6 address add {HOST_IPV6}/64 dev up0 nodad; ip -6 route add default via {OUTSIDE_IPV6}"));
            outside.sh(&format!(
                "ip -6 address add {OUTSIDE_IPV6}/64 dev down0 nodad"
            ));
        }
        let net = open(&host, config, commands).unwrap();
        Self { net, host, outside }
    }

    pub(crate) fn guest(&self, slot: u32, access: Access) -> Guest {
        Guest {
            tag: tag(slot),
            lease: self.net.lease(slot).unwrap(),
            access,
            rx_bytes_per_s: None,
            tx_bytes_per_s: None,
        }
    }

    pub(crate) fn take(&self, guest: &Guest) -> Tap {
        self.host
            .run(|| self.net.take(guest, 4711, &Cancel::try_new().unwrap()))
            .unwrap()
    }

    pub(crate) fn release(&self, n: u32) {
        self.host.run(|| self.net.release(&tag(n))).unwrap();
    }

    /// Takes a tap for the guest of this slot, and starts the guest.
    pub(crate) fn start(&self, slot: u32, access: Access) -> Machine {
        let guest = self.guest(slot, access);
        let tap = self.take(&guest);
        Machine::start(&self.host, &tap.name, guest)
    }

    /// Describes all of fcd's state: interfaces and the elements of the sets.
    pub(crate) fn census(&self) -> String {
        let links = self
            .host
            .sh("ip -o link show type tun; ip -o link show type bridge");
        let mut lines: Vec<String> = links
            .lines()
            .map(|l| l.split(": ").nth(1).unwrap_or_default().to_owned())
            .collect();
        lines.sort();
        lines.extend(self.elements());
        lines.join(" ")
    }

    pub(crate) fn elements(&self) -> Vec<String> {
        let list = format!(
            "nft list set bridge fcd_{INSTALL} guests; nft list set inet fcd_{INSTALL} nat; ip neighbour show nud permanent dev fcbr0"
        );
        let text = self.host.sh(&list);
        let words = text
            .split([' ', ',', '\n'])
            .filter(|w| w.starts_with("10.89."));
        let mut words: Vec<_> = words.map(str::to_owned).collect();
        words.sort();
        words
    }

    /// Waits until there are `count` spare taps.
    #[track_caller]
    pub(crate) fn await_taps(&self, count: usize) {
        let deadline = Instant::now() + DEADLINE;
        while self.net.taps_ready() != count {
            assert!(
                Instant::now() < deadline,
                "{} taps of {count} are ready",
                self.net.taps_ready()
            );
            std::thread::yield_now();
        }
    }
}

pub(crate) fn open(
    host: &Ns,
    config: &Config,
    commands: Arc<dyn Commands>,
) -> crate::error::Result<Net> {
    host.run(|| Net::open(config, INSTALL, commands, &Cancel::try_new().unwrap()))
}

/// A guest: a namespace behind a tap.
pub(crate) struct Machine {
    pub guest: Guest,
    pub ns: Ns,
    tap: File,
    ends: Option<(PipeWriter, JoinHandle<()>)>,
}

impl Machine {
    pub(crate) fn start(host: &Ns, tap: &str, guest: Guest) -> Self {
        let ns = Ns::new();
        let here = host.run(|| tun::connect(tap)).unwrap();
        let there = ns.run(|| tun::connect("eth0")).unwrap();
        // The bridge forwards to a port only after it has noticed the port's carrier.
        let deadline = Instant::now() + DEADLINE;
        while !host
            .sh(&format!("ip -d link show dev {tap}"))
            .contains("state forwarding")
        {
            assert!(Instant::now() < deadline, "port {tap} does not forward");
        }
        let lease = guest.lease;
        ns.sh(&format!(
            "ip link set eth0 address {} addrgenmode none; ip address add {}/{} dev eth0; ip link set eth0 up; ip route add default via {}",
            lease.mac, lease.address, lease.prefix, lease.gateway
        ));
        let (reader, writer) = std::io::pipe().unwrap();
        let tap = here.try_clone().unwrap();
        let relay = crate::host::thread::spawn("relay", move || {
            let mut buffer = vec![0; 65_536];
            loop {
                let mut fds = [&here, &there]
                    .map(|f| PollFd::new(f.as_fd(), PollFlags::POLLIN))
                    .to_vec();
                fds.push(PollFd::new(reader.as_fd(), PollFlags::POLLIN));
                poll(&mut fds, PollTimeout::NONE).unwrap();
                if fds[2].any().unwrap() {
                    return;
                }
                for (mut from, mut to) in [(&here, &there), (&there, &here)] {
                    while let Ok(len) = from.read(&mut buffer) {
                        let _ = to.write(&buffer[..len]);
                    }
                }
            }
        })
        .unwrap();
        let machine = Self {
            guest,
            ns,
            tap,
            ends: Some((writer, relay)),
        };
        machine.take_ipv6();
        machine
    }

    /// Gives the guest the IPv6 address of its lease, if there is one.
    pub(crate) fn take_ipv6(&self) {
        let Some(ipv6) = self.guest.lease.ipv6 else {
            return;
        };
        self.ns.sh(&format!(
            "ip -6 address replace {}/128 dev eth0 nodad; ip -6 route replace {gateway} dev eth0; ip -6 route replace default via {gateway} dev eth0",
            ipv6.address,
            gateway = ipv6.gateway
        ));
    }

    pub(crate) fn address(&self) -> Ipv4Addr {
        self.guest.lease.address
    }

    /// Opens a socket at the guest's address.
    pub(crate) fn udp(&self) -> Udp {
        self.ns.udp((self.address(), 0))
    }

    /// Sends a raw frame: destination, source, type, payload.
    pub(crate) fn inject(&self, frame: &[u8]) {
        assert_eq!((&self.tap).write(frame).unwrap(), frame.len());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some((writer, relay)) = self.ends.take() {
            drop(writer);
            let _ = relay.join();
        }
    }
}
