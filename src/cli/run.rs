//! `run`: a fresh VM, the tree, the command, its status and its changes.

use super::context::Context;
use super::exec::{self, Ended, How, OUR_FAILURE};
use super::signals::{Interrupts, Phase, interrupted};
use super::vm::Shape;
use super::workspace::{Bound, ExportTo, PrepareHow, Source, Transfer, tell_exported, tell_left};
use crate::api::frame::Note;
use crate::api::vm::{Vm, VmCreate, VmCreateRequest, VmDelete, VmDeleteRequest, VmRequest, VmSet, VmSetRequest, VmStart};
use crate::client::{Client, Event, Failure, Result};
use crate::error::{Error, Kind};
use crate::ids::VmName;
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Directory to copy into the VM. In a git repository, the whole repository is copied, and the command starts in this directory
    path: Option<PathBuf>,
    /// Delete the VM afterwards, even if fcctl is killed
    #[arg(long)]
    rm: bool,
    /// Name of the VM [default: a random adjective-noun]
    #[arg(short, long)]
    name: Option<VmName>,
    #[command(flatten)]
    shape: Shape,
    /// Write the guest's changes as a git patch to a new file afterwards, or to stdout with -
    #[arg(long, value_name = "FILE", requires = "path")]
    export_patch: Option<PathBuf>,
    #[command(flatten)]
    bound: Bound,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    workspace: PrepareHow,
    /// Command and arguments [default: a shell]
    #[arg(last = true, value_name = "CMD")]
    argv: Vec<std::ffi::OsString>,
}

/// The story, from a tree that can be sent to a VM that runs on or is gone.
pub fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let interrupts = Interrupts::start(&ctx.signals, &ctx.stdio.stderr)?;
    match tell(ctx, &interrupts, args) {
        Err(_) if interrupts.cause().is_some() => {
            ctx.note("interrupted");
            Ok(interrupts.status().unwrap_or(OUR_FAILURE))
        }
        result => result,
    }
}

fn tell(ctx: &mut Context, interrupts: &Interrupts, args: Args) -> Result<u8> {
    // Whatever can be known to be wrong is, before anything is made.
    let spec = args.how.spec(ctx, args.argv)?;
    let to = args.export_patch.map(ExportTo::patch);
    to.iter().try_for_each(ExportTo::check)?;
    let source = match &args.path {
        Some(path) => Some(Source::tree(path, &args.workspace, interrupts.cancel())?),
        None if args.workspace.is_said() => {
            return Err(Error::invalid("workspace options need a PATH").hint("for example: fcctl run . -- CMD").into());
        }
        None => None,
    };
    let export = to.map(|to| Export { to, bound: args.bound, top: source.as_ref().and_then(Source::top).map(Path::to_owned) });
    let mut made = make(ctx, interrupts, args.name, args.shape, args.rm)?;
    ctx.note(&format!("VM {}", made.vm.name));
    for port in &made.vm.ports {
        ctx.note(&format!("port {}", super::vm::port_line(port)));
    }
    let vm = made.vm.name.to_string();
    let ended = match boot(ctx, interrupts, &mut made, source.map(|s| (s, args.workspace))) {
        Ok(()) => exec::execute(ctx, interrupts, &mut made.client, &vm, spec),
        Err(e) => Err(e),
    };
    finish(ctx, interrupts, made, ended, export)
}

/// What `--export-patch` asks for.
struct Export {
    to: ExportTo,
    bound: Bound,
    /// The tree that was sent, to which the patch is applied.
    top: Option<PathBuf>,
}

/// A VM that this run made.
struct Made {
    vm: Vm,
    /// For what is done with it.
    client: Client,
    /// With `--rm`: while it is open, the VM lives. Nothing is read from it any more.
    _hold: Option<Client>,
    rm: bool,
}

fn make(ctx: &mut Context, interrupts: &Interrupts, name: Option<VmName>, shape: Shape, rm: bool) -> Result<Made> {
    let mut client = ctx.connect()?;
    let rates = shape.rates;
    let request = VmCreateRequest {
        disk_bytes_per_s: rates.disk_bps,
        disk_ops_per_s: rates.disk_iops,
        net_rx_bytes_per_s: rates.net_rx_bps,
        net_tx_bytes_per_s: rates.net_tx_bps,
        name: name.clone(),
        kernel: shape.kernel.clone(),
        image: shape.image,
        vcpus: shape.vcpus,
        mem_mib: shape.memory,
        disk_bytes: None,
        work_disk_bytes: shape.work_disk,
        net: shape.net,
        ports: shape.ports,
        rm,
        hold: rm,
    };
    let result = if rm {
        let mut hold = Client::connect_again(&ctx.socket)?;
        create_held(interrupts, &mut hold, &request).map(|vm| (vm, Some(hold)))
    } else {
        let _guard = interrupts.guard(&client)?;
        client.call::<VmCreate>(&request).map(|reply| (reply.vm, None))
    };
    let (vm, hold) = result.map_err(|e| match name {
        Some(name) if e.is(Kind::NameTaken) => e.hint(format!(
            "use it: fcctl exec {name} -- CMD (after fcctl start {name} if it is stopped)\n\
             delete it: fcctl rm -f {name}\n\
             use another name: fcctl run --name {name}-2"
        )),
        _ => e,
    })?;
    Ok(Made { vm, client, _hold: hold, rm })
}

/// The call stays in flight: its end is the VM's.
fn create_held(interrupts: &Interrupts, hold: &mut Client, request: &VmCreateRequest) -> Result<Vm> {
    let _guard = interrupts.guard(hold)?;
    let mut in_flight = hold.begin::<VmCreate>(request, &[])?;
    loop {
        match in_flight.next_event()? {
            Event::Note(Note::Created(vm)) => return Ok(*vm),
            Event::Note(_) => {}
            Event::Reply(reply) => {
                return Err(Error::internal(format!("VM {} was deleted right after it was created", reply.vm.name)).into());
            }
        }
    }
}

