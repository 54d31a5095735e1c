//! Saves guests: memory and disks of one moment.
//!
//! A snapshot is a directory, and a row once it is complete. `private/` holds `memory` and
//! `devices`, which a VMM gets as a descriptor or a hard link. Beside it are `disk`, `work` and the
//! kernel. The directory is in the ledger until the row exists, and again while the snapshot is
//! being deleted. A snapshot outlives its VM.
//!
//! 1. The guest gets a script (`src/guest/rejoin.sh`) that waits for another seed drive. The script
//!    is part of the saved memory and continues in the restored guest.
//! 2. The guest is paused (`GuestHolder`; a resume by a user does not end that).
//! 3. The driver saves memory and devices. The disks are copied: shared blocks where the file
//!    system can, else everything but holes.
//! 4. The guest resumes. Zeroes in the memory file become holes and the copies are synced.
//!
//! No lock is held meanwhile. The operation is in the VM's cancel set, so a stop, kill or delete of
//! the VM ends it. A guard resumes the guest in any case. If the daemon dies, the next one resumes
//! the guest and removes the directory.
//!
//! A guest that is paused or does not respond cannot be saved.

use super::access::Caller;
use super::access::PREFIX_LEN_MIN;
use super::call::{CallOutcome, to_value};
use super::core::Core;
use super::create::Creator;
use super::guest_holder::GuestHolder;
use super::guest_scripts::GUEST_SHELL;
use super::guest_scripts::set_clock_command;
use super::guests::Guests;
use super::lifecycle::Lifecycle;
use super::listing::Position;
use super::network::Networks;
use super::resources;
use super::resources::Resources;
use super::runtime::Use;
use super::sessions::Sessions;
use super::snapshot_registry::CreateGuard;
use super::snapshot_registry::Files;
use super::snapshot_registry::SnapshotRegistry;
use super::snapshot_registry::allocated_bytes;
use super::snapshot_registry::disk_bytes;
use super::snapshot_registry::share_saved;
use super::spec::Specs;
use super::views::Views;
use crate::api::exec::Exit;
use crate::api::page;
use crate::api::snapshot::{
    Snapshot, SnapshotCreateRequest, SnapshotDeleteReply, SnapshotListReply, SnapshotListRequest,
    SnapshotReply,
};
use crate::disk::seed::UNIT_BYTES;
use crate::disk::{Method, duplicate, punch_zeroes, snapshot as device};
use crate::error::{Error, Kind, Result};
use crate::guest::Transport;
use crate::guest::{REJOIN, Script, run_script};
use crate::host::Commands;
use crate::host::Credentials;
use crate::host::fs::{create_dir, create_private_dir};
use crate::host::time::now_s;
use crate::ids::{NAME_LEN_MAX, SnapshotId, SnapshotName, VmName};
use crate::image::Images;
use crate::ops::OpHandle;
use crate::store::{SnapshotRow, State, VmRow, WorkspaceRow};
use crate::vmm::Driver;
use crate::vmm::SaveTo;
use crate::workspace::remote;
use serde_json::value::RawValue;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Limit of snapshots per uid.
pub const SNAPSHOTS_PER_UID_MAX: usize = 64;
/// How long to wait for the guest to start the script.
const PREPARE_DEADLINE: Duration = Duration::from_secs(30);
/// How long the preparation and the pause may take together. The script waits for a minute.
const HOLD_DEADLINE: Duration = Duration::from_secs(40);
const OUTPUT_BYTES_MAX: usize = 4096;
/// How much space a snapshot must leave free on the host.
const SPARE_BYTES: u64 = 256 << 20;

/// A complete snapshot that has no row yet. Its directory is in the ledger.
pub(super) struct Captured {
    create_guard: CreateGuard,
    ledger: u64,
    pub row: SnapshotRow,
    pub files: Files,
}

