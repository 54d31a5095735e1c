//! Runs fcctl's own commands in a guest, as root, and gives a copy to the user who runs the
//! commands of the VM's image.

use super::context::Stdio;
use super::exec::{self, Outcome, Spec};
use super::printer::Printer;
use super::signals::{Interrupts, interrupted};
use super::transfer::{PrepareHow, Source};
use crate::api::exec::Exit;
use crate::api::image::{ImageRequest, ImageShow};
use crate::client::{Client, Result};
use crate::error::{Error, Kind};
use crate::ids::ImageRef;
use std::io::{Seek, Write};

/// Changes the owner of a tree. This prefers the guest runtime's `chown`, because an image may have
/// none, or a different program of that name.
const CHOWN: &str = r#"PATH=/.fcd/bin:$PATH; exec chown -hR -- "$@""#;

/// A running guest and the caller's streams.
pub(super) struct Guest<'a> {
    pub printer: &'a mut Printer,
    pub stdio: &'a Stdio,
    pub interrupts: &'a Interrupts,
    pub client: &'a mut Client,
    /// The VM's ID.
    pub vm: &'a str,
}

impl Guest<'_> {
    /// Runs a command with `input` as its stdin. Its output goes to stderr.
    pub(super) fn execute(&mut self, spec: Spec, input: &[u8]) -> Result<Exit> {
        let io = |e| Error::io("prepare the streams of a command in the guest", e);
        let mut stdin = tempfile::tempfile().map_err(io)?;
        stdin
            .write_all(input)
            .and_then(|()| stdin.rewind())
            .map_err(io)?;
        let stdio = Stdio {
            stdin,
            stdout: self.stdio.stderr.try_clone().map_err(io)?,
            stderr: self.stdio.stderr.try_clone().map_err(io)?,
        };
        let (client, vm) = (&mut *self.client, self.vm);
        match exec::execute(self.printer, &stdio, self.interrupts, client, vm, spec)? {
            Outcome::Exit(exit) => Ok(exit),
            Outcome::Interrupted | Outcome::ReaderGone => Err(interrupted()),
        }
    }

    /// Runs a command as root. Fails if the command does not succeed.
    pub(super) fn as_root(&mut self, argv: &[&str], input: &[u8]) -> Result<()> {
        let spec = Spec {
            argv: argv.iter().map(Into::into).collect(),
            env: Vec::new(),
            workdir: Some("/".into()),
            user: Some("0".to_owned()),
            stdin: true,
            term: None,
            no_wait_children: false,
            ssh_agent: None,
        };
        match self.execute(spec, input)? {
            Exit::Status(0) => Ok(()),
            exit => Err(Error::new(
                Kind::GuestCommandFailed,
                format!("ended with status {}", exit.shell_status()),
            )
            .into()),
        }
    }

    /// Makes a user the owner of a copy.
    pub(super) fn give(&mut self, gift: &Gift) -> Result<()> {
        let Gift { path, user } = gift;
        let is_number = user.bytes().all(|b| b.is_ascii_digit());
        // `NAME:` also sets the user's own group. The guest need not know a user by a number, so a
        // number stays without a group.
        let owner = if is_number || user.contains(':') {
            user.clone()
        } else {
            format!("{user}:")
        };
        self.as_root(&["sh", "-c", CHOWN, "sh", &owner, path], b"")
            .map_err(|e| e.context(format!("give {path} to {user}: chown")))
    }
}

/// A copy that belongs to a user other than root.
pub(super) struct Gift {
    path: String,
    user: String,
}

impl Gift {
    /// Chooses the path of a copy for a user other than root, because other users cannot enter
    /// root's home. Returns None for a read-only copy, which keeps its owner.
    pub(super) fn plan(source: &Source, how: &mut PrepareHow, user: String) -> Option<Self> {
        let path = how
            .guest_path
            .get_or_insert_with(|| source.path_for_user())
            .clone();
        (!how.readonly).then_some(Self { path, user })
    }
}

/// Returns the user who runs commands in the VMs of an image, unless that is root.
pub(super) fn user_of_image(client: &mut Client, image: ImageRef) -> Result<Option<String>> {
    let shown = client.call::<ImageShow>(&ImageRequest { image })?;
    Ok(unless_root(shown.config.user))
}

/// Returns an image's user, unless that is root.
pub(super) fn unless_root(user: String) -> Option<String> {
    let name = user.split(':').next().unwrap_or_default();
    let is_root = name == "root" || name.bytes().all(|digit| digit == b'0');
    (!is_root).then_some(user)
}
