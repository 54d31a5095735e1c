//! Ports that QEMU's own network stack forwards to the guest.
//!
//! Sources: hmp-commands.hx and net/slirp.c of QEMU 7.2, which opens the ports of its command line
//! from the last to the first; `connection_info` in misc.c of libslirp 4.7.

use super::argv::{GUEST_ADDR, GUEST_SSH_PORT};
use super::qmp::Qmp;
use crate::api::port::{Port, Protocol};
use crate::error::{Error, Kind, Result};
use crate::host::text::printable;
use std::net::Ipv4Addr;

/// The name of the guest's network on QEMU's command line.
const NETDEV: &str = "net";

/// Reads the ports in the answer to `info usernet`, the newest first.
pub(crate) fn parse(usernet: &str) -> Vec<Port> {
    usernet.lines().filter_map(parse_line).collect()
}

/// Returns the port on the host's loopback address that leads to the guest's SSH server. It is the
/// oldest, because it is the last one on QEMU's command line. A port of `published` may lead to the
/// SSH server, too.
pub(super) fn ssh_port(forwarded: &[Port], published: &[Port]) -> Option<u16> {
    let is_ssh = |port: &&Port| {
        port.protocol == Protocol::Tcp
            && port.host_addr == Ipv4Addr::LOCALHOST
            && port.guest_port == GUEST_SSH_PORT
            && !published.contains(port)
    };
    forwarded.iter().rfind(is_ssh).map(|port| port.host_port)
}

fn parse_line(line: &str) -> Option<Port> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let [state, _fd, host_addr, host_port, guest_addr, guest_port, ..] = fields.as_slice() else {
        return None;
    };
    let protocol = match *state {
        "TCP[HOST_FORWARD]" => Protocol::Tcp,
        "UDP[HOST_FORWARD]" => Protocol::Udp,
        _ => return None,
    };
    let host_addr = match *host_addr {
        "*" => Ipv4Addr::UNSPECIFIED,
        address => address.parse().ok()?,
    };
    let port = Port {
        host_addr,
        host_port: host_port.parse().ok()?,
        guest_port: guest_port.parse().ok()?,
        protocol,
    };
    Some(port).filter(|port| *guest_addr == GUEST_ADDR && port.host_port != 0)
}

/// Returns the ports that are forwarded now, the newest first.
pub(super) fn list(qmp: &mut Qmp<'_>) -> Result<Vec<Port>> {
    qmp.human("info usernet").map(|table| parse(&table))
}

/// Stops forwarding `remove`, and then forwards `add`. After an error, no port of `add` is
/// forwarded.
pub(super) fn change(qmp: &mut Qmp<'_>, add: &[Port], remove: &[Port]) -> Result<()> {
    remove.iter().try_for_each(|port| close(qmp, port))?;
    for (done, port) in add.iter().enumerate() {
        let Err(e) = open(qmp, port) else { continue };
        for port in &add[..done] {
            close(qmp, port)?;
        }
        return Err(e);
    }
    Ok(())
}

/// Forwards a port. QEMU's command prints nothing if it succeeds.
fn open(qmp: &mut Qmp<'_>, port: &Port) -> Result<()> {
    let guest_port = port.guest_port;
    let rule = format!("{}-{GUEST_ADDR}:{guest_port}", host_side(port));
    let said = qmp.human(&format!("hostfwd_add {NETDEV} {rule}"))?;
    if said.trim().is_empty() {
        return Ok(());
    }
    Err(Error::new(
        Kind::VmmFailed,
        format!(
            "forward port {port}: the VMM says: {}",
            printable(said.trim())
        ),
    ))
}

/// Stops forwarding a port. QEMU's command prints whether the port was forwarded, which does not
/// matter here.
fn close(qmp: &mut Qmp<'_>, port: &Port) -> Result<()> {
    qmp.human(&format!("hostfwd_remove {NETDEV} {}", host_side(port)))
        .map(drop)
}

fn host_side(port: &Port) -> String {
    let protocol = port.protocol.name();
    format!("{protocol}:{}:{}", port.host_addr, port.host_port)
}

