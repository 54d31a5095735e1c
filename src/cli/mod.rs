//! The command line of `fcctl`: parses arguments, calls the daemon and prints results. One file per
//! noun.
//!
//! Results go to stdout and everything else to stderr. Exit statuses are those of
//! `Failure::exit_status`. `exec` and `run` exit with the guest's status, and with 125 for every
//! failure of fcctl or fcd.

mod apply;
mod completions;
mod config;
mod confirm;
mod connect;
mod connector;
mod context;
mod cp;
mod debug;
mod devcontainer;
mod doctor;
mod draft;
mod events;
mod exec;
mod format;
mod forwards;
mod guest;
mod habits;
mod help;
mod image;
mod image_export;
mod image_file;
mod image_list;
mod image_pull;
mod image_register;
mod image_source;
mod kernel;
mod key_dir;
mod leaks;
mod logs;
pub mod manual;
mod op;
mod output;
mod pipes;
mod port;
mod printer;
mod progress;
mod provision;
mod ps;
mod rates;
mod registry_auth;
mod registry_login;
mod relay;
mod rpc;
mod run;
mod selection;
mod short_forms;
mod signals;
mod snapshot;
mod ssh;
mod stats;
mod system;
mod terminal;
#[cfg(test)]
mod tests;
mod top;
mod transfer;
mod uninstall;
mod usage;
mod values;
mod version;
mod vm;
mod vm_set;
mod vm_text;
mod words;
mod workspace;

use crate::client::{Failure, Result};
use clap::{CommandFactory, FromArgMatches, Parser};
use connector::Connector;
use context::{Context, Env, Stdio, may_colour};
use exec::OUR_FAILURE;
use signals::SignalSource;
use std::ffi::OsString;
use std::path::PathBuf;

/// The environment variable that names the daemon's socket.
const SOCKET_VARIABLE: &str = "FCD_SOCKET";

/// Development sandboxes in microVMs: run commands in a fresh VM with a copy of your files
#[derive(Parser, Debug)]
#[command(name = "fcctl", version, max_term_width = 100, infer_long_args = false)]
#[command(after_help = help::topics())]
struct Cli {
    // clap would show an option that it reads from the environment in every usage line.
    /// Socket of the daemon [env: FCD_SOCKET]
    #[arg(long, global = true, value_name = "S")]
    socket: Option<PathBuf>,
    /// Print results as one JSON document, errors as JSON on stderr; also --format json
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    noun: Noun,
}

#[derive(clap::Subcommand, Debug)]
enum Noun {
    /// Run a command or a shell in a new VM with a copy of a directory
    Run(Box<run::Args>),
    /// Run a command or a shell in a running VM
    Exec(exec::Args),
    /// Bring up the VM of a directory, as described by its devcontainer.json
    Up(devcontainer::UpArgs),
    /// Stop the VM of a directory
    Down(devcontainer::DownArgs),
    /// Open an SSH session in a VM
    Ssh(ssh::Args),
    /// Print a configuration for ssh, scp, rsync and editors
    SshConfig(ssh::config::Args),
    /// Connect stdin and stdout to a VM's SSH server, for ssh
    #[command(hide = true)]
    SshProxy(ssh::proxy::Args),
    /// List VMs
    Ps(ps::Args),
    /// Start VMs
    Start(selection::Selection),
    /// Stop VMs: shut down each guest, and kill the VM after a timeout
    Stop(vm::StopArgs),
    /// Delete VMs and their disks
    Rm(vm::DeleteArgs),
    /// Show a VM's console log
    Logs(logs::Args),
    /// Follow changes of VMs and operations
    Events(events::Args),
    /// Manage VMs
    #[command(subcommand)]
    Vm(Box<vm::Verb>),
    /// Copy directories into VMs and bring changes back
    #[command(subcommand)]
    Workspace(workspace::Verb),
    /// Save and restore running VMs, memory and disks
    #[command(subcommand)]
    Snapshot(snapshot::Verb),
    /// Build and list images
    #[command(subcommand)]
    Image(image::Verb),
    /// Manage kernels that VMs can boot instead of their image's
    #[command(subcommand)]
    Kernel(kernel::Verb),
    /// List, await and cancel operations
    #[command(subcommand)]
    Op(op::Verb),
    /// Show versions, drivers, VMs by state and the space in use
    Info,
    /// Show and free the space that fcd uses
    #[command(subcommand)]
    System(system::Verb),
    /// Check this host: what fcd uses, what is missing, how to fix it
    Doctor(doctor::Args),
    /// Show and check the configuration of fcd
    #[command(subcommand)]
    Config(config::Verb),
    /// Call a method of the daemon's API
    Rpc(rpc::Args),
    /// Inspect the daemon's internal state
    #[command(subcommand)]
    Debug(debug::Verb),
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
    /// Show the versions of fcctl and fcd
    Version,
}

