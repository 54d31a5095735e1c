//! `run`: creates a VM, copies a tree into it, runs a command, and brings back its status and
//! changes.

use super::connector::{Connector, operate};
use super::context::{Context, Env, Stdio};
use super::exec::{self, How, OUR_FAILURE, Outcome, Spec};
use super::forwards::ForwardReporter;
use super::guest::{self, Gift, Guest};
use super::image_pull;
use super::printer::Printer;
use super::signals::{Interrupts, Phase, interrupted};
use super::transfer::{Bound, ExportTo, PrepareHow, Source, Transfer, report_left_behind};
use super::values::{labels, parse_duration, published};
use super::vm::Shape;
use super::workspace::report_exported;
use crate::api::exec::Exit;
use crate::api::frame::Note;
use crate::api::image::{ImageConfig, ImageRequest, ImageShow, ImageShowReply};
use crate::api::vm::{
    Vm, VmCreate, VmCreateRequest, VmDelete, VmDeleteRequest, VmRequest, VmSet, VmSetRequest,
    VmStart,
};
use crate::client::{Client, Event, Failure, Result};
use crate::error::{Error, Kind};
use crate::host::shell::quote;
use crate::ids::{ImageRef, VmName};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The exit status if the command ran for longer than `--timeout`, as with timeout(1).
const TIMED_OUT: u8 = 124;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Directory to copy into the VM. In a git repository, the whole repository is copied, and the
    /// command starts in this directory. After --image, a word without a slash that is not . is
    /// the command instead
    path: Option<PathBuf>,
    /// Delete the VM afterwards, even if fcctl is killed
    #[arg(long)]
    rm: bool,
    /// Name of the VM [default: a random adjective-noun]
    #[arg(short, long)]
    name: Option<VmName>,
    #[command(flatten)]
    shape: Shape,
    /// Stop the command after this time, such as 10m, and exit with 124
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Write the guest's changes as a git patch to a new file afterwards, or to stdout with -
    #[arg(long, value_name = "FILE", requires = "path")]
    export_patch: Option<PathBuf>,
    #[command(flatten)]
    bound: Bound,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    workspace: PrepareHow,
    /// Program to run instead of the image's entrypoint; empty for none
    #[arg(long, value_name = "PROGRAM", requires = "image")]
    entrypoint: Option<String>,
    /// Command and arguments [default: those of the image, or a shell]
    #[arg(last = true, value_name = "CMD")]
    argv: Vec<OsString>,
}

/// Runs the whole sequence, from checking the tree to a VM that keeps running or has been deleted.
pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        signals,
        env,
        ..
    } = ctx;
    let interrupts = Interrupts::start(signals, &stdio.stderr)?;
    match run_in_new_vm(connector, printer, stdio, env, &interrupts, args) {
        Err(_) if interrupts.cause().is_some() => {
            printer.note("interrupted");
            Ok(interrupts.status().unwrap_or(OUR_FAILURE))
        }
        result => result,
    }
}

fn run_in_new_vm(
    connector: &mut Connector,
    printer: &mut Printer,
    stdio: &Stdio,
    env: &Env,
    interrupts: &Interrupts,
    args: Args,
) -> Result<u8> {
    refuse_directory_as_command(&args)?;
    // Check everything that can be checked before anything is created.
    let (argv, image_user) = match &args.shape.image {
        Some(image) => {
            let shown = find_or_pull(connector, printer, stdio, env, interrupts, image)?;
            let config = shown.config;
            let user = config.user.clone();
            (command(config, args.entrypoint, args.argv), Some(user))
        }
        None => (args.argv, None),
    };
    let spec = args.how.spec(stdio, env, argv)?;
    let to = args.export_patch.map(ExportTo::patch);
    to.iter().try_for_each(ExportTo::check)?;
    let source = match &args.path {
        Some(path) => Some(
            Source::tree(path, &args.workspace, interrupts.cancel())
                .map_err(|e| suggest_image(e, path, args.shape.image.is_some(), &spec.argv))?,
        ),
        None if args.workspace.is_given() => {
            return Err(Error::invalid("workspace options need a PATH")
                .hint("for example: fcctl run . -- CMD")
                .into());
        }
        None => None,
    };
    let export = to.map(|to| Export {
        to,
        bound: args.bound,
        top: source.as_ref().and_then(Source::top).map(Path::to_owned),
    });
    let mut new_vm = create(
        connector.connect(printer)?,
        interrupts,
        args.name,
        args.shape,
        args.rm,
    )?;
    printer.note(&format!("VM {}", new_vm.vm.name));
    for port in &new_vm.vm.ports {
        printer.note(&format!("port {}", super::vm_text::port_line(port)));
    }
    let work = Work {
        source,
        how: args.workspace,
        spec,
        timeout: args.timeout,
        image_user,
    };
    let outcome = perform(printer, stdio, interrupts, &mut new_vm, work);
    finish(printer, interrupts, new_vm, outcome, export)
}

