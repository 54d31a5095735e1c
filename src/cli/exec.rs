//! `exec`: runs a command in a guest and relays its streams, signals and exit status.

use super::context::{Context, Env, Stdio};
use super::printer::Printer;
use super::relay::{Drained, Relay, Wanted};
use super::signals::{Interrupts, Phase, send_controls};
use super::terminal::{self, RawMode};
use super::values;
use crate::api::exec::{CommandWords, ExecStart, ExecStartRequest, Exit, Pty};
use crate::api::frame::Note;
use crate::cli::ssh::agent::{self, Agent};
use crate::client::{Client, Failure, Result};
use crate::error::{Error, Kind};
use crate::host::thread;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The exit status of `exec` and `run` for every failure that is not the command's own.
pub(super) const OUR_FAILURE: u8 = 125;
/// A longer command goes through its own pipe. JSON can escape it to six times its length, and a
/// frame is limited to 1 MiB.
const REQUEST_COMMAND_BYTES_MAX: usize = 128 * 1024;
/// The status that a shell reports for a program whose reader has exited: 128 + SIGPIPE.
const READER_GONE: u8 = 128 + 13;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Name, ID, or ID prefix
    vm: String,
    #[command(flatten)]
    how: How,
    /// Command and arguments [default: the login shell]
    #[arg(last = true, value_name = "CMD")]
    argv: Vec<OsString>,
}

/// The options for running a command, shared by `exec` and `run`.
#[derive(clap::Args, Debug, Default)]
pub(super) struct How {
    /// Pass stdin to the command
    #[arg(short, long)]
    pub interactive: bool,
    /// Allocate a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Working directory in the guest [default: the VM's, or the workspace, if there is one]
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<OsString>,
    /// User of the guest who runs the command, by name or number [default: the VM's, or root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Set a variable: K=V, or K to pass your own value without showing it in ps
    #[arg(short, long, value_name = "K[=V]")]
    pub env: Vec<OsString>,
    /// Read variables from a file, one per line. Quotes are not removed
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Exit when the command exits, even if its background processes still hold the output open
    #[arg(long)]
    pub no_wait_children: bool,
    /// Let the command use your ssh-agent. Root in the guest can then use its keys, too
    #[arg(long)]
    pub ssh_agent: bool,
}

/// The command to run and how.
#[derive(Debug)]
pub(super) struct Spec {
    pub argv: Vec<OsString>,
    pub env: Vec<(String, OsString)>,
    pub workdir: Option<OsString>,
    pub user: Option<String>,
    pub stdin: bool,
    /// The type of the terminal to allocate, such as `xterm`. `None` means no terminal.
    pub term: Option<String>,
    pub no_wait_children: bool,
    /// The socket of the ssh-agent to forward.
    pub ssh_agent: Option<PathBuf>,
}

impl How {
    /// Fills in the defaults. A shell on a terminal gets stdin and a pty even without `-i` and
    /// `-t`; without a terminal it needs `-i`.
    pub(super) fn spec(self, stdio: &Stdio, env: &Env, argv: Vec<OsString>) -> Result<Spec> {
        let on_terminal = stdio.stdin_is_terminal() && stdio.stdout_is_terminal();
        let is_shell = argv.is_empty();
        if is_shell && !on_terminal && !self.interactive {
            let e = Error::invalid(
                "no command was given, and a shell needs a terminal on stdin and stdout",
            );
            return Err(e
                .hint("give a command (-- CMD), or pass a script on stdin with -i")
                .into());
        }
        let own = |name: &str| values::own_variable(env, name);
        let variables = values::environment(&self.env_file, &self.env, &own)?;
        let auto = is_shell && on_terminal;
        let term = || {
            env("TERM")
                .filter(|t| !t.is_empty())
                .unwrap_or_else(|| "xterm".to_owned())
        };
        Ok(Spec {
            argv,
            env: variables,
            workdir: self.workdir,
            user: self.user,
            stdin: self.interactive || auto,
            term: (self.tty || auto).then(term),
            no_wait_children: self.no_wait_children,
            ssh_agent: self.ssh_agent.then(|| agent::socket(env)).transpose()?,
        })
    }
}

/// How a command ended, as far as this process saw it.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    Exit(Exit),
    /// A signal cancelled the command before it began, or made this process detach from it.
    Interrupted,
    /// The reader of our stdout has exited, so this process stopped, too.
    ReaderGone,
}

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        signals,
        env,
        ..
    } = ctx;
    let spec = args.how.spec(stdio, env, args.argv)?;
    let interrupts = Interrupts::start(signals, &stdio.stderr)?;
    let mut client = connector.connect(printer)?;
    let outcome = execute(printer, stdio, &interrupts, &mut client, &args.vm, spec)?;
    if interrupts.detached() {
        printer.note(&format!(
            "detached from the command; VM {0} keeps running (fcctl exec {0}, fcctl stop {0})",
            args.vm
        ));
    } else if outcome == Outcome::Interrupted {
        printer.note("interrupted");
    }
    Ok(status_of(&outcome, &interrupts))
}

/// Returns the exit status for `outcome`.
pub(super) fn status_of(outcome: &Outcome, interrupts: &Interrupts) -> u8 {
    match outcome {
        Outcome::Exit(exit) => exit.shell_status(),
        Outcome::Interrupted => interrupts.status().unwrap_or(OUR_FAILURE),
        Outcome::ReaderGone => READER_GONE,
    }
}