/// Runs `fcctl` and returns its exit status.
pub fn main() -> u8 {
    let args: Vec<OsString> = std::env::args_os().collect();
    let env: Box<Env> = Box::new(|name| std::env::var(name).ok());
    let now_s = crate::host::time::now_s();
    let context = Stdio::of_process()
        .and_then(|stdio| Context::new(stdio, SignalSource::Process, env, now_s));
    match context {
        Ok(mut ctx) => command(&mut ctx, &args),
        // The streams could not be duplicated, but stderr may still work.
        Err(e) => {
            eprintln!("fcctl: duplicate the standard streams: {e}");
            1
        }
    }
}

/// Runs one command line and returns its exit status.
fn command(ctx: &mut Context, args: &[OsString]) -> u8 {
    if let Some(page) = help::page(args) {
        return u8::from(ctx.printer.text(&page).is_err());
    }
    if let Some(dir) = manual::target(args) {
        let written = manual::write(&dir);
        return written.map_or_else(|e| fail(ctx, e.into()), |()| 0);
    }
    let uid = nix::unistd::getuid().as_raw();
    let default_socket = socket_of_environment()
        .unwrap_or_else(|| context::default_socket(uid, &*ctx.env, &context::is_usable));
    let dir = std::env::current_dir().ok();
    if let Some(answer) = completions::answer(args, &default_socket, dir.as_deref()) {
        return u8::from(ctx.printer.text(&answer).is_err());
    }
    let colour = may_colour(&ctx.stdio, &*ctx.env);
    let mut syntax = syntax();
    if args.len() < 2 {
        return usage::help(&mut ctx.printer, syntax, colour);
    }
    syntax.build();
    let args = short_forms::expand(&syntax, args);
    let args = &words::with_separator(&syntax, &args);
    let args = &words::with_json(args);
    let is_guests = words::runs_in_guest(args);
    let parsed = syntax.clone().try_get_matches_from(args);
    let cli = match parsed.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(e) => return usage::report(&mut ctx.printer, syntax, args, &e, colour),
    };
    ctx.printer.json = cli.json;
    let named = cli.socket.filter(|socket| !socket.as_os_str().is_empty());
    ctx.connector = Connector::new(named.unwrap_or(default_socket));
    match dispatch(ctx, cli.noun) {
        Ok(status) => status,
        Err(failure) => {
            let status = if is_guests {
                OUR_FAILURE
            } else {
                failure.exit_status()
            };
            ctx.printer.fail(&failure, status);
            status
        }
    }
}

fn fail(ctx: &mut Context, failure: Failure) -> u8 {
    let status = failure.exit_status();
    ctx.printer.fail(&failure, status);
    status
}

/// Returns the socket that the environment names.
fn socket_of_environment() -> Option<PathBuf> {
    let socket = std::env::var_os(SOCKET_VARIABLE).filter(|socket| !socket.is_empty())?;
    Some(socket.into())
}

/// Returns the command line with the short forms.
fn syntax() -> clap::Command {
    short_forms::add(Cli::command())
}

fn dispatch(ctx: &mut Context, noun: Noun) -> Result<u8> {
    match noun {
        Noun::Run(args) => run::run(ctx, *args),
        Noun::Exec(args) => exec::run(ctx, args),
        Noun::Up(args) => devcontainer::up(ctx, args),
        Noun::Down(args) => devcontainer::down(ctx, args),
        Noun::Ssh(args) => ssh::run(ctx, args),
        Noun::SshConfig(args) => ssh::config::run(ctx, args),
        Noun::SshProxy(args) => ssh::proxy::run(ctx, args),
        Noun::Ps(args) => ps::run(ctx, args),
        Noun::Start(args) => vm::run(ctx, vm::Verb::Start(args)),
        Noun::Stop(args) => vm::run(ctx, vm::Verb::Stop(args)),
        Noun::Rm(args) => vm::run(ctx, vm::Verb::Delete(args)),
        Noun::Logs(args) => logs::run(ctx, args),
        Noun::Events(args) => events::run(ctx, args),
        Noun::Vm(verb) => vm::run(ctx, *verb),
        Noun::Workspace(verb) => workspace::run(ctx, verb),
        Noun::Snapshot(verb) => snapshot::run(ctx, verb),
        Noun::Image(verb) => image::run(ctx, verb),
        Noun::Kernel(verb) => kernel::run(ctx, verb),
        Noun::Op(verb) => op::run(ctx, verb),
        Noun::Info => system::run(ctx, system::Verb::Info),
        Noun::System(verb) => system::run(ctx, verb),
        Noun::Doctor(args) => doctor::run(ctx, &args),
        Noun::Config(verb) => config::run(ctx, verb),
        Noun::Rpc(args) => rpc::run(ctx, args),
        Noun::Debug(verb) => debug::run(ctx, verb),
        Noun::Completions { shell } => completions::script(&mut ctx.printer, shell),
        Noun::Version => version::run(ctx),
    }
}
