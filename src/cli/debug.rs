//! `debug`: the daemon's internal state.

use super::connector::Connector;
use super::context::Context;
use super::output;
use super::printer::Printer;
use crate::api::Empty;
use crate::api::daemon::{DebugLocks, DebugLocksReply, LockParty, LockRecord};
use crate::client::Result;
use crate::locks::rank::{self, Edge};

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Show held locks: since when, for which operation, who waits
    Locks {
        /// Show how long threads have waited for locks and held them
        #[arg(long)]
        stats: bool,
    },
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
        Verb::Locks { stats } => locks(connector, printer, stats),
        Verb::LockOrder { dot: true } => {
            // The graph of the declared order needs no daemon.
            let connected = connector.connect(printer);
            let reply = connected.and_then(|mut daemon| daemon.call::<DebugLocks>(&Empty {}));
            let observed = reply.ok().filter(|r| r.checked).map(|r| edges(&r));
            printer.text(&rank::dot(observed.as_deref())).map(|()| 0)
        }
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

/// Returns the nestings that the daemon has seen.
fn edges(reply: &DebugLocksReply) -> Vec<Edge> {
    let edges = reply.edges.iter();
    edges
        .filter_map(|edge| {
            Some(Edge {
                from: rank::named(&edge.from)?,
                to: rank::named(&edge.to)?,
                first: (edge.from_site.clone(), edge.to_site.clone()),
            })
        })
        .collect()
}

fn locks(connector: &mut Connector, printer: &mut Printer, stats: bool) -> Result<u8> {
    let reply = connector.connect(printer)?.call::<DebugLocks>(&Empty {})?;
    if printer.json {
        printer.document(&reply)?;
        return Ok(0);
    }
    if stats {
        return print_stats(&reply, printer);
    }
    let waits = reply.durable_waits.iter();
    let waits = waits.map(|party| row("durable_wait", "", "waits", party));
    let rows: Vec<_> = reply.locks.iter().flat_map(rows).chain(waits).collect();
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

fn row(set: &str, key: &str, who: &str, party: &LockParty) -> Vec<String> {
    vec![
        set.to_owned(),
        key.to_owned(),
        who.to_owned(),
        party.operation.clone(),
        micros(party.for_us),
        party.thread.clone(),
    ]
}

fn rows(lock: &LockRecord) -> Vec<Vec<String>> {
    let row = |who: &str, party: &LockParty| row(&lock.set, &lock.key, who, party);
    lock.holder
        .iter()
        .map(|p| row("holds", p))
        .chain(lock.waiters.iter().map(|p| row("waits", p)))
        .collect()
}

fn print_stats(reply: &DebugLocksReply, printer: &mut Printer) -> Result<u8> {
    let classes = reply.classes.iter().flat_map(|class| {
        [("waits", &class.waits), ("holds", &class.holds)]
            .into_iter()
            .filter(|(_, counts)| !counts.is_empty())
            .map(|(what, counts)| {
                vec![
                    class.class.clone(),
                    what.to_owned(),
                    counts.iter().sum::<u64>().to_string(),
                    share_below(counts, 50),
                    share_below(counts, 99),
                    share_below(counts, 100),
                ]
            })
    });
    printer.text(&output::table(
        &["LOCK", "WHAT", "COUNT", "50%", "99%", "100%"],
        &classes.collect::<Vec<_>>(),
    ))?;
    let mut places: Vec<_> = reply.contention.iter().collect();
    places.sort_by_key(|place| std::cmp::Reverse(place.count));
    if !places.is_empty() {
        let rows = places.into_iter().map(|place| {
            let count = place.count.to_string();
            vec![place.class.clone(), count, place.site.clone()]
        });
        printer.line("")?;
        printer.text(&output::table(
            &["LOCK", "WAITED", "PLACE"],
            &rows.collect::<Vec<_>>(),
        ))?;
    }
    printer.line(&format!("log lines dropped: {}", reply.log_lines_dropped))?;
    Ok(0)
}

/// Returns an upper bound for `percent` of the durations. The bound is a power of two microseconds.
fn share_below(counts: &[u64], percent: u64) -> String {
    let all: u64 = counts.iter().sum();
    let mut below = 0;
    let reached = counts.iter().position(|count| {
        below += count;
        below * 100 >= all * percent
    });
    format!("<{}", micros(1 << reached.unwrap_or_default()))
}

fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us}us"),
        1_000..1_000_000 => format!("{}ms", us / 1_000),
        _ => output::span(us / 1_000_000),
    }
}

#[cfg(test)]
#[path = "debug_tests.rs"]
mod tests;
