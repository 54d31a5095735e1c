//! Writes the files of snapshots: a guest's memory and disks at one moment.
//!
//! A snapshot is a directory and, once it is complete, a row. `private/` holds `memory` and
//! `devices`, which a VMM gets as a descriptor or a hard link. The files of the disks, the kernel,
//! the initrd and the guest runtime are next to it. The directory is in the ledger until the row
//! exists, and again while the snapshot is being deleted. A snapshot outlives its VM.
//!
//! 1. The guest gets a script (`src/guest/rejoin.sh`) that waits for another seed drive. The script
//!    is part of the saved memory and continues in the restored guest.
//! 2. The guest is paused (`GuestHolder`). A resume by a user does not end this pause.
//! 3. The driver saves memory and devices. The disks are copied: with shared blocks if the file
//!    system supports them, else without holes.
//! 4. The guest resumes. Zeroes in the memory file become holes and the copies are synced.
//!
//! No lock is held during these steps. The operation is in the VM's cancel set, so a stop, kill or
//! delete of the VM ends it. A guard resumes the guest even after an error. If the daemon dies, the
//! next daemon resumes the guest and removes the directory.
//!
//! A guest that is paused or does not respond cannot be saved.

use super::command_defaults;
use super::core::Core;
use super::guest_holder::GuestHolder;
use super::guest_scripts::Layout;
use super::guests::Guests;
use super::resources::{self, Resources};
use super::snapshot_registry::{
    CreateGuard, Files, SnapshotRegistry, allocated_bytes, disk_bytes, share_saved,
};
use super::spec::Specs;
use crate::api::exec::Exit;
use crate::disk::seed::UNIT_BYTES;
use crate::disk::{Method, duplicate, punch_zeroes, snapshot as device};
use crate::error::{Error, Kind, Result};
use crate::guest::{Script, Transport, run_script};
use crate::host::fs::{create_dir, create_private_dir};
use crate::host::time::now_s;
use crate::host::{Commands, Credentials};
use crate::ids::{SnapshotId, SnapshotName};
use crate::image::{ImageInfo, Images};
use crate::ops::OpHandle;
use crate::sched::Instant;
use crate::store::{SnapshotRow, VmRow, WorkspaceRow};
use crate::vmm::{SaveTo, VmmSpec};
use crate::workspace::remote;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

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
    /// The ledger row of the snapshot's directory.
    pub ledger: u64,
    pub row: SnapshotRow,
    pub files: Files,
}

/// The guest to save, and the destination.
struct Source<'a> {
    row: &'a VmRow,
    spec: &'a VmmSpec,
    image: &'a ImageInfo,
    method: Method,
    files: &'a Files,
}

/// The results of the steps that ran while the guest was paused.
struct Saved {
    vmm_version: String,
    /// Copies that do not have their final names yet.
    disks: Vec<duplicate::Copied>,
    workspace: Option<Arc<WorkspaceRow>>,
}

/// Saves guests.
#[derive(Clone)]
pub(super) struct SnapshotWriter {
    pub core: Core,
    pub specs: Specs,
    pub guests: Guests,
    pub resources: Resources,
    pub snapshot_registry: SnapshotRegistry,
    pub holder: GuestHolder,
    pub images: Images,
    pub commands: Arc<dyn Commands>,
    pub transport: Arc<dyn Transport>,
}