fn boot(ctx: &mut Context, interrupts: &Interrupts, made: &mut Made, source: Option<(Source, PrepareHow)>) -> Result<()> {
    let vm = made.vm.name.to_string();
    {
        let _guard = interrupts.guard(&made.client)?;
        ctx.operate::<VmStart>(&mut made.client, &format!("start {vm}"), &VmRequest { vm: vm.clone() })?;
    }
    if let Some((source, how)) = source {
        Transfer { ctx, interrupts, client: &mut made.client, vm: &vm }.prepare(source, how)?;
    }
    if interrupts.cause().is_some() { Err(interrupted()) } else { Ok(()) }
}

/// Brings the changes back, then removes the VM or says that it runs on.
fn finish(
    ctx: &mut Context,
    interrupts: &Interrupts,
    mut made: Made,
    ended: Result<Ended>,
    export: Option<Export>,
) -> Result<u8> {
    let began = interrupts.command_began() || matches!(ended, Ok(Ended::Exit(_) | Ended::ReaderGone));
    let mut status = match &ended {
        Ok(ended) => exec::status_of(ended, interrupts),
        Err(_) => interrupts.status().unwrap_or(OUR_FAILURE),
    };
    tell_end(ctx, interrupts, &ended);
    if let (Some(export), true, None) = (&export, began, interrupts.cause())
        && let Err(failed) = collect(ctx, interrupts, &made, export)
    {
        status = failed;
        // Work that could not be brought back is not thrown away.
        keep(ctx, &mut made);
    }
    if made.rm || !began {
        remove(ctx, interrupts, &made);
        return Ok(status);
    }
    let name = &made.vm.name;
    ctx.note(&format!("VM {name} keeps running. Enter: fcctl ssh {name}, stop: fcctl stop {name}, delete: fcctl rm -f {name}"));
    Ok(status)
}

/// Takes `--rm` back; the daemon would delete the VM as soon as our connection goes.
fn keep(ctx: &mut Context, made: &mut Made) {
    if !made.rm {
        return;
    }
    let request = VmSetRequest { vm: made.vm.id.to_string(), rm: Some(false), ..VmSetRequest::default() };
    match Client::connect_again(&ctx.socket).and_then(|mut client| client.call::<VmSet>(&request)) {
        Ok(_) => {
            made.rm = false;
            ctx.note(&format!("VM {} is kept despite --rm, because it has changes that exist nowhere else", made.vm.name));
        }
        Err(e) => ctx.fail(&e.context("keep the VM with its changes"), OUR_FAILURE),
    }
}

fn tell_end(ctx: &mut Context, interrupts: &Interrupts, ended: &Result<Ended>) {
    match ended {
        _ if interrupts.detached() => ctx.note("detached from the command"),
        _ if interrupts.cause().is_some() => ctx.note("interrupted"),
        Err(e) if e.is(Kind::Cancelled) => {
            let again = "the VM was stopped or deleted meanwhile: run the command again".to_owned();
            ctx.fail(&e.clone().hint(again), OUR_FAILURE);
        }
        Err(e) => ctx.fail(e, OUR_FAILURE),
        Ok(_) => {}
    }
}

/// On a connection of its own, since that of the command may be broken. Err: the status.
fn collect(ctx: &mut Context, interrupts: &Interrupts, made: &Made, export: &Export) -> std::result::Result<(), u8> {
    let vm = made.vm.name.as_str();
    let result = interrupts.enter(Phase::Collecting).and_then(|()| {
        let mut client = Client::connect_again(&ctx.socket)?;
        Transfer { ctx, interrupts, client: &mut client, vm }.export(&export.to, export.bound, false)
    });
    match result {
        Ok(fetched) => {
            tell_exported(ctx, interrupts, &export.to, &fetched.exported, export.top.as_deref());
            tell_left(ctx, vm, &fetched.left_behind);
            // The VM is the only place where this is.
            if made.rm && fetched.left_behind.total > 0 { Err(OUR_FAILURE) } else { Ok(()) }
        }
        Err(_) if interrupts.cause().is_some() => {
            ctx.note("interrupted");
            Err(interrupts.status().unwrap_or(OUR_FAILURE))
        }
        Err(e) => {
            ctx.fail(&e.context("export the changes"), OUR_FAILURE);
            Err(OUR_FAILURE)
        }
    }
}

/// Whatever was cancelled before, this is done; the daemon does it for `--rm` even if we do not.
fn remove(ctx: &mut Context, interrupts: &Interrupts, made: &Made) {
    // Never fails for this phase.
    let _ = interrupts.enter(Phase::CleaningUp { asked: false });
    let name = made.vm.name.as_str();
    // By its id: a name may have been taken by another since.
    let request = VmDeleteRequest { vm: made.vm.id.to_string(), force: true, if_exists: true };
    let result: Result<()> = Client::connect_again(&ctx.socket).and_then(|mut client| {
        let _guard = interrupts.guard(&client)?;
        ctx.operate::<VmDelete>(&mut client, &format!("delete {name}"), &request)?;
        Ok(())
    });
    if let Err(e) = result {
        let rest = if made.rm { "fcd deletes it, at the latest when it starts again" } else { "it still exists" };
        let failure: Failure = e.context(format!("delete VM {name} ({rest})"));
        ctx.fail(&failure.hint(format!("check: fcctl ps -a, delete: fcctl rm -f {name}")), OUR_FAILURE);
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
