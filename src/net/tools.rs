//! `ip` and `nft`: how they are called.

use crate::error::{Error, Kind, Result};
use crate::host::{Command, Commands};
use crate::locks::Cancel;
use std::sync::Arc;
use std::time::Duration;

/// Each call takes milliseconds, and waits where another changes the same things.
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Clone)]
pub struct Tools {
    commands: Arc<dyn Commands>,
    /// Never fires.
    never: Cancel,
}

impl Tools {
    pub fn new(commands: Arc<dyn Commands>) -> Result<Self> {
        let never = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        Ok(Self { commands, never })
    }

    /// For what is not to be given up half done, and for clean-up.
    pub fn never(&self) -> &Cancel {
        &self.never
    }

    pub fn run(&self, command: &Command, cancel: &Cancel) -> Result<Vec<u8>> {
        run(self.commands.as_ref(), command, cancel)
    }

    /// `ip -json ...`.
    pub fn ip_json(&self, args: &[&str], cancel: &Cancel) -> Result<Vec<u8>> {
        self.run(&ip_json(args), cancel)
    }

    /// Lines of arguments to `ip`, in order, up to the first that fails.
    pub fn ip_batch(&self, lines: &[String], cancel: &Cancel) -> Result<()> {
        let command = Command::new("ip").args(["-batch", "-"]).stdin(text(lines)).deadline(DEADLINE);
        self.run(&command, cancel).map(drop)
    }

    /// All of the lines, also after one that fails; an error then.
    pub fn ip_batch_all(&self, lines: &[String]) -> Result<()> {
        let command = Command::new("ip").args(["-force", "-batch", "-"]).stdin(text(lines)).deadline(DEADLINE);
        self.run(&command, &self.never).map(drop)
    }

    /// One transaction: all of it or nothing.
    pub fn nft(&self, script: &str, cancel: &Cancel) -> Result<()> {
        let command = Command::new("nft").args(["-f", "-"]).stdin(script).deadline(DEADLINE);
        self.run(&command, cancel).map(drop)
    }
}

fn text(lines: &[String]) -> String {
    let mut text = lines.join("\n");
    text.push('\n');
    text
}

pub fn ip_json(args: &[&str]) -> Command {
    Command::new("ip").arg("-json").args(args).deadline(DEADLINE)
}

pub fn nft_json(args: &[&str]) -> Command {
    Command::new("nft").arg("--json").args(args).deadline(DEADLINE)
}

pub fn run(commands: &dyn Commands, command: &Command, cancel: &Cancel) -> Result<Vec<u8>> {
    match commands.run(command, cancel, &mut |_| {}) {
        Ok(output) => Ok(output.stdout),
        Err(e) if e.kind() == Kind::CommandMissing => Err(e.hint("apt install iproute2 nftables")),
        Err(e) => Err(e),
    }
}
