//! `vm`: the commands for one or several VMs, including those that also exist at top level.

use super::connector::{Connector, operate};
use super::context::{Context, Env};
use super::format::Template;
use super::printer::Printer;
use super::ps::FIELDS;
use super::rates::Rates;
use super::selection::{Filter, Selection, for_each_vm, parse_state};
use super::values::{
    self, Label, Publish, labels, parse_duration, parse_init, parse_label, parse_mem_mib,
    parse_net, parse_publish, parse_restart, parse_size, parse_vcpus, published, timeout_ms,
};
use super::vm_text::{ended, kept, sheet, state};
use crate::api::vm::{
    Init, Net, Restart, VmBalloon, VmBalloonRequest, VmCreate, VmCreateRequest, VmDelete,
    VmDeleteReply, VmDeleteRequest, VmFork, VmForkRequest, VmKill, VmMetrics, VmPause, VmPrune,
    VmRename, VmRenameRequest, VmReply, VmRequest, VmRestart, VmResume, VmShow, VmStart, VmState,
    VmStop, VmStopRequest, VmWait, VmWaitRequest,
};
use crate::api::{Call, Empty};
use crate::client::Result;
use crate::host::plural::count;
use crate::host::text::printable;
use crate::ids::{HostName, ImageRef, KernelName, VmName};
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Create a VM without starting it
    Create(Box<CreateArgs>),
    /// Copy files and directories into a VM, out of one, or between two
    Cp(super::cp::Args),
    /// Start VMs
    Start(Selection),
    /// Stop VMs: shut down each guest, and kill the VM after a timeout
    Stop(StopArgs),
    /// Restart VMs
    Restart(StopArgs),
    /// Kill VMs at once; unsynced data is lost
    Kill(Selection),
    /// Pause VMs (memory is kept)
    Pause(Selection),
    /// Resume paused VMs
    Resume(Selection),
    /// Clone a running VM, memory and disks
    Fork(ForkArgs),
    /// Delete VMs and their disks
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
    /// List VMs
    #[command(visible_alias = "ls")]
    List(super::ps::Args),
    /// Show details of VMs
    Show(ShowArgs),
    /// List, add and remove published ports of VMs
    #[command(visible_alias = "port")]
    Ports(super::port::Args),
    /// Change vCPUs, memory, disk size, rate limits and labels
    Set(super::vm_set::Args),
    /// Give a VM another name
    Rename(RenameArgs),
    /// Show the processes in a guest
    Top(super::top::Args),
    /// Ask a guest to return memory to the host, or show how much it keeps
    Balloon(BalloonArgs),
    /// Show a VM's console log
    Logs(super::logs::Args),
    /// Show CPU, memory, disk and network usage of VMs
    Stats(super::stats::Args),
    /// Connect stdin and stdout to a vsock port of a guest
    Connect(super::connect::Args),
    /// Show the counters of a VM's VMM as JSON
    Metrics(Target),
    /// Wait until VMs have stopped or reached another state
    Wait(WaitArgs),
    /// Delete all stopped and failed VMs
    Prune,
}

#[derive(clap::Args, Debug)]
pub(super) struct CreateArgs {
    /// Name of the VM [default: a random adjective-noun]
    #[arg(value_name = "NAME", conflicts_with = "name")]
    new: Option<VmName>,
    /// Name of the VM, as an option
    #[arg(short, long, value_name = "NAME")]
    name: Option<VmName>,
    #[command(flatten)]
    shape: Shape,
    /// Size of the root disk, such as 10G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    disk: Option<u64>,
    #[command(flatten)]
    commands: CommandArgs,
}

/// The options of `create` for the commands that will run in the VM.
#[derive(clap::Args, Debug)]
struct CommandArgs {
    /// Set a variable for every command in the VM: K=V, or K to pass your own value
    #[arg(short, long, value_name = "K[=V]")]
    env: Vec<OsString>,
    /// Read variables from a file, one per line. Quotes are not removed
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// User of the guest who runs commands, by name or number [default: the image's]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Working directory of commands in the guest [default: the workspace, if there is one]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
}

