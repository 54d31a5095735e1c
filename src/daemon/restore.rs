//! Continuing from a snapshot, in its own VM or in a new one.
//!
//! A restore is a start (`Verb::Restore`). Its resource `snapshot` puts the snapshot's disks in the
//! place of the VM's, and its VMM loads instead of booting: QEMU as an incoming migration from a
//! file, Firecracker with `/snapshot/load` and another tap. In a jail every VM's disks have the
//! same paths, which is how a fork satisfies the paths that a snapshot fixes. Without a jail a fork
//! on Firecracker is `unsupported`.
//!
//! The script in the saved memory finds the new seed within a quarter of a second and sets the
//! clock, random numbers, name, address and keys. The start ends when it has done so. Until then
//! the bridge's rules drop what the guest sends from its old address.
//!
//! The VM's own disks are kept in `former/`, in the ledger, until the guest runs. If the start ends
//! in any other way (the VMM refuses to load, a stop, a daemon that dies) they are put back. vCPUs
//! and memory stay those of the snapshot until `vm set`. A snapshot cannot be deleted while a start
//! uses it.
//!
//! `vm fork` is a save and a restore. Until the new VM runs it is marked `rm`, so nothing of it
//! stays if anything fails.

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::lifecycle::LifecycleRequest;
use super::runtime::Use;
use super::snapshot_registry::Restore;
use super::snapshots::Snapshots;
use super::transitions::Verb;
use crate::api::op::OpState;
use crate::api::snapshot::SnapshotRestoreRequest;
use crate::api::vm::{Net, RateLimits, Vm, VmCreateRequest, VmForkRequest, VmReply, VmState};
use crate::error::{Error, Kind, Result};
use crate::ids::{ImageRef, KernelName, OpId, VmId, VmName};
use crate::locks::CancelCause;
use crate::ops::OpHandle;
use crate::store::{SnapshotRow, VmRow};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For the whole of a start from a snapshot, which has deadlines of its own.
const RESTORE_DEADLINE: Duration = Duration::from_secs(3600);

impl Snapshots {
    /// The VM that it is of must be at rest. A new one is made whole or not at all.
    pub fn snapshot_restore(&self, caller: &Caller, request: SnapshotRestoreRequest) -> Result<CallOutcome> {
        const METHOD: &str = "snapshot.restore";
        let row = self.find_snapshot(caller, &request.snapshot)?;
        let Some(name) = request.new_vm else {
            let restore = self.restore_of(row, false)?;
            let vm = self.vm_of(caller, &restore.row)?;
            return self.lifecycle.request(caller, vm.as_str(), &ask(METHOD, &restore));
        };
        let restore = self.restore_of(row, true)?;
        let vm = self.create_from(caller, &restore.row, Some(name))?;
        self.in_new_vm(caller, METHOD, &vm, move |snapshots, op, vm| snapshots.go_on(op, vm, &restore))
    }

    /// The VM runs on.
    pub fn fork(&self, caller: &Caller, request: VmForkRequest) -> Result<CallOutcome> {
        const METHOD: &str = "vm.fork";
        let found = self.core.resolve(caller, &request.vm)?;
        self.core.allow(&found, Verb::Guest)?;
        self.vmm.can_load(found.driver.as_deref().unwrap_or_default(), true)?;
        let vm = self.create_like(caller, &found, request.name)?;
        self.in_new_vm(caller, METHOD, &vm, move |snapshots, op, vm| {
            let (row, user) = snapshots.sessions.join_guest(&found, Use::Transfer, op.cancel())?;
            let captured = snapshots.capture(&row, op).map_err(|e| e.context(format!("save vm {}", row.name)))?;
            drop(user);
            let restore =
                Restore { row: Arc::new(captured.row.clone()), files: captured.files.clone(), elsewhere: true, _in_use: None };
            let done = snapshots.go_on(op, vm, &restore);
            snapshots.discard(captured);
            done
        })
    }