/// The steps of a run in its VM.
struct Work {
    source: Option<Source>,
    how: PrepareHow,
    spec: Spec,
    /// How long the command may run.
    timeout: Option<Duration>,
    /// The user of the image's commands, if the image is known.
    image_user: Option<String>,
}

/// Boots the VM, copies the tree and runs the command.
fn perform(
    printer: &mut Printer,
    stdio: &Stdio,
    interrupts: &Interrupts,
    new_vm: &mut NewVm,
    work: Work,
) -> Result<Outcome> {
    let Work {
        source,
        mut how,
        spec,
        timeout,
        image_user,
    } = work;
    let user = match (&source, &spec.user, image_user) {
        (None, _, _) => None,
        (Some(_), Some(user), _) => Some(user.clone()),
        (Some(_), None, Some(user)) => guest::unless_root(user),
        // The daemon chose the image, so fcctl does not know its user yet.
        (Some(_), None, None) => guest::user_of_image(&mut new_vm.client, new_vm.vm.image.clone())?,
    };
    let gift = source
        .as_ref()
        .zip(user)
        .and_then(|(source, user)| Gift::plan(source, &mut how, user));
    let vm = new_vm.vm.name.to_string();
    boot(
        printer,
        interrupts,
        new_vm,
        source.map(|source| (source, how)),
    )?;
    if let Some(gift) = &gift {
        new_vm.guest(printer, stdio, interrupts).give(gift)?;
    }
    let has_news = new_vm.vm.auto_ports.is_some() && !printer.json;
    let socket = new_vm.client.socket();
    let reporter = has_news.then(|| ForwardReporter::start(socket, &stdio.stderr, &new_vm.vm));
    let reporter = reporter.transpose()?;
    let timer = timeout.map(|limit| interrupts.end_after(limit));
    let timer = timer.transpose()?;
    let outcome = exec::execute(printer, stdio, interrupts, &mut new_vm.client, &vm, spec);
    drop((timer, reporter));
    if interrupts.timed_out() && interrupts.cause().is_none() {
        printer.note("the command ran for too long, so it was stopped (--timeout)");
        return Ok(Outcome::Exit(Exit::Status(TIMED_OUT)));
    }
    outcome
}

/// Returns an image. Pulls the image if this host does not have it.
pub(super) fn find_or_pull(
    connector: &mut Connector,
    printer: &mut Printer,
    stdio: &Stdio,
    env: &Env,
    interrupts: &Interrupts,
    image: &ImageRef,
) -> Result<ImageShowReply> {
    let mut client = connector.connect(printer)?;
    let request = ImageRequest {
        image: image.clone(),
    };
    let shown = client.call::<ImageShow>(&request);
    match shown {
        Err(e) if e.is(Kind::ImageNotFound) => {}
        shown => return shown,
    }
    let _guard = interrupts.guard(&client)?;
    let args = image_pull::Args::of(image);
    let pulled = image_pull::pull(&mut client, printer, interrupts, &stdio.stdin, env, args)
        .map_err(|e| e.context(format!("this host has no image {image}")))?;
    let request = ImageRequest { image: pulled.name };
    client.call::<ImageShow>(&request)
}