/// The options of `create` and `run` that describe a VM.
#[derive(clap::Args, Debug, Default)]
pub(super) struct Shape {
    /// Image to create the root disk from
    #[arg(long)]
    pub image: Option<ImageRef>,
    /// Kernel to boot instead of the image's (see fcctl kernel list)
    #[arg(long)]
    pub kernel: Option<KernelName>,
    /// First process of the guest: `fcd` for an SSH server only, or `image` for the image's own
    /// init, such as systemd [default: fcd]
    #[arg(long, value_name = "fcd|image", value_parser = parse_init)]
    pub init: Option<Init>,
    /// Number of virtual CPUs
    #[arg(long, value_name = "N", visible_alias = "cpus", value_parser = parse_vcpus)]
    pub vcpus: Option<u32>,
    /// Memory, such as 512M or 2G
    #[arg(short, long, value_name = "SIZE", value_parser = parse_mem_mib)]
    pub memory: Option<u64>,
    /// Network: `nat` to reach out through this host, or `none`
    #[arg(long, value_name = "nat|none", value_parser = parse_net)]
    pub net: Option<Net>,
    /// Publish a guest port: [[ADDR:]HOST:]GUEST[/udp]. ADDR defaults to 127.0.0.1, HOST to a free
    /// port. `auto` publishes whatever processes in the guest listen on, as long as they do
    #[arg(short = 'p', long = "publish", value_name = "PORT", value_parser = parse_publish)]
    pub publish: Vec<Publish>,
    /// Label the VM, to find it with --filter label=KEY[=VALUE]
    #[arg(short, long = "label", value_name = "KEY[=VALUE]", value_parser = parse_label)]
    pub labels: Vec<Label>,
    /// Start the VM again after a reboot of the host, if it was running
    #[arg(long, value_name = "no|always", value_parser = parse_restart)]
    pub restart: Option<Restart>,
    /// Host name of the guest [default: the VM's name]
    #[arg(long = "hostname", value_name = "NAME")]
    pub host_name: Option<HostName>,
    /// Name server that the guest uses instead of fcd's. Can be repeated
    #[arg(long, value_name = "ADDR")]
    pub dns: Vec<IpAddr>,
    #[command(flatten)]
    pub rates: Rates,
    /// Size of a second, empty disk at /work in the guest, such as 20G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub work_disk: Option<u64>,
}

#[derive(clap::Args, Debug)]
pub(super) struct Target {
    /// Name, ID, or ID prefix
    vm: String,
}

#[derive(clap::Args, Debug)]
pub(super) struct ShowArgs {
    #[command(flatten)]
    targets: Selection,
    /// Print with a template such as '{{.State}}', or `json` (fcctl help lists)
    #[arg(short, long, value_name = "TEMPLATE")]
    format: Option<String>,
}

#[derive(clap::Args, Debug)]
pub(super) struct StopArgs {
    #[command(flatten)]
    targets: Selection,
    /// Do not give the guest time to shut down
    #[arg(short, long)]
    force: bool,
    /// How long the guest may take before it is forced, such as 30s
    #[arg(short, long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
}

#[derive(clap::Args, Debug)]
pub(super) struct ForkArgs {
    /// Name, ID, or ID prefix
    vm: String,
    /// Name of the new VM [default: a random adjective-noun]
    new: Option<VmName>,
    /// Label the new VM, which also has the labels of the original
    #[arg(short, long = "label", value_name = "KEY[=VALUE]", value_parser = parse_label)]
    labels: Vec<Label>,
}

#[derive(clap::Args, Debug)]
pub(super) struct DeleteArgs {
    // Not required with -f: `rm -f $(fcctl ps -aq)` must succeed if there is nothing to remove.
    /// Names, IDs, or ID prefixes
    #[arg(required_unless_present_any = ["force", "filters"], value_name = "VM")]
    vms: Vec<String>,
    #[command(flatten)]
    filter: Filter,
    /// Also delete running VMs. A VM that does not exist is not an error
    #[arg(short, long)]
    force: bool,
    /// A VM that does not exist is not an error
    #[arg(long)]
    if_exists: bool,
}

