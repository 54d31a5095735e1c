//! Claims VMs and runs the operations that own them. A verb consults the transition table and
//! claims the VM under its lock. Then the operation's own thread does the work without a lock, and
//! `commit.rs` settles the claim. So a VM in a transitional state always has exactly one operation
//! that owns it.

use super::access::{Caller, vm_not_found};
use super::auto_ports::AutoForwarder;
use super::call::CallOutcome;
use super::capacity::Capacity;
use super::controls::Controls;
use super::core::Core;
use super::grant::{ClaimedRow, Grant};
use super::guests::Guests;
use super::kernels::KernelService;
use super::recovery;
use super::recovery::Recovery;
use super::resources;
use super::resources::Resources;
use super::rules::{cause_for, enter, refusal, superseded};
use super::runtime::{Runtimes, Successor};
use super::snapshot_registry::Restore;
use super::spec::Specs;
use super::transitions::{Decision, Verb, decide};
use super::unreconciled::Unreconciled;
use super::views::Views;
use super::vmms::Vmms;
use crate::api::vm::{Synced, VmReply, VmState};
use crate::error::{Error, Result};
use crate::guest::Transport;
use crate::ids::VmId;
use crate::image::Images;
use crate::locks::{Cancel, KeyGuard};
use crate::ops::OpHandle;
use crate::pool::Admission;
use crate::store::{Intent, Ticket, Tx, VmRow};
use crate::vmm::Driver;
use std::sync::Arc;
use std::time::Duration;

/// A request for a change of a VM's state.
pub(super) struct LifecycleRequest {
    pub verb: Verb,
    pub method: &'static str,
    /// How long the guest may take to shut down.
    pub timeout: Option<Duration>,
    /// The snapshot to restore.
    pub restore: Option<Restore>,
}

/// How the work of a claim ended.
#[derive(Clone)]
pub(super) enum Outcome {
    Booted(crate::vmm::Running),
    /// The boot failed, and the VMM is gone.
    BootFailed(Error),
    Ended {
        synced: Synced,
    },
    /// The VMM could not be killed, or the files could not be removed.
    StillThere(Error),
    Deleted,
}

/// The right to change one VM's state until it is settled. If a claim is dropped before it is
/// settled, for example after a panic, the VM becomes `failed`.
pub(super) struct Claim {
    pub lifecycle: Lifecycle,
    pub vm: VmId,
    pub op: Option<OpHandle>,
    pub state: VmState,
    pub verb: Verb,
    pub timeout: Option<Duration>,
    /// The snapshot to restore in the boot.
    pub restore: Option<Restore>,
    /// Ends the work early: aborts a boot, or shortens the grace period of a stop.
    pub cancel: Cancel,
    pub ticket: Option<Ticket>,
}

impl Claim {
    pub(super) fn op(&self) -> &OpHandle {
        self.op
            .as_ref()
            .expect("a claim has its operation until it is settled")
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(op) = self.op.take() {
            self.lifecycle.clone().abandon(&self.vm, op);
        }
    }
}

/// Starts, stops and deletes VMs, and watches their VMMs.
#[derive(Clone)]
pub struct Lifecycle {
    pub(super) core: Core,
    pub(super) views: Views,
    pub(super) runtimes: Runtimes,
    pub(super) unreconciled: Arc<Unreconciled>,
    pub(super) recovery: Recovery,
    pub(super) capacity: Capacity,
    pub(super) kernel_service: KernelService,
    pub(super) specs: Specs,
    pub(super) vmms: Vmms,
    pub(super) guests: Guests,
    pub(super) controls: Controls,
    pub(super) auto_forwarder: AutoForwarder,
    pub(super) resources: Resources,
    pub(super) images: Images,
    /// Limits how many VMs boot at the same time.
    pub(super) boots: Admission,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) vmm: Arc<dyn Driver>,
}

impl Lifecycle {
    /// Answers a request according to the transition table. If the request claims the VM, another
    /// thread does the work.
    pub(super) fn request(
        &self,
        caller: &Caller,
        vm: &str,
        request: &LifecycleRequest,
    ) -> Result<CallOutcome> {
        let found = self.core.resolve(caller, vm)?;
        self.unreconciled
            .ensure_reconciled(&found, request.verb, &self.core.closing)?;
        let guard = self.core.locks.vm.lock(&found.id);
        let row = self.core.row(&found.id)?;
        let granted = self.grant_locked(&guard, &row, request, caller.uid);
        self.core
            .note_answer(&guard, &row, request.verb, granted.as_ref());
        drop(guard);
        match granted? {
            Grant::Claimed(mut claimed) => {
                if let Some(stale) = claimed.stale.take() {
                    self.core
                        .end_op_soon(stale.op, Err(superseded(&row, stale.verb)));
                }
                let claim = self.claim(found.id, request, claimed);
                self.unreconciled.skip(&claim.vm);
                self.begin(claim)
            }
            Grant::Nothing => CallOutcome::done(&VmReply {
                vm: self.views.view(&found.id)?,
            }),
            Grant::Joined(op) => Ok(CallOutcome::Joined(op)),
            Grant::Queued { op, replaced } => {
                if let Some(old) = replaced {
                    self.core
                        .end_op_soon(old.op, Err(superseded(&row, old.verb)));
                }
                Ok(CallOutcome::Op(op))
            }
        }
    }

