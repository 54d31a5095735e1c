//! Copies from one VM to another, or within one VM. The tar passes through this process, which
//! checks only that it is complete. The receiving guest unpacks the tar in a new directory, and
//! moves only the requested path to its destination.

use super::super::pipes::{self, End};
use super::super::transfer::conclude;
use super::into::content;
use super::job::{Job, receive};
use super::meter::Meter;
use super::places::GuestPath;
use super::session::{self, Command};
use crate::api::exec::Stream;
use crate::api::vm::{VmRequest, VmShow};
use crate::client::{Client, Result};
use crate::error::Error;
use crate::host::thread;
use crate::locks::{Cancel, CancelCause};
use crate::workspace::copy::forward::forward;
use crate::workspace::copy::script::{Into, Out, last_entry, read_first_line};
use crate::workspace::copy::{Copied, FileKind, name_of};

/// Copies one path of a VM to another path. With `several`, the destination must be a directory.
pub(super) fn copy(
    job: &mut Job<'_>,
    from: &GuestPath,
    to: &GuestPath,
    several: bool,
) -> Result<Copied> {
    let out = Out {
        path: from.path.clone(),
        follow: job.options.follow_link,
        archive: job.options.archive,
        named: name_of(&from.path).is_some(),
        count: job.has_bar(),
    };
    let stop = job.stop()?;
    let (ours, theirs) = pipes::from_daemon(&stop)?;
    let mut client = job.connector.connect(job.printer)?;
    let other = job.connector.connect(job.printer)?;
    let receiver = Receiver {
        is_same: is_same_vm(&mut client, from, to)?,
        from: from.clone(),
        to: to.clone(),
        several,
        archive: job.options.archive,
        user: job.options.user.clone(),
        meter: job.meter(&format!("from {} to {}", from.vm, to.vm), None),
    };
    let hang_up = job.interrupts.hang_up();
    let hangup = other.hangup()?;
    job.interrupts.on_end(move || hangup.hang_up());
    let _guard = job.interrupts.guard(&client)?;
    let receiver = receive(&stop, hang_up, move |token| {
        receiver.run(ours, other, token)
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
    job.warn(&from.vm, &said, &[]);
    let received = received.unwrap_or_default();
    job.warn(&to.vm, &received.said, &[]);
    Ok(received.copied)
}

/// The reply of the receiving VM.
#[derive(Default)]
struct Received {
    copied: Copied,
    /// The stderr of its command.
    said: Vec<u8>,
}

/// True if both paths name the same VM. One of them may use the VM's ID.
fn is_same_vm(client: &mut Client, from: &GuestPath, to: &GuestPath) -> Result<bool> {
    if from.vm == to.vm {
        return Ok(true);
    }
    let mut id = |vm: &str| {
        let request = VmRequest { vm: vm.to_owned() };
        client.call::<VmShow>(&request).map(|reply| reply.vm.id)
    };
    Ok(id(&from.vm)? == id(&to.vm)?)
}

/// The side of the VM that gets the copy.
struct Receiver {
    from: GuestPath,
    to: GuestPath,
    is_same: bool,
    several: bool,
    archive: bool,
    user: Option<String>,
    meter: Meter,
}

impl Receiver {
    /// Forwards the tar from the other VM. Returns what was copied, and what the command wrote to
    /// stderr.
    fn run(self, mut from: End, mut client: Client, stop: &Cancel) -> Result<Received> {
        let first = read_first_line(&mut from)?;
        let mut meter = self.meter;
        meter.set_total(first.bytes);
        let origin = self.from.path;
        let last = last_entry();
        let mut path = self.to.path;
        if self.several {
            // `/.` requires a directory, and follows a link to one.
            path.extend_from_slice(b"/.");
        }
        let is_within = self.is_same && first.kind == FileKind::Dir;
        let into = Into {
            content: content(first.kind, name_of(&origin)),
            path,
            last: last.clone(),
            archive: self.archive,
            origin: is_within.then_some(origin),
        };
        // Use a separate token. If both sides shared one, an error of this side would look like a
        // consequence of the other side's.
        let own = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
        let fired = own.clone();
        let _subscription = stop.on_cancel(move || fired.cancel(CancelCause::CommandEnded));
        let (mut ours, theirs) = pipes::to_daemon(&own)?;
        let token = own.clone();
        let sender = thread::spawn("forward", move || {
            let add = &mut |n| meter.add(n);
            let copied = forward(&mut from, &mut ours, Some(&last), add, &token);
            (copied, token.is_cancelled() || ours.is_unread())
        })?;
        let command = Command {
            vm: &self.to.vm,
            user: self.user.as_deref(),
            words: into.words(),
            tar: theirs,
            stream: Stream::Stdin,
        };
        let reply = session::run(&mut client, command, &own);
        let (said, copied) = conclude(reply, Some(sender), &own)?;
        let copied = copied.unwrap_or_default();
        Ok(Received { copied, said })
    }
}
