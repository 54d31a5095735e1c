//! Saving a guest and letting it go on: QEMU's migration to a file and from it (docs/devel/migration.rst, 7.2). QEMU may open nothing by
//! itself, so it is given the file.

use super::qmp::Qmp;
use crate::error::{Error, Kind, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

/// For a guest's memory to go to the disk, or to come from there.
pub const DEADLINE: Duration = Duration::from_secs(600);
/// The file's name in QMP.
const NAME: &str = "saved";
/// QEMU's own bound is meant for a network. In bytes per second.
const BANDWIDTH_MAX: u64 = 1 << 40;
/// A file system with less than this is full: a write of QEMU's is at most 32 KiB
/// (migration/qemu-file.c), and others write at the same time.
const FULL_BYTES: u64 = 1 << 20;

/// The guest must stand still; its disks are flushed, and its own again when it goes on.
pub fn save(qmp: &mut Qmp<'_>, memory: &Path) -> Result<()> {
    let file = File::options().write(true).open(memory);
    let file = file.map_err(|e| Error::io(format!("open {}", memory.display()), e))?;
    prepare(qmp)?;
    qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": BANDWIDTH_MAX }))?;
    qmp.give(NAME, file.as_fd())?;
    qmp.execute("migrate", &json!({ "uri": format!("fd:{NAME}") }))?;
    until_migrated(qmp).map_err(|e| if e.kind() == Kind::VmmFailed && has_no_room(&file) { full(e) } else { e })
}

/// QMP gives a migration's failure as text for people only, so the file system is asked. QEMU does
/// not run as root, so the blocks that are kept for root do not count.
fn has_no_room(file: &File) -> bool {
    rustix::fs::fstatvfs(file).is_ok_and(|s| s.f_bavail.saturating_mul(s.f_frsize) < FULL_BYTES)
}

fn full(e: Error) -> Error {
    e.with_kind(Kind::DiskFull).hint("free some space (df -h), then try again")
}

/// `7.2.22`.
pub fn version(qmp: &mut Qmp<'_>) -> Result<String> {
    let answer = qmp.execute("query-version", &json!({}))?;
    let number = |name: &str| answer["qemu"][name].as_u64();
    match (number("major"), number("minor"), number("micro")) {
        (Some(major), Some(minor), Some(micro)) => Ok(format!("{major}.{minor}.{micro}")),
        _ => Err(Error::new(Kind::VmmFailed, "ask the VMM for its version: the answer is not as documented")),
    }
}

/// Ends what a cancelled save, or a daemon that died in one, left under way: it would stop the guest when it is done, however long after. Nothing
/// under way is ok.
pub fn give_up(qmp: &mut Qmp<'_>) -> Result<()> {
    let mut is_told = false;
    loop {
        let answer = qmp.execute("query-migrate", &json!({}))?;
        match answer.get("status").and_then(Value::as_str) {
            None | Some("none" | "completed" | "failed" | "cancelled") => return Ok(()),
            Some(_) if !is_told => {
                qmp.execute("migrate_cancel", &json!({}))?;
                is_told = true;
            }
            Some(_) => qmp.event()?,
        }
    }
}

/// Into a VMM that waits for it; the guest stands still then.
pub fn load(qmp: &mut Qmp<'_>, memory: &Path) -> Result<()> {
    let file = crate::host::fs::open_nofollow(memory)?;
    prepare(qmp)?;
    qmp.give(NAME, file.as_fd())?;
    qmp.execute("migrate-incoming", &json!({ "uri": format!("fd:{NAME}") }))?;
    until_migrated(qmp)
}

/// It tells of each step.
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
                let why = answer.get("error-desc").and_then(Value::as_str).unwrap_or("it does not say why");
                let why: String = why.chars().take(512).collect();
                return Err(failed(status, &crate::host::command::printable(&why)));
            }
            // What was told before the answer is in the answer.
            _ => qmp.event()?,
        }
    }
}

fn failed(status: &str, why: &str) -> Error {
    Error::new(Kind::VmmFailed, format!("move the guest's memory: {status}: {why}"))
}

/// A saved guest goes on only on what it was saved on.
pub fn require_same(then: &str, now: &str) -> Result<()> {
    if then == now {
        return Ok(());
    }
    Err(Error::new(Kind::Unsupported, format!("let a saved guest go on: it was saved on {then}, and VMs run on {now} now"))
        .hint("set driver under [vmm], and accel and machine under [qemu], as they were"))
}
