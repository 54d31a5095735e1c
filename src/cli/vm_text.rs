//! How commands describe a VM to people.

use super::output::{count, size};
use crate::api::port::Port;
use crate::api::vm::{Pending, RateLimits, VmState, WorkspaceInfo, WorkspaceState};
use std::borrow::Cow;

/// Formats the state of a VM with what is most important about it.
pub fn state_text(
    state: VmState,
    reason: Option<&str>,
    is_paused: bool,
    is_unresponsive: bool,
) -> Cow<'static, str> {
    match reason {
        Some(reason) if state == VmState::Failed => format!("failed ({reason})").into(),
        _ if is_paused => format!("{} (paused)", state.name()).into(),
        _ if is_unresponsive => format!("{} (unresponsive)", state.name()).into(),
        _ => state.name().into(),
    }
}

pub fn workspace_line(workspace: &WorkspaceInfo) -> String {
    match workspace.state {
        WorkspaceState::Complete => workspace.guest_path.clone(),
        WorkspaceState::Incomplete => format!("{} (incomplete)", workspace.guest_path),
    }
}

/// Formats a port as docker does: `80/tcp -> 127.0.0.1:8080`.
pub fn port_line(port: &Port) -> String {
    format!(
        "{}/{} -> {}:{}",
        port.guest_port,
        port.protocol.name(),
        port.host_addr,
        port.host_port
    )
}

pub fn settings(of: &Pending) -> String {
    let vcpus = of.vcpus.map(|n| count(n.into(), "vCPU"));
    let memory = of.mem_mib.map(|m| format!("{} of memory", size(m << 20)));
    let disk = of.disk_bytes.map(|d| format!("{} of disk", size(d)));
    let rates = Some(rates(&of.rates)).filter(|text| !text.is_empty());
    [vcpus, memory, disk, rates]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", ")
}

/// Lists the rates that are set. 0 means no limit.
pub fn rates(rates: &RateLimits) -> String {
    let bytes = |n: u64| format!("{}/s", size(n));
    let of = |what: &str, rate: Option<u64>, shown: &dyn Fn(u64) -> String| {
        rate.map(|n| {
            if n == 0 {
                format!("{what} unlimited")
            } else {
                format!("{what} {}", shown(n))
            }
        })
    };
    let all = [
        of("disk", rates.disk_bytes_per_s, &bytes),
        of("disk operations", rates.disk_ops_per_s, &|n| {
            format!("{n}/s")
        }),
        of("receives", rates.net_rx_bytes_per_s, &bytes),
        of("sends", rates.net_tx_bytes_per_s, &bytes),
    ];
    all.into_iter().flatten().collect::<Vec<_>>().join(", ")
}
