//! Removes what installations that no longer exist have left on the host: control groups without
//! processes, a bridge without ports, taps without a VMM, tables of rules. The name of each
//! contains the ID of its installation.
//!
//! An installation is gone if no daemon has claimed it, none of its VMs runs, and its state
//! directory is missing or belongs to another installation. A missing directory may be on a disk
//! that is not mounted. Removal is harmless even then: nothing of the installation runs, the
//! removed objects hold no data, and its daemon recreates them at its next start, as after a
//! reboot.

use super::leak::leak;
use crate::api::daemon::Leak;
use crate::error::{Kind, Result};
use crate::host::Commands;
use crate::net;
use crate::vmm::firecracker;
use std::path::PathBuf;
use std::sync::Arc;

/// An installation that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoneInstallation {
    pub install_id: String,
    /// The installation's former state directory.
    pub state_dir: PathBuf,
    /// True if the installation may have had a bridge in this network namespace.
    pub has_network: bool,
}

/// Records the installations of this host and finds those that are gone.
pub trait Installations: Send + Sync {
    /// Sets the ID of the daemon's own installation. Another installation that had the same state
    /// directory is then gone.
    fn set_own(&self, install_id: &str) -> Result<()>;

    /// Calls `visit` with each installation that is gone. The installation cannot start again
    /// during the visit. If `visit` returns true, nothing is left of the installation, and it is
    /// forgotten.
    fn visit_gone(&self, visit: &mut dyn FnMut(&GoneInstallation) -> bool) -> Result<()>;
}

/// Finds the leftovers of installations that are gone. Removes them if `fix` is set.
pub(super) fn sweep(
    installations: &dyn Installations,
    commands: &Arc<dyn Commands>,
    fix: bool,
) -> Vec<Leak> {
    let mut leaks = Vec::new();
    let visited = installations.visit_gone(&mut |gone| {
        let before = leaks.len();
        sweep_groups(gone, fix, &mut leaks);
        let is_complete = sweep_network(gone, commands, fix, &mut leaks).unwrap_or_else(|e| {
            log::warn!(
                "look for leftovers of the installation in {}: {e}",
                gone.state_dir.display()
            );
            false
        });
        is_complete && leaks[before..].iter().all(|leak| leak.removed)
    });
    if let Err(e) = visited {
        log::warn!("look for installations that are gone: {e}");
    }
    leaks
}

fn sweep_groups(gone: &GoneInstallation, fix: bool, leaks: &mut Vec<Leak>) {
    if let Some(group) = firecracker::empty_group(&gone.install_id) {
        let removed = fix.then(|| firecracker::remove_group(&group));
        leaks.push(leak_of(
            gone,
            "control_group",
            &group.display().to_string(),
            removed.as_ref(),
        ));
    }
}

/// Finds what an installation that is gone has left on the network, and removes it if `fix` is set.
/// Returns false if the network is in use.
fn sweep_network(
    gone: &GoneInstallation,
    commands: &Arc<dyn Commands>,
    fix: bool,
    leaks: &mut Vec<Leak>,
) -> Result<bool> {
    if !gone.has_network {
        return Ok(true);
    }
    let left = match net::gone::look(&gone.install_id, commands) {
        // A bridge needs the same tools, so the installation had no bridge.
        Err(e) if e.kind() == Kind::CommandMissing => return Ok(true),
        found => found?,
    };
    let found = [
        ("tap", &left.taps),
        ("bridge", &left.bridges),
        ("table", &left.tables),
    ];
    let found: Vec<_> = found
        .into_iter()
        .flat_map(|(kind, names)| names.iter().map(move |name| (kind, name)))
        .collect();
    let removed = (fix && !found.is_empty()).then(|| net::gone::remove(&left, commands));
    leaks.extend(
        found
            .into_iter()
            .map(|(kind, name)| leak_of(gone, kind, name, removed.as_ref())),
    );
    Ok(!left.is_in_use)
}

fn leak_of(gone: &GoneInstallation, kind: &str, name: &str, removed: Option<&Result<()>>) -> Leak {
    let why = format!(
        "installation {} is gone (its state directory was {})",
        gone.install_id,
        gone.state_dir.display()
    );
    leak(kind, name, &why, removed)
}