/// Makes snapshots, and new VMs from them.
#[derive(Clone)]
pub struct Snapshots {
    pub(super) core: Core,
    pub(super) views: Views,
    pub(super) networks: Networks,
    pub(super) specs: Specs,
    pub(super) guests: Guests,
    pub(super) sessions: Sessions,
    pub(super) resources: Resources,
    pub(super) creator: Creator,
    pub(super) lifecycle: Lifecycle,
    pub(super) snapshot_registry: SnapshotRegistry,
    pub(super) holder: GuestHolder,
    pub(super) images: Images,
    pub(super) commands: Arc<dyn Commands>,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) vmm: Arc<dyn Driver>,
}

impl Snapshots {
    pub fn snapshot_create(
        &self,
        caller: &Caller,
        request: SnapshotCreateRequest,
    ) -> Result<CallOutcome> {
        const METHOD: &str = "snapshot.create";
        let found = self.core.resolve(caller, &request.vm)?;
        self.core
            .store
            .read(|s| allow_another(s, found.owner_uid, request.name.as_ref()))?;
        let op = self
            .core
            .begin_op(METHOD, Some(found.id.clone()), caller.uid, true)?;
        let (row, user) = match self.sessions.join_guest(&found, Use::Transfer, op.cancel()) {
            Ok(joined) => joined,
            Err(e) => {
                op.refuse(&e);
                return Err(e);
            }
        };
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, snapshots) = (op.id().clone(), self.clone());
        self.core.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope(format!("{METHOD} {}", row.id));
            let made = snapshots
                .capture(&row, &op)
                .and_then(|captured| snapshots.publish(captured, request.name));
            drop(user);
            let result = made.and_then(|snapshot| to_value(&SnapshotReply { snapshot }));
            snapshots.core.end_op(
                op,
                result.map_err(|e| e.context(format!("save VM {}", row.name)).of_vm(&row.name)),
            );
        })?;
        Ok(CallOutcome::Op(id))
    }

    pub fn snapshot_list(
        &self,
        caller: &Caller,
        request: &SnapshotListRequest,
    ) -> Result<SnapshotListReply<Box<RawValue>>> {
        let after = request.after.as_deref().map(Position::parse).transpose()?;
        // The snapshots of a deleted VM are listed by the name or ID that it had.
        let is_of_vm = |row: &SnapshotRow| {
            request
                .vm
                .as_ref()
                .is_none_or(|vm| row.vm_name.as_str() == vm || row.vm.as_str() == vm)
        };
        let mut snapshots: Vec<Snapshot> = self.core.store.read(|s| {
            let seen = s
                .snapshots()
                .filter(|row| caller.may_see(row.owner_uid) && is_of_vm(row));
            seen.map(|row| view(row)).collect()
        });
        if let (Some(vm), true) = (&request.vm, snapshots.is_empty()) {
            self.core.resolve(caller, vm)?;
        }
        let position = |snapshot: &Snapshot| Position(snapshot.created_at, snapshot.name.clone());
        snapshots.sort_by_key(position);
        let rest = snapshots
            .into_iter()
            .map(|s| (position(&s), s))
            .filter(|(at, _)| after.as_ref().is_none_or(|after| at > after));
        let (snapshots, next) = page::fill(request.limit, rest)?;
        Ok(SnapshotListReply { snapshots, next })
    }

    pub fn snapshot_show(&self, caller: &Caller, snapshot: &str) -> Result<SnapshotReply> {
        Ok(SnapshotReply {
            snapshot: view(&self.find_snapshot(caller, snapshot)?),
        })
    }

    /// VMs that were started from the snapshot do not need it any more.
    pub fn snapshot_delete(&self, caller: &Caller, snapshot: &str) -> Result<SnapshotDeleteReply> {
        let SnapshotRow { id, name, .. } = self.find_snapshot(caller, snapshot)?;
        let _delete_guard = self
            .snapshot_registry
            .uses
            .begin_delete(&id)
            .ok_or_else(|| {
                Error::new(
                    Kind::Busy,
                    format!("delete snapshot {name}: a VM is being started from it"),
                )
                .hint("wait until the VM is running: fcctl op list")
            })?;
        let (ledger, ticket) = self.core.change(true, |tx| {
            tx.remove_snapshot(&id);
            Ok(tx.intend(None, 0, resources::snapshot::KIND, id.as_str()))
        })?;
        self.core.wait_durable(ticket)?;
        self.discard_files(&id, ledger);
        Ok(SnapshotDeleteReply { deleted: id })
    }

    /// Finds a snapshot by name, ID, or the beginning of an ID.
    pub(super) fn find_snapshot(&self, caller: &Caller, text: &str) -> Result<SnapshotRow> {
        let mut found: Vec<SnapshotRow> = self.core.store.read(|s| {
            let seen = || s.snapshots().filter(|row| caller.may_see(row.owner_uid));
            let exact = seen().find(|row| row.name.as_str() == text || row.id.as_str() == text);
            let by_prefix = |row: &SnapshotRow| {
                text.len() >= PREFIX_LEN_MIN && row.id.as_str().starts_with(text)
            };
            exact.map_or_else(
                || {
                    seen()
                        .filter(|row| by_prefix(row))
                        .map(|r| (**r).clone())
                        .collect()
                },
                |r| vec![(**r).clone()],
            )
        });
        match (found.pop(), found.is_empty()) {
            (Some(row), true) => Ok(row),
            (Some(_), false) => Err(Error::new(
                Kind::AmbiguousPrefix,
                format!("{text:?} matches several snapshots"),
            )
            .hint("use the name or a longer part of the ID: fcctl snapshot list")),
            (None, _) => {
                let shown: String = text.chars().take(2 * NAME_LEN_MAX).collect();
                Err(
                    Error::new(Kind::SnapshotNotFound, format!("no snapshot {shown:?}"))
                        .hint("fcctl snapshot list"),
                )
            }
        }
    }

    /// Saves the guest of a VM whose cancel set the operation has joined. After an error the files
    /// are removed, or are in the ledger so that they will be.
    pub(super) fn capture(&self, row: &VmRow, op: &OpHandle) -> Result<Captured> {
        let create_guard = self.snapshot_registry.begin(row)?;
        let files = self.snapshot_registry.files(&create_guard.id);
        self.require_room(row)?;
        let (ledger, ticket) = self.core.store.change(|tx| {
            Ok(tx.intend(
                None,
                row.generation,
                resources::snapshot::KIND,
                create_guard.id.as_str(),
            ))
        })?;
        self.core.wait_durable(ticket)?;
        match self.fill(row, op, &create_guard.id, &files) {
            Ok(row) => Ok(Captured {
                create_guard,
                ledger,
                row,
                files,
            }),
            Err(e) => {
                let id = create_guard.id.clone();
                drop(create_guard);
                self.discard_files(&id, ledger);
                Err(e)
            }
        }
    }

    fn fill(
        &self,
        row: &VmRow,
        op: &OpHandle,
        id: &SnapshotId,
        files: &Files,
    ) -> Result<SnapshotRow> {
        self.core.effects.before("make the snapshot's directory")?;
        // VMMs of other uids must reach the files in it that are meant for them.
        drop(create_dir(&files.dir, 0o711)?);
        // But not the guest's memory, which a VMM gets as a link or a descriptor.
        drop(create_private_dir(&files.private)?);
        let image = self.images.get(&row.shape.image)?;
        let spec = self.specs.spec(row, &image);
        link(&spec.kernel, &files.kernel)?;
        link(&spec.initrd, &files.initrd)?;
        for path in [&files.memory, &files.devices] {
            let file = new_file(path)?;
            let owned = spec.credentials.map_or(Ok(()), |owner| {
                std::os::unix::fs::fchown(&file, Some(owner.uid), Some(owner.gid))
            });
            owned.map_err(|e| Error::io(format!("change the owner of {}", path.display()), e))?;
        }
        if std::fs::metadata(&spec.seed).is_ok_and(|seed| seed.len() < UNIT_BYTES as u64) {
            let text = format!(
                "VM {} was started by an earlier fcd, and its seed drive is too short for a restore",
                row.name
            );
            return Err(Error::new(Kind::Unsupported, text)
                .hint(format!("restart it: fcctl vm restart {}", row.name)));
        }
        let method = self
            .specs
            .disk_method(row)
            .ok_or_else(|| Error::internal(format!("VM {} has no disk", row.name)))?;
        let since = Instant::now();
        op.progress("prepare the guest");
        self.prepare_guest(row, op)?;
        let (version, copied, workspace) = {
            op.progress("pause the guest");
            let _held = self.holder.hold(row)?;
            if since.elapsed() > HOLD_DEADLINE {
                return Err(
                    Error::new(Kind::Timeout, "the guest was not paused in time").hint("try again"),
                );
            }
            // The row is the one from the call, because another start of the VM would have another
            // directory.
            let identity = row
                .identity
                .clone()
                .ok_or_else(|| Error::internal(format!("VM {} has no VMM", row.name)))?;
            op.progress("save the memory");
            self.core.effects.before("save the guest")?;
            let to = SaveTo {
                memory: &files.memory,
                devices: &files.devices,
            };
            let version = self.vmm.save(&spec, &identity, to, op.cancel())?;
            op.progress("copy the disks");
            self.core.effects.before("copy the disks")?;
            (
                version,
                self.copy_disks(row, op, files, method)?,
                self.core.store.read(|s| s.workspace(&row.id).cloned()),
            )
        };
        self.set_clock(row, op);
        op.progress("sync the snapshot");
        copied
            .into_iter()
            .try_for_each(duplicate::Copied::publish)?;
        free_zeroes(files, op);
        sync_saved(files, spec.credentials)?;
        if let Some(cause) = op.cancel().cause() {
            return Err(Error::new(Kind::Cancelled, format!("cancelled: {cause}")));
        }
        let saved = describe(
            row,
            id,
            files,
            method,
            workspace.map(|w| WorkspaceRow::clone(&w)),
        );
        Ok(SnapshotRow {
            vmm_version: Some(version),
            ..saved
        })
    }

    /// Sets the guest's clock after the pause. If the guest is unreachable, its clock stays behind.
    fn set_clock(&self, row: &VmRow, op: &OpHandle) {
        let command = set_clock_command();
        let deadline = Instant::now() + PREPARE_DEADLINE;
        let script = Script {
            command: &command,
            stdin: &[],
            deadline,
            output_bytes_max: OUTPUT_BYTES_MAX,
        };
        let set = self
            .guests
            .target(row)
            .and_then(|target| run_script(self.transport.as_ref(), &target, &script, op.cancel()));
        if !set.is_ok_and(|output| output.exit == Exit::Status(0)) {
            log::info!(
                "the clock of VM {} may be late, because the VM was paused while it was saved",
                row.name
            );
        }
    }

    fn prepare_guest(&self, row: &VmRow, op: &OpHandle) -> Result<()> {
        let deadline = Instant::now() + PREPARE_DEADLINE;
        let script = Script {
            command: GUEST_SHELL,
            stdin: REJOIN.as_bytes(),
            deadline,
            output_bytes_max: OUTPUT_BYTES_MAX,
        };
        let output = run_script(
            self.transport.as_ref(),
            &self.guests.target(row)?,
            &script,
            op.cancel(),
        )?;
        if output.exit == Exit::Status(0) && output.stdout == b"ready\n" {
            return Ok(());
        }
        Err(remote::failure(
            "prepare the guest",
            &output.exit,
            &output.stderr,
        ))
    }

    fn copy_disks(
        &self,
        row: &VmRow,
        op: &OpHandle,
        files: &Files,
        method: Method,
    ) -> Result<Vec<duplicate::Copied>> {
        let image = self.images.get(&row.shape.image)?;
        let spec = self.specs.spec(row, &image);
        if method == Method::DmSnapshot {
            device::flush(&spec.disk)?;
        }
        let path = self.specs.disk_path(&row.id, method);
        let root = duplicate::Source {
            method: Some(method),
            path: &path,
            base: &image.rootfs,
        };
        let work = spec.work_disk.as_ref().map(|path| duplicate::Source {
            method: None,
            path,
            base: path,
        });
        let reporter = op.reporter();
        let report = &mut |done, total| reporter.progress_units(done, Some(total), "bytes");
        let mut copied = Vec::new();
        for (source, to) in
            std::iter::once((root, &files.disk)).chain(work.map(|work| (work, &files.work_disk)))
        {
            copied.push(duplicate::copy(
                self.commands.as_ref(),
                &source,
                to,
                None,
                op.cancel(),
                report,
            )?);
        }
        Ok(copied)
    }

    fn publish(&self, captured: Captured, name: Option<SnapshotName>) -> Result<Snapshot> {
        let Captured {
            create_guard,
            ledger,
            row,
            ..
        } = captured;
        let published = self.core.store.change(|tx| {
            allow_another(tx, row.owner_uid, name.as_ref())?;
            let name = name.unwrap_or_else(|| some_name(tx, &row.vm_name, &row.id));
            let row = SnapshotRow { name, ..row };
            let snapshot = view(&row);
            tx.put_snapshot(row)?;
            tx.strike(ledger);
            Ok(snapshot)
        });
        match published
            .and_then(|(snapshot, ticket)| self.core.wait_durable(ticket).map(|()| snapshot))
        {
            Ok(snapshot) => Ok(snapshot),
            Err(e) => {
                let id = create_guard.id.clone();
                drop(create_guard);
                self.discard_files(&id, ledger);
                Err(e)
            }
        }
    }

    /// Deletes the files of a snapshot that was not published.
    pub(super) fn discard(&self, captured: Captured) {
        let Captured {
            create_guard,
            ledger,
            ..
        } = captured;
        let id = create_guard.id.clone();
        drop(create_guard);
        self.discard_files(&id, ledger);
    }

    /// Deletes the files of a snapshot that has no row and is not in use.
    fn discard_files(&self, id: &SnapshotId, ledger: u64) {
        if let Err(e) = resources::discard_snapshot(&self.resources, id, ledger) {
            log::warn!("{e}; retrying every minute");
        }
    }

    /// Some guests get an I/O error when the host's disk is full. So no snapshot is made that could
    /// fill it.
    fn require_room(&self, row: &VmRow) -> Result<()> {
        let needed =
            (row.shape.mem_mib << 20) + disk_bytes(&self.core.vm_dir(&row.id)) + SPARE_BYTES;
        let free = crate::host::fs::space(&self.core.state_dir)?.free_bytes;
        if free >= needed {
            return Ok(());
        }
        let mib = |bytes: u64| bytes >> 20;
        let text = format!(
            "a snapshot needs up to {} MiB, but only {} MiB are free",
            mib(needed),
            mib(free)
        );
        Err(Error::new(Kind::DiskFull, text).hint(format!(
            "free some space (df -h {})",
            self.core.state_dir.display()
        )))
    }
}

