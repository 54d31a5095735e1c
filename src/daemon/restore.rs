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

use super::boot::Boot;
use super::captures::Restore;
use super::lifecycle::{Ask, Claim};
use super::resources::former_disks;
use super::runtime::Use;
use super::transitions::Verb;
use super::{Begun, Caller, Daemon, now_s, to_value};
use crate::api::exec::Exit;
use crate::api::op::OpState;
use crate::api::snapshot::SnapshotRestoreRequest;
use crate::api::vm::{Net, RateLimits, Vm, VmCreateRequest, VmForkRequest, VmReply, VmState};
use crate::disk::{Method, RestoreSeed, duplicate};
use crate::error::{Error, Kind, Result};
use crate::guest::{Script, Target, run_script};
use crate::ids::{ImageRef, KernelName, OpId, VmId, VmName};
use crate::locks::CancelCause;
use crate::net::Mac;
use crate::ops::OpHandle;
use crate::store::{SnapshotRow, VmRow, WorkspaceRow};
use crate::vmm::Running;
use crate::workspace::remote;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For the whole of a start from a snapshot, which has deadlines of its own.
const RESTORE_DEADLINE: Duration = Duration::from_secs(3600);
/// For the guest to take up what its new seed says.
const REJOIN_DEADLINE: Duration = Duration::from_secs(60);
/// Between two tries of a guest that has its old keys still.
const REJOIN_PERIOD: Duration = Duration::from_millis(100);
const ANSWER_BYTES_MAX: usize = 4096;
const RANDOM_BYTES: usize = 64;

impl Daemon {
    /// The VM that it is of must be at rest. A new one is made whole or not at all.
    pub fn snapshot_restore(&self, caller: &Caller, request: SnapshotRestoreRequest) -> Result<Begun> {
        const METHOD: &str = "snapshot.restore";
        let row = self.find_snapshot(caller, &request.snapshot)?;
        let Some(name) = request.new_vm else {
            let restore = self.restore_of(row, false)?;
            let vm = self.vm_of(caller, &restore.row)?;
            return self.lifecycle(caller, vm.as_str(), &ask(METHOD, &restore));
        };
        let restore = self.restore_of(row, true)?;
        let vm = self.create_from(caller, &restore.row, Some(name))?;
        self.in_new_vm(caller, METHOD, &vm, move |daemon, op, vm| daemon.go_on(op, vm, &restore))
    }

    /// The VM runs on.
    pub fn fork(&self, caller: &Caller, request: VmForkRequest) -> Result<Begun> {
        const METHOD: &str = "vm.fork";
        let found = self.resolve(caller, &request.vm)?;
        self.allow(&found, Verb::Guest)?;
        self.vmm.can_load(found.driver.as_deref().unwrap_or_default(), true)?;
        let vm = self.create_like(caller, &found, request.name)?;
        self.in_new_vm(caller, METHOD, &vm, move |daemon, op, vm| {
            let (row, user) = daemon.join_guest(&found, Use::Transfer, op.cancel())?;
            let captured = daemon.capture(&row, op).map_err(|e| e.context(format!("save vm {}", row.name)))?;
            drop(user);
            let restore =
                Restore { row: Arc::new(captured.row.clone()), files: captured.files.clone(), elsewhere: true, _in_use: None };
            let done = daemon.go_on(op, vm, &restore);
            daemon.discard(captured);
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
    ) -> Result<Begun> {
        let begun = self.begin_op(method, Some(vm.id.clone()), caller.uid, true);
        let op = begun.inspect_err(|_| self.delete_unasked(&vm.id))?;
        if let Err(e) = self.persist_op(&op) {
            op.finish(Err(e.clone()));
            self.delete_unasked(&vm.id);
            return Err(e);
        }
        let (daemon, id, vm, name) = (self.clone(), op.id().clone(), vm.id.clone(), vm.name.clone());
        self.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope(format!("{method} {vm}"));
            let result = work(&daemon, &op, &vm).and_then(|()| daemon.keep(&vm)).and_then(|vm| to_value(&VmReply { vm }));
            if result.is_err() {
                daemon.delete_unasked(&vm);
            }
            daemon.end_op(op, result.map_err(|e| e.context(format!("make vm {name}"))));
        })?;
        Ok(Begun::Op(id))
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
        self.create(caller, &request(name, shape))
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
        self.create(caller, &request(name, shape))
    }

    fn keep(&self, vm: &VmId) -> Result<Vm> {
        let guard = self.locks.vm.lock(vm);
        let row = self.row(vm)?;
        if row.state == VmState::Deleting {
            // It came to rest before it was to stay.
            return Err(Error::new(Kind::Superseded, "a later request ended it, and it was deleted")
                .hint(format!("try again: the VM that was to be {} is gone", row.name)));
        }
        let ((), ticket) = self.store.change(|tx| tx.update_vm(&guard, |row| row.rm = false))?;
        drop(guard);
        self.wait_durable(ticket)?;
        self.view(vm)
    }

