//! `doctor --leaks`: lists what belongs to fcd on this host but to no VM, and removes it only when
//! asked.

use super::context::Context;
use super::output::{self, count, harmless_line};
use crate::api::daemon::{Leak, Leaks, LeaksRequest};
use crate::client::Result;
use crate::error::Error;
use std::io::{BufRead, BufReader};

/// The status is 0 if there is nothing, or nothing left after removing it.
pub fn run(ctx: &mut Context, fix: bool, yes: bool) -> Result<u8> {
    let found = look(ctx, false)?;
    if found.is_empty() || !fix {
        tell(ctx, &found)?;
        return Ok(u8::from(!found.is_empty()));
    }
    if !ctx.json {
        tell(ctx, &found)?;
    }
    if !yes && !confirmed(ctx, found.len())? {
        ctx.note("nothing was removed");
        return Ok(1);
    }
    let left = look(ctx, true)?;
    let remaining = left.iter().filter(|l| !l.removed).count();
    if ctx.json {
        ctx.document(&left)?;
    } else {
        ctx.line(&format!(
            "{} removed",
            count((left.len() - remaining) as u64, "leftover")
        ))?;
        for leak in left.iter().filter(|l| !l.removed) {
            let error = leak.error.as_deref().unwrap_or("not tried");
            ctx.line(&format!(
                "{} {} is still there: {}",
                leak.kind,
                harmless_line(&leak.name),
                harmless_line(error)
            ))?;
        }
    }
    Ok(u8::from(remaining > 0))
}

fn look(ctx: &mut Context, fix: bool) -> Result<Vec<Leak>> {
    Ok(ctx.connect()?.call::<Leaks>(&LeaksRequest { fix })?.leaks)
}

fn tell(ctx: &mut Context, leaks: &[Leak]) -> Result<()> {
    if ctx.json {
        return ctx.document(&leaks);
    }
    if leaks.is_empty() {
        return ctx.line("fcd has left nothing behind on this host");
    }
    let rows: Vec<_> = leaks
        .iter()
        .map(|l| vec![l.kind.clone(), l.name.clone(), l.why.clone()])
        .collect();
    ctx.text(&output::table(&["KIND", "NAME", "WHY"], &rows))
}

/// Asks on the terminal. Without a terminal only `--yes` confirms.
fn confirmed(ctx: &mut Context, number: usize) -> Result<bool> {
    if !ctx.stdio.stdin_is_terminal() {
        let e = Error::invalid("remove leftovers: there is no terminal to ask for confirmation");
        return Err(e
            .hint("review the list (fcctl doctor --leaks), then add --yes")
            .into());
    }
    ctx.note(&format!(
        "remove {}? [y/N]",
        count(number as u64, "leftover")
    ));
    let mut answer = String::new();
    BufReader::new(&ctx.stdio.stdin)
        .read_line(&mut answer)
        .map_err(|e| Error::io("read the answer", e))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