/// Frees the zeroes of the memory file: a VMM may have written memory that the guest never used.
/// The guest is running again by now, so nobody waits for this.
fn free_zeroes(files: &Files, op: &OpHandle) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&files.memory);
    let freed = file
        .map_err(|e| Error::io("open", e))
        .and_then(|file| punch_zeroes(&file, op.cancel()));
    match freed {
        Ok(bytes) => log::debug!(
            "{}: {} MiB were zeroes",
            files.memory.display(),
            bytes >> 20
        ),
        Err(e) if e.kind() == Kind::Cancelled => {}
        Err(e) => log::warn!(
            "{}: {e}; the snapshot takes more space than it needs",
            files.memory.display()
        ),
    }
}

fn sync_saved(files: &Files, credentials: Option<Credentials>) -> Result<()> {
    for path in [&files.memory, &files.devices] {
        let file = share_saved(path, credentials)?;
        file.sync_all()
            .map_err(|e| Error::io(format!("sync {}", path.display()), e))?;
    }
    crate::host::fs::sync_dir(&files.private)?;
    crate::host::fs::sync_dir(&files.dir)
}

fn describe(
    row: &VmRow,
    id: &SnapshotId,
    files: &Files,
    method: Method,
    workspace: Option<WorkspaceRow>,
) -> SnapshotRow {
    SnapshotRow {
        id: id.clone(),
        // `publish` replaces it.
        name: id_name(id),
        owner_uid: row.owner_uid,
        vm: row.id.clone(),
        vm_name: row.name.clone(),
        created_at: now_s(),
        shape: row.shape.clone(),
        disk_driver: method.name().to_owned(),
        guest_version: row.guest_version,
        has_balloon: row.has_balloon,
        balloon_mib: row.balloon_mib,
        on_bridge: row.tap.is_some(),
        driver: row.driver.clone().unwrap_or_default(),
        vmm_version: None,
        workspace,
        bytes: allocated_bytes(&files.dir) + allocated_bytes(&files.private),
    }
}

