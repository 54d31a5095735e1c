//! `version`: the versions of fcctl and fcd.

use super::context::Context;
use crate::api::daemon::Info;
use crate::api::{Empty, VERSION_MAJOR, VERSION_MINOR};
use crate::client::{ABSENT, Result};

/// Prints both versions. Succeeds without a daemon, but fails if the daemon cannot be used, for
/// example because it refuses the caller.
pub(super) fn run(ctx: &mut Context) -> Result<u8> {
    let Context {
        connector, printer, ..
    } = ctx;
    let ours = env!("CARGO_PKG_VERSION");
    let daemon = match connector.connect(printer) {
        Ok(mut client) => Some(client.call::<Info>(&Empty {})?),
        Err(e) if e.kind() == ABSENT => None,
        Err(e) => return Err(e),
    };
    if printer.json {
        let api = serde_json::json!({ "major": VERSION_MAJOR, "minor": VERSION_MINOR });
        printer.document(
            &serde_json::json!({ "fcctl": { "version": ours, "api": api }, "fcd": daemon }),
        )?;
        return Ok(0);
    }
    let theirs = match daemon {
        Some(info) => format!(
            "fcd   {} (protocol {}.{}, pid {})",
            info.version, info.api.major, info.api.minor, info.pid
        ),
        None => format!("fcd   is not running at {}", connector.socket().display()),
    };
    printer.line(&format!(
        "fcctl {ours} (protocol {VERSION_MAJOR}.{VERSION_MINOR})\n{theirs}"
    ))?;
    Ok(0)
}
