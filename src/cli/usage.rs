//! Prints help, version, or an error with a hint for command lines that clap does not accept.

use super::exec::OUR_FAILURE;
use super::printer::Printer;
use super::values::is_path;
use super::words::{self, runs_in_guest};
use super::{habits, image};
use crate::error::Error;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use std::error::Error as _;
use std::ffi::OsString;

/// The exit status for usage errors, outside `exec` and `run`.
const STATUS: u8 = 2;
/// Options of `docker build` that `fcctl image build` does not have.
const DOCKER_BUILD: &[&str] = &[
    "-t",
    "--tag",
    "--build-arg",
    "--no-cache",
    "--platform",
    "--target",
];

/// Prints the help for a command line without any words, as docker does. clap prints it, too, but
/// as an error.
pub(super) fn help(printer: &mut Printer, mut cli: clap::Command, colour: bool) -> u8 {
    print(printer, &cli.render_help(), colour)
}

fn print(printer: &mut Printer, text: &clap::builder::StyledStr, colour: bool) -> u8 {
    let text = if colour {
        text.ansi().to_string()
    } else {
        text.to_string()
    };
    match printer.text(&text) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

/// Prints help and version to stdout, and reports parse errors the way all failures are reported.
pub(super) fn report(
    printer: &mut Printer,
    mut cli: clap::Command,
    args: &[OsString],
    e: &clap::Error,
    colour: bool,
) -> u8 {
    if !e.use_stderr() {
        return print(printer, &e.render(), colour);
    }
    let status = if runs_in_guest(args) {
        OUR_FAILURE
    } else {
        STATUS
    };
    printer.json = args
        .iter()
        .take_while(|a| *a != "--")
        .any(|a| a == "--json");
    cli.build();
    match hinted(&cli, args, e) {
        Some(error) => printer.fail(&error.into(), status),
        None if printer.json => {
            let error = Error::invalid(message(e)).hint("fcctl --help");
            printer.fail(&error.into(), status);
        }
        None => printer.usage(&e.render().to_string()),
    }
    status
}

/// Returns clap's message without its tips and the usage, as one line.
fn message(e: &clap::Error) -> String {
    let text = e.render().to_string();
    let lines = text.lines().take_while(|line| !line.is_empty());
    let line = lines.map(str::trim).collect::<Vec<_>>().join(" ");
    line.trim_start_matches("error: ").to_owned()
}

/// Returns an error with a better hint than clap's, if there is one.
fn hinted(cli: &clap::Command, args: &[OsString], e: &clap::Error) -> Option<Error> {
    let (noun, verb) = words::noun_and_verb(cli, args).unwrap_or_default();
    if noun == "image" && verb.as_deref() == Some("build") && is_for_dockerfile(e) {
        return Some(image::no_dockerfile(
            "fcctl image build reads no Dockerfile",
        ));
    }
    of_value_parser(e)
        .or_else(|| of_habit(&noun, e))
        .or_else(|| of_option(&noun, e))
        .or_else(|| of_run(cli, args, e))
}

/// Returns a text that clap attached to the error.
fn context(e: &clap::Error, kind: ContextKind) -> Option<&str> {
    match e.get(kind)? {
        ContextValue::String(text) => Some(text),
        _ => None,
    }
}

/// True if the rejected word is a directory or an option of `docker build`.
fn is_for_dockerfile(e: &clap::Error) -> bool {
    let arg = context(e, ContextKind::InvalidArg).unwrap_or_default();
    match context(e, ContextKind::InvalidValue) {
        // The value of an option is not the directory to build.
        Some(_) if arg.starts_with('-') => false,
        Some(value) => is_path(value),
        None => is_path(arg) || DOCKER_BUILD.contains(&arg),
    }
}

/// Suggests a command for a word that users of docker type by habit. clap would suggest a command
/// with a similar spelling instead, such as `stop` for `top`.
fn of_habit(noun: &str, e: &clap::Error) -> Option<Error> {
    let word = context(e, ContextKind::InvalidSubcommand)?;
    let noun = if word == noun { "" } else { noun };
    let hint = habits::hint(noun, word)?;
    Some(Error::invalid(message(e)).hint(hint))
}

/// Explains an option that users of docker type by habit.
fn of_option(noun: &str, e: &clap::Error) -> Option<Error> {
    if e.kind() != ErrorKind::UnknownArgument || !["run", "exec", "vm"].contains(&noun) {
        return None;
    }
    let hint = habits::option_hint(context(e, ContextKind::InvalidArg)?)?;
    Some(Error::invalid(message(e)).hint(hint))
}

/// Explains `fcctl run WORD CMD`.
fn of_run(cli: &clap::Command, args: &[OsString], e: &clap::Error) -> Option<Error> {
    let word = context(e, ContextKind::InvalidArg)?;
    if e.kind() != ErrorKind::UnknownArgument || word.starts_with('-') {
        return None;
    }
    words::without_separator(cli, args, word)
}

/// Adds the hint of a value parser's error. clap prints only its message.
fn of_value_parser(e: &clap::Error) -> Option<Error> {
    let hint = e.source()?.downcast_ref::<Error>()?.hint_text()?;
    Some(Error::invalid(message(e)).hint(hint))
}

#[cfg(test)]
#[path = "usage_tests.rs"]
mod tests;
