//! Allocates space on the host for what guests write to disks that are device-mapper snapshots.
//! Such a disk is lost if the host runs out of space. So space is allocated ahead. If there is no
//! space, the guest is paused before it can write more.

use super::controls::Controls;
use super::core::Core;
use super::runtime::Runtimes;
use super::spec::Specs;
use super::vmms::Vmms;
use crate::api::vm::VmState;
use crate::disk::Method;
use crate::disk::snapshot::{self, Fill};
use crate::error::Kind;
use crate::host::Commands;
use crate::sched::HashSet;
use crate::store::{Ticket, VmRow};
use std::sync::Arc;
use std::time::Duration;

/// How long to pause between two checks. A guest that writes more than [`snapshot::AHEAD_BYTES`] in
/// this time may use up its space.
const CHECK_PERIOD: Duration = Duration::from_millis(500);
/// How long to pause between two checks while no running VM has a disk that is a device-mapper
/// snapshot.
const IDLE_PERIOD: Duration = Duration::from_secs(2);

/// The tags of the VMs that the monitor has resumed or paused, or whose disks are lost.
#[derive(Default)]
struct Monitored {
    /// Guests that this daemon has resumed once, because an earlier daemon may have paused them.
    resumed: HashSet<String>,
    /// Guests that are paused because the host has no room.
    paused: HashSet<String>,
    lost: HashSet<String>,
}

/// Keeps space allocated for guests on device-mapper snapshots, and pauses them if there is none.
#[derive(Clone)]
pub struct SpaceMonitor {
    pub(super) core: Core,
    pub(super) specs: Specs,
    pub(super) controls: Controls,
    pub(super) runtimes: Runtimes,
    pub(super) commands: Arc<dyn Commands>,
    pub(super) vmms: Vmms,
}

impl SpaceMonitor {
    /// Runs until the daemon closes.
    pub fn run(&self) {
        let mut monitored = Monitored::default();
        loop {
            let rows = self.rows_on_snapshots();
            if !rows.is_empty() {
                self.check_snapshots(&rows, &mut monitored);
            }
            if self.core.sleep(if rows.is_empty() {
                IDLE_PERIOD
            } else {
                CHECK_PERIOD
            }) {
                return;
            }
        }
    }

    fn rows_on_snapshots(&self) -> Vec<VmRow> {
        self.core.store.read(|s| {
            let on_snapshot =
                |r: &VmRow| r.disk_driver.as_deref() == Some(Method::DmSnapshot.name());
            let runs = |r: &VmRow| {
                matches!(
                    r.state,
                    VmState::Running | VmState::Starting | VmState::Stopping
                )
            };
            s.vms()
                .filter(|r| runs(r) && on_snapshot(r))
                .map(|r| (**r).clone())
                .collect()
        })
    }

    fn check_snapshots(&self, rows: &[VmRow], monitored: &mut Monitored) {
        let fills = match snapshot::fill(
            self.commands.as_ref(),
            &self.core.tag_prefix(),
            &self.core.closing,
        ) {
            Ok(fills) => fills,
            Err(e) if self.core.closing.is_cancelled() => return log::debug!("{e}"),
            Err(e) => return log::warn!("check how full the disks are: {e}"),
        };
        let tags: HashSet<String> = rows
            .iter()
            .map(|row| self.core.tag(row).to_string())
            .collect();
        for set in [
            &mut monitored.resumed,
            &mut monitored.paused,
            &mut monitored.lost,
        ] {
            set.retain(|tag| tags.contains(tag));
        }
        for row in rows {
            match fills
                .iter()
                .find(|(name, _)| name == self.core.tag(row).as_str())
            {
                Some((tag, Fill::Used { bytes })) => self.make_room(row, tag, *bytes, monitored),
                Some((tag, Fill::Lost(why))) if monitored.lost.insert(tag.clone()) => {
                    self.note_lost(row, why)
                }
                _ => {}
            }
        }
    }

    fn make_room(&self, row: &VmRow, tag: &str, used_bytes: u64, monitored: &mut Monitored) {
        let reserved = snapshot::reserve(
            &self.specs.disk_path(&row.id, Method::DmSnapshot),
            used_bytes,
        );
        let Some(identity) = &row.identity else {
            return;
        };
        let is_paused = monitored.paused.contains(tag);
        match reserved {
            Err(e) if !is_paused && e.kind() == Kind::DiskFull => {
                // Record the pause first. A resume by the owner then sees it and leaves the guest
                // paused.
                self.runtimes.set_paused(&row.id, true);
                let paused = self
                    .vmms
                    .vm(row, identity)
                    .and_then(|vm| vm.pause(&self.core.closing));
                match paused {
                    Ok(()) => {
                        log::warn!("VM {} is paused until the host has room: {e}", row.name);
                        monitored.paused.insert(tag.to_owned());
                    }
                    Err(k) => {
                        self.runtimes.set_paused(&row.id, false);
                        log::error!(
                            "VM {} may lose its disk: {e}; it could not be paused: {k}",
                            row.name
                        );
                    }
                }
            }
            Err(e) if !is_paused => log::warn!("VM {}: {e}", row.name),
            // During a boot, the driver decides when the guest runs.
            Ok(())
                if row.state == VmState::Running
                    && (is_paused || !monitored.resumed.contains(tag)) =>
            {
                self.runtimes.set_paused(&row.id, false);
                // The guest stays paused if its owner has paused it.
                match self.controls.apply_pause(&row.id, row.generation) {
                    Ok(()) => {
                        monitored.resumed.insert(tag.to_owned());
                        if monitored.paused.remove(tag) {
                            log::info!("VM {} resumes, because the host has room", row.name);
                        }
                    }
                    Err(e) => {
                        self.runtimes.set_paused(&row.id, is_paused);
                        log::warn!("resume VM {}: {e}", row.name);
                    }
                }
            }
            _ => {}
        }
    }

    /// Records that the disk is lost. The guest gets I/O errors from now on, and its changes cannot
    /// be recovered.
    fn note_lost(&self, row: &VmRow, why: &str) {
        let reason =
            format!("its disk is lost: the host had no room for the guest's changes ({why})");
        log::error!("VM {}: {reason}", row.name);
        let noted = self
            .core
            .change_row(&row.id, true, |r| r.reason = Some(reason));
        if let Err(e) = noted.map(Ticket::detach) {
            log::warn!("record that the disk of VM {} is lost: {e}", row.name);
        }
    }
}
