//! Copies out of a VM: to files of the host, or as a tar to stdout.

use super::super::pipes::{self, End};
use super::super::relay::write_patiently;
use super::super::transfer::conclude;
use super::job::{Job, Outcome, receive};
use super::meter::Meter;
use super::places::GuestPath;
use super::session::{self, Command};
use crate::api::exec::Stream;
use crate::client::Result;
use crate::error::Error;
use crate::locks::Cancel;
use crate::workspace::copy::forward::forward;
use crate::workspace::copy::land::{self, Landing};
use crate::workspace::copy::script::{Out, read_first_line};
use crate::workspace::copy::{Copied, name_of};
use crate::workspace::unpack::Limits;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Copies one path of a VM to the host.
pub(super) fn files(job: &mut Job<'_>, from: &GuestPath, to: &Path) -> Result<Copied> {
    let landing = Landing {
        archive: job.options.archive,
        limits: Limits {
            bytes: job.options.bound.max_bytes,
            ..Limits::default()
        },
    };
    let (to, name) = (to.to_owned(), name_of(&from.path).map(<[u8]>::to_vec));
    copy(job, from, false, move |stream, meter, stop| {
        let first = read_first_line(stream)?;
        let to = land::resolve(&to, name.as_deref(), first.kind)?;
        meter.set_total(first.bytes);
        let landed = land::land(stream, &to, &landing, &mut |n| meter.add(n), stop)?;
        Ok((landed.copied, landed.warnings))
    })
}

/// Writes one path of a VM to stdout.
pub(super) fn tar(job: &mut Job<'_>, from: &GuestPath) -> Result<Copied> {
    if job.stdio.stdout_is_terminal() {
        let text = "a tar is not written to a terminal";
        let hint = format!("redirect it: fcctl cp {}:PATH - > FILE", from.vm);
        return Err(Error::invalid(text).hint(hint).into());
    }
    let stdout = job.stdio.stdout.try_clone();
    let stdout = stdout.map_err(|e| Error::io("duplicate stdout", e))?;
    let is_named = name_of(&from.path).is_some();
    copy(job, from, is_named, move |stream, meter, stop| {
        meter.set_total(read_first_line(stream)?.bytes);
        let mut out = Stdout {
            file: stdout,
            failure: None,
        };
        let result = forward(stream, &mut out, None, &mut |n| meter.add(n), stop);
        match out.failure {
            Some(e) => Err(Error::io("write to stdout", e)),
            None => Ok((result?, Vec::new())),
        }
    })
}

/// The caller's stdout. It keeps the error that made writing fail.
struct Stdout {
    file: File,
    failure: Option<io::Error>,
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match write_patiently(&mut self.file, bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(e) => {
                let kind = e.kind();
                self.failure = Some(e);
                Err(kind.into())
            }
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the command in the guest while `take` reads its output.
fn copy(
    job: &mut Job<'_>,
    from: &GuestPath,
    named: bool,
    take: impl FnOnce(&mut End, &mut Meter, &Cancel) -> Outcome + Send + 'static,
) -> Result<Copied> {
    let out = Out {
        path: from.path.clone(),
        follow: job.options.follow_link,
        archive: job.options.archive,
        named,
        count: job.has_bar(),
    };
    let stop = job.stop()?;
    let (mut ours, theirs) = pipes::from_daemon(&stop)?;
    let mut meter = job.meter(&format!("from {}", from.vm), None);
    let hang_up = job.interrupts.hang_up();
    let mut client = job.connector.connect(job.printer)?;
    let _guard = job.interrupts.guard(&client)?;
    let receiver = receive(&stop, hang_up, move |token| {
        Ok(take(&mut ours, &mut meter, token)?)
    })?;
    let command = Command {
        vm: &from.vm,
        user: job.options.user.as_deref(),
        words: out.words(),
        tar: theirs,
        stream: Stream::Stdout,
    };
    let reply = session::run(&mut client, command, &stop);
    let (said, received) = conclude(reply, Some(receiver), &stop)?;
    let (copied, warnings) = received.unwrap_or_default();
    job.warn(&from.vm, &said, &warnings);
    Ok(copied)
}
