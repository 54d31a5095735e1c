//! `vm set`: changes the settings and labels of a VM.

use super::connector::Connector;
use super::printer::Printer;
use super::rates::Rates;
use super::values::{
    LabelChange, labels, parse_label_change, parse_mem_mib, parse_restart, parse_size, parse_vcpus,
};
use super::vm_text::{label_list, settings};
use crate::api::vm::{Pending, Restart, Vm, VmSet, VmSetRequest, VmState};
use crate::client::Result;
use crate::ids::LabelKey;

#[derive(clap::Args, Debug)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["vcpus", "memory", "disk", "disk_bps", "disk_iops", "net_rx_bps", "net_tx_bps", "restart", "labels", "remove_labels"]))]
pub(super) struct Args {
    /// Name, ID, or ID prefix
    vm: String,
    /// Number of virtual CPUs
    #[arg(long, value_name = "N", visible_alias = "cpus", value_parser = parse_vcpus)]
    vcpus: Option<u32>,
    /// Memory, such as 512M or 2G
    #[arg(short, long, value_name = "SIZE", value_parser = parse_mem_mib)]
    memory: Option<u64>,
    /// Size of the root disk, such as 10G. It can only grow
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    disk: Option<u64>,
    #[command(flatten)]
    rates: Rates,
    /// Start the VM again after each reboot of the host (always), or do not (no)
    #[arg(long, value_name = "no|always", value_parser = parse_restart)]
    restart: Option<Restart>,
    /// Set a label, or remove it with KEY-
    #[arg(short, long = "label", value_name = "KEY[=VALUE]", value_parser = parse_label_change)]
    labels: Vec<LabelChange>,
    /// Remove a label
    #[arg(long = "remove-label", value_name = "KEY")]
    remove_labels: Vec<LabelKey>,
    /// Apply new rates to the running VM at once
    #[arg(long)]
    now: bool,
}

pub(super) fn run(connector: &mut Connector, printer: &mut Printer, args: Args) -> Result<u8> {
    let (rates, wanted) = (args.rates, args.rates.limits());
    let settings = Pending {
        vcpus: args.vcpus,
        mem_mib: args.memory,
        disk_bytes: args.disk,
        rates: wanted,
    };
    let (mut set, mut remove_labels) = (Vec::new(), args.remove_labels);
    for change in args.labels {
        match change {
            LabelChange::Set(label) => set.push(label),
            LabelChange::Remove(key) => remove_labels.push(key),
        }
    }
    let changes_labels = !set.is_empty() || !remove_labels.is_empty();
    let request = VmSetRequest {
        vm: args.vm,
        vcpus: args.vcpus,
        mem_mib: args.memory,
        disk_bytes: args.disk,
        disk_bytes_per_s: rates.disk_bps,
        disk_ops_per_s: rates.disk_iops,
        net_rx_bytes_per_s: rates.net_rx_bps,
        net_tx_bytes_per_s: rates.net_tx_bps,
        now: args.now,
        rm: None,
        restart: args.restart,
        labels: labels(set)?,
        remove_labels,
    };
    let vm = connector.connect(printer)?.call::<VmSet>(&request)?.vm;
    if printer.json {
        printer.document(&vm)?;
        return Ok(0);
    }
    if settings != Pending::default() {
        printer.line(&applied(&vm, &settings, args.now))?;
    }
    if let Some(restart) = args.restart {
        printer.line(&format!("{}: restart {}", vm.name, restart.name()))?;
    }
    if changes_labels {
        let labels = match label_list(&vm.labels) {
            list if list.is_empty() => "no labels".to_owned(),
            list => format!("labels {list}"),
        };
        printer.line(&format!("{}: {labels}", vm.name))?;
    }
    Ok(0)
}

/// Says which settings change, and when.
fn applied(vm: &Vm, wanted: &Pending, now: bool) -> String {
    let what = settings(wanted);
    let changes_size =
        wanted.vcpus.is_some() || wanted.mem_mib.is_some() || wanted.disk_bytes.is_some();
    let hint = if changes_size {
        format!("; now: fcctl vm restart {}", vm.name)
    } else {
        format!("; now: --now, or fcctl vm restart {}", vm.name)
    };
    let when = match (now, &vm.pending) {
        (true, _) if vm.state == VmState::Running => "applied now".to_owned(),
        (_, Some(_)) => format!("applied at next start{hint}"),
        _ => "applied at next start".to_owned(),
    };
    format!("{}: {what}, {when}", vm.name)
}
