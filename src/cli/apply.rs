//! `workspace apply`: applies the guest's changes to the caller's tree, byte for byte. Either all
//! of them are applied or none.

use super::connector::Connector;
use super::printer::Printer;
use super::signals::Interrupts;
use super::transfer::{Bound, ExportTo, Transfer, report_left_behind};
use crate::client::Result;
use crate::error::{Error, Kind};
use crate::host::plural::count;
use crate::host::shell::quote;
use crate::locks::Cancel;
use crate::workspace::apply::{self, Change};
use crate::workspace::caller_env::CallerEnv;
use crate::workspace::encode::encode;
use crate::workspace::left::LeftBehind;
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Name, ID, or ID prefix
    #[arg(required_unless_present = "patch")]
    vm: Option<String>,
    /// Apply this patch file instead of fetching one from the VM
    #[arg(long, value_name = "FILE", conflicts_with = "vm")]
    patch: Option<PathBuf>,
    /// Show what would change, and whether it applies, without changing anything
    #[arg(long)]
    dry_run: bool,
    /// Repository to change
    #[arg(short = 'C', long, value_name = "DIR", default_value = ".")]
    directory: PathBuf,
    #[command(flatten)]
    bound: Bound,
    /// Fail instead of waiting for another transfer of this VM
    #[arg(long)]
    no_wait: bool,
}

/// The `--json` output.
#[derive(serde::Serialize)]
struct Document {
    applied: bool,
    directory: PathBuf,
    files: Vec<ChangedFile>,
    left_behind: LeftBehind,
}

#[derive(serde::Serialize)]
struct ChangedFile {
    /// Bytes that are not printable ASCII are percent-encoded.
    path: String,
    lines_added: Option<u64>,
    lines_removed: Option<u64>,
}

pub(super) fn run(
    connector: &mut Connector,
    printer: &mut Printer,
    interrupts: &Interrupts,
    args: Args,
) -> Result<u8> {
    let top = apply::top_of(&args.directory)?;
    let spool = tempfile::Builder::new()
        .prefix("fcctl-apply-")
        .tempdir()
        .map_err(|e| Error::io("create a temporary directory", e))?;
    let mut left = LeftBehind::default();
    let patch = match (&args.vm, &args.patch) {
        (Some(vm), _) => {
            let file = spool.path().join("patch");
            let mut client = connector.connect(printer)?;
            let transfer = Transfer {
                printer,
                interrupts,
                client: &mut client,
                vm,
            };
            left = fetch(transfer, &file, &args)?;
            file
        }
        (None, Some(file)) => file.clone(),
        (None, None) => return Err(Error::internal("neither a VM nor a patch was given").into()),
    };
    if !patch.is_file() {
        return Err(Error::new(
            Kind::PathNotFound,
            format!("{} is not a file", patch.display()),
        )
        .hint("name a patch that fcctl workspace export has written")
        .into());
    }
    let checked = apply::check(
        &top,
        &patch,
        &CallerEnv::from_process(),
        interrupts.cancel(),
    )?;
    if let Some(vm) = &args.vm {
        if checked.changes.is_empty() {
            printer.note(&format!("nothing has changed in {vm}"));
        }
        report_left_behind(printer, vm, &left);
    }
    let changes = if args.dry_run {
        checked.changes
    } else {
        checked.apply_all()?
    };
    report(printer, top, &changes, left, !args.dry_run)?;
    Ok(0)
}

/// Exports the VM's changes into the file `spool` and returns what could not be exported.
fn fetch(mut transfer: Transfer<'_>, spool: &Path, args: &Args) -> Result<LeftBehind> {
    let to = ExportTo::Patch(spool.to_owned());
    let fetched = transfer.export(&to, args.bound, args.no_wait)?;
    Ok(fetched.left_behind)
}

fn report(
    printer: &mut Printer,
    directory: PathBuf,
    changes: &[Change],
    left_behind: LeftBehind,
    applied: bool,
) -> Result<()> {
    if printer.json {
        let files = changes.iter().map(|c| ChangedFile {
            path: encode(&c.path),
            lines_added: c.added,
            lines_removed: c.removed,
        });
        return printer.document(&Document {
            applied,
            directory,
            files: files.collect(),
            left_behind,
        });
    }
    if changes.is_empty() {
        return Ok(());
    }
    let (files, place) = (count(changes.len() as u64, "file"), directory.display());
    match applied {
        true => printer.line(&format!("changed {files} in {place}:"))?,
        false => printer.line(&format!("{files} would change in {place}:"))?,
    }
    for change in changes {
        let how = match (change.added, change.removed) {
            (Some(added), Some(removed)) => format!("+{added} -{removed}"),
            _ => "binary".to_owned(),
        };
        printer.line(&format!("  {} ({how})", encode(&change.path)))?;
    }
    Ok(())
}

/// Returns the command that applies a patch file to the tree `top` when it is run in the current
/// directory.
pub(super) fn command_for(top: &Path, patch: &Path, cancel: &Cancel) -> String {
    let by_hand = std::env::current_dir()
        .ok()
        .and_then(|cwd| apply::by_hand(top, &cwd, patch, &CallerEnv::from_process(), cancel));
    by_hand.unwrap_or_else(|| {
        let (top, patch) = (
            quote(&top.display().to_string()),
            quote(&patch.display().to_string()),
        );
        format!("fcctl workspace apply -C {top} --patch {patch}")
    })
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
