//! What `fcctl` prints if clap cannot use a command line: help, version, or an error and a hint.

use super::exec::OUR_FAILURE;
use super::printer::Printer;
use super::runs_in_guest;
use crate::error::Error;
use std::error::Error as _;
use std::ffi::OsString;

/// The exit status for usage errors, outside `exec` and `run`.
const STATUS: u8 = 2;

/// Prints help and version to stdout, and reports parse errors the way all failures are reported.
pub(super) fn report(
    printer: &mut Printer,
    args: &[OsString],
    e: &clap::Error,
    colour: bool,
) -> u8 {
    if !e.use_stderr() {
        let text = if colour {
            e.render().ansi().to_string()
        } else {
            e.render().to_string()
        };
        return match printer.text(&text) {
            Ok(()) => 0,
            Err(_) => 1,
        };
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
    match hinted(e) {
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
fn hinted(e: &clap::Error) -> Option<Error> {
    of_value_parser(e)
}

/// clap prints the message of a value parser's error, but not its hint.
fn of_value_parser(e: &clap::Error) -> Option<Error> {
    let hint = e.source()?.downcast_ref::<Error>()?.hint_text()?;
    Some(Error::invalid(message(e)).hint(hint))
}