/// Returns the command to run in an image, as docker chooses it: the arguments replace the image's
/// command, and the entrypoint precedes both.
fn command(config: ImageConfig, entrypoint: Option<String>, argv: Vec<OsString>) -> Vec<OsString> {
    let (first, default) = match entrypoint {
        Some(program) => (
            Vec::from_iter(Some(program).filter(|p| !p.is_empty())),
            Vec::new(),
        ),
        None => (config.entrypoint, config.cmd),
    };
    let argv = if argv.is_empty() {
        default.into_iter().map(OsString::from).collect()
    } else {
        argv
    };
    first.into_iter().map(OsString::from).chain(argv).collect()
}

/// Refuses `run --image IMAGE DIR -- CMD`, where DIR would be the command.
fn refuse_directory_as_command(args: &Args) -> Result<()> {
    let [first, second, ..] = &args.argv[..] else {
        return Ok(());
    };
    if args.path.is_some() || second != "--" || !Path::new(first).is_dir() {
        return Ok(());
    }
    let name = first.to_string_lossy();
    Err(Error::invalid(format!(
        "{name} after --image is a command, not a directory"
    ))
    .hint(format!("to copy the directory, write ./{name}"))
    .into())
}

/// Adds a hint on how to name an image, if the word in the place of a directory may be one.
fn suggest_image(e: Failure, path: &Path, has_image: bool, argv: &[OsString]) -> Failure {
    let word = path.to_string_lossy();
    if !e.is(Kind::PathNotFound) || has_image || path.exists() || word.parse::<ImageRef>().is_err()
    {
        return e;
    }
    let command: String = argv
        .iter()
        .map(|arg| format!(" {}", quote(&arg.to_string_lossy())))
        .collect();
    e.hint(format!(
        "if it is an image: fcctl run --image {word}{command}\n\
         to copy a directory, name it: fcctl run . --{}",
        if command.is_empty() { " CMD" } else { &command }
    ))
}

/// The target and limit of `--export-patch`.
struct Export {
    to: ExportTo,
    bound: Bound,
    /// The tree that was sent, and to which the patch will be applied.
    top: Option<PathBuf>,
}

/// The VM that this run created.
pub(super) struct NewVm {
    pub vm: Vm,
    /// The connection for everything that is done with the VM.
    pub client: Client,
    /// With `--rm`, the VM lives as long as this connection. Nothing more is read from it.
    _hold: Option<Client>,
    rm: bool,
}

impl NewVm {
    /// Creates a VM that the daemon deletes when this process ends.
    pub(super) fn held(
        client: Client,
        interrupts: &Interrupts,
        request: &VmCreateRequest,
    ) -> Result<Self> {
        let mut hold = Client::connect_again(client.socket())?;
        let vm = create_held(interrupts, &mut hold, request)?;
        Ok(Self {
            vm,
            client,
            _hold: Some(hold),
            rm: true,
        })
    }

    /// Returns the guest for fcctl's own commands.
    pub(super) fn guest<'a>(
        &'a mut self,
        printer: &'a mut Printer,
        stdio: &'a Stdio,
        interrupts: &'a Interrupts,
    ) -> Guest<'a> {
        Guest {
            printer,
            stdio,
            interrupts,
            client: &mut self.client,
            vm: self.vm.id.as_str(),
        }
    }
}

fn create(
    mut client: Client,
    interrupts: &Interrupts,
    name: Option<VmName>,
    shape: Shape,
    rm: bool,
) -> Result<NewVm> {
    let rates = shape.rates;
    let (ports, auto_ports) = published(&shape.publish);
    let request = VmCreateRequest {
        disk_bytes_per_s: rates.disk_bps,
        disk_ops_per_s: rates.disk_iops,
        net_rx_bytes_per_s: rates.net_rx_bps,
        net_tx_bytes_per_s: rates.net_tx_bps,
        name: name.clone(),
        kernel: shape.kernel.clone(),
        init: shape.init,
        image: shape.image,
        vcpus: shape.vcpus,
        mem_mib: shape.memory,
        disk_bytes: None,
        work_disk_bytes: shape.work_disk,
        net: shape.net,
        ports,
        auto_ports,
        labels: labels(shape.labels)?,
        restart: shape.restart.unwrap_or_default(),
        host_name: shape.host_name,
        dns: shape.dns,
        // These options of `run` apply to its own command, not to later commands in the VM.
        user: None,
        workdir: None,
        env: Vec::new(),
        rm,
        hold: rm,
    };
    let result = if rm {
        NewVm::held(client, interrupts, &request)
    } else {
        let _guard = interrupts.guard(&client)?;
        client.call::<VmCreate>(&request).map(|reply| NewVm {
            vm: reply.vm,
            client,
            _hold: None,
            rm,
        })
    };
    result.map_err(|e| match name {
        Some(name) if e.is(Kind::NameTaken) => e.hint(format!(
            "use it: fcctl exec {name} -- CMD (after fcctl start {name} if it is stopped)\n\
             delete it: fcctl rm -f {name}\n\
             use another name: fcctl run --name {name}-2"
        )),
        _ => e,
    })
}

