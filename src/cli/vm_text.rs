//! Formats VMs for people.

use super::output::{age, size};
use crate::api::port::{AutoPorts, Port, RefusedPort};
use crate::api::vm::{
    Init, Net, Pending, RateLimits, Restart, Synced, Vm, VmBalloonReply, VmState, WorkspaceInfo,
    WorkspaceState,
};
use crate::host::plural::count;
use crate::host::text::printable;
use crate::ids::{LabelKey, LabelValue, Labels, VmName};
use std::borrow::Cow;

/// Formats the state of a VM with its most important detail.
pub(super) fn state_text(
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

pub(super) fn workspace_line(workspace: &WorkspaceInfo) -> String {
    match workspace.state {
        WorkspaceState::Complete => workspace.guest_path.clone(),
        WorkspaceState::Incomplete => format!("{} (incomplete)", workspace.guest_path),
    }
}

/// Formats a port as docker does: `80/tcp -> 127.0.0.1:8080`.
pub(super) fn port_line(port: &Port) -> String {
    format!(
        "{}/{} -> {}:{}",
        port.guest_port,
        port.protocol.name(),
        port.host_addr,
        port.host_port
    )
}

/// Says that a port is forwarded automatically.
pub(super) fn forward_line(vm: &VmName, port: &Port) -> String {
    format!(
        "forwarding {}:{} to port {} of VM {vm}",
        port.host_addr, port.host_port, port.guest_port
    )
}

/// Says why a port is not forwarded automatically.
pub(super) fn refused_line(port: &RefusedPort) -> String {
    format!("port {} is not forwarded: {}", port.guest_port, port.reason)
}

/// Lists the ports that are forwarded automatically, and those that are not.
pub(super) fn auto_ports(auto: &AutoPorts) -> String {
    let open: Vec<String> = auto.open.iter().map(|p| p.guest_port.to_string()).collect();
    let open = match open.is_empty() {
        true => "none now".to_owned(),
        false => open.join(", "),
    };
    let refused = auto.refused.iter().map(refused_line);
    std::iter::once(open)
        .chain(refused)
        .collect::<Vec<_>>()
        .join("; ")
}

pub(super) fn settings(of: &Pending) -> String {
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
pub(super) fn rates(rates: &RateLimits) -> String {
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

/// Lists labels as `ci=yes, draft`. A label without a value is only its key.
pub(super) fn label_list(labels: &Labels) -> String {
    let text = |(key, value): (&LabelKey, &LabelValue)| match value.as_str() {
        "" => key.to_string(),
        value => format!("{key}={value}"),
    };
    labels.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// Says how a VM ended, and whether the guest's data reached its disk.
pub(super) fn ended(vm: &Vm) -> String {
    format!("{}: {}{}", vm.name, vm.state.name(), synced(vm.synced))
}

pub(super) fn synced(synced: Option<Synced>) -> &'static str {
    match synced {
        Some(Synced::Yes) => ", the guest's data was synced",
        Some(Synced::No) => ", the guest's data was not synced",
        Some(Synced::Timeout) => {
            ", but the guest did not sync its data in time, so its last writes may be lost"
        }
        None => "",
    }
}

pub(super) fn kept(reply: &VmBalloonReply) -> String {
    let mib = |mib: u64| size(mib << 20);
    let vm = &reply.vm;
    let asked = vm
        .balloon_mib
        .filter(|keep| *keep != reply.kept_mib)
        .map(|keep| format!(", and is asked to keep {}", mib(keep)))
        .unwrap_or_default();
    format!(
        "{}: keeps {} of {}{asked}",
        vm.name,
        mib(reply.kept_mib),
        mib(vm.mem_mib)
    )
}

pub(super) fn state(vm: &Vm) -> Cow<'static, str> {
    state_text(vm.state, vm.reason.as_deref(), vm.paused, vm.unresponsive)
}

/// Formats all details of a VM, one per line.
pub(super) fn sheet(vm: &Vm, now_s: u64) -> String {
    let mut facts: Vec<(&str, String)> = vec![
        ("name", vm.name.to_string()),
        ("id", vm.id.to_string()),
        ("state", state(vm).into_owned()),
    ];
    let mut add = |name, value: Option<String>| facts.extend(value.map(|v| (name, v)));
    add(
        "reason",
        vm.reason.clone().filter(|_| vm.state != VmState::Failed),
    );
    add("operation", vm.op.as_ref().map(ToString::to_string));
    add("owner", Some(format!("uid {}", vm.owner_uid)));
    add("image", Some(vm.image.to_string()));
    add("digest", vm.image_digest.clone());
    add("kernel", vm.kernel.as_ref().map(ToString::to_string));
    add(
        "init",
        (vm.init == Init::Image).then(|| "the image's own".to_owned()),
    );
    add("vcpus", Some(vm.vcpus.to_string()));
    add("memory", Some(size(vm.mem_mib << 20)));
    add(
        "disk",
        Some(
            size(vm.disk_bytes)
                + &vm
                    .disk_driver
                    .as_ref()
                    .map(|d| format!(" ({d})"))
                    .unwrap_or_default(),
        ),
    );
    add("work disk", vm.work_disk_bytes.map(size));
    add(
        "rates",
        Some(rates(&vm.rates())).filter(|text| !text.is_empty()),
    );
    add(
        "balloon",
        vm.balloon_mib
            .map(|mib| format!("asked to keep {} of its memory", size(mib << 20))),
    );
    add("next start", vm.pending.as_ref().map(settings));
    add("driver", vm.driver.clone());
    add("process", vm.pid.map(|pid| pid.to_string()));
    add("host name", vm.host_name.as_ref().map(ToString::to_string));
    let servers: Vec<_> = vm.dns.iter().map(ToString::to_string).collect();
    add("dns", (!servers.is_empty()).then(|| servers.join(", ")));
    let commands = &vm.commands;
    add("user", commands.user.clone());
    add("directory", commands.workdir.clone());
    add(
        "variables",
        (!commands.env.is_empty()).then(|| commands.env.join(", ")),
    );
    add("network", (vm.net == Net::None).then(|| "none".to_owned()));
    add(
        "ports",
        (!vm.ports.is_empty()).then(|| {
            vm.ports
                .iter()
                .map(port_line)
                .collect::<Vec<_>>()
                .join(", ")
        }),
    );
    add("automatic ports", vm.auto_ports.as_ref().map(auto_ports));
    add("ssh", vm.ssh_addr.map(|a| a.to_string()));
    add("ip6", vm.ip6.map(|a| a.to_string()));
    add(
        "labels",
        Some(label_list(&vm.labels)).filter(|text| !text.is_empty()),
    );
    add("created", Some(age(now_s, vm.created_at)));
    add("started", vm.started_at.map(|at| age(now_s, at)));
    add(
        "removed",
        vm.rm
            .then(|| "when it stops or its creator disconnects".to_owned()),
    );
    add(
        "restarts",
        (vm.restart == Restart::Always).then(|| "after a reboot of the host".to_owned()),
    );
    add(
        "synced",
        vm.synced.map(|s| match s {
            Synced::Yes => "yes, at the last stop".to_owned(),
            Synced::No => "no: the guest was not asked at the last stop".to_owned(),
            Synced::Timeout => "no: the guest did not respond in time at the last stop".to_owned(),
        }),
    );
    if let Some(w) = &vm.workspace {
        let readonly = if w.readonly { ", read-only" } else { "" };
        add("workspace", Some(workspace_line(w) + readonly));
        add(
            "starts in",
            Some(w.workdir.clone()).filter(|dir| *dir != w.guest_path),
        );
        if w.state == WorkspaceState::Complete {
            let what = if w.entries == 1 { "entry" } else { "entries" };
            add(
                "holds",
                Some(format!(
                    "{} {what}, {}, {}",
                    w.entries,
                    size(w.bytes),
                    age(now_s, w.prepared_at)
                )),
            );
        }
    }
    let line = |(name, value): &(&str, String)| format!("{name:<11} {}\n", printable(value));
    facts.iter().map(line).collect()
}