    /// Starts the VM from there and waits until that has ended.
    fn go_on(&self, op: &OpHandle, vm: &VmId, restore: &Restore) -> Result<()> {
        let owner = self.row(vm)?.owner_uid;
        let caller = Caller { uid: owner, gid: 0, pid: 0 };
        op.progress("start from the snapshot");
        let start = match self.lifecycle(&caller, vm.as_str(), &ask("snapshot.restore", restore))? {
            Begun::Op(start) | Begun::Joined(start) => start,
            Begun::Done(_) => return Err(Error::internal(format!("vm {vm} runs before it was started"))),
        };
        let waited = self.ops.wait(&start, Instant::now() + RESTORE_DEADLINE, op.cancel());
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
        if let Err(e) = self.ops.cancel(start, CancelCause::ParentCancelled) {
            log::debug!("{e}");
        }
    }

    /// What can be seen before anything is begun.
    fn restore_of(&self, row: SnapshotRow, elsewhere: bool) -> Result<Restore> {
        self.vmm.can_load(&row.driver, elsewhere)?;
        if row.on_bridge != self.net.is_some() {
            let (then, now) = if row.on_bridge { ("bridge", "user") } else { ("user", "bridge") };
            let text =
                format!("restore snapshot {}: its guest was on the {then}-mode network, and VMs are on {now} now", row.name);
            return Err(Error::new(Kind::Unsupported, text).hint(format!("set driver = \"{then}\" under [network]")));
        }
        let gone =
            || Error::new(Kind::SnapshotNotFound, format!("snapshot {} is being deleted", row.name)).hint("fcctl snapshot list");
        let in_use = self.captures.uses.begin_use(&row.id).map(Arc::new).ok_or_else(gone)?;
        // It may have gone before it was marked.
        if self.store.read(|s| s.snapshot(&row.id).is_none()) {
            return Err(gone());
        }
        Ok(Restore { files: self.snapshot_files(&row.id), row: Arc::new(row), elsewhere, _in_use: Some(in_use) })
    }

