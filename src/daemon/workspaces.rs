//! Imports and exports workspaces. The VM's lock is held for a moment, to check the state and join
//! the cancel set. The workspace lock is held during the guest I/O, by the operation's own thread.
//! A pool worker moves the bytes (`transfer.rs`).

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::core::Core;
use super::guests::Guests;
use super::notes::Notes;
use super::rate_floor::Moved;
use super::rate_floor::RateFloor;
use super::runtime::Use;
use super::runtime::User;
use super::sessions::Sessions;
use super::transfer::Imported;
use super::transfer::Transfer;
use super::views::Views;
use crate::api::vm::{WorkspaceInfo, WorkspaceState};
use crate::api::workspace::{ExportReply, ExportRequest, PrepareReply, PrepareRequest};
use crate::error::{Error, Kind, Result};
use crate::guest::Transport;
use crate::guest::io::fifo::{self, Direction};
use crate::host::time::now_s;
use crate::host::wait::{cancelled, cancelled_by, sleep};
use crate::ids::VmId;
use crate::locks::{CancelCause, KeyGuard};
use crate::ops::OpHandle;
use crate::pool::Pool;
use crate::pool::QueueSlot;
use crate::sched::Instant;
use crate::store::{VmRow, WorkspaceOf, WorkspaceRow};
use crate::workspace::{encode, guest_path, remote};
use serde_json::Value;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// Time limit for a whole transfer. A transfer that moves nothing ends after `transfer_idle_s`.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// How long a transfer waits to learn why its VM left `running`. This normally takes microseconds.
const CAUSE_DEADLINE: Duration = Duration::from_secs(1);

/// Everything that a transfer holds from its call to its end: a place in the VM's cancel set and a
/// slot in the pool's queue.
struct Admitted {
    row: VmRow,
    op: OpHandle,
    stream: Stream,
    _user: User,
}

/// The stream of a transfer, and the slot of the worker that copies it.
struct Stream {
    fifo: OwnedFd,
    slot: QueueSlot,
    /// True if the transfer fails instead of waiting for another transfer of the VM.
    no_wait: bool,
}

/// Imports and exports of workspaces.
#[derive(Clone)]
pub struct Transfers {
    pub(super) core: Core,
    pub(super) views: Views,
    pub(super) guests: Guests,
    pub(super) sessions: Sessions,
    pub pool: Arc<Pool>,
    pub(super) transport: Arc<dyn Transport>,
}

impl Transfers {
    /// Returns the directories below which a workspace may be.
    pub fn guest_roots(&self) -> Vec<String> {
        guest_path::ROOTS.iter().map(|r| (*r).to_owned()).collect()
    }

    /// Begins an import. The stream comes through the FIFO in `fds`; `notes` carries the `ready`
    /// notification.
    pub fn prepare(
        &self,
        caller: &Caller,
        mut request: PrepareRequest,
        fds: Vec<OwnedFd>,
        notes: &Notes,
    ) -> Result<CallOutcome> {
        request.guest_path = guest_path::validate(&request.guest_path)?;
        guest_path::validate_subdir(&request.subdir)?;
        let method = "workspace.prepare";
        let admitted = self.admit(
            caller,
            &request.vm,
            method,
            request.no_wait,
            (fds, Direction::Read),
        )?;
        let (doing, notes) = ("import into", notes.clone());
        self.start(
            method,
            doing,
            admitted,
            move |transfers, row, op, stream| {
                transfers.run_prepare(row, op, stream, (&request, notes))
            },
        )
    }

