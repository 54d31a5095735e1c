//! `doctor --leaks`: lists what belongs to fcd on this host but to no VM, and removes it only when
//! asked.

use super::confirm::Question;
use super::connector::Connector;
use super::context::Stdio;
use super::output;
use super::printer::Printer;
use crate::api::daemon::{Leak, Leaks, LeaksRequest};
use crate::client::Result;
use crate::host::plural::count;
use crate::host::text::printable;

/// Lists leaks, and removes them with `--fix`. The exit status is 0 if no leak is left.
pub(super) fn run(
    connector: &mut Connector,
    printer: &mut Printer,
    stdio: &Stdio,
    fix: bool,
    yes: bool,
) -> Result<u8> {
    let found = look(connector, printer, false)?;
    if found.is_empty() || !fix {
        tell(printer, &found)?;
        return Ok(u8::from(!found.is_empty()));
    }
    if !printer.json {
        tell(printer, &found)?;
    }
    let question = Question {
        doing: "remove leftovers",
        text: format!("remove {}?", count(found.len() as u64, "leftover")),
        hint: "review the list (fcctl doctor --leaks), then add --yes",
    };
    if !yes && !question.is_confirmed(printer, stdio)? {
        printer.note("nothing was removed");
        return Ok(1);
    }
    let left = look(connector, printer, true)?;
    let remaining = left.iter().filter(|l| !l.removed).count();
    if printer.json {
        printer.document(&left)?;
    } else {
        printer.line(&format!(
            "{} removed",
            count((left.len() - remaining) as u64, "leftover")
        ))?;
        for leak in left.iter().filter(|l| !l.removed) {
            let error = leak.error.as_deref().unwrap_or("not tried");
            printer.line(&format!(
                "{} {} is still there: {}",
                leak.kind,
                printable(&leak.name),
                printable(error)
            ))?;
        }
    }
    Ok(u8::from(remaining > 0))
}

fn look(connector: &mut Connector, printer: &mut Printer, fix: bool) -> Result<Vec<Leak>> {
    Ok(connector
        .connect(printer)?
        .call::<Leaks>(&LeaksRequest { fix })?
        .leaks)
}

fn tell(printer: &mut Printer, leaks: &[Leak]) -> Result<()> {
    if printer.json {
        return printer.document(&leaks);
    }
    if leaks.is_empty() {
        return printer.line("fcd has left nothing behind on this host");
    }
    let rows: Vec<_> = leaks
        .iter()
        .map(|l| vec![l.kind.clone(), l.name.clone(), l.why.clone()])
        .collect();
    printer.text(&output::table(&["KIND", "NAME", "WHY"], &rows))
}
