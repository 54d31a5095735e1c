//! Pauses and resumes a guest at the request of its owner.

use super::monitor::PAUSED_BY_FULL_DISK;
use super::qmp::Qmp;
use super::save;
use crate::error::Result;
use serde_json::json;

pub(super) fn pause(qmp: &mut Qmp<'_>) -> Result<()> {
    qmp.execute("stop", &json!({})).map(drop)
}

/// Resumes the guest, unless QEMU has paused it because the host's disk is full. The monitor
/// resumes such a guest when space is free. Before that, its next write would only fail again.
pub(super) fn resume(qmp: &mut Qmp<'_>) -> Result<()> {
    save::cancel_migration(qmp)?;
    let status = qmp.execute("query-status", &json!({}))?;
    if status["status"] == PAUSED_BY_FULL_DISK {
        return Ok(());
    }
    qmp.execute("cont", &json!({})).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::qemu::scripted::{GREETING, talk};

    /// Resumes a guest with this status and returns the commands that were sent to QEMU.
    fn commands(status: &str) -> Vec<String> {
        let done = "{\"return\": {}}\n";
        let script =
            format!("{GREETING}{done}{done}{{\"return\": {{\"status\": \"{status}\"}}}}\n{done}");
        let (resumed, asked) = talk(&script, 10_000, |qmp, _| resume(&mut qmp.unwrap()));
        resumed.unwrap();
        let command = |line: &str| -> serde_json::Value { serde_json::from_str(line).unwrap() };
        asked
            .lines()
            .map(|line| command(line)["execute"].as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn resume_skips_guest_paused_by_full_disk() {
        let asked = ["qmp_capabilities", "query-migrate", "query-status"];
        assert_eq!(commands("io-error"), asked);
        for status in ["paused", "running", "postmigrate"] {
            let with_cont: Vec<_> = asked.into_iter().chain(["cont"]).collect();
            assert_eq!(commands(status), with_cont, "{status}");
        }
    }
}
