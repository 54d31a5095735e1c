//! The steps of a boot, and the resources that VMs have on the host.
//!
//! A [`BootStep`] is something that a boot does. A boot runs all of [`STEPS`] in order.
//!
//! A [`Resource`] is a kind of thing that is in the ledger while it may exist on the host. The
//! trait names the resource that a boot needs, releases it, and finds it again. A step that
//! acquires a resource is in the same file. Steps that acquire nothing are in `steps/`.
//!
//! The claim of a start writes everything that the boot is about to acquire into the ledger, in the
//! claim's own transaction. A boot that fails releases its resources in the reverse order of
//! [`ALL`]. Each ledger row is deleted once its resource is gone. So whenever a daemon is killed,
//! the next one can read what to look for.

mod boot_step;
mod directory;
mod disk_device;
pub(super) mod former_disks;
mod jail;
mod ports;
mod process;
pub(super) mod snapshot;
mod steps;
mod tap;

pub(super) use boot_step::Boot;
pub(super) use ports::intend_forwards;

use super::core::Core;
use super::network::Networks;
use super::recovery;
use super::snapshot_registry::SnapshotRegistry;
use super::spec::Specs;
use super::vmms::Vmms;
use crate::api::daemon::{Check, Leak};
use crate::api::vm::VmState;
use crate::config::{self, SyncedFile, VmmDriver};
use crate::daemon::gone::Installations;
use crate::daemon::host_view::HostView;
use crate::daemon::leak::leak;
use crate::error::{Error, Result};
use crate::host::Commands;
use crate::ids::{SnapshotId, VmId};
use crate::sched::HashSet;
use crate::store::{LedgerRow, State, Tx, VmRow};
use crate::vmm::Driver;
use boot_step::BootStep;
use std::path::Path;
use std::sync::Arc;

/// All steps of a boot, in order.
const STEPS: [&dyn BootStep; 10] = [
    &directory::Directory,
    &steps::restored_disks::RestoredDisks,
    &steps::root_disk::RootDisk,
    &disk_device::DiskDevice,
    &steps::work_disk::WorkDisk,
    &steps::synced_files::SyncedFiles,
    &steps::seed::Seed,
    &tap::Tap,
    &ports::Ports,
    &process::VmmProcess,
];

/// All kinds of resources. Each may use those before it, so they are released in the reverse order.
const ALL: [&dyn Resource; 9] = [
    &directory::Directory,
    &former_disks::FormerDisks,
    &former_disks::ReplacedDisks,
    &snapshot::Snapshot,
    &disk_device::DiskDevice,
    &tap::Tap,
    &ports::Ports,
    &jail::Jail,
    &process::VmmProcess,
];

/// How long a VM has a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Span {
    /// The VM has the resource only while a start is in progress.
    Start,
    /// The VM has the resource from a start until the VMM has exited.
    Boot,
    /// The VM has the resource from the first start until the VM is deleted.
    Life,
}

/// One kind of resource.
pub(super) trait Resource: Send + Sync {
    /// Returns the name of this kind in the ledger. Never change the name of a kind.
    fn kind(&self) -> &'static str;

    fn span(&self) -> Span;

    /// Returns the name of the resource that a boot of `row` acquires. The name identifies the
    /// resource on the host. Returns `None` if the boot does not need this kind, or if another
    /// operation writes the ledger row. If the span is `Boot`, the name must be unique to the boot.
    /// This runs inside the claim's transaction, so it may only access memory.
    fn intent(&self, _resources: &Resources, _row: &VmRow) -> Option<String> {
        None
    }

    /// Releases the resource, even if the operation was cancelled. Succeeds if the resource is
    /// already gone.
    fn release(&self, resources: &Resources, name: &str) -> Result<()>;

    /// True if the other resources may not be released before this one, because this one uses them.
    fn blocks_release(&self) -> bool {
        false
    }

    /// Returns the names of all resources of this kind that are on the host and carry a name of
    /// fcd.
    fn found(&self, resources: &Resources) -> Result<Vec<String>>;

    /// True if the resource must not be removed even if it is not in the ledger.
    fn is_in_use(&self, _resources: &Resources, _name: &str) -> bool {
        false
    }
}

/// Returns the checks of `doctor` for what boots need. They are read-only, and also run without a
/// daemon.
pub(super) fn checks(host: &HostView<'_>) -> Vec<Check> {
    [
        directory::checks(host),
        steps::root_disk::checks(host),
        steps::work_disk::checks(host),
        steps::synced_files::checks(host),
        super::network::checks(host),
        ports::checks(host),
        jail::checks(host),
        host.vmm.checks(),
    ]
    .concat()
}