/// Creates a VM that is deleted when `hold` closes. The call stays in flight for as long as the VM
/// exists.
fn create_held(
    interrupts: &Interrupts,
    hold: &mut Client,
    request: &VmCreateRequest,
) -> Result<Vm> {
    let _guard = interrupts.guard(hold)?;
    let mut in_flight = hold.begin::<VmCreate>(request, &[])?;
    loop {
        match in_flight.next_event()? {
            Event::Note(Note::Created(vm)) => return Ok(*vm),
            Event::Note(_) => {}
            Event::Reply(reply) => {
                return Err(Error::internal(format!(
                    "VM {} was deleted right after it was created",
                    reply.vm.name
                ))
                .into());
            }
        }
    }
}

pub(super) fn boot(
    printer: &mut Printer,
    interrupts: &Interrupts,
    new_vm: &mut NewVm,
    source: Option<(Source, PrepareHow)>,
) -> Result<()> {
    let vm = new_vm.vm.name.to_string();
    {
        let _guard = interrupts.guard(&new_vm.client)?;
        operate::<VmStart>(
            printer,
            &mut new_vm.client,
            &format!("start {vm}"),
            &VmRequest { vm: vm.clone() },
        )?;
    }
    if let Some((source, how)) = source {
        Transfer {
            printer,
            interrupts,
            client: &mut new_vm.client,
            vm: &vm,
        }
        .prepare(source, how)?;
    }
    if interrupts.cause().is_some() {
        Err(interrupted())
    } else {
        Ok(())
    }
}

/// Exports the changes. Then deletes the VM, or prints that it keeps running.
fn finish(
    printer: &mut Printer,
    interrupts: &Interrupts,
    mut new_vm: NewVm,
    outcome: Result<Outcome>,
    export: Option<Export>,
) -> Result<u8> {
    let began =
        interrupts.command_began() || matches!(outcome, Ok(Outcome::Exit(_) | Outcome::ReaderGone));
    let mut status = match &outcome {
        Ok(outcome) => exec::status_of(outcome, interrupts),
        Err(_) => interrupts.status().unwrap_or(OUR_FAILURE),
    };
    report_outcome(printer, interrupts, &outcome);
    if let (Some(export), true, None) = (&export, began, interrupts.cause())
        && let Err(failed) = collect(printer, interrupts, &new_vm, export)
    {
        status = failed;
        // The VM has changes that could not be exported, so it must not be deleted.
        keep(printer, &mut new_vm);
    }
    if new_vm.rm || !began {
        remove(printer, interrupts, &new_vm);
        return Ok(status);
    }
    let name = &new_vm.vm.name;
    printer.note(&format!("VM {name} keeps running. Enter: fcctl ssh {name}, stop: fcctl stop {name}, delete: fcctl rm -f {name}"));
    Ok(status)
}

/// Revokes `--rm`, because the daemon would delete the VM when our connection closes.
fn keep(printer: &mut Printer, new_vm: &mut NewVm) {
    if !new_vm.rm {
        return;
    }
    let request = VmSetRequest {
        vm: new_vm.vm.id.to_string(),
        rm: Some(false),
        ..VmSetRequest::default()
    };
    match Client::connect_again(new_vm.client.socket())
        .and_then(|mut client| client.call::<VmSet>(&request))
    {
        Ok(_) => {
            new_vm.rm = false;
            printer.note(&format!(
                "VM {} is kept despite --rm, because it has changes that exist nowhere else",
                new_vm.vm.name
            ));
        }
        Err(e) => printer.fail(&e.context("keep the VM with its changes"), OUR_FAILURE),
    }
}

