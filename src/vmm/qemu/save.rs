//! Saves and restores a guest with QEMU's migration to and from a file (docs/devel/migration.rst,
//! 7.2). QEMU's sandbox forbids opening files, so fcd passes a descriptor.

use super::qmp::Qmp;
use crate::error::{Error, Kind, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

/// How long QEMU may take to write a guest's memory to the disk or to read it.
pub(super) const DEADLINE: Duration = Duration::from_secs(600);
/// The name of the descriptor in QMP.
const NAME: &str = "saved";
/// The bandwidth limit in bytes per second. QEMU's default is meant for a network.
const BANDWIDTH_MAX: u64 = 1 << 40;
/// A file system with less free space than this counts as full. QEMU writes at most 32 KiB at once
/// (migration/qemu-file.c), but other processes write at the same time.
const FULL_BYTES: u64 = 1 << 20;

/// Saves a paused guest. QEMU flushes the disks and releases their locks. QEMU takes the locks
/// again when the guest is resumed.
pub(super) fn save(qmp: &mut Qmp<'_>, memory: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let file = File::options().write(true).open(memory);
    let file = file.map_err(|e| Error::io(format!("open {}", memory.display()), e))?;
    prepare(qmp)?;
    qmp.execute(
        "migrate-set-parameters",
        &json!({ "max-bandwidth": BANDWIDTH_MAX }),
    )?;
    qmp.give(NAME, file.as_fd())?;
    qmp.execute("migrate", &json!({ "uri": format!("fd:{NAME}") }))?;
    until_migrated(qmp).map_err(|e| {
        if e.kind() == Kind::VmmFailed && has_no_room(&file) {
            full(e)
        } else {
            e
        }
    })
}

/// True if the file system is full. QMP reports the reason of a failed migration only as text for
/// people, so this function checks the file system instead. QEMU does not run as root, so blocks
/// that are reserved for root do not count.
fn has_no_room(file: &File) -> bool {
    rustix::fs::fstatvfs(file).is_ok_and(|s| s.f_bavail.saturating_mul(s.f_frsize) < FULL_BYTES)
}

fn full(e: Error) -> Error {
    e.with_kind(Kind::DiskFull)
        .hint("free some space (df -h), then try again")
}

/// Returns the VMM's version, for example `7.2.22`.
pub(super) fn version(qmp: &mut Qmp<'_>) -> Result<String> {
    let answer = qmp.execute("query-version", &json!({}))?;
    let number = |name: &str| answer["qemu"][name].as_u64();
    match (number("major"), number("minor"), number("micro")) {
        (Some(major), Some(minor), Some(micro)) => Ok(format!("{major}.{minor}.{micro}")),
        _ => Err(Error::new(
            Kind::VmmFailed,
            "ask the VMM for its version: the answer is not as documented",
        )),
    }
}

/// Cancels a migration that a cancelled save or a killed daemon has left running. Otherwise the
/// migration would stop the guest when it completes, even much later. Succeeds if no migration is
/// running.
pub(super) fn cancel_migration(qmp: &mut Qmp<'_>) -> Result<()> {
    let mut is_cancelling = false;
    loop {
        let answer = qmp.execute("query-migrate", &json!({}))?;
        match answer.get("status").and_then(Value::as_str) {
            None | Some("none" | "completed" | "failed" | "cancelled") => return Ok(()),
            Some(_) if !is_cancelling => {
                qmp.execute("migrate_cancel", &json!({}))?;
                is_cancelling = true;
            }
            Some(_) => qmp.event()?,
        }
    }
}

/// Loads a guest into a VMM that was started for it. The guest is paused afterwards.
pub(super) fn load(qmp: &mut Qmp<'_>, memory: &Path) -> Result<()> {
    let file = crate::host::fs::open_nofollow(memory)?;
    prepare(qmp)?;
    qmp.give(NAME, file.as_fd())?;
    qmp.execute("migrate-incoming", &json!({ "uri": format!("fd:{NAME}") }))?;
    until_migrated(qmp)
}

/// Makes QEMU send an event for each step of a migration.
fn prepare(qmp: &mut Qmp<'_>) -> Result<()> {
    let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
    qmp.execute("migrate-set-capabilities", &events).map(drop)
}

fn until_migrated(qmp: &mut Qmp<'_>) -> Result<()> {
    loop {
        let answer = qmp.execute("query-migrate", &json!({}))?;
        match answer.get("status").and_then(Value::as_str) {
            Some("completed") => return Ok(()),
            Some(status @ ("failed" | "cancelled")) => {
                let why = answer
                    .get("error-desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason given");
                let why: String = why.chars().take(512).collect();
                return Err(failed(status, &crate::host::text::printable(&why)));
            }
            _ => qmp.event()?,
        }
    }
}

fn failed(status: &str, why: &str) -> Error {
    Error::new(
        Kind::VmmFailed,
        format!("move the guest's memory: {status}: {why}"),
    )
}

/// Checks that a guest is restored on the same platform on which it was saved.
pub(super) fn require_same(then: &str, now: &str) -> Result<()> {
    if then == now {
        return Ok(());
    }
    Err(Error::new(
        Kind::Unsupported,
        format!("restore a saved guest: it was saved on {then}, but VMs now run on {now}"),
    )
    .hint(
        "set driver under [vmm], and accel and machine under [qemu], back to their former values",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::qemu::scripted::{GREETING, talk};

    /// A script in which the event of the last step overtakes the answer to the first query.
    fn overtaking(last: &str) -> String {
        let status = |s: &str| format!("{{\"return\": {{\"status\": \"{s}\"}}}}\n");
        let event = format!("{{\"event\": \"MIGRATION\", \"data\": {{\"status\": \"{last}\"}}}}\n");
        let done = "{\"return\": {}}\n";
        format!(
            "{GREETING}{done}{event}{}{}",
            status("active"),
            status(last)
        )
    }

    #[test]
    fn event_that_overtakes_an_answer_ends_the_wait_for_a_migration() {
        let waited = |last| {
            let (waited, _) = talk(&overtaking(last), 200, |qmp, _| {
                until_migrated(&mut qmp.unwrap())
            });
            waited.map_err(|e| e.kind())
        };
        assert_eq!(waited("completed"), Ok(()));
        assert_eq!(waited("failed"), Err(Kind::VmmFailed));
    }

    #[test]
    fn event_that_overtakes_an_answer_ends_the_wait_for_a_cancelled_migration() {
        let done = "{\"return\": {}}\n";
        let query = "{\"return\": {\"status\": \"cancelling\"}}\n";
        let event = "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"cancelled\"}}\n";
        let last = "{\"return\": {\"status\": \"cancelled\"}}\n";
        let script = format!("{GREETING}{done}{query}{done}{event}{query}{last}");
        let (waited, _) = talk(&script, 200, |qmp, _| cancel_migration(&mut qmp.unwrap()));
        waited.unwrap();
    }
}
