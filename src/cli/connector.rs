//! Connects to the daemon that the command line names, and makes the calls that most commands
//! consist of.

use super::printer::Printer;
use crate::api::Call;
use crate::api::frame::Note;
use crate::client::{Client, Result};
use serde::Serialize;
use std::collections::HashSet;
use std::hash::Hash;
use std::path::{Path, PathBuf};

pub(super) struct Connector {
    socket: PathBuf,
    warned: bool,
}

impl Connector {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            warned: false,
        }
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Connects. A version difference between fcctl and fcd is reported only the first time.
    pub(super) fn connect(&mut self, printer: &mut Printer) -> Result<Client> {
        let client = Client::connect(&self.socket)?;
        if let Some(warning) = client.warning()
            && !std::mem::replace(&mut self.warned, true)
        {
            printer.note(&format!("warning: {warning}"));
        }
        Ok(client)
    }

    /// Runs `each` for every target, and continues after failures. The status is that of the first
    /// failure, or 0. With `--json` it prints the results of `each`: one object for one target, an
    /// array for several.
    pub(super) fn for_each<T: Serialize>(
        &mut self,
        printer: &mut Printer,
        targets: &[String],
        mut each: impl FnMut(&mut Printer, &mut Client, &str) -> Result<T>,
    ) -> Result<u8> {
        let is_one = targets.len() == 1;
        self.for_all(printer, targets, is_one, |printer, client, target| {
            each(printer, client, target)
        })
    }

    /// Does what [`Connector::for_each`] does for any kind of target. The caller says whether the
    /// result is a single object.
    pub(super) fn for_all<W: Eq + Hash, T: Serialize>(
        &mut self,
        printer: &mut Printer,
        targets: &[W],
        is_one: bool,
        mut each: impl FnMut(&mut Printer, &mut Client, &W) -> Result<T>,
    ) -> Result<u8> {
        let mut client = self.connect(printer)?;
        let (mut status, mut done) = (0, Vec::new());
        let mut seen = HashSet::new();
        // Act once on a VM that is named twice.
        for target in targets.iter().filter(|target| seen.insert(*target)) {
            match each(printer, &mut client, target) {
                Ok(value) => done.push(value),
                Err(failure) => {
                    let this = failure.exit_status();
                    printer.fail(&failure, this);
                    status = if status == 0 { this } else { status };
                    if failure.unreachable {
                        // The daemon went away. It may be back for the next target.
                        client = match self.connect(printer) {
                            Ok(client) => client,
                            Err(_) => break,
                        };
                    }
                }
            }
        }
        if printer.json {
            match (is_one, done.first()) {
                (true, Some(one)) => printer.document(one)?,
                (true, None) => {}
                _ => printer.document(&done)?,
            }
        }
        Ok(status)
    }
}

/// Runs an operation and shows its progress on stderr. `doing` is the prefix of each line, such as
/// `start web`.
pub(super) fn operate<C: Call>(
    printer: &Printer,
    client: &mut Client,
    doing: &str,
    request: &C::Request,
) -> Result<C::Reply> {
    let mut progress = printer.progress(doing);
    client.call_more::<C>(request, &[], &mut |note| {
        if let Note::Progress(p) = note {
            progress.update(&p);
        }
        Ok(())
    })
}
