//! Prints results on stdout, and progress, remarks and failures on stderr.

use super::output::Out;
use super::progress::Progress;
use crate::client::{Failure, Result};
use crate::error::Error;
use crate::host::text::printable;
use serde::Serialize;
use std::fs::File;

pub(super) struct Printer {
    /// Print results as one JSON document on stdout, and failures as JSON on stderr.
    pub json: bool,
    /// Show progress in lines even on a terminal, because it cannot move its cursor.
    pub is_dumb: bool,
    out: Out,
    err: Out,
}

impl Printer {
    pub(super) fn new(stdout: File, stderr: File) -> Self {
        Self {
            json: false,
            is_dumb: false,
            out: Out::new(stdout),
            err: Out::new(stderr),
        }
    }

    /// Returns the progress of one operation. `doing` is the prefix of each line, such as `start
    /// web`.
    pub(super) fn progress(&self, doing: &str) -> Progress {
        if self.json {
            return Progress::silent();
        }
        Progress::new(doing, self.err.file(), self.is_dumb)
    }

    /// Prints one line to stdout.
    pub(super) fn line(&mut self, text: &str) -> Result<()> {
        self.text(&format!("{text}\n"))
    }

    /// Prints a line unless `--json` is given. The caller prints the document.
    pub(super) fn say(&mut self, text: &str) -> Result<()> {
        if self.json { Ok(()) } else { self.line(text) }
    }

    /// Prints `text` to stdout as it is.
    pub(super) fn text(&mut self, text: &str) -> Result<()> {
        self.bytes(text.as_bytes())
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.out
            .bytes(bytes)
            .map_err(|e| Error::io("write to stdout", e).into())
    }

    /// Prints the single JSON document of a command.
    pub(super) fn document(&mut self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|e| Error::internal("write JSON").with_source(e))?;
        self.line(&text)
    }

    /// True once the reader of stdout has exited.
    pub(super) fn is_unread(&self) -> bool {
        self.out.is_broken()
    }

    /// Prints a remark on stderr, except with `--json`.
    pub(super) fn note(&mut self, text: &str) {
        if !self.json {
            // If stderr cannot be written either, there is nowhere left to report it.
            let _ = self.err.line(&format!("fcctl: {}", printable(text)));
        }
    }

    /// Reports a failure on stderr, with `--json` as a JSON object.
    pub(super) fn fail(&mut self, failure: &Failure, status: u8) {
        let fault = &failure.fault;
        if self.json {
            let mut error = serde_json::to_value(fault).unwrap_or_default();
            error["exit_status"] = status.into();
            let _ = self
                .err
                .line(&serde_json::json!({ "error": error }).to_string());
            return;
        }
        let _ = self
            .err
            .line(&format!("fcctl: {}", printable(&fault.message)));
        for line in fault.hint.iter().flat_map(|h| h.lines()) {
            let _ = self.err.line(&format!("hint: {}", printable(line)));
        }
    }

    /// Prints clap's own message about a command line that it rejected.
    pub(super) fn usage(&mut self, text: &str) {
        let _ = self
            .err
            .bytes(text.replacen("error: ", "fcctl: ", 1).as_bytes());
    }
}