#[derive(clap::Args, Debug)]
pub(super) struct RenameArgs {
    /// Name, ID, or ID prefix
    vm: String,
    /// The new name
    name: VmName,
}

#[derive(clap::Args, Debug)]
pub(super) struct BalloonArgs {
    /// Name, ID, or ID prefix
    vm: String,
    /// Memory that the guest keeps until its next start, such as 512M. It returns the rest
    #[arg(value_name = "SIZE", value_parser = parse_mem_mib)]
    keep: Option<u64>,
}

#[derive(clap::Args, Debug)]
pub(super) struct WaitArgs {
    #[command(flatten)]
    targets: Selection,
    /// State to wait for: running, stopped, ... [default: stopped or failed]
    #[arg(long, value_parser = parse_state)]
    state: Option<VmState>,
    /// Give up after this time, such as 30s
    #[arg(short, long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
}

pub(super) fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    let Context {
        connector,
        printer,
        now_s,
        env,
        ..
    } = ctx;
    match verb {
        Verb::Create(args) => create(connector, printer, env, *args),
        Verb::Start(args) => start(connector, printer, args),
        Verb::Stop(args) => stop(connector, printer, args),
        Verb::Restart(args) => restart(connector, printer, args),
        Verb::Kill(args) => kill(connector, printer, args),
        Verb::Pause(args) => pause::<VmPause>(connector, printer, args),
        Verb::Resume(args) => pause::<VmResume>(connector, printer, args),
        Verb::Fork(args) => fork(connector, printer, args),
        Verb::Delete(args) => delete(connector, printer, args),
        Verb::List(args) => super::ps::run(ctx, args),
        Verb::Show(args) => show(connector, printer, *now_s, args),
        Verb::Ports(args) => super::port::run(ctx, args),
        Verb::Set(args) => super::vm_set::run(connector, printer, args),
        Verb::Rename(args) => rename(connector, printer, args),
        Verb::Top(args) => super::top::run(ctx, args),
        Verb::Balloon(args) => balloon(connector, printer, args),
        Verb::Cp(args) => super::cp::run(ctx, args),
        Verb::Logs(args) => super::logs::run(ctx, args),
        Verb::Stats(args) => super::stats::run(ctx, args),
        Verb::Connect(args) => super::connect::run(ctx, args),
        Verb::Metrics(args) => metrics(connector, printer, args),
        Verb::Wait(args) => wait(connector, printer, args),
        Verb::Prune => prune(connector, printer),
    }
}

fn create(
    connector: &mut Connector,
    printer: &mut Printer,
    env: &Env,
    args: CreateArgs,
) -> Result<u8> {
    let commands = args.commands;
    let (ports, auto_ports) = published(&args.shape.publish);
    let rates = args.shape.rates;
    let request = VmCreateRequest {
        disk_bytes_per_s: rates.disk_bps,
        disk_ops_per_s: rates.disk_iops,
        net_rx_bytes_per_s: rates.net_rx_bps,
        net_tx_bytes_per_s: rates.net_tx_bps,
        name: args.new.or(args.name),
        image: args.shape.image,
        kernel: args.shape.kernel,
        init: args.shape.init,
        vcpus: args.shape.vcpus,
        mem_mib: args.shape.memory,
        net: args.shape.net,
        ports,
        auto_ports,
        labels: labels(args.shape.labels)?,
        restart: args.shape.restart.unwrap_or_default(),
        host_name: args.shape.host_name,
        dns: args.shape.dns,
        disk_bytes: args.disk,
        work_disk_bytes: args.shape.work_disk,
        user: commands.user,
        workdir: commands.workdir,
        env: values::vm_environment(&commands.env_file, &commands.env, env)?,
        rm: false,
        hold: false,
    };
    let vm = connector.connect(printer)?.call::<VmCreate>(&request)?.vm;
    if printer.json {
        printer.document(&vm)?
    } else {
        printer.line(vm.name.as_str())?
    }
    Ok(0)
}