impl SnapshotWriter {
    /// Saves the guest of a VM whose cancel set the operation has joined. After an error, the files
    /// are either removed or in the ledger, to be removed later.
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
                self.discard_guarded(create_guard, ledger);
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
        make_directories(files)?;
        let image = self.images.get(&row.shape.image)?;
        let spec = self.specs.spec(row, &image);
        make_files(files, &spec)?;
        command_defaults::save(&self.core, row, files)?;
        require_long_seed(row, &spec)?;
        let method = self
            .specs
            .disk_method(row)
            .ok_or_else(|| Error::internal(format!("VM {} has no disk", row.name)))?;
        let source = Source {
            row,
            spec: &spec,
            image: &image,
            method,
            files,
        };
        let saved = self.save_guest(&source, op)?;
        self.set_clock(row, op);
        op.progress("sync the snapshot");
        saved
            .disks
            .into_iter()
            .try_for_each(duplicate::Copied::publish)?;
        free_zeroes(files, op);
        sync_saved(files, spec.credentials)?;
        if let Some(cause) = op.cancel().cause() {
            return Err(Error::new(Kind::Cancelled, format!("cancelled: {cause}")));
        }
        Ok(SnapshotRow {
            id: id.clone(),
            // The snapshot gets its real name when it is published.
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
            vmm_version: Some(saved.vmm_version),
            workspace: saved.workspace.map(|w| WorkspaceRow::clone(&w)),
            bytes: allocated_bytes(&files.dir) + allocated_bytes(&files.private),
        })
    }

    /// Saves memory, devices and disks at one moment. The guest is paused for the save and resumed
    /// before this returns.
    fn save_guest(&self, source: &Source<'_>, op: &OpHandle) -> Result<Saved> {
        let row = source.row;
        let since = Instant::now();
        op.progress("prepare the guest");
        self.prepare_guest(row, op)?;
        op.progress("pause the guest");
        let _held = self.holder.hold(row)?;
        if since.elapsed() > HOLD_DEADLINE {
            return Err(
                Error::new(Kind::Timeout, "the guest was not paused in time").hint("try again"),
            );
        }
        // Use the row from the beginning of the call, because a later start of the VM would use
        // another directory.
        let identity = row
            .identity
            .as_ref()
            .ok_or_else(|| Error::internal(format!("VM {} has no VMM", row.name)))?;
        op.progress("save the memory");
        self.core.effects.before("save the guest")?;
        let to = SaveTo {
            memory: &source.files.memory,
            devices: &source.files.devices,
        };
        let running = self.holder.vmms.vm(source.row, identity)?;
        let vmm_version = running.save(source.spec, to, op.cancel())?;
        op.progress("copy the disks");
        self.core.effects.before("copy the disks")?;
        Ok(Saved {
            vmm_version,
            disks: self.copy_disks(source, op)?,
            workspace: self.core.store.read(|s| s.workspace(&row.id).cloned()),
        })
    }

    /// Sets the guest's clock after the pause. If the guest is unreachable, its clock stays behind.
    fn set_clock(&self, row: &VmRow, op: &OpHandle) {
        let command = Layout::of(row).set_clock_command();
        let deadline = Instant::now() + PREPARE_DEADLINE;
        let script = Script {
            command: &command,
            stdin: &[],
            deadline,
            output_bytes_max: OUTPUT_BYTES_MAX,
        };
        let set = self
            .guests
            .script_target(row)
            .and_then(|target| run_script(self.transport.as_ref(), &target, &script, op.cancel()));
        if !set.is_ok_and(|output| output.exit == Exit::Status(0)) {
            log::info!(
                "the clock of VM {} may be behind, because the VM was paused while it was saved",
                row.name
            );
        }
    }

    fn prepare_guest(&self, row: &VmRow, op: &OpHandle) -> Result<()> {
        let deadline = Instant::now() + PREPARE_DEADLINE;
        let layout = Layout::of(row);
        let (command, rejoin) = (layout.script_command(), layout.rejoin_script());
        let script = Script {
            command: &command,
            stdin: rejoin.as_bytes(),
            deadline,
            output_bytes_max: OUTPUT_BYTES_MAX,
        };
        let output = run_script(
            self.transport.as_ref(),
            &self.guests.script_target(row)?,
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

    fn copy_disks(&self, source: &Source<'_>, op: &OpHandle) -> Result<Vec<duplicate::Copied>> {
        let &Source { spec, method, .. } = source;
        if method == Method::DmSnapshot {
            device::flush(&spec.disk)?;
        }
        let path = self.specs.disk_path(&source.row.id, method);
        let root = duplicate::Source {
            method: Some(method),
            path: &path,
            base: &source.image.rootfs,
        };
        let work = spec.work_disk.as_ref().map(|path| duplicate::Source {
            method: None,
            path,
            base: path,
        });
        let reporter = op.reporter();
        let report = &mut |done, total| reporter.progress_units(done, Some(total), "bytes");
        let mut copied = Vec::new();
        let work = work.map(|work| (work, &source.files.work_disk));
        for (from, to) in std::iter::once((root, &source.files.disk)).chain(work) {
            copied.push(duplicate::copy(
                self.commands.as_ref(),
                &from,
                to,
                None,
                op.cancel(),
                report,
            )?);
        }
        Ok(copied)
    }

    /// Deletes the files of a snapshot that was not published.
    pub(super) fn discard(&self, captured: Captured) {
        self.discard_guarded(captured.create_guard, captured.ledger);
    }

    fn discard_guarded(&self, create_guard: CreateGuard, ledger: u64) {
        let id = create_guard.id.clone();
        // Drop the guard first, because the files of a snapshot that is being made are not deleted.
        drop(create_guard);
        self.discard_files(&id, ledger);
    }

    /// Deletes the files of a snapshot that has no row and is not in use. If that fails, the next
    /// sweep retries it.
    pub(super) fn discard_files(&self, id: &SnapshotId, ledger: u64) {
        if let Err(e) = resources::discard_snapshot(&self.resources, id, ledger) {
            log::warn!("{e}; retrying every minute");
        }
    }

    /// Fails if the snapshot could fill the host's disk, because some guests get an I/O error when
    /// that disk is full.
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

fn make_directories(files: &Files) -> Result<()> {
    // VMMs with other uids must reach their files in this directory.
    drop(create_dir(&files.dir, 0o711)?);
    // They must not reach the guest's memory, which a VMM gets as a link or a descriptor.
    drop(create_private_dir(&files.private)?);
    Ok(())
}

/// Links the kernel, the initrd and the guest runtime's disk, and creates the files that the VMM
/// writes.
fn make_files(files: &Files, spec: &VmmSpec) -> Result<()> {
    link(&spec.kernel, &files.kernel)?;
    link(&spec.initrd, &files.initrd)?;
    if let Some(disk) = &spec.runtime_disk {
        link(disk, &files.runtime)?;
    }
    for path in [&files.memory, &files.devices] {
        let file = new_file(path)?;
        let owned = spec.credentials.map_or(Ok(()), |owner| {
            std::os::unix::fs::fchown(&file, Some(owner.uid), Some(owner.gid))
        });
        owned.map_err(|e| Error::io(format!("change the owner of {}", path.display()), e))?;
    }
    Ok(())
}

/// Fails if the new seed of a restore would not fit into the guest's seed drive.
fn require_long_seed(row: &VmRow, spec: &VmmSpec) -> Result<()> {
    crate::locks::may_block("file access");
    if std::fs::metadata(&spec.seed).is_ok_and(|seed| seed.len() < UNIT_BYTES as u64) {
        let text = format!(
            "VM {} was started by an earlier fcd, and its seed drive is too short for a restore",
            row.name
        );
        return Err(Error::new(Kind::Unsupported, text)
            .hint(format!("restart it: fcctl vm restart {}", row.name)));
    }
    Ok(())
}

/// Turns the zeroes of the memory file into holes. A VMM may have written memory that the guest
/// never used. The guest has already resumed, so this does not prolong its pause.
fn free_zeroes(files: &Files, op: &OpHandle) {
    crate::locks::may_block("file access");
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
    crate::locks::may_block("file access");
    for path in [&files.memory, &files.devices] {
        let file = share_saved(path, credentials)?;
        file.sync_all()
            .map_err(|e| Error::io(format!("sync {}", path.display()), e))?;
    }
    crate::host::fs::sync_dir(&files.private)?;
    crate::host::fs::sync_dir(&files.dir)
}

fn new_file(path: &Path) -> Result<File> {
    crate::locks::may_block("file access");
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
    crate::locks::may_block("file access");
    std::fs::hard_link(from, to)
        .or_else(|_| std::fs::copy(from, to).map(drop))
        .map_err(|e| {
            let doing = format!("copy {} to {}", from.display(), to.display());
            Error::io(doing, e)
        })
}

/// Makes a name from an ID. The name has a prefix, because an ID may begin with a digit and a name
/// may not.
pub(super) fn id_name(id: &SnapshotId) -> SnapshotName {
    format!("s{id}").parse().expect("letters and digits")
}
