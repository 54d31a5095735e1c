//! `workspace`: copies a tree into a VM and brings a patch or a tree back.

use super::apply;
use super::connector::Connector;
use super::context::{Context, Stdio};
use super::guest::{self, Gift, Guest};
use super::output::size;
use super::pipes;
use super::printer::Printer;
use super::signals::Interrupts;
use super::transfer::{
    Bound, ExportTo, Exported, PrepareHow, Source, Transfer, report_left_behind,
};
use super::values::path_error;
use crate::api::vm::{VmRequest, VmShow};
use crate::client::{Client, Result};
use crate::error::{Error, Kind};
use crate::host::plural::count;
use crate::workspace::guest_path;
use std::fs::File;
use std::path::{Path, PathBuf};

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Copy a directory into a VM, without files that git ignores
    Prepare(PrepareArgs),
    /// Write the guest's changes as a patch, or the whole tree to a directory
    Export(ExportArgs),
    /// Apply the guest's changes to this repository, all or none
    Apply(apply::Args),
}

#[derive(clap::Args, Debug)]
pub(super) struct PrepareArgs {
    /// Name, ID, or ID prefix
    vm: String,
    /// Directory to copy. In a git repository, the whole repository is copied, and commands start
    /// in this directory
    #[arg(required_unless_present = "tar")]
    path: Option<PathBuf>,
    /// Send a tar archive instead: a file, or - for stdin
    #[arg(long, value_name = "FILE", conflicts_with_all = ["path", "history", "allow_alternate"])]
    tar: Option<PathBuf>,
    #[command(flatten)]
    how: PrepareHow,
}

#[derive(clap::Args, Debug)]
pub(super) struct ExportArgs {
    /// Name, ID, or ID prefix
    vm: String,
    /// Write a git patch to a new file [default: -, which is stdout]
    #[arg(long, value_name = "FILE")]
    patch: Option<PathBuf>,
    /// Write the tree as it is in the guest to a new directory
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
    #[command(flatten)]
    bound: Bound,
    /// Fail instead of waiting for another transfer of this VM
    #[arg(long)]
    no_wait: bool,
}

pub(super) fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        signals,
        ..
    } = ctx;
    let interrupts = Interrupts::start(signals, &stdio.stderr)?;
    let result = match verb {
        Verb::Prepare(args) => prepare(connector, printer, stdio, &interrupts, args),
        Verb::Export(args) => export(connector, printer, &interrupts, args),
        Verb::Apply(args) => apply::run(connector, printer, &interrupts, args),
    };
    match (interrupts.or_interrupted(result), interrupts.status()) {
        (Err(_), Some(status)) => {
            printer.note("interrupted");
            Ok(status)
        }
        (result, _) => result,
    }
}

fn prepare(
    connector: &mut Connector,
    printer: &mut Printer,
    stdio: &Stdio,
    interrupts: &Interrupts,
    mut args: PrepareArgs,
) -> Result<u8> {
    let source = match (&args.tar, &args.path) {
        (Some(tar), _) => Source::Tar(open_tar(&stdio.stdin, tar)?),
        (None, path) => Source::tree(
            path.as_deref().unwrap_or(Path::new(".")),
            &args.how,
            interrupts.cancel(),
        )?,
    };
    let mut client = connector.connect(printer)?;
    let gift = plan_gift(&mut client, &source, &args.vm, &mut args.how)?;
    let reply = Transfer {
        printer,
        interrupts,
        client: &mut client,
        vm: &args.vm,
    }
    .prepare(source, args.how)?;
    if let Some(gift) = &gift {
        Guest {
            printer,
            stdio,
            interrupts,
            client: &mut client,
            vm: reply.vm.id.as_str(),
        }
        .give(gift)?;
    }
    if printer.json {
        printer.document(&reply)?;
    } else if let Some(workspace) = &reply.vm.workspace {
        let what = if reply.entries == 1 {
            "entry"
        } else {
            "entries"
        };
        printer.line(&format!(
            "{}: {} {what}, {}, in {}",
            reply.vm.name,
            reply.entries,
            size(reply.bytes),
            workspace.guest_path
        ))?;
    }
    Ok(0)
}