    /// Decides how to answer a request, and updates the VM's row accordingly.
    fn grant_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
        request: &LifecycleRequest,
        uid: u32,
    ) -> Result<Grant> {
        match decide(row.state, row.intent == Some(Intent::Restart), request.verb) {
            Decision::Claim(to) => self
                .claim_locked(vm, row, request, to, uid)
                .map(Grant::Claimed),
            Decision::Nothing | Decision::Allow => Ok(Grant::Nothing),
            Decision::Join => self.join_locked(vm, row, request),
            Decision::Escalate => {
                self.runtimes.shorten_stop(vm.key());
                self.join_locked(vm, row, request)
            }
            Decision::Queue => self.queue_locked(vm, row, request, uid),
            Decision::Refuse(hint) => Err(refusal(row, request.verb, hint)),
        }
    }

    /// Claims the VM: writes the row's new state and its operation. Unless the VM starts, also
    /// cancels its sessions and transfers.
    fn claim_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
        request: &LifecycleRequest,
        to: VmState,
        uid: u32,
    ) -> Result<ClaimedRow> {
        let op = match to {
            VmState::Starting => {
                self.core
                    .begin_op(request.method, Some(row.id.clone()), uid, true)?
            }
            _ => self.core.begin_end_op(request.method, &row.id, uid)?,
        };
        let essential = matches!(
            request.verb,
            Verb::StopForce | Verb::Kill | Verb::Delete | Verb::DeleteForce
        );
        let op_row = op.op();
        let changed = self.core.change(essential, |tx| {
            tx.update_vm(vm, |row| {
                enter(row, to, &op, request.verb);
                if let Some(restore) = &request.restore {
                    restore.enter(row);
                }
            })?;
            tx.put_op(op_row);
            if to == VmState::Starting {
                self.intend_boot(vm, tx)
            } else {
                Ok(())
            }
        });
        match changed {
            Ok(((), ticket)) => {
                let (_, stale) = self.runtimes.end(vm.key());
                self.arm_locked(vm, &op, to, request.verb);
                Ok(ClaimedRow {
                    op,
                    state: to,
                    ticket,
                    stale,
                })
            }
            Err(e) => {
                let e = e.context(format!("{} VM {}", request.verb.name(), row.name));
                op.refuse(&e);
                Err(e)
            }
        }
    }

    fn claim(&self, vm: VmId, request: &LifecycleRequest, claimed: ClaimedRow) -> Claim {
        let ClaimedRow {
            op, state, ticket, ..
        } = claimed;
        let (verb, timeout, restore, cancel) = (
            request.verb,
            request.timeout,
            request.restore.clone(),
            op.cancel().clone(),
        );
        Claim {
            lifecycle: self.clone(),
            vm,
            op: Some(op),
            state,
            verb,
            timeout,
            restore,
            cancel,
            ticket: Some(ticket),
        }
    }

    /// Reserves the boot's memory, resets the VM's crash budget, and writes ledger rows for
    /// everything that the boot is about to acquire.
    fn intend_boot(&self, vm: &KeyGuard<'_, VmId>, tx: &mut Tx) -> Result<()> {
        let row = tx
            .vm(vm.key())
            .cloned()
            .ok_or_else(|| vm_not_found(vm.key().as_str()))?;
        self.capacity.reserve_memory(tx, &row)?;
        recovery::forget(tx, vm.key());
        resources::intend(&self.resources, tx, &row);
        Ok(())
    }

    /// Makes `op` the owner of the VM: registers its cancel token and, unless the VM starts,
    /// cancels the users of the guest.
    pub(super) fn arm_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        op: &OpHandle,
        to: VmState,
        verb: Verb,
    ) {
        if to == VmState::Starting {
            self.runtimes.begin_boot(vm.key(), op.cancel().clone());
        } else {
            self.runtimes.cancel_users(vm.key(), &cause_for(verb));
            // A stop cannot be cancelled. Cancelling its token only shortens its grace period.
            self.runtimes.begin_stop(vm.key(), op.cancel().clone());
        }
    }

    fn join_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
        request: &LifecycleRequest,
    ) -> Result<Grant> {
        if request.verb == Verb::Start && self.runtimes.successor(vm.key()).is_some() {
            return Err(refusal(
                row,
                request.verb,
                "wait until it has stopped: fcctl vm wait {vm}, then fcctl start {vm}",
            ));
        }
        match &row.op {
            Some(op) => Ok(Grant::Joined(op.clone())),
            None => Err(Error::internal(format!(
                "VM {} is {} without an operation",
                row.name,
                row.state.name()
            ))),
        }
    }

    /// Puts the request into the successor slot, and aborts or shortens the operation in progress.
    /// If the slot already holds an operation of the same or a higher weight, joins or refuses
    /// instead.
    fn queue_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
        request: &LifecycleRequest,
        uid: u32,
    ) -> Result<Grant> {
        let weight = Successor::weight(request.verb);
        if let Some((verb, op)) = self.runtimes.successor(vm.key())
            && Successor::weight(verb) >= weight
        {
            if Successor::deletes(verb) && !Successor::deletes(request.verb) {
                return Err(refusal(
                    row,
                    request.verb,
                    "it is being deleted: create another one with fcctl vm create",
                ));
            }
            if matches!(
                request.verb,
                Verb::StopForce | Verb::Kill | Verb::DeleteForce
            ) {
                self.runtimes.shorten_stop(vm.key());
            }
            return Ok(Grant::Joined(op));
        }
        let op = self.core.begin_end_op(request.method, &row.id, uid)?;
        let (id, op_row) = (op.id().clone(), op.op());
        let outcome = self.core.change(true, |tx| {
            tx.put_op(op_row);
            Ok(())
        });
        match outcome {
            Ok(((), ticket)) => ticket.detach(),
            Err(e) => {
                op.refuse(&e);
                return Err(e.context(format!("{} VM {}", request.verb.name(), row.name)));
            }
        }
        let replaced = self.runtimes.set_successor(
            vm.key(),
            Successor {
                verb: request.verb,
                op,
                timeout: request.timeout,
            },
        );
        match row.state {
            VmState::Starting => self.runtimes.cancel_boot(vm.key(), cause_for(request.verb)),
            _ if matches!(
                request.verb,
                Verb::StopForce | Verb::Kill | Verb::DeleteForce
            ) =>
            {
                self.runtimes.shorten_stop(vm.key())
            }
            _ => {}
        }
        Ok(Grant::Queued { op: id, replaced })
    }

    /// Starts the thread that runs the claim. If that fails, the claim is dropped, which settles
    /// it.
    pub(super) fn begin(&self, claim: Claim) -> Result<CallOutcome> {
        let id = claim.op().id().clone();
        let lifecycle = self.clone();
        self.core
            .spawn(&format!("op-{id}"), move || lifecycle.run_claim(claim))?;
        Ok(CallOutcome::Op(id))
    }

    pub(super) fn run_claim(&self, mut claim: Claim) {
        loop {
            let _label =
                crate::locks::operation_scope(format!("{} {}", claim.verb.name(), claim.vm));
            // Nothing may change on the host before the claim is durable.
            if let Some(ticket) = claim.ticket.take()
                && let Err(e) = self.core.wait_settled(&ticket)
            {
                return self.abort_unpersisted(claim, &e);
            }
            let outcome = self.run_step(&claim);
            match self.commit(claim, outcome) {
                Some(next) => claim = next,
                None => return,
            }
        }
    }

    fn run_step(&self, claim: &Claim) -> Outcome {
        match claim.state {
            VmState::Starting => match self.boot(claim) {
                Ok(running) => Outcome::Booted(running),
                Err(e) if self.has_vmm(&claim.vm) => Outcome::StillThere(e),
                Err(e) => Outcome::BootFailed(e),
            },
            VmState::Deleting => self.remove(claim),
            _ => self.shut_down(claim),
        }
    }

    /// True if a failed boot left a VMM that could not be killed.
    fn has_vmm(&self, vm: &VmId) -> bool {
        self.core
            .row(vm)
            .is_ok_and(|row| self.vmms.identity(&row).is_some())
    }

    /// Ends a claim that never became durable. The store has undone the claim, and its operation
    /// ends with the error.
    fn abort_unpersisted(&self, mut claim: Claim, error: &Error) {
        let op = claim.op.take().expect("unsettled");
        let successor = {
            let guard = self.core.locks.vm.lock(&claim.vm);
            // If another operation has claimed the VM since, the runtime belongs to that operation.
            let taken = self
                .core
                .row(guard.key())
                .is_ok_and(|row| row.op.is_some_and(|other| other != *op.id()));
            if taken {
                None
            } else {
                self.runtimes.end(guard.key()).1
            }
        };
        if let Some(s) = successor {
            self.core.end_op_soon(s.op, Err(error.clone()));
        }
        self.report_missed_death(&claim.vm);
        let mut error = error.clone();
        if matches!(claim.verb, Verb::StopForce | Verb::Kill) {
            // A kill works even if the disk does not. The row is updated once the store is writable
            // again (`watch.rs`).
            error = match self.kill_unrecorded(&claim.vm) {
                Ok(()) => error.context("its VMM was killed, but that could not be recorded"),
                Err(e) => e,
            };
        }
        let name = self
            .core
            .row(&claim.vm)
            .map_or_else(|_| claim.vm.to_string(), |row| row.name.to_string());
        op.finish(Err(
            error.context(format!("{} VM {name}", claim.verb.name()))
        ));
    }

    fn kill_unrecorded(&self, vm: &VmId) -> Result<()> {
        match self.vmms.identity(&self.core.row(vm)?) {
            Some(identity) => self.vmms.kill_vmm(&identity),
            None => Ok(()),
        }
    }
}
