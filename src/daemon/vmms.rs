//! The VMM processes of VMs: finds them again, distinguishes them from other processes, and kills
//! them.

use super::core::Core;
use super::spec::Specs;
use super::unreconciled::EarlierVmms;
use super::vm_dir::DISK_FILE;
use crate::disk::{self, Method};
use crate::error::Result;
use crate::ids::Tag;
use crate::locks::Mutex;
use crate::sched::Instant;
use crate::store::VmRow;
use crate::vmm::{Driver, End, Identity, Vm, VmRef, end_from_files};
use std::sync::Arc;
use std::time::Duration;

/// How long a killed VMM may take to exit. The kernel frees its memory first.
const KILL_DEADLINE: Duration = Duration::from_secs(60);

/// Finds and kills VMM processes.
#[derive(Clone)]
pub(super) struct Vmms {
    pub(super) core: Core,
    pub(super) specs: Specs,
    pub(super) vmm: Arc<dyn Driver>,
    /// The VMMs of earlier daemons, until every VM has been reconciled.
    pub(super) earlier_vmms: Arc<Mutex<Option<Arc<EarlierVmms>>>>,
}

impl Vmms {
    /// Kills every VMM of this VM, whichever boot started it.
    pub(super) fn kill_earlier(&self, row: &VmRow) -> Result<()> {
        let all = self
            .vmm
            .processes()
            .list(&Tag::prefix_of_vm(self.core.store.install_id(), &row.id))?;
        all.iter().try_for_each(|vmm| self.kill_vmm(&vmm.identity))
    }

    /// Returns the VM's live VMM process: the process in the row, or else a process that carries
    /// the tag of the VM's current boot. Returns `None` if there is none, or if the processes could
    /// not be searched.
    pub(super) fn identity(&self, row: &VmRow) -> Option<Identity> {
        let known = row.identity.clone();
        if let Some(identity) = known
            && (self.runs_as_it(row, &identity)
                || self
                    .vmm
                    .processes()
                    .is_ours(&identity, self.core.tag(row).as_str())
                    && self.has_its_uid(row, &identity))
        {
            return Some(identity);
        }
        let found = self
            .find_vmm(self.core.tag(row).as_str())
            .unwrap_or_else(|e| {
                log::warn!("look for the VMM of VM {}: {e}", row.name);
                None
            });
        found.filter(|identity| self.has_its_uid(row, identity))
    }

    /// True if the process in the row is alive and runs under the VM's own uid. The uid also
    /// identifies a compromised VMM that has overwritten its arguments.
    fn runs_as_it(&self, row: &VmRow, identity: &Identity) -> bool {
        let its = self.specs.credentials(row).map(|its| its.uid);
        its.is_some()
            && its == crate::host::process::uid(identity.pid)
            && self.vmm.processes().is_alive(identity)
    }

    /// False if the process runs under a uid that the VM's VMM cannot have. A compromised VMM can
    /// copy another VM's arguments, but not its uid. Root is allowed because a jailer starts as
    /// root.
    fn has_its_uid(&self, row: &VmRow, identity: &Identity) -> bool {
        let its = self.specs.credentials(row).map(|its| its.uid);
        its.is_none_or(|its| {
            crate::host::process::uid(identity.pid).is_none_or(|uid| uid == its || uid == 0)
        })
    }

    /// Returns the handle of the VM that runs in this process.
    pub(super) fn vm(&self, row: &VmRow, identity: &Identity) -> Result<Box<dyn Vm + '_>> {
        self.vmm.vm(VmRef {
            dir: self.core.vm_dir(&row.id),
            identity: identity.clone(),
            mem_mib: row.shape.mem_mib,
        })
    }

    /// Kills the VMM and waits until it has exited.
    pub(super) fn kill_vmm(&self, identity: &Identity) -> Result<()> {
        self.vmm
            .processes()
            .kill(identity, Instant::now() + KILL_DEADLINE)
    }

    /// Finds the VMM with this tag. During reconciliation, one scan of all processes serves every
    /// VMM of an earlier daemon.
    pub(super) fn find_vmm(&self, tag: &str) -> Result<Option<Identity>> {
        let earlier = self.earlier_vmms.lock().clone();
        if earlier.is_some_and(|earlier| {
            earlier.is_gone(tag, || self.vmm.processes().list(&self.core.tag_prefix()))
        }) {
            return Ok(None);
        }
        self.vmm.processes().find(tag)
    }

    /// Returns how a guest ended while no daemon watched it, if the console, the VMM's log or the
    /// root disk shows the cause.
    pub(super) fn unseen_end(&self, row: &VmRow) -> Option<End> {
        let dir = self.core.vm_dir(&row.id);
        let end = end_from_files(&dir);
        if end
            .as_ref()
            .is_some_and(|end| *end != End::GuestResetUnrecorded)
        {
            return end;
        }
        // A guest that reboots cleanly is reset as well. Its disk shows whether it did so.
        let Some(method) = row.disk_driver.as_deref().and_then(Method::from_name) else {
            return end;
        };
        match disk::is_unmounted(&dir.join(DISK_FILE), method) {
            Ok(true) => Some(End::GuestUnmounted),
            Ok(false) => end,
            Err(e) => {
                log::warn!("find out how VM {} ended: {e}", row.name);
                end
            }
        }
    }
}