/// Runs a command until it has ended and all its output is written. Fails with the daemon's errors
/// and with errors of the caller's own streams.
pub(super) fn execute(
    printer: &mut Printer,
    stdio: &Stdio,
    interrupts: &Interrupts,
    client: &mut Client,
    vm: &str,
    spec: Spec,
) -> Result<Outcome> {
    let _guard = match interrupts.guard(client) {
        Ok(guard) => guard,
        Err(_) => return Ok(Outcome::Interrupted),
    };
    let mut spec = spec;
    let agent = spec
        .ssh_agent
        .take()
        .map(|local| Agent::forward(client, vm, &local, interrupts.cancel()))
        .transpose()?;
    spec.env.extend(agent.as_ref().map(Agent::variable));
    // If nobody types into the pty, the caller's terminal stays in cooked mode, so that Ctrl-C
    // arrives here as a signal and is forwarded.
    let raw = if spec.term.is_some() && spec.stdin && stdio.stdin_is_terminal() {
        Some(RawMode::enter(&stdio.stdin)?)
    } else {
        None
    };
    if spec.term.is_some() && !spec.stdin && stdio.stdin_is_terminal() {
        printer.note("stdin is not passed to the command; add -i to type into it");
    }
    let wanted = Wanted {
        stdin: spec.stdin,
        stderr: spec.term.is_none(),
    };
    let mut relay = Relay::start(stdio, wanted, interrupts.hang_up())?;
    let request = request(stdio, vm, spec, &mut relay)?;
    let result = converse(&stdio.stdout, interrupts, client, request, &mut relay);
    if result.is_err() && interrupts.cause().is_some() {
        return Ok(Outcome::Interrupted);
    }
    let drained = relay.finish();
    drop(raw);
    conclude(result, drained)
}

fn request(stdio: &Stdio, vm: &str, mut spec: Spec, relay: &mut Relay) -> Result<ExecStartRequest> {
    let size = || {
        terminal::size(&stdio.stdout)
            .or_else(|| terminal::size(&stdio.stdin))
            .unwrap_or(terminal::DEFAULT_SIZE)
    };
    let pty = spec.term.take().map(|term| Pty { size: size(), term });
    let (user, no_wait_children) = (spec.user.take(), spec.no_wait_children);
    let text = match as_text(&spec) {
        Some(text) => text,
        None => {
            relay.command(&words(spec).encode())?;
            Text::default()
        }
    };
    let Text { argv, env, workdir } = text;
    Ok(ExecStartRequest {
        vm: vm.to_owned(),
        argv,
        env,
        workdir,
        user,
        pty,
        streams: relay.streams().to_vec(),
        no_wait_children,
    })
}

/// A command in the form that a request carries.
#[derive(Default)]
pub(super) struct Text {
    pub argv: Vec<String>,
    env: Vec<(String, String)>,
    pub workdir: Option<String>,
}

/// Returns the command in the form that a request carries, or None if it is not UTF-8 or is too
/// long.
pub(super) fn as_text(spec: &Spec) -> Option<Text> {
    let mut bytes = 0;
    let mut text = |word: &OsString| {
        bytes += word.len();
        word.to_str().map(str::to_owned)
    };
    let argv = spec.argv.iter().map(&mut text).collect::<Option<_>>()?;
    let env = spec
        .env
        .iter()
        .map(|(name, value)| Some((name.clone(), text(value)?)))
        .collect::<Option<_>>()?;
    let workdir = match &spec.workdir {
        Some(dir) => Some(text(dir)?),
        None => None,
    };
    (bytes <= REQUEST_COMMAND_BYTES_MAX).then_some(Text { argv, env, workdir })
}

/// Returns the command in the form that goes through its own pipe.
pub(super) fn words(spec: Spec) -> CommandWords {
    CommandWords {
        argv: spec.argv.into_iter().map(OsString::into_vec).collect(),
        env: spec
            .env
            .into_iter()
            .map(|(name, value)| (name, value.into_vec()))
            .collect(),
        workdir: spec.workdir.map(OsString::into_vec),
    }
}

fn converse(
    stdout: &File,
    interrupts: &Interrupts,
    client: &mut Client,
    request: ExecStartRequest,
    relay: &mut Relay,
) -> Result<Exit> {
    let socket = client.socket().to_owned();
    let in_flight = client.begin::<ExecStart>(&request, &relay.fds());
    relay.close_lent();
    let reply = in_flight?.finish(&mut |note| {
        if let Note::Session { session } = note {
            let controls = interrupts.controls();
            interrupts.enter(Phase::Command { forwarded: 0 })?;
            let tty = request.pty.as_ref().and_then(|_| stdout.try_clone().ok());
            let socket = socket.clone();
            thread::spawn("controls", move || {
                send_controls(&socket, &session, tty.as_ref(), &controls)
            })?;
            // The window may have been resized since the request was sent.
            interrupts.resized();
        }
        Ok(())
    })?;
    Ok(reply.exit)
}

fn conclude(result: Result<Exit>, drained: Vec<Drained>) -> Result<Outcome> {
    let mut is_open = false;
    for (stream, drained) in ["stdout", "stderr"].iter().zip(drained) {
        match drained {
            Drained::Failed(e) => {
                return Err(Error::io(format!("write the command's {stream}"), e).into());
            }
            Drained::ReaderGone if *stream == "stdout" && result.is_err() => {
                return Ok(Outcome::ReaderGone);
            }
            Drained::ReaderGone | Drained::Whole => {}
            Drained::Open => is_open = true,
        }
    }
    let exit = result?;
    if is_open {
        let e = Error::new(
            Kind::StreamIncomplete,
            "the command ended, but its output was cut off: some of it may be missing",
        );
        return Err(Failure::from(e).hint("run it again; if it happens again, restart fcd"));
    }
    Ok(Outcome::Exit(exit))
}

#[cfg(test)]
#[path = "exec_tests.rs"]
pub(crate) mod tests;