fn view(row: &SnapshotRow) -> Snapshot {
    Snapshot {
        id: row.id.clone(),
        name: row.name.clone(),
        owner_uid: row.owner_uid,
        vm: row.vm.clone(),
        vm_name: row.vm_name.clone(),
        created_at: row.created_at,
        image: row.shape.image.clone(),
        vcpus: row.shape.vcpus,
        mem_mib: row.shape.mem_mib,
        disk_bytes: row.shape.disk_bytes,
        work_disk_bytes: row.shape.work_disk_bytes,
        net: row.shape.net,
        driver: row.driver.clone(),
        vmm_version: row.vmm_version.clone(),
        bytes: row.bytes,
    }
}

fn allow_another(state: &State, owner_uid: u32, name: Option<&SnapshotName>) -> Result<()> {
    if let Some(name) = name.filter(|name| state.snapshot_by_name(name).is_some()) {
        let text = format!("the snapshot name {name} is taken");
        return Err(Error::new(Kind::NameTaken, text).hint("choose another with --name"));
    }
    let owned = state
        .snapshots()
        .filter(|row| row.owner_uid == owner_uid)
        .count();
    if owned < SNAPSHOTS_PER_UID_MAX {
        return Ok(());
    }
    Err(Error::new(
        Kind::Exhausted,
        format!("uid {owner_uid} has {owned} snapshots, which is the limit"),
    )
    .hint("delete some: fcctl snapshot list, fcctl snapshot delete"))
}

/// Picks a free name: `web-1`, `web-2` and so on.
fn some_name(state: &State, vm: &VmName, id: &SnapshotId) -> SnapshotName {
    let candidates = (1..=SNAPSHOTS_PER_UID_MAX * 2)
        .filter_map(|n| format!("{vm}-{n}").parse::<SnapshotName>().ok());
    candidates
        .into_iter()
        .find(|name| state.snapshot_by_name(name).is_none())
        .unwrap_or_else(|| id_name(id))
}

/// Makes a name of an ID. It has a prefix because an ID may begin with a digit and a name cannot.
fn id_name(id: &SnapshotId) -> SnapshotName {
    format!("s{id}").parse().expect("letters and digits")
}

fn new_file(path: &Path) -> Result<File> {
    let options = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .clone();
    options
        .open(path)
        .map_err(|e| Error::io(format!("create {}", path.display()), e))
}

/// Makes a hard link if the file system supports it, else a copy.
fn link(from: &Path, to: &Path) -> Result<()> {
    std::fs::hard_link(from, to)
        .or_else(|_| std::fs::copy(from, to).map(drop))
        .map_err(|e| {
            let doing = format!("copy {} to {}", from.display(), to.display());
            Error::io(doing, e)
        })
}
