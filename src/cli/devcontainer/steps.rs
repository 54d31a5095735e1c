//! Sets the variables in the guest and runs the commands of the file there.

use super::super::exec::Spec;
use super::super::guest::Guest;
use super::super::signals::Phase;
use super::parse::{Config, Step};
use super::scripts;
use crate::client::Result;
use crate::error::{Error, Kind};

pub(super) struct Steps<'a> {
    pub config: &'a Config,
    /// The user who runs the commands, if the file names one. Otherwise, the image's user does.
    pub user: Option<&'a str>,
}

impl Steps<'_> {
    /// Runs the commands for a new VM unless they have succeeded before, and those for each start
    /// unless the VM was running.
    pub(super) fn run(&self, guest: &mut Guest<'_>, was_running: bool) -> Result<()> {
        let config = self.config;
        if config.env.is_empty() && config.once.is_empty() && config.at_start.is_none() {
            return Ok(());
        }
        let env = scripts::environment(&config.env);
        let is_new = match self.as_root(guest, &scripts::prepare(), env.as_bytes())? {
            0 => false,
            scripts::IS_NEW => true,
            status => return Err(failed("set the variables of the file", status)),
        };
        let once: &[Step] = if is_new { &config.once } else { &[] };
        let at_start = config.at_start.as_ref().filter(|_| is_new || !was_running);
        let (now, later): (Vec<&Step>, Vec<&Step>) = once
            .iter()
            .chain(at_start)
            .partition(|step| config.is_waited_for(step.key));
        let mut is_marked = !is_new;
        for step in now {
            if !is_marked && Some(step) == at_start {
                self.mark(guest)?;
                is_marked = true;
            }
            guest.printer.note(step.key);
            match self.in_project(guest, scripts::step(step), false)? {
                0 => {}
                status => return Err(failed(step.key, status)),
            }
        }
        if !is_marked {
            self.mark(guest)?;
        }
        if later.is_empty() {
            return Ok(());
        }
        let keys: Vec<&str> = later.iter().map(|step| step.key).collect();
        let text = format!(
            "{} in the background; output: {}",
            keys.join(", "),
            scripts::LOG
        );
        guest.printer.note(&text);
        match self.in_project(guest, scripts::background(&later), true)? {
            0 => Ok(()),
            status => Err(failed(&keys.join(", "), status)),
        }
    }

    fn mark(&self, guest: &mut Guest<'_>) -> Result<()> {
        match self.as_root(guest, &scripts::mark(), b"")? {
            0 => Ok(()),
            status => Err(failed("note that the commands have succeeded", status)),
        }
    }

    fn as_root(&self, guest: &mut Guest<'_>, script: &str, input: &[u8]) -> Result<u8> {
        let spec = Spec {
            argv: ["sh", "-c", script].iter().map(Into::into).collect(),
            env: Vec::new(),
            workdir: Some("/".into()),
            user: Some("0".to_owned()),
            stdin: true,
            term: None,
            no_wait_children: false,
            ssh_agent: None,
        };
        execute(guest, spec, input)
    }

    /// Runs a command in the directory of the project, which is where the workspace's commands
    /// start.
    fn in_project(&self, guest: &mut Guest<'_>, argv: Vec<String>, detached: bool) -> Result<u8> {
        let spec = Spec {
            argv: argv.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            workdir: None,
            user: self.user.map(str::to_owned),
            stdin: false,
            term: None,
            no_wait_children: detached,
            ssh_agent: None,
        };
        execute(guest, spec, b"")
    }
}

/// Runs a command with its output on stderr, and returns its status.
fn execute(guest: &mut Guest<'_>, spec: Spec, input: &[u8]) -> Result<u8> {
    // The previous command may have left another phase.
    guest.interrupts.enter(Phase::Working)?;
    Ok(guest.execute(spec, input)?.shell_status())
}

fn failed(what: &str, status: u8) -> crate::client::Failure {
    let text = format!("{what} ended with status {status}");
    Error::new(Kind::GuestCommandFailed, text).into()
}