    /// An operation that makes a new VM run; a failure takes the VM away again.
    fn in_new_vm(
        &self,
        caller: &Caller,
        method: &'static str,
        vm: &Vm,
        work: impl FnOnce(&Self, &OpHandle, &VmId) -> Result<()> + Send + 'static,
    ) -> Result<CallOutcome> {
        let begun = self.core.begin_op(method, Some(vm.id.clone()), caller.uid, true);
        let op = begun.inspect_err(|_| self.lifecycle.delete_unasked(&vm.id))?;
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            self.lifecycle.delete_unasked(&vm.id);
            return Err(e);
        }
        let (snapshots, id, vm, name) = (self.clone(), op.id().clone(), vm.id.clone(), vm.name.clone());
        self.core.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope(format!("{method} {vm}"));
            let result = work(&snapshots, &op, &vm).and_then(|()| snapshots.keep(&vm)).and_then(|vm| to_value(&VmReply { vm }));
            if result.is_err() {
                snapshots.lifecycle.delete_unasked(&vm);
            }
            snapshots.core.end_op(op, result.map_err(|e| e.context(format!("make vm {name}"))));
        })?;
        Ok(CallOutcome::Op(id))
    }

    /// Until it runs it goes when it comes to rest, also after a crash.
    fn create_from(&self, caller: &Caller, row: &SnapshotRow, name: Option<VmName>) -> Result<Vm> {
        let shape = (
            row.image.clone(),
            row.kernel.clone(),
            row.vcpus,
            row.mem_mib,
            row.disk_bytes,
            row.work_disk_bytes,
            row.net,
            row.rates,
        );
        self.creator.create(caller, &request(name, shape))
    }

    fn create_like(&self, caller: &Caller, row: &VmRow, name: Option<VmName>) -> Result<Vm> {
        let shape = (
            row.image.clone(),
            row.kernel.clone(),
            row.vcpus,
            row.mem_mib,
            row.disk_bytes,
            row.work_disk_bytes,
            row.net,
            row.rates,
        );
        self.creator.create(caller, &request(name, shape))
    }

    fn keep(&self, vm: &VmId) -> Result<Vm> {
        let guard = self.core.locks.vm.lock(vm);
        let row = self.core.row(vm)?;
        if row.state == VmState::Deleting {
            // It came to rest before it was to stay.
            return Err(Error::new(Kind::Superseded, "a later request ended it, and it was deleted")
                .hint(format!("try again: the VM that was to be {} is gone", row.name)));
        }
        let ((), ticket) = self.core.store.change(|tx| tx.update_vm(&guard, |row| row.rm = false))?;
        drop(guard);
        self.core.wait_durable(ticket)?;
        self.views.view(vm)
    }

    /// Starts the VM from there and waits until that has ended.
    fn go_on(&self, op: &OpHandle, vm: &VmId, restore: &Restore) -> Result<()> {
        let owner = self.core.row(vm)?.owner_uid;
        let caller = Caller { uid: owner, gid: 0, pid: 0 };
        op.progress("start from the snapshot");
        let start = match self.lifecycle.request(&caller, vm.as_str(), &ask("snapshot.restore", restore))? {
            CallOutcome::Op(start) | CallOutcome::Joined(start) => start,
            CallOutcome::Done(_) => return Err(Error::internal(format!("vm {vm} runs before it was started"))),
        };
        let waited = self.core.ops.wait(&start, Instant::now() + RESTORE_DEADLINE, op.cancel());
        if waited.is_err() {
            self.end_start(&start);
        }
        let ended = waited?;
        match (ended.state, ended.error) {
            (OpState::Ok, _) => Ok(()),
            (_, Some(fault)) => {
                let kind = Kind::ALL.iter().copied().find(|k| k.name() == fault.kind).unwrap_or(Kind::VmmFailed);
                let error = Error::new(kind, fault.message);
                Err(match fault.hint {
                    Some(hint) => error.hint(hint),
                    None => error,
                })
            }
            (state, None) => Err(Error::internal(format!("the start ended as {state:?} and does not say why"))),
        }
    }

    fn end_start(&self, start: &OpId) {
        if let Err(e) = self.core.ops.cancel(start, CancelCause::ParentCancelled) {
            log::debug!("{e}");
        }
    }

    /// What can be seen before anything is begun.
    fn restore_of(&self, row: SnapshotRow, elsewhere: bool) -> Result<Restore> {
        self.vmm.can_load(&row.driver, elsewhere)?;
        if row.on_bridge != self.networks.net.is_some() {
            let (then, now) = if row.on_bridge { ("bridge", "user") } else { ("user", "bridge") };
            let text =
                format!("restore snapshot {}: its guest was on the {then}-mode network, and VMs are on {now} now", row.name);
            return Err(Error::new(Kind::Unsupported, text).hint(format!("set driver = \"{then}\" under [network]")));
        }
        let gone =
            || Error::new(Kind::SnapshotNotFound, format!("snapshot {} is being deleted", row.name)).hint("fcctl snapshot list");
        let in_use = self.snapshot_registry.uses.begin_use(&row.id).map(Arc::new).ok_or_else(gone)?;
        // It may have gone before it was marked.
        if self.core.store.read(|s| s.snapshot(&row.id).is_none()) {
            return Err(gone());
        }
        Ok(Restore { files: self.snapshot_registry.files(&row.id), row: Arc::new(row), elsewhere, _in_use: Some(in_use) })
    }

    fn vm_of(&self, caller: &Caller, snapshot: &SnapshotRow) -> Result<VmId> {
        let row = self.core.resolve(caller, snapshot.vm.as_str()).map_err(|e| match e.kind() {
            Kind::VmNotFound => Error::new(Kind::VmNotFound, format!("vm {}, of which it is, is gone", snapshot.vm_name))
                .hint(format!("let a new one go on from there: fcctl snapshot restore {} --as NAME", snapshot.name)),
            _ => e,
        })?;
        if row.disk_driver.as_ref().is_some_and(|driver| *driver != snapshot.disk_driver) {
            return Err(Error::new(
                Kind::Conflict,
                format!("vm {} has another kind of disk than snapshot {}", row.name, snapshot.name),
            )
            .hint(format!("let a new one go on from there: fcctl snapshot restore {} --as NAME", snapshot.name)));
        }
        Ok(row.id)
    }
}

/// Image, kernel, vCPUs, memory, disk, work disk, network, rates.
type Shape = (ImageRef, Option<KernelName>, u32, u64, u64, Option<u64>, Net, RateLimits);

fn request(
    name: Option<VmName>,
    (image, kernel, vcpus, mem_mib, disk_bytes, work_disk_bytes, net, rates): Shape,
) -> VmCreateRequest {
    VmCreateRequest {
        name,
        image: Some(image),
        kernel,
        vcpus: Some(vcpus),
        mem_mib: Some(mem_mib),
        disk_bytes: Some(disk_bytes),
        work_disk_bytes,
        net: Some(net),
        disk_bytes_per_s: rates.disk_bytes_per_s,
        disk_ops_per_s: rates.disk_ops_per_s,
        net_rx_bytes_per_s: rates.net_rx_bytes_per_s,
        net_tx_bytes_per_s: rates.net_tx_bytes_per_s,
        rm: true,
        ..Default::default()
    }
}

fn ask(method: &'static str, restore: &Restore) -> LifecycleRequest {
    LifecycleRequest { verb: Verb::Restore, method, timeout: None, restore: Some(restore.clone()) }
}
