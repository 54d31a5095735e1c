//! Restores snapshots, in their own VM or in a new one.
//!
//! A restore is a start (`Verb::Restore`). A boot step replaces the VM's disks with copies of the
//! snapshot's disks, and the VMM loads the saved state instead of booting: QEMU as an incoming
//! migration from a file, Firecracker with `/snapshot/load` and another tap. A snapshot contains
//! the paths of its disks. In a jail every VM's disks have the same paths, so a fork works. Without
//! a jail, a fork on Firecracker is `unsupported`.
//!
//! The script in the saved memory finds the new seed within a quarter of a second and sets the
//! clock, random numbers, name, address and keys. The start waits for that. Until then the rules of
//! the bridge drop what the guest sends from its old address.
//!
//! Until the guest runs, the VM's own disks are kept in `former/`, which is in the ledger. If the
//! start fails for any reason (the VMM refuses to load, a stop, a daemon that dies), they are
//! restored. The VM keeps the snapshot's vCPUs and memory until `vm set` changes them. A snapshot
//! cannot be deleted while a start uses it.
//!
//! `vm fork` is a save and a restore. The new VM is marked `rm` until it runs, so it is deleted if
//! anything fails.

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::command_defaults::{self, Variable};
use super::lifecycle::LifecycleRequest;
use super::runtime::Use;
use super::snapshot_registry::Restore;
use super::snapshots::Snapshots;
use super::transitions::Verb;
use crate::api::op::OpState;
use crate::api::snapshot::SnapshotRestoreRequest;
use crate::api::vm::{Vm, VmCreateRequest, VmForkRequest, VmReply, VmState};
use crate::error::{Error, Kind, Result};
use crate::ids::{ImageRef, OpId, VmId, VmName};
use crate::locks::CancelCause;
use crate::ops::OpHandle;
use crate::sched::Instant;
use crate::store::{SnapshotRow, VmShape};
use std::sync::Arc;
use std::time::Duration;

/// The time limit for a whole start from a snapshot. The steps of the start have their own
/// deadlines.
const RESTORE_DEADLINE: Duration = Duration::from_secs(3600);

impl Snapshots {
    /// Restores a snapshot, into the VM from which it was taken or into a new VM. The original VM
    /// must not be running. A new VM is deleted if the restore fails.
    pub fn snapshot_restore(
        &self,
        caller: &Caller,
        request: SnapshotRestoreRequest,
    ) -> Result<CallOutcome> {
        const METHOD: &str = "snapshot.restore";
        let row = self.find_snapshot(caller, &request.snapshot)?;
        let Some(name) = request.new_vm else {
            let restore = self.restore_of(row, false)?;
            let vm = self.source_vm(caller, &restore.row)?;
            return self
                .lifecycle
                .request(caller, vm.as_str(), &start_request(METHOD, &restore));
        };
        let restore = self.restore_of(row, true)?;
        let shape = &restore.row.shape;
        let env = command_defaults::read_saved(shape, &restore.files)?;
        let vm = self.create_like(caller, like(shape, Some(name), env), &shape.image)?;
        self.run_in_new_vm(caller, METHOD, &vm, move |snapshots, op, vm| {
            snapshots.start_from(op, vm, &restore)
        })
    }

    /// Forks a VM, which keeps running.
    pub fn fork(&self, caller: &Caller, request: VmForkRequest) -> Result<CallOutcome> {
        const METHOD: &str = "vm.fork";
        let found = self.core.resolve(caller, &request.vm)?;
        self.core.allow(&found, Verb::Guest)?;
        self.vmm
            .can_load(found.driver.as_deref().unwrap_or_default(), true)?;
        let env = command_defaults::read(&self.core, &found)?;
        let labels = found.shape.labels.changed(&request.labels, &[])?;
        let mut new = like(&found.shape, request.name, env);
        new.labels = labels;
        let vm = self.create_like(caller, new, &found.shape.image)?;
        self.run_in_new_vm(caller, METHOD, &vm, move |snapshots, op, vm| {
            let (row, user) = snapshots
                .sessions
                .join_guest(&found, Use::Transfer, op.cancel())?;
            let captured = snapshots
                .writer
                .capture(&row, op)
                .map_err(|e| e.context(format!("save VM {}", row.name)))?;
            drop(user);
            let restore = Restore {
                row: Arc::new(captured.row.clone()),
                files: captured.files.clone(),
                in_other_vm: true,
                _in_use: None,
            };
            let done = snapshots.start_from(op, vm, &restore);
            snapshots.writer.discard(captured);
            done
        })
    }

