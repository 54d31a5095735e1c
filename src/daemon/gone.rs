//! Installations that are gone, and what they have left on the host: control groups without
//! processes, a bridge without ports, taps without a VMM, tables of rules. Each carries its
//! installation's id in its name.
//!
//! An installation is gone when no daemon has its claim, none of its VMs runs, and its state
//! directory is not there or has become another installation's. A directory that is not there may
//! be on a disk that is not mounted. That does no harm: nothing of it runs, what is removed holds
//! no data, and a daemon that starts makes all of it again, as it does after a reboot.

use super::leak::leak;
use crate::api::daemon::Leak;
use crate::error::{Kind, Result};
use crate::host::Commands;
use crate::net;
use crate::vmm::firecracker;
use std::path::PathBuf;
use std::sync::Arc;

/// One that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoneInstallation {
    pub install_id: String,
    /// Where its state was.
    pub state_dir: PathBuf,
    /// It may have had a bridge in this network namespace.
    pub has_network: bool,
}

/// Whoever knows the installations of this host.
pub trait Installations: Send + Sync {
    /// The daemon's own has this id. Another one that had its state directory before is gone.
    fn set_own(&self, install_id: &str) -> Result<()>;

    /// Shows each one that is gone, which cannot come back meanwhile. One of which nothing is left
    /// is forgotten: `visit` says whether that is so.
    fn visit_gone(&self, visit: &mut dyn FnMut(&GoneInstallation) -> bool) -> Result<()>;
}

/// What installations that are gone have left; with `fix` it is removed.
pub(super) fn sweep(installations: &dyn Installations, commands: &Arc<dyn Commands>, fix: bool) -> Vec<Leak> {
    let mut leaks = Vec::new();
    let visited = installations.visit_gone(&mut |gone| {
        let before = leaks.len();
        sweep_groups(gone, fix, &mut leaks);
        let is_all = sweep_network(gone, commands, fix, &mut leaks).unwrap_or_else(|e| {
            log::warn!("look for what the installation in {} has left: {e}", gone.state_dir.display());
            false
        });
        is_all && leaks[before..].iter().all(|leak| leak.removed)
    });
    if let Err(e) = visited {
        log::warn!("look for installations that are gone: {e}");
    }
    leaks
}

fn sweep_groups(gone: &GoneInstallation, fix: bool, leaks: &mut Vec<Leak>) {
    if let Some(group) = firecracker::empty_group(&gone.install_id) {
        let removed = fix.then(|| firecracker::remove_group(&group));
        leaks.push(leak_of(gone, "control_group", &group.display().to_string(), removed.as_ref()));
    }
}

/// False when somebody uses it.
fn sweep_network(gone: &GoneInstallation, commands: &Arc<dyn Commands>, fix: bool, leaks: &mut Vec<Leak>) -> Result<bool> {
    if !gone.has_network {
        return Ok(true);
    }
    let left = match net::gone::look(&gone.install_id, commands) {
        // It had no bridge, which needs these tools, too.
        Err(e) if e.kind() == Kind::CommandMissing => return Ok(true),
        found => found?,
    };
    let found = [("tap", &left.taps), ("bridge", &left.bridges), ("table", &left.tables)];
    let found: Vec<_> = found.into_iter().flat_map(|(kind, names)| names.iter().map(move |name| (kind, name))).collect();
    let removed = (fix && !found.is_empty()).then(|| net::gone::remove(&left, commands));
    leaks.extend(found.into_iter().map(|(kind, name)| leak_of(gone, kind, name, removed.as_ref())));
    Ok(!left.is_in_use)
}

fn leak_of(gone: &GoneInstallation, kind: &str, name: &str, removed: Option<&Result<()>>) -> Leak {
    let why = format!("installation {} is gone, whose state directory was {}", gone.install_id, gone.state_dir.display());
    leak(kind, name, &why, removed)
}