pub(super) fn start(
    connector: &mut Connector,
    printer: &mut Printer,
    args: Selection,
) -> Result<u8> {
    for_each_vm(connector, printer, &args, |printer, client, vm| {
        let vm = operate::<VmStart>(
            printer,
            client,
            &format!("start {}", vm.shown),
            &VmRequest { vm: vm.vm.clone() },
        )?
        .vm;
        printer.say(&format!("{}: {}", vm.name, vm.state.name()))?;
        Ok(vm)
    })
}

fn stop_request(vm: &str, args: &StopArgs) -> VmStopRequest {
    VmStopRequest {
        vm: vm.to_owned(),
        force: args.force,
        timeout_ms: timeout_ms(args.timeout),
        keep: false,
    }
}

pub(super) fn stop(connector: &mut Connector, printer: &mut Printer, args: StopArgs) -> Result<u8> {
    for_each_vm(connector, printer, &args.targets, |printer, client, vm| {
        let vm = operate::<VmStop>(
            printer,
            client,
            &format!("stop {}", vm.shown),
            &stop_request(&vm.vm, &args),
        )?
        .vm;
        printer.say(&ended(&vm))?;
        Ok(vm)
    })
}

fn restart(connector: &mut Connector, printer: &mut Printer, args: StopArgs) -> Result<u8> {
    for_each_vm(connector, printer, &args.targets, |printer, client, vm| {
        let vm = operate::<VmRestart>(
            printer,
            client,
            &format!("restart {}", vm.shown),
            &stop_request(&vm.vm, &args),
        )?
        .vm;
        printer.say(&ended(&vm))?;
        Ok(vm)
    })
}

fn kill(connector: &mut Connector, printer: &mut Printer, args: Selection) -> Result<u8> {
    for_each_vm(connector, printer, &args, |printer, client, vm| {
        let vm = operate::<VmKill>(
            printer,
            client,
            &format!("kill {}", vm.shown),
            &VmRequest { vm: vm.vm.clone() },
        )?
        .vm;
        printer.say(&ended(&vm))?;
        Ok(vm)
    })
}

fn pause<C: Call<Request = VmRequest, Reply = VmReply>>(
    connector: &mut Connector,
    printer: &mut Printer,
    args: Selection,
) -> Result<u8> {
    for_each_vm(connector, printer, &args, |printer, client, vm| {
        let vm = client.call::<C>(&VmRequest { vm: vm.vm.clone() })?.vm;
        printer.say(&format!("{}: {}", vm.name, state(&vm)))?;
        Ok(vm)
    })
}

fn fork(connector: &mut Connector, printer: &mut Printer, args: ForkArgs) -> Result<u8> {
    let mut client = connector.connect(printer)?;
    let request = VmForkRequest {
        vm: args.vm,
        name: args.new,
        labels: labels(args.labels)?,
    };
    let vm = operate::<VmFork>(
        printer,
        &mut client,
        &format!("fork {}", printable(&request.vm)),
        &request,
    )?
    .vm;
    if printer.json {
        printer.document(&vm)?;
    } else {
        printer.line(vm.name.as_str())?;
    }
    Ok(0)
}

pub(super) fn delete(
    connector: &mut Connector,
    printer: &mut Printer,
    args: DeleteArgs,
) -> Result<u8> {
    let selection = Selection {
        vms: args.vms,
        filter: args.filter,
    };
    for_each_vm(connector, printer, &selection, |printer, client, vm| {
        let request = VmDeleteRequest {
            vm: vm.vm.clone(),
            force: args.force,
            // A filter chooses VMs that exist. One that is gone by now is not an error.
            if_exists: args.force || args.if_exists || !selection.filter.is_empty(),
        };
        let reply =
            operate::<VmDelete>(printer, client, &format!("delete {}", vm.shown), &request)?;
        printer.say(&deleted(&vm.shown, &reply))?;
        Ok(reply)
    })
}

