//! The `fcd` program: parses flags, sets up logging, and runs the daemon from the library.

use clap::{CommandFactory, Parser};
use fcd::program::{Config, Flags};
use std::path::PathBuf;
use std::process::ExitCode;

/// Development sandboxes in microVMs: the daemon
#[derive(Parser)]
#[command(name = "fcd", version)]
struct Args {
    /// Configuration file [env: FCD_CONFIG] [default: /etc/fcd/config.toml, users:
    /// ~/.config/fcd/config.toml]
    #[arg(long, value_name = "F")]
    config: Option<PathBuf>,
    /// Directory for VMs, images and the database [env: FCD_STATE_DIR] [default: /var/lib/fcd,
    /// users: ~/.local/state/fcd]
    #[arg(long, value_name = "D")]
    state_dir: Option<PathBuf>,
    /// Socket to listen on [env: FCD_SOCKET] [default: /run/fcd/fcd.sock, users:
    /// $XDG_RUNTIME_DIR/fcd/fcd.sock]
    #[arg(long, value_name = "S")]
    socket: Option<PathBuf>,
    /// Print a configuration file with every setting, its default and what it means, and exit
    #[arg(long)]
    print_config: bool,
    /// Print the man page, for scripts/package
    #[arg(long, hide = true)]
    print_man_page: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Check this host and print the results as JSON, without starting the daemon
    Doctor {
        /// Accepted for scripts: the output is always JSON
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    // This comes first because a helper process must have one thread and no open files when it
    // drops its privileges.
    if let Some(code) = fcd::program::run_helper_if_asked() {
        return code;
    }
    fcd::program::memory::bound_allocator();
    let closed = fcd::program::close_descriptors(&|name| std::env::var(name).ok());
    let args = Args::parse();
    if args.print_config {
        return print(&fcd::program::config_reference());
    }
    if args.print_man_page {
        let page = fcd::program::man_page(Args::command(), "fcd", "8");
        return page.map_or(ExitCode::FAILURE, |page| print(&page));
    }
    if let Err(e) = fcd::program::log::init() {
        eprintln!("fcd: {e}");
        return ExitCode::FAILURE;
    }
    if let Err(e) = closed {
        log::warn!("{e}");
    }
    let flags = Flags {
        config: args.config,
        state_dir: args.state_dir,
        socket: args.socket,
    };
    let uid = nix::unistd::geteuid().as_raw();
    let outcome = Config::load(&flags, uid, &|name| std::env::var(name).ok()).and_then(|config| {
        match args.command {
            Some(Command::Doctor { .. }) => fcd::program::print_doctor(&config),
            None => fcd::program::run(config),
        }
    });
    match outcome {
        Ok(()) => {
            fcd::program::log::flush();
            ExitCode::SUCCESS
        }
        Err(e) => {
            let hint = e
                .hint_text()
                .map(|hint| format!("\nhint: {hint}"))
                .unwrap_or_default();
            fcd::program::log::say(&format!("fcd: {e}{hint}"));
            ExitCode::from(fcd::program::exit_status(&e))
        }
    }
}

/// Prints to stdout. It is not an error if the reader has exited (`| head`).
fn print(text: &str) -> ExitCode {
    use std::io::{ErrorKind, Write};
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("fcd: write to stdout: {e}");
            ExitCode::FAILURE
        }
    }
}