    /// Begins an export into the FIFO in `fds`. The export waits for another transfer of the VM,
    /// unless the request has `no_wait`.
    pub fn export(
        &self,
        caller: &Caller,
        request: ExportRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<CallOutcome> {
        let method = "workspace.export";
        let admitted = self.admit(
            caller,
            &request.vm,
            method,
            request.no_wait,
            (fds, Direction::Write),
        )?;
        self.start(
            method,
            "export from",
            admitted,
            move |transfers, row, op, stream| transfers.run_export(row, op, stream, &request),
        )
    }

    /// Starts the thread of a transfer, which ends the operation with the result of `work`.
    fn start(
        &self,
        method: &'static str,
        doing: &'static str,
        admitted: Admitted,
        work: impl FnOnce(&Self, &VmRow, &OpHandle, Stream) -> Result<Value> + Send + 'static,
    ) -> Result<CallOutcome> {
        let (id, transfers) = (admitted.op.id().clone(), self.clone());
        self.core.spawn(&format!("op-{id}"), move || {
            // Move the whole value here, so that the transfer leaves the VM's cancel set at the
            // end.
            let Admitted {
                row,
                op,
                stream,
                _user,
            } = admitted;
            let _label = crate::locks::operation_scope(format!("{method} {}", row.id));
            let result = work(&transfers, &row, &op, stream).map_err(|e| {
                let e = transfers.explain_full_disk(&op, e);
                let e = transfers.sessions.explain_pause(&row, e);
                e.context(format!("{doing} VM {}", row.name))
                    .of_vm(&row.name)
            });
            transfers.core.end_op(op, result);
        })?;
        Ok(CallOutcome::Op(id))
    }

    /// Admits a transfer: checks the descriptor and the VM's state, joins the VM's cancel set,
    /// takes a slot in the queue and records the operation. Does not wait for other transfers.
    fn admit(
        &self,
        caller: &Caller,
        vm: &str,
        method: &str,
        no_wait: bool,
        (fds, direction): (Vec<OwnedFd>, Direction),
    ) -> Result<Admitted> {
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| {
            Error::new(
                Kind::InvalidRequest,
                format!("{method} takes one descriptor, but got {}", fds.len()),
            )
            .hint("pass one end of a FIFO")
        })?;
        let fifo = fifo::accept(fd, direction)?;
        let found = self.core.resolve(caller, vm)?;
        let op = self
            .core
            .begin_op(method, Some(found.id.clone()), caller.uid, true)?;
        let joined = self.sessions.join_guest(&found, Use::Transfer, op.cancel());
        let (row, _user, slot) =
            match joined.and_then(|(row, user)| Ok((row, user, self.pool.reserve(caller.uid)?))) {
                Ok(joined) => joined,
                Err(e) => {
                    op.refuse(&e);
                    return Err(e);
                }
            };
        match self.core.persist_op(&op) {
            Ok(()) => Ok(Admitted {
                row,
                op,
                stream: Stream {
                    fifo,
                    slot,
                    no_wait,
                },
                _user,
            }),
            Err(e) => {
                op.finish(Err(e.clone()));
                Err(e)
            }
        }
    }

    /// Reports a transfer that was cancelled because of a full disk as `disk_full`.
    fn explain_full_disk(&self, op: &OpHandle, e: Error) -> Error {
        let is_paused =
            e.kind() == Kind::Cancelled && op.cancel().cause() == Some(&CancelCause::HostDiskFull);
        if is_paused {
            e.with_kind(Kind::DiskFull)
                .hint(self.sessions.disk_full_hint())
        } else {
            e
        }
    }

    fn run_prepare(
        &self,
        row: &VmRow,
        op: &OpHandle,
        stream: Stream,
        (request, notes): (&PrepareRequest, Notes),
    ) -> Result<Value> {
        #[cfg(feature = "one-lock")]
        let _negative_control = self.core.locks.vm.lock(&row.id);
        let guard = self.lock_workspace(op, row, stream.no_wait)?;
        let transfer = self.transfer(&guard.key().0, op, stream.fifo, &request.guest_path)?;
        let row_at_start = self.mark_incomplete(&guard, &transfer.row, request)?;
        let (wanted, moved) = (request.clone(), transfer.moved.clone());
        let job = stream.slot.submit(
            &format!("workspace.prepare {}", row.name),
            op.cancel(),
            move |cancel| transfer.import(cancel, &wanted, &notes),
        );
        let imported = self.rate_floor().wait(
            &job,
            &moved,
            op.cancel(),
            Instant::now() + TRANSFER_DEADLINE,
        )?;
        self.mark_complete(&guard, &row_at_start, &imported)?;
        drop(guard);
        let kept = encode::encode_some(imported.kept.iter());
        let (entries, bytes) = (imported.trailer.entries, imported.trailer.bytes);
        to_value(&PrepareReply {
            vm: self.views.view(&row.id)?,
            kept,
            entries,
            bytes,
        })
    }

    fn run_export(
        &self,
        row: &VmRow,
        op: &OpHandle,
        stream: Stream,
        request: &ExportRequest,
    ) -> Result<Value> {
        let guard = self.lock_workspace(op, row, stream.no_wait)?;
        let workspace = self
            .core
            .store
            .read(|s| s.workspace(&guard.key().0).cloned())
            .ok_or_else(|| {
                Error::new(Kind::WorkspaceNotFound, "it has no workspace")
                    .hint(format!("fcctl workspace prepare {} PATH", row.name))
            })?;
        if workspace.info.state == WorkspaceState::Incomplete {
            return Err(Error::new(
                Kind::WorkspaceIncomplete,
                "its workspace is incomplete: an import was interrupted",
            )
            .hint(format!(
                "import it again: fcctl workspace prepare {} PATH",
                row.name
            )));
        }
        let transfer =
            self.transfer(&guard.key().0, op, stream.fifo, &workspace.info.guest_path)?;
        let (kind, moved) = (request.kind, transfer.moved.clone());
        let job = stream.slot.submit(
            &format!("workspace.export {}", row.name),
            op.cancel(),
            move |cancel| transfer.export(cancel, kind),
        );
        let trailer = self.rate_floor().wait(
            &job,
            &moved,
            op.cancel(),
            Instant::now() + TRANSFER_DEADLINE,
        )?;
        drop(guard);
        to_value(&ExportReply {
            bytes: trailer.bytes,
        })
    }