/// Explains why no VM can start from this state directory, and how to fix that. Returns `None` if
/// nothing is wrong.
pub(crate) fn state_dir_check(state_dir: &Path, driver: VmmDriver) -> Option<Check> {
    directory::reach_check(state_dir, driver)
}

/// Returns the path or its nearest ancestor that exists, because the state directory may not exist
/// yet.
pub(super) fn existing(path: &Path) -> &Path {
    crate::locks::may_block("file access");
    path.ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"))
}

fn of_kind(kind: &str) -> Option<&'static dyn Resource> {
    ALL.into_iter().find(|r| r.kind() == kind)
}

/// True if a VM at rest should have no ledger rows of this kind.
pub(super) fn ends_with_its_boot(kind: &str) -> bool {
    of_kind(kind).is_some_and(|resource| resource.span() != Span::Life)
}

/// Writes into the ledger what the next boot of `row` is about to acquire.
pub(super) fn intend(resources: &Resources, tx: &mut Tx, row: &VmRow) {
    for resource in ALL {
        let Some(name) = resource.intent(resources, row) else {
            continue;
        };
        if !tx
            .ledger_of(&row.id)
            .any(|l| l.kind == resource.kind() && l.name == name)
        {
            tx.intend(Some(&row.id), row.generation, resource.kind(), name);
        }
    }
}

/// True if the resource in this ledger row should no longer exist.
fn is_leftover(state: &State, row: &LedgerRow) -> bool {
    let Some(vm) = row.vm.as_ref().and_then(|id| state.vm(id)) else {
        return true;
    };
    if recovery::is_left_alone(state, &vm.id) {
        return false;
    }
    let at_rest = matches!(
        vm.state,
        VmState::Created | VmState::Stopped | VmState::Failed
    );
    match of_kind(&row.kind).map(Resource::span) {
        Some(Span::Start) => vm.state != VmState::Starting || row.generation < vm.generation,
        Some(Span::Boot) => at_rest || row.generation < vm.generation,
        Some(Span::Life) | None => false,
    }
}

/// Removes the directory and the ledger row of a snapshot that is neither in the store nor in
/// progress.
pub(super) fn discard_snapshot(resources: &Resources, id: &SnapshotId, ledger: u64) -> Result<()> {
    let (vm, kind, name) = (None, snapshot::KIND.to_owned(), id.to_string());
    resources.release_row(
        &snapshot::Snapshot,
        &LedgerRow {
            id: ledger,
            vm,
            generation: 0,
            kind,
            name,
            facts: None,
        },
    )
}

/// Removes the directory of a VM that has no ledger row for it.
pub(super) fn forget_directory(resources: &Resources, row: &VmRow) -> Result<()> {
    let directory = directory::Directory;
    directory
        .intent(resources, row)
        .map_or(Ok(()), |name| directory.release(resources, &name))
}

/// Runs the steps of boots and releases the resources of VMs.
#[derive(Clone)]
pub(super) struct Resources {
    pub(in crate::daemon) core: Core,
    pub(in crate::daemon) networks: Networks,
    pub(in crate::daemon) specs: Specs,
    pub(in crate::daemon) vmms: Vmms,
    pub(in crate::daemon) snapshot_registry: SnapshotRegistry,
    pub(in crate::daemon) commands: Arc<dyn Commands>,
    pub(in crate::daemon) vmm: Arc<dyn Driver>,
    /// Finds other installations that are gone. `None` if the daemon is not root.
    pub(in crate::daemon) installations: Option<Arc<dyn Installations>>,
    pub(in crate::daemon) disk: config::Disk,
    /// Files that every guest gets.
    pub(in crate::daemon) synced: Arc<[SyncedFile]>,
}

impl Resources {
    /// Runs all steps of a boot. After an error, what was acquired is in the ledger.
    pub(super) fn run_boot_steps(&self, boot: &mut Boot<'_>) -> Result<()> {
        for step in STEPS {
            boot.op.progress(step.stage());
            self.core.effects.before(step.stage())?;
            step.run(self, boot)?;
        }
        Ok(())
    }

    /// Releases the resources of all boots of `vm` up to `generation`. Resources that cannot be
    /// released stay in the ledger for the next sweep.
    ///
    /// # Errors
    /// Fails if the VMM could not be killed. Then nothing else is released, because it is in use.
    pub(super) fn release_boot(&self, vm: &VmId, generation: u64) -> Result<()> {
        let left = self.release(vm, |resource, row| {
            resource.span() != Span::Life && row.generation <= generation
        })?;
        left.iter()
            .for_each(|e| log::warn!("clean up after VM {vm}: {e}; retrying every minute"));
        Ok(())
    }

    /// Releases all resources of a VM.
    ///
    /// # Errors
    /// Returns the first error. The other resources are released even so.
    pub(super) fn release_life(&self, vm: &VmId) -> Result<()> {
        let left = self.release(vm, |_, _| true)?;
        left.into_iter().next().map_or(Ok(()), Err)
    }