    /// Runs an operation that starts a new VM. If the operation fails, the VM is deleted.
    fn run_in_new_vm(
        &self,
        caller: &Caller,
        method: &'static str,
        vm: &Vm,
        work: impl FnOnce(&Self, &OpHandle, &VmId) -> Result<()> + Send + 'static,
    ) -> Result<CallOutcome> {
        let op = self
            .core
            .begin_op(method, Some(vm.id.clone()), caller.uid, true);
        let op = op.inspect_err(|_| self.lifecycle.delete_unasked(&vm.id))?;
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            self.lifecycle.delete_unasked(&vm.id);
            return Err(e);
        }
        let (snapshots, id, vm, name) = (
            self.clone(),
            op.id().clone(),
            vm.id.clone(),
            vm.name.clone(),
        );
        self.core.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope(format!("{method} {vm}"));
            let result = work(&snapshots, &op, &vm)
                .and_then(|()| snapshots.unmark_rm(&vm))
                .and_then(|vm| to_value(&VmReply { vm }));
            if result.is_err() {
                snapshots.lifecycle.delete_unasked(&vm);
            }
            snapshots.core.end_op(
                op,
                result.map_err(|e| e.context(format!("create VM {name}"))),
            );
        })?;
        Ok(CallOutcome::Op(id))
    }

    /// Creates a VM with the image of another VM. The VM is marked `rm` until it runs, so it is
    /// deleted if its start fails or the daemon dies.
    fn create_like(
        &self,
        caller: &Caller,
        request: VmCreateRequest,
        image: &ImageRef,
    ) -> Result<Vm> {
        // Use exactly this image, because the same name may mean another image to the caller.
        let image = self.creator.image_service.use_image(caller, image)?;
        self.creator.create_from(caller, &request, image, None)
    }

    fn unmark_rm(&self, vm: &VmId) -> Result<Vm> {
        let guard = self.core.locks.vm.lock(vm);
        let row = self.core.row(vm)?;
        if row.state == VmState::Deleting {
            // The VM stopped before the mark was removed.
            return Err(Error::new(
                Kind::Superseded,
                "a later request stopped the new VM, so it was deleted",
            )
            .hint(format!("try again: VM {} has been deleted", row.name)));
        }
        let ((), ticket) = self
            .core
            .store
            .change(|tx| tx.update_vm(&guard, |row| row.rm = false))?;
        drop(guard);
        self.core.wait_durable(ticket)?;
        self.views.view(vm)
    }

    /// Starts the VM from the snapshot and waits until the start has ended.
    fn start_from(&self, op: &OpHandle, vm: &VmId, restore: &Restore) -> Result<()> {
        let owner = self.core.row(vm)?.owner_uid;
        let caller = Caller {
            uid: owner,
            gid: 0,
            pid: 0,
        };
        op.progress("start from the snapshot");
        let start = match self.lifecycle.request(
            &caller,
            vm.as_str(),
            &start_request("snapshot.restore", restore),
        )? {
            CallOutcome::Op(start) | CallOutcome::Joined(start) => start,
            CallOutcome::Done(_) => {
                return Err(Error::internal(format!(
                    "VM {vm} is running before its start"
                )));
            }
        };
        let waited = self
            .core
            .ops
            .wait(&start, Instant::now() + RESTORE_DEADLINE, op.cancel());
        if waited.is_err() {
            self.end_start(&start);
        }
        let ended = waited?;
        match (ended.state, ended.error) {
            (OpState::Ok, _) => Ok(()),
            (_, Some(fault)) => {
                let kind = Kind::ALL
                    .iter()
                    .copied()
                    .find(|k| k.name() == fault.kind)
                    .unwrap_or(Kind::VmmFailed);
                let error = Error::new(kind, fault.message);
                Err(match fault.hint {
                    Some(hint) => error.hint(hint),
                    None => error,
                })
            }
            (state, None) => Err(Error::internal(format!(
                "the start ended as {state:?} without an error"
            ))),
        }
    }

    fn end_start(&self, start: &OpId) {
        if let Err(e) = self.core.ops.cancel(start, CancelCause::ParentCancelled) {
            log::debug!("{e}");
        }
    }

    /// Makes the checks that are possible before the boot, and returns what a boot needs to restore
    /// the snapshot. The snapshot cannot be deleted until the returned value is dropped.
    fn restore_of(&self, row: SnapshotRow, in_other_vm: bool) -> Result<Restore> {
        self.vmm.can_load(&row.driver, in_other_vm)?;
        if row.on_bridge != self.networks.net.is_some() {
            let (then, now) = if row.on_bridge {
                ("bridge", "user")
            } else {
                ("user", "bridge")
            };
            let text = format!(
                "restore snapshot {}: it was made with {then} networking, and VMs now have {now} networking",
                row.name
            );
            return Err(Error::new(Kind::Unsupported, text)
                .hint(format!("set driver = \"{then}\" under [network]")));
        }
        let gone = || {
            Error::new(
                Kind::SnapshotNotFound,
                format!("snapshot {} is being deleted", row.name),
            )
            .hint("fcctl snapshot list")
        };
        let in_use = self
            .snapshot_registry
            .uses
            .begin_use(&row.id)
            .map(Arc::new)
            .ok_or_else(gone)?;
        // The snapshot may have been deleted before the guard was taken.
        if self.core.store.read(|s| s.snapshot(&row.id).is_none()) {
            return Err(gone());
        }
        Ok(Restore {
            files: self.snapshot_registry.files(&row.id),
            row: Arc::new(row),
            in_other_vm,
            _in_use: Some(in_use),
        })
    }

    fn source_vm(&self, caller: &Caller, snapshot: &SnapshotRow) -> Result<VmId> {
        let row = self
            .core
            .resolve(caller, snapshot.vm.as_str())
            .map_err(|e| match e.kind() {
                Kind::VmNotFound => Error::new(
                    Kind::VmNotFound,
                    format!(
                        "VM {}, from which this snapshot was taken, has been deleted",
                        snapshot.vm_name
                    ),
                )
                .hint(format!(
                    "restore it as a new VM: fcctl snapshot restore {} --as NAME",
                    snapshot.name
                )),
                _ => e,
            })?;
        if row
            .disk_driver
            .as_ref()
            .is_some_and(|driver| *driver != snapshot.disk_driver)
        {
            return Err(Error::new(
                Kind::Conflict,
                format!(
                    "VM {} has a different kind of disk than snapshot {}",
                    row.name, snapshot.name
                ),
            )
            .hint(format!(
                "restore it as a new VM: fcctl snapshot restore {} --as NAME",
                snapshot.name
            )));
        }
        Ok(row.id)
    }
}

/// Returns the request for a VM of this shape.
fn like(shape: &VmShape, name: Option<VmName>, env: Vec<Variable>) -> VmCreateRequest {
    VmCreateRequest {
        name,
        image: None,
        kernel: shape.kernel.clone(),
        init: Some(shape.init),
        vcpus: Some(shape.vcpus),
        mem_mib: Some(shape.mem_mib),
        disk_bytes: Some(shape.disk_bytes),
        work_disk_bytes: shape.work_disk_bytes,
        net: Some(shape.net),
        labels: shape.labels.clone(),
        user: shape.commands.user.clone(),
        workdir: shape.commands.workdir.clone(),
        env,
        disk_bytes_per_s: shape.rates.disk_bytes_per_s,
        disk_ops_per_s: shape.rates.disk_ops_per_s,
        net_rx_bytes_per_s: shape.rates.net_rx_bytes_per_s,
        net_tx_bytes_per_s: shape.rates.net_tx_bytes_per_s,
        rm: true,
        ..Default::default()
    }
}

fn start_request(method: &'static str, restore: &Restore) -> LifecycleRequest {
    LifecycleRequest {
        verb: Verb::Restore,
        method,
        timeout: None,
        restore: Some(restore.clone()),
    }
}
