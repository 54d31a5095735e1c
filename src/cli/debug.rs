//! `debug`: the daemon's internal state.

use super::connector::Connector;
use super::context::Context;
use super::output;
use super::printer::Printer;
use crate::api::Empty;
use crate::api::daemon::{DebugLocks, LockParty, LockRecord};
use crate::client::Result;
use crate::locks::rank;

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Show held locks: since when, for which operation, who waits
    Locks,
    /// Show the lock order that the checker enforces
    LockOrder {
        /// Print it as a graph for Graphviz
        #[arg(long, conflicts_with = "json")]
        dot: bool,
    },
}

pub(super) fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    let Context {
        connector, printer, ..
    } = ctx;
    match verb {
        Verb::Locks => locks(connector, printer),
        Verb::LockOrder { dot: true } => printer.text(&rank::dot(None)).map(|()| 0),
        Verb::LockOrder { dot: false } => lock_order(printer),
    }
}

/// Prints the order compiled into this program, without asking a daemon.
fn lock_order(printer: &mut Printer) -> Result<u8> {
    let order = rank::order();
    if printer.json {
        printer.document(&order)?;
        return Ok(0);
    }
    let kind = |is_virtual| if is_virtual { "virtual" } else { "lock" }.to_owned();
    let under = |names: &[&str]| {
        if names.is_empty() {
            "nothing".to_owned()
        } else {
            names.join(", ")
        }
    };
    let rows: Vec<_> = order
        .iter()
        .map(|r| vec![r.taken.to_owned(), kind(r.is_virtual), under(&r.under)])
        .collect();
    printer.text(&output::table(
        &["TAKEN", "KIND", "WHILE HOLDING ONLY"],
        &rows,
    ))?;
    Ok(0)
}

fn locks(connector: &mut Connector, printer: &mut Printer) -> Result<u8> {
    let reply = connector.connect(printer)?.call::<DebugLocks>(&Empty {})?;
    if printer.json {
        printer.document(&reply)?;
        return Ok(0);
    }
    let rows: Vec<_> = reply.locks.iter().flat_map(rows).collect();
    printer.text(&output::table(
        &["LOCK", "KEY", "WHO", "OPERATION", "FOR", "THREAD"],
        &rows,
    ))?;
    let checked = if reply.checked {
        format!("{} so far", reply.violations)
    } else {
        "not counted in this build".to_owned()
    };
    printer.line(&format!("lock-order violations: {checked}"))?;
    Ok(0)
}

fn rows(lock: &LockRecord) -> Vec<Vec<String>> {
    let row = |who: &str, party: &LockParty| {
        let operation = party.operation.clone();
        vec![
            lock.set.clone(),
            lock.key.clone(),
            who.to_owned(),
            operation,
            micros(party.for_us),
            party.thread.clone(),
        ]
    };
    lock.holder
        .iter()
        .map(|p| row("holds", p))
        .chain(lock.waiters.iter().map(|p| row("waits", p)))
        .collect()
}

fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us}us"),
        1_000..1_000_000 => format!("{}ms", us / 1_000),
        _ => output::span(us / 1_000_000),
    }
}