#[cfg(test)]
mod tests {
    use super::super::scripted::{GREETING, talk};
    use super::*;

    fn port(host_addr: [u8; 4], host_port: u16, guest_port: u16, protocol: Protocol) -> Port {
        Port {
            host_addr: host_addr.into(),
            host_port,
            guest_port,
            protocol,
        }
    }

    #[test]
    fn forwards_are_parsed_from_usernet_table() {
        let table = "Hub -1 (net):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                     TCP[ESTABLISHED]  12       127.0.0.1 40000       10.0.2.15    22     0     0\r\n  \
                     TCP[HOST_FORWARD]  10               *  8080       10.0.2.15    80     0     0\r\n  \
                     TCP[HOST_FORWARD]   9       127.0.0.1  2022       10.0.2.15    22     0     0\r\n  \
                     TCP[HOST_FORWARD]   8       127.0.0.1 39341       10.0.2.15    22     0     0\r\n  \
                     UDP[HOST_FORWARD]  11       127.0.0.1  5353       10.0.2.15    53     0     0\r\n  \
                     UDP[236 sec]       14       10.0.2.15 40001        10.0.2.3    53     0     0\r\n";
        let ssh = |number| port([127, 0, 0, 1], number, 22, Protocol::Tcp);
        let ports = parse(table);
        assert_eq!(
            ports,
            [
                port([0, 0, 0, 0], 8080, 80, Protocol::Tcp),
                ssh(2022),
                ssh(39341),
                port([127, 0, 0, 1], 5353, 53, Protocol::Udp),
            ]
        );
        assert_eq!(ssh_port(&ports, &[]), Some(39341));
        // An earlier version of fcd put the port for SSH at another place in the list.
        assert_eq!(ssh_port(&ports, &[ssh(39341)]), Some(2022));
        for bad in [
            "",
            "TCP[HOST_FORWARD] 8 127.0.0.1 0 10.0.2.15 22 0 0",
            "TCP[HOST_FORWARD] 8 0.0.0.0 39341 10.0.2.15 22 0 0",
            "TCP[HOST_FORWARD] 8 127.0.0.1 39341 10.0.2.15 80 0 0",
            "TCP[HOST_FORWARD] 8 127.0.0.1 39341 10.0.2.16 22 0 0",
            "TCP[HOST_FORWARD] 8 127.0.0.1",
        ] {
            assert_eq!(ssh_port(&parse(bad), &[]), None, "{bad}");
        }
    }

    #[test]
    fn refused_port_closes_the_ports_before_it() {
        let said = |text: &str| format!("{{\"return\": \"{text}\"}}\n");
        let script = [
            GREETING,
            "{\"return\": {}}\n",
            &said("host forwarding rule for tcp:127.0.0.1:1 not found\\r\\n"),
            &said(""),
            &said("could not set up host forwarding rule 'x'\\r\\n"),
            &said("host forwarding rule for tcp:127.0.0.1:2 removed\\r\\n"),
        ]
        .concat();
        let at = |number| port([127, 0, 0, 1], number, 80, Protocol::Tcp);
        let (refused, asked) = talk(&script, 10_000, |qmp, _| {
            change(&mut qmp.unwrap(), &[at(2), at(3)], &[at(1)])
        });
        let e = refused.unwrap_err();
        assert!(
            e.kind() == Kind::VmmFailed && e.to_string().contains("could not set up"),
            "{e}"
        );
        let lines: Vec<&str> = asked
            .lines()
            .filter_map(|line| line.split("\"command-line\":\"").nth(1)?.split('"').next())
            .collect();
        assert_eq!(
            lines,
            [
                "hostfwd_remove net tcp:127.0.0.1:1",
                "hostfwd_add net tcp:127.0.0.1:2-10.0.2.15:80",
                "hostfwd_add net tcp:127.0.0.1:3-10.0.2.15:80",
                "hostfwd_remove net tcp:127.0.0.1:2",
            ]
        );
    }
}
