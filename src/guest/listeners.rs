//! Reads the list of the TCP ports on which processes of a guest listen. The guest's kernel writes
//! it, so it may be anything.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

/// The most ports of one kind that are read. If there are more, the lowest count.
pub const LISTENERS_MAX: usize = 64;
/// The first port that can be forwarded. The ports below belong to the system.
pub const LISTENER_PORT_MIN: u16 = 1024;
/// The port of the guest's SSH server, which is never read.
const SSH_PORT: u16 = 22;

/// The digits of an IPv4 address in `/proc/net/tcp`.
const V4_DIGITS: usize = 8;
/// The digits of an IPv6 address in `/proc/net/tcp6`.
const V6_DIGITS: usize = 32;
const PORT_DIGITS: usize = 4;

/// The ports on which processes of a guest listen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listeners {
    /// The ports that can be forwarded.
    pub reachable: BTreeSet<u16>,
    /// The ports that cannot be forwarded.
    pub blocked: BTreeMap<u16, Obstacle>,
}

/// The reason why a port cannot be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The process listens on the guest's loopback only.
    Loopback,
    /// The port is below [`LISTENER_PORT_MIN`].
    Privileged,
}

/// Returns the ports that the host can reach at `guest`, the guest's address, and those that it
/// cannot. Ignores the loopback's ports below [`LISTENER_PORT_MIN`]. Each line has a local address
/// as in `/proc/net/tcp` and `/proc/net/tcp6`. Returns `None` if a line has any other form.
pub fn parse(list: &[u8], guest: Ipv4Addr) -> Option<Listeners> {
    let mut reachable = BTreeSet::new();
    let (mut loopback, mut privileged) = (BTreeSet::new(), BTreeSet::new());
    for line in list.split(|byte| *byte == b'\n') {
        if line.is_empty() {
            continue;
        }
        let (address, port) = socket(line)?;
        let is_low = port < LISTENER_PORT_MIN;
        let ports = match address {
            _ if port == SSH_PORT => continue,
            a if a.is_loopback() && !is_low => &mut loopback,
            a if !a.is_unspecified() && a != guest => continue,
            _ if is_low => &mut privileged,
            _ => &mut reachable,
        };
        ports.insert(port);
        if ports.len() > LISTENERS_MAX {
            ports.pop_last();
        }
    }
    let loopback = loopback.difference(&reachable);
    let blocked = loopback
        .map(|port| (*port, Obstacle::Loopback))
        .chain(privileged.iter().map(|port| (*port, Obstacle::Privileged)))
        .collect();
    Some(Listeners { reachable, blocked })
}

/// Returns the address and port of one line. An IPv6 address that leads to no IPv4 address becomes
/// 255.255.255.255, on which nothing can listen.
fn socket(line: &[u8]) -> Option<(Ipv4Addr, u16)> {
    let at = line.iter().position(|byte| *byte == b':')?;
    let (address, port) = (&line[..at], &line[at + 1..]);
    let address = match address.len() {
        V4_DIGITS => Ipv4Addr::from(word(address)?.to_le_bytes()),
        V6_DIGITS => {
            let mut bytes = [0; 16];
            for (word_bytes, digits) in bytes.chunks_mut(4).zip(address.chunks(V4_DIGITS)) {
                word_bytes.copy_from_slice(&word(digits)?.to_le_bytes());
            }
            v4_part(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    if port.len() != PORT_DIGITS {
        return None;
    }
    Some((address, u16::try_from(word(port)?).ok()?))
}

/// Returns the IPv4 address at which a socket with this address can be reached.
fn v4_part(address: Ipv6Addr) -> Ipv4Addr {
    if address.is_unspecified() {
        return Ipv4Addr::UNSPECIFIED;
    }
    if address.is_loopback() {
        return Ipv4Addr::LOCALHOST;
    }
    address.to_ipv4_mapped().unwrap_or(Ipv4Addr::BROADCAST)
}

/// Reads at most eight hexadecimal digits. The kernel writes a word of an address as a number in
/// the byte order of its CPU, which is little-endian on every host that fcd supports.
fn word(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |number: u32, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some((number << 4) | digit)
    })
}

#[cfg(test)]
mod tests {
    use super::Obstacle::{Loopback, Privileged};
    use super::*;

    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

    #[track_caller]
    fn check(list: &str, reachable: &[u16], blocked: &[(u16, Obstacle)]) {
        let expected = Listeners {
            reachable: reachable.iter().copied().collect(),
            blocked: blocked.iter().copied().collect(),
        };
        assert_eq!(parse(list.as_bytes(), GUEST), Some(expected), "{list:?}");
    }

    #[test]
    fn listeners_are_read() {
        check("", &[], &[]);
        check("\n", &[], &[]);
        // 0.0.0.0, the guest's address, the SSH server, and another port below 1024.
        check(
            "00000000:0BB8\n0F02000A:0BB9\n00000000:0016\n00000000:03FF\n",
            &[3000, 3001],
            &[(1023, Privileged)],
        );
        check(
            "00000000:0BB8\n00000000:0BB8\n00000000:0400",
            &[1024, 3000],
            &[],
        );
        // The loopback, 127.0.0.53, and another address.
        check(
            "0100007F:0BB8\n0101A8C0:0BB9\n3500007F:0BBA\n3500007F:0035\n",
            &[],
            &[(3000, Loopback), (3002, Loopback)],
        );
        // Both addresses have one port.
        check("0100007F:0BB8\n0F02000A:0BB8\n", &[3000], &[]);
        // ::, ::1, the guest's mapped address, and another address.
        check(
            "00000000000000000000000000000000:0BB8\n\
             00000000000000000000000001000000:0BB9\n\
             0000000000000000FFFF00000F02000A:0BBA\n\
             000080FE00000000FF005450B61200FE:0BBB\n",
            &[3000, 3002],
            &[(3001, Loopback)],
        );
    }

    #[test]
    fn lists_of_any_other_form_are_refused() {
        for list in [
            "0000000:0BB8",
            "000000000:0BB8",
            "00000000:BB8",
            "00000000:00BB8",
            "00000000",
            ":",
            ":0BB8",
            "00000000:",
            "00000000:0BB8:0BB8",
            "00000000:0BB8 ",
            "+0000000:0BB8",
            "0000000g:0BB8",
            "00000000:0BB8\r\n",
            "sl local_address",
            "00000000:0BB8\n\u{1b}[2J",
        ] {
            assert_eq!(parse(list.as_bytes(), GUEST), None, "{list:?}");
        }
        assert_eq!(parse(b"00000000:0B\xff8", GUEST), None);
        assert_eq!(parse(&[0; 4096], GUEST), None);
    }

    #[test]
    fn long_lists_keep_the_lowest_ports() {
        let list = |address: &str, from: u16, to: u16| -> String {
            (from..=to)
                .rev()
                .map(|port| format!("{address}:{port:04X}\n"))
                .collect()
        };
        let all = list("00000000", 1, u16::MAX) + &list("0100007F", 1, 9000);
        let listeners = parse(all.as_bytes(), GUEST).unwrap();
        let reachable = Vec::from_iter(listeners.reachable);
        assert_eq!(reachable, Vec::from_iter(1024..1024 + 64));
        let blocked = Vec::from_iter(listeners.blocked.into_keys());
        let low: Vec<u16> = (1..=65).filter(|port| *port != SSH_PORT).collect();
        assert_eq!(blocked, low);
    }
}
