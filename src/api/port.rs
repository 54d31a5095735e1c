//! Host ports that are forwarded to a guest.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;

#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
}

impl Protocol {
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// A host port that is forwarded to a guest port while the VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// The address on the host. It defaults to 127.0.0.1; 0.0.0.0 means every address.
    #[serde(default = "loopback")]
    pub host_addr: Ipv4Addr,
    /// The port on the host. A 0 in a request asks for a free port, which the VM then keeps.
    #[serde(default)]
    pub host_port: u16,
    pub guest_port: u16,
    #[serde(default)]
    pub protocol: Protocol,
}

/// Returns the default of `host_addr`.
pub const fn loopback() -> Ipv4Addr {
    Ipv4Addr::LOCALHOST
}

impl Port {
    /// True if the host cannot forward both ports, because they overlap.
    pub fn overlaps(&self, other: &Port) -> bool {
        let any = self.host_addr.is_unspecified() || other.host_addr.is_unspecified();
        self.protocol == other.protocol
            && self.host_port == other.host_port
            && (any || self.host_addr == other.host_addr)
    }
}

/// The ports that fcd forwards automatically because processes in the guest listen on them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AutoPorts {
    /// The published ports that fcd added automatically. They end with their listeners.
    pub open: Vec<Port>,
    /// The ports that fcd does not forward although a process in the guest listens on them.
    pub refused: Vec<RefusedPort>,
}

impl AutoPorts {
    /// Returns the guest ports that are refused.
    pub fn refused_ports(of: Option<&Self>) -> Vec<u16> {
        let refused = of.into_iter().flat_map(|auto| &auto.refused);
        refused.map(|port| port.guest_port).collect()
    }
}

/// A guest port that fcd does not forward automatically.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedPort {
    pub guest_port: u16,
    pub cause: RefusalCause,
    /// The cause as a text, such as `port 127.0.0.1:3000/tcp belongs to another VM`.
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCause {
    /// The same port of the host cannot be forwarded, for example because it is in use.
    Conflict,
    /// The owner removed the forward.
    Removed,
    /// The process listens on the guest's loopback, which forwards do not reach.
    Loopback,
    /// The port is below 1024.
    Privileged,
}

/// Formats the host's side, such as `127.0.0.1:8080/tcp`.
impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}:{}/{}",
            self.host_addr,
            self.host_port,
            self.protocol.name()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_overlap_on_the_same_or_any_address() {
        let port = |host_addr: [u8; 4], host_port, protocol| Port {
            host_addr: host_addr.into(),
            host_port,
            guest_port: 1,
            protocol,
        };
        let a = port([127, 0, 0, 1], 80, Protocol::Tcp);
        assert!(
            a.overlaps(&port([127, 0, 0, 1], 80, Protocol::Tcp))
                && a.overlaps(&port([0, 0, 0, 0], 80, Protocol::Tcp))
        );
        assert!(port([0, 0, 0, 0], 80, Protocol::Tcp).overlaps(&a));
        for other in [
            port([127, 0, 0, 1], 81, Protocol::Tcp),
            port([127, 0, 0, 2], 80, Protocol::Tcp),
            port([0, 0, 0, 0], 80, Protocol::Udp),
        ] {
            assert!(!a.overlaps(&other), "{other}");
        }
    }
}
