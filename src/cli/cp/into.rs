//! Copies into a VM: files of the host, or a tar from stdin.

use super::super::pipes::{self, Stoppable};
use super::super::transfer::conclude;
use super::job::{Job, Outcome};
use super::places::GuestPath;
use super::session::{self, Command};
use crate::api::exec::Stream;
use crate::client::Result;
use crate::error::{Error, Kind};
use crate::host::thread;
use crate::locks::Cancel;
use crate::workspace::copy::forward::forward;
use crate::workspace::copy::list::{Listing, list};
use crate::workspace::copy::pack::{Packing, pack};
use crate::workspace::copy::script::{Content, Into, last_entry};
use crate::workspace::copy::{Copied, FileKind};
use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

/// Copies files of the host.
pub(super) fn files(job: &mut Job<'_>, from: &[PathBuf], to: &GuestPath) -> Result<Copied> {
    let listings = listings(job, from)?;
    for warning in listings.iter().flat_map(|listing| &listing.warnings) {
        job.printer.note(&format!("warning: {warning}"));
    }
    let content = match listings.as_slice() {
        [one] => content(one.kind, one.name.as_deref()),
        _ => Content::Many,
    };
    let total = listings.iter().map(Listing::bytes).sum();
    let archive = job.options.archive;
    copy(
        job,
        to,
        content,
        Some(total),
        move |last, out, meter, stop| {
            let packing = Packing {
                archive,
                last: last.to_owned(),
            };
            let packed = pack(&listings, &packing, out, meter, stop)?;
            Ok((packed.copied, packed.warnings))
        },
    )
}

/// Returns the content that a guest should expect in the tar of one path.
pub(super) fn content(kind: FileKind, name: Option<&[u8]>) -> Content {
    match (kind, name) {
        (FileKind::Dir, Some(name)) => Content::Dir(name.to_vec()),
        (_, None) => Content::Contents,
        (_, Some(name)) => Content::File(name.to_vec()),
    }
}

fn listings(job: &Job<'_>, from: &[PathBuf]) -> Result<Vec<Listing>> {
    let (mut listings, mut names) = (Vec::new(), HashMap::new());
    for path in from {
        let listing = list(path, job.options.follow_link, job.interrupts.cancel())?;
        if let Some(name) = &listing.name
            && let Some(other) = names.insert(name.clone(), path)
        {
            let (other, path) = (other.display(), path.display());
            let text = format!("{other} and {path} have the same name");
            return Err(Error::invalid(text)
                .hint("copy them with two commands")
                .into());
        }
        listings.push(listing);
    }
    Ok(listings)
}

/// Copies a tar from stdin.
pub(super) fn tar(job: &mut Job<'_>, to: &GuestPath) -> Result<Copied> {
    if job.stdio.stdin_is_terminal() {
        let text = "a tar is not read from a terminal";
        let hint = format!("pipe one in: tar c DIR | fcctl cp - {}:DIR", to.vm);
        return Err(Error::invalid(text).hint(hint).into());
    }
    let stdin = job.stdio.stdin.try_clone();
    let stdin = stdin.map_err(|e| Error::io("duplicate stdin", e))?;
    let vm = to.vm.clone();
    copy(
        job,
        to,
        Content::Tar,
        None,
        move |last, out, meter, stop| {
            let mut from = Stoppable::new(stdin, stop);
            let copied = forward(&mut from, out, Some(last), meter, stop).map_err(|e| {
                match e.kind() {
            Kind::InvalidTree => e.hint(format!(
                "give an uncompressed tar, for instance: zcat x.tar.gz | fcctl cp - {vm}:DIR"
            )),
            _ => e,
        }
            })?;
            Ok((copied, Vec::new()))
        },
    )
}

/// Runs the command in the guest while `send` writes its input: the tar, with an entry of the given
/// name at its end.
fn copy(
    job: &mut Job<'_>,
    to: &GuestPath,
    content: Content,
    total: Option<u64>,
    send: impl FnOnce(&str, &mut dyn Write, &mut dyn FnMut(u64), &Cancel) -> Outcome + Send + 'static,
) -> Result<Copied> {
    let last = last_entry();
    let into = Into {
        content,
        path: to.path.clone(),
        last: last.clone(),
        archive: job.options.archive,
        origin: None,
    };
    let stop = job.stop()?;
    let (mut ours, theirs) = pipes::to_daemon(&stop)?;
    let (token, mut meter) = (stop.clone(), job.meter(&format!("to {}", to.vm), total));
    let mut client = job.connector.connect(job.printer)?;
    let _guard = job.interrupts.guard(&client)?;
    let sender = thread::spawn("pack", move || {
        let result = send(&last, &mut ours, &mut |n| meter.add(n), &token);
        // Our end is still open here, so `is_unread` cannot be a consequence of our own failure.
        (result, token.is_cancelled() || ours.is_unread())
    })?;
    let command = Command {
        vm: &to.vm,
        user: job.options.user.as_deref(),
        words: into.words(),
        tar: theirs,
        stream: Stream::Stdin,
    };
    let reply = session::run(&mut client, command, &stop);
    let (said, sent) = conclude(reply, Some(sender), &stop)?;
    let (copied, warnings) = sent.unwrap_or_default();
    job.warn(&to.vm, &said, &warnings);
    Ok(copied)
}
