//! Completions for shells. The scripts for bash, zsh and fish run `fcctl __complete`, which takes
//! the syntax of the command line from clap, and names from the daemon.
//!
//! `fcctl __complete` never waits long for the daemon. If the daemon does not answer in time, only
//! words of the command line are completed.

mod names;
#[cfg(test)]
mod tests;

use super::printer::Printer;
use super::syntax;
use crate::client::Result;
use clap_complete::Shell;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate, complete};
use names::{Daemon, Source};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The hidden command that the scripts run: `fcctl __complete INDEX -- WORDS...`.
pub(super) const COMMAND: &str = "__complete";

const BASH: &str = include_str!("fcctl.bash");
const ZSH: &str = include_str!("fcctl.zsh");
const FISH: &str = include_str!("fcctl.fish");

/// Prints the script for a shell. The scripts for other shells than bash, zsh and fish complete
/// only words of the command line.
pub(super) fn script(printer: &mut Printer, shell: Shell) -> Result<u8> {
    if matches!(shell, Shell::Bash | Shell::Zsh | Shell::Fish) {
        printer.text(of(shell))?;
        return Ok(0);
    }
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut syntax(), "fcctl", &mut script);
    printer.bytes(&script)?;
    Ok(0)
}

/// Returns the script for bash, zsh or fish.
pub(super) fn of(shell: Shell) -> &'static str {
    match shell {
        Shell::Zsh => ZSH,
        Shell::Fish => FISH,
        _ => BASH,
    }
}

/// Returns the candidates for one word of a command line, each with its description after a tab.
/// `args` are all words of the call of [`COMMAND`]. Returns None if they are malformed.
pub(super) fn answer(args: &[OsString], socket: &Path, dir: Option<&Path>) -> Option<String> {
    let [_, command, index, separator, words @ ..] = args else {
        return None;
    };
    if command != COMMAND || separator != "--" {
        return None;
    }
    let index: usize = index.to_str()?.parse().ok()?;
    let socket = socket_in(words).unwrap_or_else(|| socket.to_owned());
    let daemon = Arc::new(Daemon::new(socket));
    let mut command = with_names(syntax(), "", &daemon);
    let mut found = complete(&mut command, words.to_vec(), index, dir).unwrap_or_default();
    let is_option =
        |one: &CompletionCandidate| one.get_value().as_encoded_bytes().starts_with(b"-");
    // Offer options only after a dash, or if there are no other candidates.
    if words.get(index).is_some_and(|word| word.is_empty()) && !found.iter().all(is_option) {
        found.retain(|one| !is_option(one));
    }
    Some(found.iter().filter_map(line).collect())
}

/// Returns the candidate as a line. Skips a value with a control character, which the shell would
/// misread.
fn line(candidate: &CompletionCandidate) -> Option<String> {
    let value = candidate.get_value().to_str()?;
    if value.is_empty() || value.contains(char::is_control) {
        return None;
    }
    let help = candidate.get_help().map(ToString::to_string);
    let help = help.as_deref().and_then(|help| help.lines().next());
    Some(match help {
        Some(help) => format!("{value}\t{}\n", crate::host::text::printable(help)),
        None => format!("{value}\n"),
    })
}

/// Returns the socket that the command line names.
fn socket_in(words: &[OsString]) -> Option<PathBuf> {
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "--socket" {
            return words.next().map(PathBuf::from);
        }
        if let Some(socket) = word.to_str().and_then(|w| w.strip_prefix("--socket=")) {
            return Some(socket.into());
        }
    }
    None
}

/// Lets the daemon complete the arguments of a command and its subcommands.
fn with_names(command: clap::Command, verb: &str, daemon: &Arc<Daemon>) -> clap::Command {
    let command = command.mut_args(|arg| match Source::of(verb, arg.get_id().as_str()) {
        Some(source) => {
            let daemon = daemon.clone();
            let complete = move |typed: &OsStr| daemon.candidates(source, typed);
            arg.add(ArgValueCompleter::new(complete))
        }
        None => arg,
    });
    command.mut_subcommands(|sub| {
        let name = sub.get_name().to_owned();
        with_names(sub, &name, daemon)
    })
}
