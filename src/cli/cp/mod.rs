//! `cp`: copies files into VMs, out of them, and between them.
//!
//! A copy is an exec session whose input or output is a tar. The daemon therefore needs no call for
//! copies, and stopping the VM ends a copy at once. Files on the host are read and written in this
//! process, with the caller's rights; [`crate::workspace::copy`] does that.

mod between;
mod into;
mod job;
mod meter;
mod out;
mod places;
mod session;

use super::context::Context;
use super::signals::Interrupts;
use crate::client::{Failure, Result};
use crate::workspace::copy::{Copied, land};
use job::{Job, Options};
use places::{GuestPath, Plan};
use std::ffi::OsString;
use std::path::Path;

const HELP: &str = "\
A path in a VM is VM:PATH. Write a path of this host that has a colon with / or ./ before it.
As with cp, SRC is copied into DST if that is a directory. Otherwise the copy is called DST.
SRC/. copies the content of a directory. Links are copied, not followed.

  fcctl cp notes.txt web:/root/
  fcctl cp -a web:/etc/nginx .
  tar c src | fcctl cp - web:/root
  fcctl cp web:/var/log - | tar t
  fcctl cp web:/root/a db:/root/b";

#[derive(clap::Args, Debug)]
#[command(after_help = HELP, override_usage = "fcctl vm cp [OPTIONS] SRC... DST")]
pub(super) struct Args {
    #[command(flatten)]
    options: Options,
    // This is one list, because clap's message about two would not say what is missing.
    /// PATH of this host, VM:PATH, or - for a tar on stdin or stdout
    #[arg(required = true, value_name = "SRC... DST")]
    paths: Vec<OsString>,
}

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        signals,
        ..
    } = ctx;
    let plan = places::plan(&args.paths)?;
    let interrupts = Interrupts::start(signals, &stdio.stderr)?;
    let mut job = Job {
        connector,
        printer,
        stdio,
        interrupts: &interrupts,
        options: &args.options,
    };
    let result = copy(&mut job, &plan).map_err(|failure| hinted(failure, &args));
    match (interrupts.or_interrupted(result), interrupts.status()) {
        (Err(_), Some(status)) => {
            printer.note("interrupted");
            Ok(status)
        }
        (result, _) => result,
    }
}

fn copy(job: &mut Job<'_>, plan: &Plan) -> Result<u8> {
    let copied = match plan {
        Plan::Into(from, to) => into::files(job, from, to)?,
        Plan::TarInto(to) => into::tar(job, to)?,
        Plan::OutTar(from) => {
            out::tar(job, from)?;
            return Ok(0);
        }
        Plan::Out(from, to) => {
            land::check(to, from.len() > 1)?;
            return each(job, from, |job, from| out::files(job, from, to));
        }
        Plan::Between(from, to) => {
            let several = from.len() > 1;
            return each(job, from, |job, from| between::copy(job, from, to, several));
        }
    };
    report(job, copied)?;
    Ok(0)
}

/// Copies each source, and continues after failures. Returns the status of the first failure, or 0.
fn each(
    job: &mut Job<'_>,
    from: &[GuestPath],
    mut one: impl FnMut(&mut Job<'_>, &GuestPath) -> Result<Copied>,
) -> Result<u8> {
    let (mut status, mut total) = (0, Copied::default());
    for path in from {
        match one(job, path) {
            Ok(copied) => total += copied,
            Err(failure) if from.len() == 1 || job.interrupts.cause().is_some() => {
                return Err(failure);
            }
            Err(failure) => {
                let this = failure.exit_status();
                job.printer.fail(&failure, this);
                status = if status == 0 { this } else { status };
            }
        }
    }
    report(job, total)?;
    Ok(status)
}

fn report(job: &mut Job<'_>, copied: Copied) -> Result<()> {
    if job.printer.json {
        job.printer.document(&copied)?;
    }
    Ok(())
}

/// Adds a hint to the error about a missing VM, if a file of the host has the same name.
fn hinted(failure: Failure, args: &Args) -> Failure {
    let is_file = |word: &&OsString| {
        word.to_string_lossy().contains(':') && Path::new(word).symlink_metadata().is_ok()
    };
    let mut files = args.paths.iter().filter(is_file);
    match files.next() {
        Some(word) if failure.fault.kind == crate::error::Kind::VmNotFound.name() => {
            let word = word.to_string_lossy();
            failure.hint(format!("to copy a file of this host: ./{word}"))
        }
        _ => failure,
    }
}

#[cfg(test)]
mod tests;