    /// Releases resources and returns the errors of those that could not be released.
    ///
    /// # Errors
    /// Fails if the VMM could not be killed. Then the resources that it uses are not released.
    fn release(
        &self,
        vm: &VmId,
        which: impl Fn(&dyn Resource, &LedgerRow) -> bool,
    ) -> Result<Vec<Error>> {
        let mut left = Vec::new();
        for resource in ALL.into_iter().rev() {
            let rows: Vec<LedgerRow> = self.core.store.read(|s| {
                let rows_of_kind = s
                    .ledger_of(vm)
                    .filter(|l| l.kind == resource.kind() && which(resource, l));
                rows_of_kind.map(|l| LedgerRow::clone(l)).collect()
            });
            for row in rows {
                match self.release_row(resource, &row) {
                    Ok(()) => {}
                    Err(e) if resource.blocks_release() => return Err(e),
                    Err(e) => left.push(e),
                }
            }
        }
        Ok(left)
    }

    fn release_row(&self, resource: &dyn Resource, row: &LedgerRow) -> Result<()> {
        self.core.effects.before("release a resource")?;
        resource.release(self, &row.name)?;
        // If the row cannot be deleted, the resource is gone even so. The next attempt finds
        // nothing to release and deletes the row.
        match self.core.store.change_essential(|tx| Ok(tx.strike(row.id))) {
            Ok((_, ticket)) => ticket.detach(),
            Err(e) => log::warn!("delete {} {} from the ledger: {e}", row.kind, row.name),
        }
        Ok(())
    }

    /// Compares the ledger, the rows of VMs and the host. Reports what belongs to fcd but not to a
    /// VM, and removes it if `fix` is set.
    ///
    /// A sweep is idempotent. It skips what is currently being acquired or released.
    pub(super) fn sweep(&self, fix: bool) -> Vec<Leak> {
        let mut leaks = Vec::new();
        // The VMs whose VMM could not be killed. Their resources are not released.
        let mut stuck: Vec<Option<VmId>> = Vec::new();
        for resource in ALL.into_iter().rev() {
            // Look at the host before the ledger, because a resource is in the ledger before it
            // appears on the host.
            let found = resource.found(self).unwrap_or_else(|e| {
                log::warn!("look for leftovers of kind {}: {e}", resource.kind());
                Vec::new()
            });
            let (known, leftover): (HashSet<String>, Vec<LedgerRow>) = self.core.store.read(|s| {
                let rows_of_kind = || s.ledger().filter(|l| l.kind == resource.kind());
                (
                    rows_of_kind().map(|l| l.name.clone()).collect(),
                    rows_of_kind()
                        .filter(|l| is_leftover(s, l))
                        .map(|l| (**l).clone())
                        .collect(),
                )
            });
            let mut unknown: Vec<String> = found
                .into_iter()
                .filter(|name| !known.contains(name))
                .collect();
            // Check the use before the rows: whatever leaves use in between has its row or ledger
            // row by then.
            unknown.retain(|name| !resource.is_in_use(self, name));
            if !unknown.is_empty() {
                let intended = self.intended_by_all(resource);
                unknown.retain(|name| !intended.contains(name));
            }
            for name in unknown {
                let removed = if fix {
                    Some(resource.release(self, &name))
                } else {
                    None
                };
                leaks.push(leak(
                    resource.kind(),
                    &name,
                    "it is not in the ledger",
                    removed.as_ref(),
                ));
            }
            let is_free =
                |row: &LedgerRow| !stuck.contains(&row.vm) && !resource.is_in_use(self, &row.name);
            for row in leftover.into_iter().filter(is_free).collect::<Vec<_>>() {
                let removed = if fix {
                    Some(self.release_row(resource, &row))
                } else {
                    None
                };
                if matches!(removed, Some(Err(_))) && resource.blocks_release() {
                    stuck.push(row.vm.clone());
                }
                leaks.push(leak(
                    resource.kind(),
                    &row.name,
                    "nothing uses it any more",
                    removed.as_ref(),
                ));
            }
        }
        if let Some(installations) = &self.installations {
            leaks.extend(super::gone::sweep(
                installations.as_ref(),
                &self.commands,
                fix,
            ));
        }
        leaks
    }

    /// Returns the names that the resources of all VMs would have. A VM that was started by an
    /// earlier version, which had no ledger, has resources without ledger rows.
    fn intended_by_all(&self, resource: &dyn Resource) -> HashSet<String> {
        let rows = self
            .core
            .store
            .read(|s| s.vms().cloned().collect::<Vec<_>>());
        rows.iter()
            .filter_map(|row| resource.intent(self, row))
            .collect()
    }
}
