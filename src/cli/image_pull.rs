//! `image pull`, and the pull that `run --image` makes if the image is missing.

use super::context::Env;
use super::image_source::{Content, Source};
use super::pipes::{self, End};
use super::printer::Printer;
use super::registry_auth;
use super::signals::Interrupts;
use super::transfer::{TransferThread, conclude};
use crate::api::frame::Note;
use crate::api::image::{Image, ImagePull, ImagePullRequest, PullSource};
use crate::api::registry::Credential;
use crate::client::{Client, Result};
use crate::error::Error;
use crate::host::thread;
use crate::ids::{ImageRef, split_registry};
use crate::locks::{Cancel, CancelCause};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

/// The image to pull, and its name on this host.
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// A reference such as gcc:13 or ghcr.io/owner/app, or oci:DIR[:TAG], oci-archive:FILE,
    /// docker-archive:FILE, the path of an archive or a layout such as ./app.tar, or - for an
    /// archive on stdin
    #[arg(value_name = "REF")]
    source: Source,
    /// Name of the image on this host [default: REF, or the name in the archive]
    #[arg(long, value_name = "NAME")]
    name: Option<ImageRef>,
    /// Choose this platform from an index, such as linux/amd64
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    /// Share the image with all users (root only)
    #[arg(long)]
    shared: bool,
}

impl Args {
    /// Returns the arguments for a pull of `reference` without options.
    pub(super) fn of(reference: &ImageRef) -> Self {
        Self {
            source: Source::Reference(reference.to_string()),
            name: None,
            platform: None,
            shared: false,
        }
    }
}

/// The data that is sent to the daemon through a pipe.
enum Payload {
    Credential(Credential),
    Archive(Content),
}

/// Pulls an image and shows the progress.
pub(super) fn pull(
    client: &mut Client,
    printer: &Printer,
    interrupts: &Interrupts,
    stdin: &File,
    env: &Env,
    args: Args,
) -> Result<Image> {
    let stop = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
    let fired = stop.clone();
    interrupts.on_end(move || fired.cancel(CancelCause::Interrupted));
    let (source, content) = args.source.open(stdin)?;
    let payload = match (&source, content) {
        (PullSource::Registry { reference }, _) => {
            let caller = registry_auth::Caller::new(env, std::env::vars_os().collect());
            match registry_auth::find(split_registry(reference).0, &caller, &stop)? {
                Credential::Anonymous => None,
                credential => Some(Payload::Credential(credential)),
            }
        }
        (PullSource::Archive { .. }, content) => content.map(Payload::Archive),
    };
    let what = match &source {
        PullSource::Registry { reference } => reference.clone(),
        PullSource::Archive { .. } => "the archive".to_owned(),
    };
    let request = ImagePullRequest {
        source,
        name: args.name,
        platform: args.platform,
        shared: args.shared,
    };
    let (theirs, sender) = match payload {
        Some(payload) => {
            let (theirs, sender) = start_sending(payload, &stop)?;
            (Some(theirs), Some(sender))
        }
        None => (None, None),
    };
    let mut progress = printer.progress(&format!("pull {what}"));
    let fds: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
    let reply = client.call_more::<ImagePull>(&request, &fds, &mut |note| {
        if let Note::Progress(p) = note {
            progress.update(&p);
        }
        Ok(())
    });
    drop(progress);
    // Otherwise the sender would wait for a reader that does not exist.
    drop(theirs);
    let (reply, _) = conclude(reply, sender, &stop)?;
    Ok(reply.image)
}

fn start_sending(payload: Payload, stop: &Cancel) -> Result<(OwnedFd, TransferThread<()>)> {
    let (mut ours, theirs) = pipes::to_daemon(stop)?;
    let token = stop.clone();
    let sender = thread::spawn("send image", move || {
        let result = send(payload, &mut ours, &token);
        (result, token.is_cancelled() || ours.is_unread())
    })?;
    Ok((theirs, sender))
}

fn send(payload: Payload, to: &mut End, stop: &Cancel) -> crate::error::Result<()> {
    let sent = match payload {
        Payload::Credential(credential) => to.write_all(&credential.to_bytes()),
        Payload::Archive(content) => content.send(to, stop),
    };
    match sent {
        // The daemon stops reading once it has what it needs.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        sent => sent.map_err(|e| match e.downcast::<Error>() {
            Ok(ours) => ours,
            Err(e) => Error::io("send the image", e),
        }),
    }
}

#[cfg(test)]
#[path = "image_pull_tests.rs"]
mod tests;