    fn vm_of(&self, caller: &Caller, snapshot: &SnapshotRow) -> Result<VmId> {
        let row = self.resolve(caller, snapshot.vm.as_str()).map_err(|e| match e.kind() {
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

    /// Puts the snapshot's disks in the place of the VM's own, which are put back unless the guest goes on: see [`Daemon::keep_disks`].
    pub(super) fn take_disks(&self, boot: &mut Boot<'_>) -> Result<()> {
        let Some(restore) = &boot.claim.restore else { return Ok(()) };
        let (from, saved) = (&restore.files, &restore.row);
        // All that can be seen before the VM's own disks are gone.
        self.vmm.warm_up(&from.kernel, &boot.claim.cancel);
        self.vmm.can_load(&saved.driver, restore.elsewhere)?;
        for path in [&from.memory, &from.kernel, &from.initrd] {
            let len = std::fs::metadata(path).map_err(|e| damaged(saved, path, &e.to_string()))?.len();
            if len == 0 {
                return Err(damaged(saved, path, "it is empty"));
            }
        }
        for path in [&from.memory, &from.devices] {
            // An earlier fcd left them to a group that all VMMs had.
            super::snapshots::share_saved(path, boot.spec.credentials).map_err(|e| damaged(saved, path, &e.to_string()))?;
        }
        let method = Method::from_name(&saved.disk_driver).ok_or_else(|| {
            Error::new(Kind::Unsupported, format!("snapshot {}: no disk is made by {}", saved.name, saved.disk_driver))
        })?;
        let root = duplicate::Source { method: Some(method), path: &from.disk, base: &boot.image.rootfs };
        let work = boot
            .spec
            .work_disk
            .clone()
            .map(|to| (duplicate::Source { method: None, path: &from.work_disk, base: &from.work_disk }, to));
        let reporter = boot.claim.op().reporter();
        let told = &mut |done, total| reporter.progress_units(done, Some(total), "bytes");
        let (former, ticket) = self.store.change(|tx| Ok(former_disks::intend(tx, &boot.row, &boot.spec.tag)))?;
        self.wait_durable(ticket)?;
        boot.former_disks = Some(former);
        let mut copied = Vec::new();
        for (source, to) in std::iter::once((root, self.disk_path(&boot.row.id, method))).chain(work) {
            copied.push(duplicate::copy(self.commands.as_ref(), &source, &to, boot.spec.credentials, &boot.claim.cancel, told)?);
        }
        self.effects.before("set the disks aside")?;
        former_disks::set_aside(&boot.spec.dir)?;
        self.effects.before("replace the disks")?;
        copied.into_iter().try_for_each(duplicate::Copied::publish)?;
        // The row keeps what it says of the former ones.
        boot.row.disk_bytes = saved.disk_bytes;
        Ok(())
    }

    /// The guest goes on: from here on the disks are the VM's, with what they stand for.
    pub(super) fn keep_disks(&self, boot: &mut Boot<'_>) -> Result<()> {
        let (Some(restore), Some(former)) = (&boot.claim.restore, boot.former_disks.take()) else { return Ok(()) };
        let (saved, row, tag) = (&restore.row, &boot.row, &boot.spec.tag);
        let workspace = saved.workspace.clone().map(|w| WorkspaceRow { vm: row.id.clone(), generation: row.generation, ..w });
        let guard = self.locks.vm.lock(&row.id);
        let (replaced, ticket) = self.store.change(|tx| {
            match workspace {
                Some(workspace) => tx.put_workspace(workspace)?,
                None => tx.remove_workspace(&row.id),
            }
            tx.update_vm(&guard, |row| {
                (row.disk_bytes, row.guest_version) = (saved.disk_bytes, saved.guest_version);
                row.disk_driver = Some(saved.disk_driver.clone());
            })?;
            Ok(former_disks::let_go(tx, former, row, tag))
        })?;
        drop(guard);
        self.wait_durable(ticket)?;
        former_disks::remove(self, row, tag, replaced);
        Ok(())
    }

    /// What the guest is told when it goes on.
    pub(super) fn wake(&self, row: &VmRow, restore: &Restore) -> Result<RestoreSeed> {
        Ok(RestoreSeed {
            token: random_hex(RANDOM_BYTES / 4)?,
            now_s: now_s(),
            random: random_hex(RANDOM_BYTES)?,
            // Its tap comes later; where it will be is known.
            mac: self.net.as_ref().map(|net| net.lease(row.slot).map(|l| Mac::of(l.address).to_string())).transpose()?,
            machine_id: restore.elsewhere.then(|| random_hex(16)).transpose()?,
        })
    }

    /// Until the guest has taken up what its seed says.
    pub(super) fn wait_rejoined(&self, claim: &Claim, running: &Running, wake: &RestoreSeed) -> Result<()> {
        claim.op().progress("wait for the guest to find its way");
        let target = self.target_at(&self.row(&claim.vm)?, running.ssh_addr)?;
        let deadline = Instant::now() + REJOIN_DEADLINE;
        let command = format!(
            "until read -r seen </run/fcd/rejoined && [ \"$seen\" = {} ]; do /usr/lib/fcd/busybox usleep 50000; done 2>/dev/null",
            wake.token
        );
        // Its seed was written before its memory was read, which takes its time.
        let script = Script { command: &command, stdin: &[], deadline, output_bytes_max: ANSWER_BYTES_MAX };
        let (exit, _, complaint) = run_script(self.transport.as_ref(), &target, &script, &claim.cancel)
            .map_err(|e| e.context("wait for the guest to find its way"))?;
        match exit {
            Exit::Status(0) => {
                let command = set_clock_command();
                let script = Script { command: &command, ..script };
                run_script(self.transport.as_ref(), &target, &script, &claim.cancel).map(drop)
            }
            exit => Err(remote::failure("wait for the guest to find its way", &exit, &complaint)),
        }
    }

    /// A guest that goes on in another VM has the old one's keys for a moment.
    pub(super) fn wait_with_new_keys(&self, claim: &Claim, target: &Target, deadline: Instant) -> Result<()> {
        loop {
            match self.transport.wait_ready(target, deadline, &claim.cancel) {
                Err(e) if e.kind() == Kind::HostKeyMismatch && Instant::now() < deadline => {
                    crate::host::wait::sleep(REJOIN_PERIOD, &claim.cancel).map_err(|e| Error::io("wait for the guest", e))?;
                }
                other => return other,
            }
        }
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

fn damaged(snapshot: &SnapshotRow, path: &Path, why: &str) -> Error {
    Error::new(Kind::Host, format!("snapshot {} is damaged: {}: {why}", snapshot.name, path.display()))
        .hint(format!("nothing was changed; delete it: fcctl snapshot delete {}", snapshot.name))
}

/// To the time at which this is asked for.
pub(super) fn set_clock_command() -> String {
    format!("/usr/lib/fcd/busybox date -s @{} >/dev/null", now_s())
}

fn ask(method: &'static str, restore: &Restore) -> Ask {
    Ask { verb: Verb::Restore, method, timeout: None, restore: Some(restore.clone()) }
}

fn random_hex(bytes: usize) -> Result<String> {
    let mut random = vec![0u8; bytes];
    let mut filled = 0;
    while filled < bytes {
        filled += match rustix::rand::getrandom(&mut random[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => n,
            Err(rustix::io::Errno::INTR) => 0,
            Err(e) => return Err(Error::io("take random numbers", std::io::Error::from(e))),
        };
    }
    Ok(random.iter().map(|b| format!("{b:02x}")).collect())
}