    fn rate_floor(&self) -> RateFloor {
        let limits = &self.core.limits;
        RateFloor::new(
            Duration::from_secs(limits.transfer_rate_window_s),
            limits.transfer_bytes_per_s_min,
        )
    }

    /// Locks the workspace, in order of arrival. A waiting transfer occupies no worker and can be
    /// cancelled. With `no_wait`, fails with `busy` instead of waiting.
    fn lock_workspace<'a>(
        &'a self,
        op: &OpHandle,
        row: &VmRow,
        no_wait: bool,
    ) -> Result<KeyGuard<'a, WorkspaceOf>> {
        let workspace = WorkspaceOf(row.id.clone());
        if let Some(guard) = self.core.locks.workspace.try_lock(&workspace) {
            return Ok(guard);
        }
        if no_wait {
            return Err(
                Error::new(Kind::Busy, "another import or export is in progress")
                    .hint("leave out --no-wait to wait for it"),
            );
        }
        op.progress("wait for another import or export of this VM");
        self.core
            .locks
            .workspace
            .lock_cancellable(&workspace, op.cancel())
            .map_err(|_| cancelled("wait for another import or export", op.cancel()))
    }

    /// Prepares the transfer with the VM's current address, keys and generation, because the VM may
    /// have been restarted while the transfer waited.
    fn transfer(
        &self,
        vm: &VmId,
        op: &OpHandle,
        fifo: OwnedFd,
        guest_path: &str,
    ) -> Result<Transfer> {
        let row = self.core.row(vm)?;
        if let Err(refused) = self.core.allow(&row, super::transitions::Verb::Guest) {
            // A stop has claimed the VM since the transfer joined the cancel set. Wait for the stop
            // to cancel the transfer, because the stop also sets the reason.
            let _ = sleep(CAUSE_DEADLINE, op.cancel());
            return Err(if op.cancel().is_cancelled() {
                cancelled_by(op.cancel())
            } else {
                refused
            });
        }
        Ok(Transfer {
            transport: self.transport.clone(),
            target: self.guests.script_target(&row)?,
            reporter: op.reporter(),
            fifo,
            moved: Moved::default(),
            workspace: remote::GuestWorkspace::new(guest_path),
            idle: Duration::from_secs(self.core.limits.transfer_idle_s),
            row,
        })
    }

    /// Marks the workspace as incomplete, durably, before the first byte arrives, so that an
    /// interrupted import never looks finished. Returns the workspace's row.
    fn mark_incomplete(
        &self,
        workspace: &KeyGuard<'_, WorkspaceOf>,
        row: &VmRow,
        request: &PrepareRequest,
    ) -> Result<WorkspaceRow> {
        let workdir = match request.subdir.as_str() {
            "" => request.guest_path.clone(),
            subdir => format!("{}/{subdir}", request.guest_path),
        };
        let row_at_start = WorkspaceRow {
            vm: row.id.clone(),
            info: WorkspaceInfo {
                guest_path: request.guest_path.clone(),
                workdir,
                state: WorkspaceState::Incomplete,
                readonly: request.readonly,
                entries: 0,
                bytes: 0,
                prepared_at: now_s(),
            },
            generation: row.generation,
        };
        let ((), ticket) = self
            .core
            .store
            .change(|tx| tx.put_workspace(workspace, row_at_start.clone()))?;
        self.core.wait_durable(ticket)?;
        Ok(row_at_start)
    }

    /// Marks the workspace as complete. Fails with `conflict` if the VM was restarted since.
    /// Compares and writes in one transaction.
    fn mark_complete(
        &self,
        workspace: &KeyGuard<'_, WorkspaceOf>,
        row_at_start: &WorkspaceRow,
        imported: &Imported,
    ) -> Result<()> {
        let ((), ticket) = self.core.store.change(|tx| {
            if tx.workspace(&row_at_start.vm).map(|w| &**w) != Some(row_at_start) {
                return Err(
                    Error::new(Kind::Conflict, "the VM was restarted during the import")
                        .hint("run the import again"),
                );
            }
            let row = WorkspaceRow {
                info: WorkspaceInfo {
                    state: WorkspaceState::Complete,
                    entries: imported.trailer.entries,
                    bytes: imported.trailer.bytes,
                    prepared_at: now_s(),
                    ..row_at_start.info.clone()
                },
                ..row_at_start.clone()
            };
            tx.put_workspace(workspace, row)
        })?;
        self.core.wait_durable(ticket)
    }
}
