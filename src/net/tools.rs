//! Runs `ip` and `nft`.

use crate::error::{Error, Kind, Result};
use crate::host::{Command, Commands, Complaint, strerror};
use crate::locks::Cancel;
use std::sync::Arc;
use std::time::Duration;

/// The deadline of a call. A call normally takes milliseconds, but waits while another process
/// changes the same objects.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub(super) struct Tools {
    commands: Arc<dyn Commands>,
    /// A cancel token that never fires.
    never: Cancel,
}

impl Tools {
    pub(super) fn new(commands: Arc<dyn Commands>) -> Result<Self> {
        let never = Cancel::try_new().map_err(|e| Error::io("create an eventfd", e))?;
        Ok(Self { commands, never })
    }

    /// Returns a token that never fires, for clean-up and for changes that must not be interrupted.
    pub(super) fn never(&self) -> &Cancel {
        &self.never
    }

    pub(super) fn run(&self, command: &Command, cancel: &Cancel) -> Result<Vec<u8>> {
        run(self.commands.as_ref(), command, cancel)
    }

    /// Runs `ip -json` with these arguments and returns its output.
    pub(super) fn ip_json(&self, args: &[&str], cancel: &Cancel) -> Result<Vec<u8>> {
        self.run(&ip_json(args), cancel)
    }

    /// Runs `ip -batch` with these lines. Stops at the first line that fails.
    pub(super) fn ip_batch(&self, lines: &[String], cancel: &Cancel) -> Result<()> {
        let command = Command::new("ip")
            .args(["-batch", "-"])
            .stdin(text(lines))
            .deadline(DEADLINE);
        self.run(&command, cancel).map(drop)
    }

    /// Runs `ip -batch` with all of these lines, and fails at the end if any line failed.
    pub(super) fn ip_batch_all(&self, lines: &[String]) -> Result<()> {
        let command = Command::new("ip")
            .args(["-force", "-batch", "-"])
            .stdin(text(lines))
            .deadline(DEADLINE);
        self.run(&command, &self.never).map(drop)
    }

    /// Runs a script as one transaction, which is applied as a whole or not at all.
    pub(super) fn nft(&self, script: &str, cancel: &Cancel) -> Result<()> {
        let command = Command::new("nft")
            .args(["-f", "-"])
            .stdin(script)
            .deadline(DEADLINE);
        self.run(&command, cancel).map(drop)
    }

    /// Runs `nft --json`. Returns None if a table does not exist. nft (1.0.6, src/evaluate.c) exits
    /// with status 1 after every failure, and prints the text of `strerror` for ENOENT if it does
    /// not find a table.
    pub(super) fn nft_list(&self, args: &[&str]) -> Result<Option<Vec<u8>>> {
        match self.run(&nft_json(args), &self.never) {
            Ok(json) => Ok(Some(json)),
            Err(e) if strerror::says_not_found(Complaint::of(&e)) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn text(lines: &[String]) -> String {
    let mut text = lines.join("\n");
    text.push('\n');
    text
}

pub(super) fn ip_json(args: &[&str]) -> Command {
    Command::new("ip")
        .arg("-json")
        .args(args)
        .deadline(DEADLINE)
}

pub(super) fn nft_json(args: &[&str]) -> Command {
    Command::new("nft")
        .arg("--json")
        .args(args)
        .deadline(DEADLINE)
}

pub(super) fn run(commands: &dyn Commands, command: &Command, cancel: &Cancel) -> Result<Vec<u8>> {
    match commands.run(command, cancel, &mut |_| {}) {
        Ok(output) => Ok(output.stdout),
        Err(e) if e.kind() == Kind::CommandMissing => Err(e.hint("apt install iproute2 nftables")),
        Err(e) => Err(e),
    }
}
