//! `logs`: prints what a VM wrote to its console.

use super::context::Context;
use crate::api::frame::Note;
use crate::api::vm::{VmLogs, VmLogsRequest};
use crate::client::{Failure, Result};
use crate::error::{Error, Kind};
use crate::host::text::printable_lines;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Name, ID, or ID prefix
    vm: String,
    /// Keep printing until the VM is deleted
    #[arg(short, long)]
    follow: bool,
    /// Print only the last N lines
    #[arg(short = 'n', long, value_name = "N")]
    tail: Option<u64>,
}

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        ..
    } = ctx;
    if printer.json && args.follow {
        return Err(
            Error::invalid("--follow never ends, so it cannot be one JSON document")
                .hint("leave out --json or --follow")
                .into(),
        );
    }
    // A guest must not control the user's terminal. Files and pipes get the bytes unchanged.
    let is_terminal = stdio.stdout_is_terminal();
    let request = VmLogsRequest {
        vm: args.vm.clone(),
        tail: args.tail,
        follow: args.follow,
    };
    let mut client = connector.connect(printer)?;
    let mut kept = String::new();
    let result = client.call_more::<VmLogs>(&request, &[], &mut |note| {
        let Note::Log(chunk) = note else {
            return Ok(());
        };
        if printer.json {
            kept.push_str(&chunk.text);
            return Ok(());
        }
        if is_terminal {
            printer.text(&printable_lines(&chunk.text))?
        } else {
            printer.text(&chunk.text)?
        }
        // With --follow, only this check ends the call when the reader exits.
        if printer.is_unread() {
            Err(unread())
        } else {
            Ok(())
        }
    });
    match result {
        Err(e) if is_unread(&e) => Ok(0),
        Err(e) => Err(e),
        Ok(_) if printer.json => printer
            .document(&serde_json::json!({ "vm": args.vm, "text": kept }))
            .map(|()| 0),
        Ok(_) => Ok(0),
    }
}

/// Returns the failure that ends a call once nobody reads its output.
pub(super) fn unread() -> Failure {
    Error::new(Kind::Cancelled, "nobody reads").into()
}

/// True for [`unread`], but not for a full disk behind stdout or an error of the daemon.
pub(super) fn is_unread(failure: &Failure) -> bool {
    *failure == unread()
}