fn deleted(vm: &str, reply: &VmDeleteReply) -> String {
    let what = if reply.deleted.is_some() {
        "deleted"
    } else {
        "did not exist"
    };
    format!("{}: {what}", printable(vm))
}

fn show(
    connector: &mut Connector,
    printer: &mut Printer,
    now_s: u64,
    args: ShowArgs,
) -> Result<u8> {
    // --format json is --json already, but -f json is not.
    printer.json |= args.format.as_deref() == Some("json");
    let template = args.format.filter(|_| !printer.json);
    let template = template.map(|text| Template::parse(&text, FIELDS));
    let template = template.transpose()?;
    let mut is_first = true;
    for_each_vm(connector, printer, &args.targets, |printer, client, vm| {
        let vm = client.call::<VmShow>(&VmRequest { vm: vm.vm.clone() })?.vm;
        let gap = if std::mem::replace(&mut is_first, false) {
            ""
        } else {
            "\n"
        };
        match &template {
            _ if printer.json => {}
            Some(template) => {
                printer.text(&template.render(FIELDS, std::slice::from_ref(&vm), now_s))?;
            }
            None => printer.text(&format!("{gap}{}", sheet(&vm, now_s)))?,
        }
        Ok(vm)
    })
}

fn rename(connector: &mut Connector, printer: &mut Printer, args: RenameArgs) -> Result<u8> {
    let before = printable(&args.vm);
    let request = VmRenameRequest {
        vm: args.vm,
        name: args.name,
    };
    let vm = connector.connect(printer)?.call::<VmRename>(&request)?.vm;
    if printer.json {
        printer.document(&vm)?;
        return Ok(0);
    }
    let guest = match vm.state {
        VmState::Running => "; the guest's host name changes at its next start",
        _ => "",
    };
    printer.line(&format!("{before}: renamed to {}{guest}", vm.name))?;
    Ok(0)
}

fn balloon(connector: &mut Connector, printer: &mut Printer, args: BalloonArgs) -> Result<u8> {
    let reply = connector
        .connect(printer)?
        .call::<VmBalloon>(&VmBalloonRequest {
            vm: args.vm,
            keep_mib: args.keep,
        })?;
    if printer.json {
        printer.document(&reply)?;
    } else {
        printer.line(&kept(&reply))?;
    }
    Ok(0)
}

fn metrics(connector: &mut Connector, printer: &mut Printer, args: Target) -> Result<u8> {
    let reply = connector
        .connect(printer)?
        .call::<VmMetrics>(&VmRequest { vm: args.vm })?;
    printer.document(&reply)?;
    Ok(0)
}

fn wait(connector: &mut Connector, printer: &mut Printer, args: WaitArgs) -> Result<u8> {
    for_each_vm(connector, printer, &args.targets, |printer, client, vm| {
        let request = VmWaitRequest {
            vm: vm.vm.clone(),
            state: args.state,
            timeout_ms: timeout_ms(args.timeout),
        };
        let vm = client
            .call_more::<VmWait>(&request, &[], &mut |_| Ok(()))?
            .vm;
        printer.say(&format!("{}: {}", vm.name, state(&vm)))?;
        Ok(vm)
    })
}

fn prune(connector: &mut Connector, printer: &mut Printer) -> Result<u8> {
    let mut client = connector.connect(printer)?;
    let deleted = operate::<VmPrune>(printer, &mut client, "prune", &Empty {})?.deleted;
    if printer.json {
        printer.document(&deleted)?;
    } else {
        let ids: String = deleted.iter().map(|id| format!("{id}\n")).collect();
        printer.text(&format!(
            "{ids}{} deleted\n",
            count(deleted.len() as u64, "VM")
        ))?;
    }
    Ok(0)
}

#[cfg(test)]
#[path = "vm_tests.rs"]
mod tests;
