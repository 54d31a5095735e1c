//! `debug`: what the daemon is at inside.

use super::context::Context;
use super::output;
use crate::api::Empty;
use crate::api::daemon::{DebugLocks, LockParty, LockRecord};
use crate::client::Result;

#[derive(clap::Subcommand, Debug)]
pub enum Verb {
    /// Who holds which lock since when for which operation, and who waits
    Locks,
}

pub fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    let Verb::Locks = verb;
    let reply = ctx.connect()?.call::<DebugLocks>(&Empty {})?;
    if ctx.json {
        ctx.document(&reply)?;
        return Ok(0);
    }
    let rows: Vec<_> = reply.locks.iter().flat_map(rows).collect();
    ctx.text(&output::table(&["LOCK", "KEY", "WHO", "OPERATION", "FOR", "THREAD"], &rows))?;
    let checked = if reply.checked { format!("{} so far", reply.violations) } else { "not counted in this build".to_owned() };
    ctx.line(&format!("lock-order violations: {checked}"))?;
    Ok(0)
}

fn rows(lock: &LockRecord) -> Vec<Vec<String>> {
    let row = |who: &str, party: &LockParty| {
        let operation = party.operation.clone();
        vec![lock.set.clone(), lock.key.clone(), who.to_owned(), operation, micros(party.for_us), party.thread.clone()]
    };
    lock.holder.iter().map(|p| row("holds", p)).chain(lock.waiters.iter().map(|p| row("waits", p))).collect()
}

fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us}us"),
        1_000..1_000_000 => format!("{}ms", us / 1_000),
        _ => output::span(us / 1_000_000),
    }
}
