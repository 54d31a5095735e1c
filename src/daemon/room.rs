//! Room for what guests write on disks that are device-mapper snapshots: those are lost when the
//! host runs out of it, so it is allocated ahead, and a guest for which there is none is paused
//! before it can write on.

use super::controls::Controls;
use super::core::Core;
use super::runtime::Runtimes;
use super::spec::Specs;
use crate::api::vm::VmState;
use crate::disk::Method;
use crate::disk::snapshot::{self, Fill};
use crate::error::Kind;
use crate::host::Commands;
use crate::store::{Ticket, VmRow};
use crate::vmm::Driver;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// Between two looks. A guest that writes more than [`snapshot::AHEAD_BYTES`] in this time may
/// outrun it.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// The same while no VM has such a disk.
const IDLE_PERIOD: Duration = Duration::from_secs(2);

/// What was found at the last look, by the VMs' tags.
#[derive(Default)]
struct Seen {
    /// Guests that this daemon has let go on once: an earlier one may have paused them.
    met: HashSet<String>,
    /// Guests that stand still for want of room.
    paused: HashSet<String>,
    lost: HashSet<String>,
}

/// Keeps room on the host for guests on device-mapper snapshots.
#[derive(Clone)]
pub struct SpaceMonitor {
    pub(super) core: Core,
    pub(super) specs: Specs,
    pub(super) controls: Controls,
    pub(super) runtimes: Runtimes,
    pub(super) commands: Arc<dyn Commands>,
    pub(super) vmm: Arc<dyn Driver>,
}

impl SpaceMonitor {
    /// Until the daemon closes.
    pub fn run(&self) {
        let mut seen = Seen::default();
        loop {
            let rows = self.rows_on_snapshots();
            if !rows.is_empty() {
                self.look_at_snapshots(&rows, &mut seen);
            }
            if self.core.sleep(if rows.is_empty() { IDLE_PERIOD } else { LOOK_PERIOD }) {
                return;
            }
        }
    }

    fn rows_on_snapshots(&self) -> Vec<VmRow> {
        self.core.store.read(|s| {
            let on_snapshot = |r: &VmRow| r.disk_driver.as_deref() == Some(Method::DmSnapshot.name());
            let runs = |r: &VmRow| matches!(r.state, VmState::Running | VmState::Starting | VmState::Stopping);
            s.vms().filter(|r| runs(r) && on_snapshot(r)).map(|r| (**r).clone()).collect()
        })
    }

    fn look_at_snapshots(&self, rows: &[VmRow], seen: &mut Seen) {
        let fills = match snapshot::fill(self.commands.as_ref(), &self.core.tag_prefix(), &self.core.closing) {
            Ok(fills) => fills,
            Err(e) if self.core.closing.is_cancelled() => return log::debug!("{e}"),
            Err(e) => return log::warn!("look how full the disks are: {e}"),
        };
        let tags: HashSet<String> = rows.iter().map(|row| self.core.tag(row)).collect();
        for set in [&mut seen.met, &mut seen.paused, &mut seen.lost] {
            set.retain(|tag| tags.contains(tag));
        }
        for row in rows {
            match fills.iter().find(|(name, _)| *name == self.core.tag(row)) {
                Some((tag, Fill::Used { bytes })) => self.make_room(row, tag, *bytes, seen),
                Some((tag, Fill::Lost(why))) if seen.lost.insert(tag.clone()) => self.note_lost(row, why),
                _ => {}
            }
        }
    }

    fn make_room(&self, row: &VmRow, tag: &str, used_bytes: u64, seen: &mut Seen) {
        let reserved = snapshot::reserve(&self.specs.disk_path(&row.id, Method::DmSnapshot), used_bytes);
        let Some(identity) = &row.identity else { return };
        let is_paused = seen.paused.contains(tag);
        let set = |to| self.vmm.set_paused(&self.core.vm_dir(&row.id), identity, to, &self.core.closing);
        match reserved {
            Err(e) if !is_paused && e.kind() == Kind::DiskFull => {
                // First said, then done: whoever resumes it for its owner looks at what is said.
                self.runtimes.set_paused(&row.id, true);
                match set(true) {
                    Ok(()) => {
                        log::warn!("vm {} is paused until the host has room: {e}", row.name);
                        seen.paused.insert(tag.to_owned());
                    }
                    Err(k) => {
                        self.runtimes.set_paused(&row.id, false);
                        log::error!("vm {} may lose its disk: {e}; it could not be paused: {k}", row.name);
                    }
                }
            }
            Err(e) if !is_paused => log::warn!("vm {}: {e}", row.name),
            // Not in a boot: the driver says when a guest begins.
            Ok(()) if row.state == VmState::Running && (is_paused || !seen.met.contains(tag)) => {
                self.runtimes.set_paused(&row.id, false);
                // Unless its owner wants it to stand still.
                match self.controls.apply_pause(&row.id, row.generation) {
                    Ok(()) => {
                        seen.met.insert(tag.to_owned());
                        if seen.paused.remove(tag) {
                            log::info!("vm {} goes on: the host has room", row.name);
                        }
                    }
                    Err(e) => {
                        self.runtimes.set_paused(&row.id, is_paused);
                        log::warn!("let vm {} go on: {e}", row.name);
                    }
                }
            }
            _ => {}
        }
    }

    /// Its guest sees errors from now on; nothing brings the changes back.
    fn note_lost(&self, row: &VmRow, why: &str) {
        let reason = format!("its disk is lost: the host had no room for the guest's changes ({why})");
        log::error!("vm {}: {reason}", row.name);
        let noted = self.core.change_row(&row.id, true, |r| r.reason = Some(reason));
        if let Err(e) = noted.map(Ticket::detach) {
            log::warn!("write that down: {e}");
        }
    }
}
