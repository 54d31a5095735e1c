//! The parts that copies in all directions share.

use super::super::connector::Connector;
use super::super::context::Stdio;
use super::super::printer::Printer;
use super::super::progress::Progress;
use super::super::signals::Interrupts;
use super::super::transfer::Bound;
use super::meter::Meter;
use crate::client::{Failure, Result};
use crate::error::{Error, Kind};
use crate::host::thread;
use crate::locks::{Cancel, CancelCause};
use crate::workspace::copy::Copied;
use std::io::IsTerminal;
use std::thread::JoinHandle;

/// How many lines of a guest's stderr are shown.
const LINES_MAX: usize = 20;

/// The result of the thread that moves the tar: the amount copied, and warnings.
pub(super) type Outcome = crate::error::Result<(Copied, Vec<String>)>;

/// The options of `cp`.
#[derive(clap::Args, Debug)]
pub(super) struct Options {
    /// Keep owners, hard links, extended attributes and all permission bits
    #[arg(short, long)]
    pub archive: bool,
    /// Follow SRC if it is a symbolic link
    #[arg(short = 'L', long)]
    pub follow_link: bool,
    /// User of the guest who reads or owns the files, by name or number [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub bound: Bound,
    /// Accepted for users of cp: directories are always copied with their content
    #[arg(short, long, visible_short_alias = 'R', hide = true)]
    recursive: bool,
}

/// One command line of `cp`.
pub(super) struct Job<'a> {
    pub connector: &'a mut Connector,
    pub printer: &'a mut Printer,
    pub stdio: &'a Stdio,
    pub interrupts: &'a Interrupts,
    pub options: &'a Options,
}

impl Job<'_> {
    /// Returns a token that also fires at a signal.
    pub(super) fn stop(&self) -> Result<Cancel> {
        let stop = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
        let fired = stop.clone();
        self.interrupts
            .on_end(move || fired.cancel(CancelCause::Interrupted));
        Ok(stop)
    }

    /// True if a progress bar is shown.
    pub(super) fn has_bar(&self) -> bool {
        !self.options.quiet && !self.printer.json && self.stdio.stderr.is_terminal()
    }

    pub(super) fn meter(&self, stage: &str, total: Option<u64>) -> Meter {
        let progress = if self.has_bar() {
            self.printer.progress("copy")
        } else {
            Progress::silent()
        };
        Meter::new(progress, stage, total)
    }

    /// Prints warnings, and what a command in the guest wrote to stderr although it succeeded.
    pub(super) fn warn(&mut self, vm: &str, said: &[u8], warnings: &[String]) {
        for warning in warnings {
            self.printer.note(&format!("warning: {warning}"));
        }
        let said = String::from_utf8_lossy(said);
        for line in said.lines().take(LINES_MAX) {
            self.printer.note(&format!("warning: {vm}: {line}"));
        }
        let more = said.lines().count().saturating_sub(LINES_MAX);
        if more > 0 {
            let text = format!("warning: {vm}: and {more} more warnings");
            self.printer.note(&text);
        }
    }
}

/// The thread that reads a tar from a guest. The `bool` is true if the transfer was cancelled or
/// cut off, so the reason for an error lies elsewhere.
pub(super) type Receiving<T> = JoinHandle<(Result<T>, bool)>;

/// Starts the thread that reads a tar from a guest. If `work` itself fails, the thread ends the
/// guest's command with `hang_up`. Otherwise the guest would notice only at its next write.
pub(super) fn receive<T: Send + 'static>(
    stop: &Cancel,
    hang_up: impl Fn() + Send + 'static,
    work: impl FnOnce(&Cancel) -> Result<T> + Send + 'static,
) -> Result<Receiving<T>> {
    let token = stop.clone();
    let thread = thread::spawn("receive", move || {
        let result = work(&token);
        let is_consequence = token.is_cancelled() || is_cut_off(&result);
        if result.is_err() && !is_consequence {
            hang_up();
        }
        (result, is_consequence)
    })?;
    Ok(thread)
}

/// True if the stream ended early. The reason is then in the command's exit status.
fn is_cut_off<T>(result: &Result<T, Failure>) -> bool {
    matches!(result, Err(e) if e.fault.kind == Kind::StreamIncomplete.name())
}