/// Chooses the path and the owner of a copy as `fcctl run` does. A copy that is already at one of
/// the usual paths is updated there.
fn plan_gift(
    client: &mut Client,
    source: &Source,
    vm: &str,
    how: &mut PrepareHow,
) -> Result<Option<Gift>> {
    // Refuse a bad path before the daemon is called.
    how.guest_path
        .iter()
        .try_for_each(|path| guest_path::validate(path).map(drop))?;
    let request = VmRequest { vm: vm.to_owned() };
    let vm = client.call::<VmShow>(&request)?.vm;
    let usual = [source.path_for_root(), source.path_for_user()];
    let present = vm.workspace.map(|workspace| workspace.guest_path);
    let present = present.filter(|path| usual.contains(path));
    how.guest_path = how.guest_path.take().or(present);
    let user = match guest::user_of_image(client, vm.image) {
        // Earlier versions let users delete the image of a VM.
        Err(e) if e.is(Kind::ImageNotFound) => None,
        user => user?,
    };
    Ok(user.and_then(|user| Gift::plan(source, how, user)))
}

fn open_tar(stdin: &File, tar: &Path) -> Result<File> {
    if tar == Path::new("-") {
        return stdin
            .try_clone()
            .map_err(|e| Error::io("duplicate stdin", e).into());
    }
    pipes::open(tar).map_err(|e| path_error(format!("open {}", tar.display()), e).into())
}

fn export(
    connector: &mut Connector,
    printer: &mut Printer,
    interrupts: &Interrupts,
    args: ExportArgs,
) -> Result<u8> {
    let mut targets: Vec<ExportTo> = args.patch.into_iter().map(ExportTo::patch).collect();
    targets.extend(args.tree.into_iter().map(ExportTo::Tree));
    if targets.is_empty() {
        targets.push(ExportTo::PatchToStdout);
    }
    if printer.json && targets.contains(&ExportTo::PatchToStdout) {
        return Err(
            Error::invalid("a patch on stdout cannot be one JSON document")
                .hint("name a file: --patch FILE")
                .into(),
        );
    }
    targets.iter().try_for_each(ExportTo::check)?;
    let mut client = connector.connect(printer)?;
    let mut all = vec![];
    for to in &targets {
        let fetched = Transfer {
            printer,
            interrupts,
            client: &mut client,
            vm: &args.vm,
        }
        .export(to, args.bound, args.no_wait)?;
        if !printer.json {
            report_exported(printer, interrupts, to, &fetched.exported, None);
            report_left_behind(printer, &args.vm, &fetched.left_behind);
        }
        all.push(fetched);
    }
    if printer.json {
        match all.as_slice() {
            [one] => printer.document(one)?,
            all => printer.document(&all)?,
        }
    }
    Ok(0)
}

/// Reports on stderr, because stdout may be the patch. `top` is the tree that the patch is for;
/// `None` means the tree of the current directory.
pub(super) fn report_exported(
    printer: &mut Printer,
    interrupts: &Interrupts,
    to: &ExportTo,
    exported: &Exported,
    top: Option<&Path>,
) {
    let what = match exported {
        Exported::Patch {
            files_changed,
            bytes,
        } => format!(
            "{} changed, {}",
            count(*files_changed, "file"),
            size(*bytes)
        ),
        Exported::Tree { entries: 1, .. } => "1 entry".to_owned(),
        Exported::Tree { entries, .. } => format!("{entries} entries"),
    };
    match (to, exported) {
        (ExportTo::Patch(path), Exported::Patch { bytes: 0, .. }) => {
            printer.note(&format!("nothing has changed; {} is empty", path.display()));
        }
        (ExportTo::Patch(path), _) => {
            let here = || {
                crate::workspace::apply::top_of(Path::new("."))
                    .unwrap_or_else(|_| PathBuf::from("."))
            };
            let top = top.map_or_else(here, Path::to_owned);
            let command = apply::command_for(&top, path, interrupts.cancel());
            printer.note(&format!("{what}: {command}"));
        }
        (ExportTo::PatchToStdout, _) => printer.note(&what),
        (ExportTo::Tree(path), _) => {
            printer.note(&format!("{} holds the tree, {what}", path.display()))
        }
    }
}

#[cfg(test)]
#[path = "workspace_tests.rs"]
pub(crate) mod tests;
