//! What a VM uses on the host: each kind of resource in a file of its own, listed in [`ALL`].
//!
//! A resource knows what a boot needs of it, how it is taken, given back and found again, and what
//! `doctor` checks. A new kind is a new file and a line in [`ALL`].
//!
//! The claim of a start writes what the boot is about to take into the ledger, in its own
//! transaction. The boot takes it in that order and gives it back in the reverse order, and each
//! row is deleted once its resource is gone. So whenever a daemon is killed, the next one can read
//! what to look for.

mod directory;
mod disk;
mod disk_device;
pub(super) mod former_disks;
mod jail;
mod ports;
mod process;
mod seed;
pub(super) mod snapshot;
mod synced_files;
mod tap;
mod work_disk;

use super::core::Core;
use super::network::Networks;
use super::recovery;
use super::snapshot_registry::SnapshotRegistry;
use super::spec::Specs;
use super::vmms::Vmms;
use crate::api::daemon::{Check, Leak};
use crate::api::vm::VmState;
use crate::config::Config;
use crate::config::{self, SyncedFile};
use crate::daemon::gone::Installations;
use crate::daemon::host_view::HostView;
use crate::daemon::leak::leak;
use crate::daemon::snapshot_registry::Restore;
use crate::disk::RestoreSeed;
use crate::disk::SeedFile;
use crate::error::Kind;
use crate::error::{Error, Result};
use crate::host::Commands;
use crate::ids::{SnapshotId, VmId};
use crate::image::ImageInfo;
use crate::locks::Cancel;
use crate::ops::OpHandle;
use crate::store::{LedgerRow, State, Tx, VmRow};
use crate::vmm::Driver;
use crate::vmm::Running;
use crate::vmm::VmmSpec;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

/// In the order in which a boot takes them; they are given back in the reverse order.
const ALL: [&dyn Resource; 13] = [
    &directory::Directory,
    &former_disks::FormerDisks,
    &former_disks::ReplacedDisks,
    &snapshot::Snapshot,
    &disk::Disk,
    &disk_device::DiskDevice,
    &work_disk::WorkDisk,
    &synced_files::SyncedFiles,
    &seed::Seed,
    &tap::Tap,
    &ports::Ports,
    &jail::Jail,
    &process::VmmProcess,
];

/// How long a resource is a VM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Span {
    /// No longer than a start is under way.
    Start,
    /// From a start until the VMM has exited.
    Boot,
    /// From the first start until the VM is deleted.
    Life,
}

/// One kind of resource.
pub(super) trait Resource: Send + Sync {
    /// In the ledger: never changes its meaning.
    fn kind(&self) -> &'static str;

    fn span(&self) -> Span;

    /// What a boot of `row` takes, by the name with which it is found again on the host; none:
    /// nothing. Of a boot's span the name is that boot's alone. Memory only: it runs inside the
    /// claim's change.
    fn intent(&self, resources: &Resources, row: &VmRow) -> Option<String>;

    /// What a boot says while it takes it.
    fn doing(&self) -> &'static str;

    /// Takes it. What an earlier try left is taken over or replaced.
    fn acquire(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()>;

    /// Gives it back, whatever was cancelled. Gone already is ok.
    fn release(&self, resources: &Resources, name: &str) -> Result<()>;

    /// Whether the others may not be given back before this is.
    fn uses_the_others(&self) -> bool {
        false
    }

    /// All of this kind that is on the host and carries our names.
    fn found(&self, resources: &Resources) -> Result<Vec<String>>;

    /// Whether this one is somebody's although it is in no ledger, or no boot's although it is in
    /// one.
    fn is_in_use(&self, _resources: &Resources, _name: &str) -> bool {
        false
    }

    /// What `doctor` says of it: what is needed for it, what was found, how to mend it. Read-only;
    /// there may be no resources.
    fn checks(&self, _host: &HostView<'_>) -> Vec<Check> {
        Vec::new()
    }
}

/// What `doctor` says of all of them.
pub(super) fn checks(host: &HostView<'_>) -> Vec<Check> {
    ALL.into_iter().flat_map(|resource| resource.checks(host)).collect()
}

/// Why no VM can start from this state directory, if that is so, and what helps.
pub(crate) fn state_dir_check(config: &Config) -> Option<Check> {
    directory::reach_check(config)
}

/// The nearest directory that is there: the state directory itself may not be made yet.
pub(super) fn existing(path: &Path) -> &Path {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"))
}

fn of_kind(kind: &str) -> Option<&'static dyn Resource> {
    ALL.into_iter().find(|r| r.kind() == kind)
}

/// Whether a row of this kind in the ledger stands for something that no VM at rest should have.
pub(super) fn ends_with_its_boot(kind: &str) -> bool {
    of_kind(kind).is_some_and(|resource| resource.span() != Span::Life)
}

