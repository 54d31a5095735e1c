//! Asks the user before something is removed.

use super::context::Stdio;
use super::printer::Printer;
use crate::client::Result;
use crate::error::Error;
use std::io::{BufRead, BufReader};

pub(super) struct Question<'a> {
    /// The action to confirm. Begins the error if there is no terminal.
    pub doing: &'a str,
    pub text: String,
    /// The hint for callers without a terminal.
    pub hint: &'a str,
}

impl Question<'_> {
    /// Asks on the terminal. Every answer but a yes means no.
    ///
    /// # Errors
    /// `invalid_argument` if there is no terminal or with `--json`: nobody can answer then.
    pub(super) fn is_confirmed(&self, printer: &mut Printer, stdio: &Stdio) -> Result<bool> {
        if !stdio.stdin_is_terminal() || printer.json {
            let doing = self.doing;
            let text = if printer.json {
                format!("{doing}: --json cannot ask for confirmation")
            } else {
                format!("{doing}: there is no terminal to ask for confirmation")
            };
            return Err(Error::invalid(text).hint(self.hint).into());
        }
        printer.note(&format!("{} [y/N]", self.text));
        let mut answer = String::new();
        BufReader::new(&stdio.stdin)
            .read_line(&mut answer)
            .map_err(|e| Error::io("read the answer", e))?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    }
}