fn report_outcome(printer: &mut Printer, interrupts: &Interrupts, outcome: &Result<Outcome>) {
    match outcome {
        _ if interrupts.detached() => printer.note("detached from the command"),
        _ if interrupts.cause().is_some() => printer.note("interrupted"),
        Err(e) if e.is(Kind::Cancelled) => {
            let again = "the VM was stopped or deleted meanwhile: run the command again".to_owned();
            printer.fail(&e.clone().hint(again), OUR_FAILURE);
        }
        Err(e) => printer.fail(e, OUR_FAILURE),
        Ok(_) => {}
    }
}

/// Exports the changes over a new connection, because the connection of the command may be broken.
/// The error is the exit status.
fn collect(
    printer: &mut Printer,
    interrupts: &Interrupts,
    new_vm: &NewVm,
    export: &Export,
) -> std::result::Result<(), u8> {
    let vm = new_vm.vm.name.as_str();
    let result = interrupts.enter(Phase::Collecting).and_then(|()| {
        let mut client = Client::connect_again(new_vm.client.socket())?;
        Transfer {
            printer,
            interrupts,
            client: &mut client,
            vm,
        }
        .export(&export.to, export.bound, false)
    });
    match result {
        Ok(fetched) => {
            report_exported(
                printer,
                interrupts,
                &export.to,
                &fetched.exported,
                export.top.as_deref(),
            );
            report_left_behind(printer, vm, &fetched.left_behind);
            // These changes exist only in the VM.
            if new_vm.rm && fetched.left_behind.total > 0 {
                Err(OUR_FAILURE)
            } else {
                Ok(())
            }
        }
        Err(_) if interrupts.cause().is_some() => {
            printer.note("interrupted");
            Err(interrupts.status().unwrap_or(OUR_FAILURE))
        }
        Err(e) => {
            printer.fail(&e.context("export the changes"), OUR_FAILURE);
            Err(OUR_FAILURE)
        }
    }
}

/// Deletes the VM even after a cancellation. If this fails, the daemon deletes a VM with `--rm`.
pub(super) fn remove(printer: &mut Printer, interrupts: &Interrupts, new_vm: &NewVm) {
    // Entering this phase never fails.
    let _ = interrupts.enter(Phase::CleaningUp { asked: false });
    let name = new_vm.vm.name.as_str();
    // Delete by ID, because another VM may have taken the name since.
    let request = VmDeleteRequest {
        vm: new_vm.vm.id.to_string(),
        force: true,
        if_exists: true,
    };
    let result: Result<()> =
        Client::connect_again(new_vm.client.socket()).and_then(|mut client| {
            let _guard = interrupts.guard(&client)?;
            operate::<VmDelete>(printer, &mut client, &format!("delete {name}"), &request)?;
            Ok(())
        });
    if let Err(e) = result {
        let rest = if new_vm.rm {
            "fcd deletes it, at the latest when it starts again"
        } else {
            "it still exists"
        };
        let failure: Failure = e.context(format!("delete VM {name} ({rest})"));
        printer.fail(
            &failure.hint(format!("check: fcctl ps -a, delete: fcctl rm -f {name}")),
            OUR_FAILURE,
        );
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;

#[cfg(test)]
mod unit {
    use super::*;

    #[track_caller]
    fn check(entrypoint: Option<&str>, argv: &[&str], expected: &[&str]) {
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        let config = ImageConfig {
            entrypoint: words(&["/init", "-v"]),
            cmd: words(&["serve"]),
            ..ImageConfig::default()
        };
        let argv = argv.iter().map(OsString::from).collect();
        let found = command(config, entrypoint.map(str::to_owned), argv);
        assert_eq!(found, expected);
    }

    #[test]
    fn command_is_chosen_like_docker() {
        check(None, &[], &["/init", "-v", "serve"]);
        check(None, &["ls", "/"], &["/init", "-v", "ls", "/"]);
        check(Some(""), &["ls"], &["ls"]);
        check(Some("sh"), &["-c", "x"], &["sh", "-c", "x"]);
        check(Some(""), &[], &[]);
    }
}