/// Writes down what the next boot of `row` is about to take.
pub(super) fn intend(resources: &Resources, tx: &mut Tx, row: &VmRow) {
    for resource in ALL {
        let Some(name) = resource.intent(resources, row) else { continue };
        if !tx.ledger_of(&row.id).any(|l| l.kind == resource.kind() && l.name == name) {
            tx.intend(Some(&row.id), row.generation, resource.kind(), name);
        }
    }
}

/// Whether what this row stands for should be gone.
fn is_leftover(state: &State, row: &LedgerRow) -> bool {
    let Some(vm) = row.vm.as_ref().and_then(|id| state.vm(id)) else { return true };
    if recovery::is_left_alone(state, &vm.id) {
        return false;
    }
    let at_rest = matches!(vm.state, VmState::Created | VmState::Stopped | VmState::Failed);
    match of_kind(&row.kind).map(Resource::span) {
        Some(Span::Start) => vm.state != VmState::Starting || row.generation < vm.generation,
        Some(Span::Boot) => at_rest || row.generation < vm.generation,
        Some(Span::Life) | None => false,
    }
}

/// Removes the directory of a snapshot that nobody makes and that has no row, and strikes it.
pub(super) fn discard_snapshot(resources: &Resources, id: &SnapshotId, ledger: u64) -> Result<()> {
    let (vm, kind, name) = (None, snapshot::KIND.to_owned(), id.to_string());
    resources.release_row(&snapshot::Snapshot, &LedgerRow { id: ledger, vm, generation: 0, kind, name, facts: None })
}

/// Removes the directory of a VM for which there is no row in the ledger.
pub(super) fn forget_directory(resources: &Resources, row: &VmRow) -> Result<()> {
    let directory = directory::Directory;
    directory.intent(resources, row).map_or(Ok(()), |name| directory.release(resources, &name))
}

/// A boot in progress: what its steps need, and what they have made so far.
pub(super) struct Boot<'a> {
    pub op: &'a OpHandle,
    /// Ends the boot early.
    pub cancel: &'a Cancel,
    /// The snapshot that the boot restores.
    pub restore: Option<&'a Restore>,
    pub row: VmRow,
    pub image: &'a ImageInfo,
    pub spec: VmmSpec,
    /// Files to copy into the guest.
    pub files: Vec<SeedFile>,
    /// What the guest of a snapshot is given after its memory is loaded.
    pub restore_seed: Option<RestoreSeed>,
    /// The ledger row of the disks that the VM had before it took those of a snapshot.
    pub former_disks: Option<u64>,
    pub running: Option<Running>,
}

impl Boot<'_> {
    /// Fails if the init of the guest is too old to know `what`: it would ignore it without an
    /// error.
    pub(super) fn needs_guest(&self, what: &str) -> Result<()> {
        if self.row.guest_version >= 1 {
            return Ok(());
        }
        let message = format!("give VM {} {what}: its disk was made from an image that an earlier fcd built", self.row.name);
        Err(Error::new(Kind::Unsupported, message).hint("build the image again (fcctl image build), and make a new VM from it"))
    }
}

/// Takes resources for boots and releases them.
#[derive(Clone)]
pub struct Resources {
    pub(in crate::daemon) core: Core,
    pub(in crate::daemon) networks: Networks,
    pub(in crate::daemon) specs: Specs,
    pub(in crate::daemon) vmms: Vmms,
    pub(in crate::daemon) snapshot_registry: SnapshotRegistry,
    pub(in crate::daemon) commands: Arc<dyn Commands>,
    pub(in crate::daemon) vmm: Arc<dyn Driver>,
    /// Knows which other installations are alive. `None` if the daemon is not root.
    pub(in crate::daemon) installations: Option<Arc<dyn Installations>>,
    pub(in crate::daemon) disk: config::Disk,
    /// Files that every guest gets.
    pub(in crate::daemon) synced: Arc<[SyncedFile]>,
}

impl Resources {
    /// Takes everything that a boot needs, step by step. After an error nothing of the boot's span
    /// is left, or the ledger says what is.
    pub(super) fn acquire_all(&self, boot: &mut Boot<'_>) -> Result<()> {
        for resource in ALL {
            boot.op.progress(resource.doing());
            self.core.effects.before(resource.doing())?;
            resource.acquire(self, boot)?;
        }
        Ok(())
    }

    /// Gives back what boots of `vm` up to `generation` hold, and strikes it off. What cannot be
    /// given back stays in the ledger for the next sweep.
    ///
    /// # Errors
    /// The VMM could not be ended: nothing else was touched, as it is in use.
    pub(super) fn release_boot(&self, vm: &VmId, generation: u64) -> Result<()> {
        let left = self.release(vm, |resource, row| resource.span() != Span::Life && row.generation <= generation)?;
        left.iter().for_each(|e| log::warn!("clean up after vm {vm}: {e}; it is tried again every minute"));
        Ok(())
    }

    /// Gives back all that a VM has.
    ///
    /// # Errors
    /// The first thing that could not be given back; the rest was.
    pub(super) fn release_life(&self, vm: &VmId) -> Result<()> {
        let left = self.release(vm, |_, _| true)?;
        left.into_iter().next().map_or(Ok(()), Err)
    }

    /// Carries on past errors, which it gives; but nothing is taken from under a VMM that still
    /// runs.
    fn release(&self, vm: &VmId, which: impl Fn(&dyn Resource, &LedgerRow) -> bool) -> Result<Vec<Error>> {
        let mut left = Vec::new();
        for resource in ALL.into_iter().rev() {
            let rows: Vec<LedgerRow> = self.core.store.read(|s| {
                let of_kind = s.ledger_of(vm).filter(|l| l.kind == resource.kind() && which(resource, l));
                of_kind.map(|l| LedgerRow::clone(l)).collect()
            });
            for row in rows {
                match self.release_row(resource, &row) {
                    Ok(()) => {}
                    Err(e) if resource.uses_the_others() => return Err(e),
                    Err(e) => left.push(e),
                }
            }
        }
        Ok(left)
    }

    fn release_row(&self, resource: &dyn Resource, row: &LedgerRow) -> Result<()> {
        self.core.effects.before("give it back")?;
        resource.release(self, &row.name)?;
        // It is gone whether or not this is written down: the next try finds nothing and strikes
        // it.
        match self.core.store.change_essential(|tx| Ok(tx.strike(row.id))) {
            Ok((_, ticket)) => ticket.detach(),
            Err(e) => log::warn!("strike {} {} off the ledger: {e}", row.kind, row.name),
        }
        Ok(())
    }

    /// Compares the ledger, the rows of VMs and the host, and removes what is ours and belongs to
    /// nothing. Says what it found; with `fix` what was removed is gone, or the leak says why not.
    ///
    /// Twice in a row changes nothing. What is being taken or given back meanwhile is left to
    /// whoever does so.
    pub(super) fn sweep(&self, fix: bool) -> Vec<Leak> {
        let mut leaks = Vec::new();
        // VMs whose VMM could not be ended keep all that they have.
        let mut stuck: Vec<Option<VmId>> = Vec::new();
        for resource in ALL.into_iter().rev() {
            // The host first: whatever is found was in the ledger before it was taken.
            let found = resource.found(self).unwrap_or_else(|e| {
                log::warn!("look for what is left of kind {}: {e}", resource.kind());
                Vec::new()
            });
            let (known, leftover): (HashSet<String>, Vec<LedgerRow>) = self.core.store.read(|s| {
                let of_kind = || s.ledger().filter(|l| l.kind == resource.kind());
                (
                    of_kind().map(|l| l.name.clone()).collect(),
                    of_kind().filter(|l| is_leftover(s, l)).map(|l| (**l).clone()).collect(),
                )
            });
            let mut unknown: Vec<String> = found.into_iter().filter(|name| !known.contains(name)).collect();
            if !unknown.is_empty() {
                let intended = self.intended_by_all(resource);
                unknown.retain(|name| !intended.contains(name) && !resource.is_in_use(self, name));
            }
            for name in unknown {
                let removed = if fix { Some(resource.release(self, &name)) } else { None };
                leaks.push(leak(resource.kind(), &name, "it is in no ledger", removed.as_ref()));
            }
            let is_free = |row: &LedgerRow| !stuck.contains(&row.vm) && !resource.is_in_use(self, &row.name);
            for row in leftover.into_iter().filter(is_free).collect::<Vec<_>>() {
                let removed = if fix { Some(self.release_row(resource, &row)) } else { None };
                if matches!(removed, Some(Err(_))) && resource.uses_the_others() {
                    stuck.push(row.vm.clone());
                }
                leaks.push(leak(resource.kind(), &row.name, "nothing uses it any more", removed.as_ref()));
            }
        }
        if let Some(installations) = &self.installations {
            leaks.extend(super::gone::sweep(installations.as_ref(), &self.commands, fix));
        }
        leaks
    }

    /// The names of what belongs to VMs that an earlier version started, which kept no ledger.
    fn intended_by_all(&self, resource: &dyn Resource) -> HashSet<String> {
        let rows = self.core.store.read(|s| s.vms().cloned().collect::<Vec<_>>());
        rows.iter().filter_map(|row| resource.intent(self, row)).collect()
    }
}
