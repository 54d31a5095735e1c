//! Claim and drive. A verb asks the transition table, claims under the VM's lock, and a thread of
//! its own works with no lock held; `commit.rs` settles. No moment without an owner.

use super::access::{Caller, vm_not_found};
use super::call::CallOutcome;
use super::capacity::Capacity;
use super::controls::Controls;
use super::core::Core;
use super::grant::{ClaimedRow, Grant};
use super::guests::Guests;
use super::kernels::KernelService;
use super::looks::Looks;
use super::recovery;
use super::recovery::Recovery;
use super::resources;
use super::resources::Resources;
use super::rules::{cause_for, enter, refusal, superseded};
use super::runtime::{Runtimes, Successor};
use super::snapshot_registry::Restore;
use super::spec::Specs;
use super::transitions::{Decision, Verb, decide};
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

/// What a caller asks of a VM.
pub(super) struct LifecycleRequest {
    pub verb: Verb,
    pub method: &'static str,
    /// How long a guest may take to shut down.
    pub timeout: Option<Duration>,
    /// From where a restore goes on.
    pub restore: Option<Restore>,
}

/// How the work of a claim ended.
#[derive(Clone)]
pub(super) enum Outcome {
    Booted(crate::vmm::Running),
    /// Nothing of the VM runs.
    BootFailed(Error),
    Ended {
        synced: Synced,
    },
    /// The VMM could not be ended, or its files not be removed.
    StillThere(Error),
    Deleted,
}

/// The right to change one VM's state until it is settled. Dropped unsettled (a panic), the VM
/// becomes `failed`.
pub(super) struct Claim {
    pub lifecycle: Lifecycle,
    pub vm: VmId,
    pub op: Option<OpHandle>,
    pub state: VmState,
    pub verb: Verb,
    pub timeout: Option<Duration>,
    /// From where its boot goes on.
    pub restore: Option<Restore>,
    /// Ends the work early: the boot, or the grace of a stop.
    pub cancel: Cancel,
    pub ticket: Option<Ticket>,
}

impl Claim {
    pub fn op(&self) -> &OpHandle {
        self.op.as_ref().expect("a claim has its operation until it is settled")
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
    pub(super) looks: Arc<Looks>,
    pub(super) recovery: Recovery,
    pub(super) capacity: Capacity,
    pub(super) kernel_service: KernelService,
    pub(super) specs: Specs,
    pub(super) vmms: Vmms,
    pub(super) guests: Guests,
    pub(super) controls: Controls,
    pub(super) resources: Resources,
    pub(super) images: Images,
    /// How many VMs boot at the same time.
    pub(super) boots: Admission,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) vmm: Arc<dyn Driver>,
}

impl Lifecycle {
    /// Carries out what the transition table says. Returns at once: the work goes on in a thread of
    /// its own.
    pub(super) fn request(&self, caller: &Caller, vm: &str, ask: &LifecycleRequest) -> Result<CallOutcome> {
        let found = self.core.resolve(caller, vm)?;
        self.looks.ensure_looked_at(&found, ask.verb, &self.core.closing)?;
        let guard = self.core.locks.vm.lock(&found.id);
        let row = self.core.row(&found.id)?;
        let granted = self.grant_locked(&guard, &row, ask, caller.uid);
        self.core.note_asked(&guard, &row, ask.verb, granted.as_ref());
        drop(guard);
        match granted? {
            Grant::Claimed(claimed) => {
                let claim = self.claim(found.id, ask, claimed);
                self.looks.skip(&claim.vm);
                self.begin(claim)
            }
            Grant::Nothing => CallOutcome::done(&VmReply { vm: self.views.view(&found.id)? }),
            Grant::Joined(op) => Ok(CallOutcome::Joined(op)),
            Grant::Queued { op, replaced } => {
                if let Some(old) = replaced {
                    self.core.end_op_soon(old.op, Err(superseded(&row, old.verb)));
                }
                Ok(CallOutcome::Op(op))
            }
        }
    }

    /// Decides what a request gets, and writes it.
    fn grant_locked(&self, vm: &KeyGuard<'_, VmId>, row: &VmRow, ask: &LifecycleRequest, uid: u32) -> Result<Grant> {
        match decide(row.state, row.intent == Some(Intent::Restart), ask.verb) {
            Decision::Claim(to) => self.claim_locked(vm, row, ask, to, uid).map(Grant::Claimed),
            Decision::Nothing | Decision::Allow => Ok(Grant::Nothing),
            Decision::Join => self.join_locked(vm, row, ask),
            Decision::Escalate => {
                self.runtimes.shorten_stop(vm.key());
                self.join_locked(vm, row, ask)
            }
            Decision::Queue => self.queue_locked(vm, row, ask, uid),
            Decision::Refuse(hint) => Err(refusal(row, ask.verb, hint)),
        }
    }

    /// Takes the VM: the row's state, its operation, the ends of whatever used the guest.
    fn claim_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
        ask: &LifecycleRequest,
        to: VmState,
        uid: u32,
    ) -> Result<ClaimedRow> {
        let op = match to {
            VmState::Starting => self.core.begin_op(ask.method, Some(row.id.clone()), uid, true)?,
            _ => self.core.begin_end_op(ask.method, &row.id, uid)?,
        };
        let essential = matches!(ask.verb, Verb::StopForce | Verb::Kill | Verb::Delete | Verb::DeleteForce);
        let op_row = op.op();
        let changed = self.core.change(essential, |tx| {
            tx.update_vm(vm, |row| {
                enter(row, to, &op, ask.verb);
                if let Some(restore) = &ask.restore {
                    restore.enter(row);
                }
            })?;
            tx.put_op(op_row);
            if to == VmState::Starting { self.intend_boot(vm, tx) } else { Ok(()) }
        });
        match changed {
            Ok(((), ticket)) => {
                self.arm_locked(vm, &op, to, ask.verb);
                Ok(ClaimedRow { op, state: to, ticket })
            }
            Err(e) => {
                let e = e.context(format!("{} vm {}", ask.verb.name(), row.name));
                op.refuse(&e);
                Err(e)
            }
        }
    }

    fn claim(&self, vm: VmId, ask: &LifecycleRequest, claimed: ClaimedRow) -> Claim {
        let ClaimedRow { op, state, ticket } = claimed;
        let (verb, timeout, restore, cancel) = (ask.verb, ask.timeout, ask.restore.clone(), op.cancel().clone());
        Claim { lifecycle: self.clone(), vm, op: Some(op), state, verb, timeout, restore, cancel, ticket: Some(ticket) }
    }

    /// Records what a boot needs in its claim: memory, and the ledger's rows of all that it is
    /// about to take.
    fn intend_boot(&self, vm: &KeyGuard<'_, VmId>, tx: &mut Tx) -> Result<()> {
        let row = tx.vm(vm.key()).cloned().ok_or_else(|| vm_not_found(vm.key().as_str()))?;
        self.capacity.reserve_memory(tx, &row)?;
        recovery::forget(tx, vm.key());
        resources::intend(&self.resources, tx, &row);
        Ok(())
    }

    /// From here on whoever drives `op` owns the VM.
    pub(super) fn arm_locked(&self, vm: &KeyGuard<'_, VmId>, op: &OpHandle, to: VmState, verb: Verb) {
        if to == VmState::Starting {
            self.runtimes.begin_boot(vm.key(), op.cancel().clone());
        } else {
            self.runtimes.cancel_users(vm.key(), &cause_for(verb));
            // A stop cannot be cancelled, so its operation's token is free to shorten it.
            self.runtimes.begin_stop(vm.key(), op.cancel().clone());
        }
    }

    fn join_locked(&self, vm: &KeyGuard<'_, VmId>, row: &VmRow, ask: &LifecycleRequest) -> Result<Grant> {
        if ask.verb == Verb::Start && self.runtimes.successor(vm.key()).is_some() {
            return Err(refusal(row, ask.verb, "it is about to end: fcctl vm wait {vm}, then fcctl start {vm}"));
        }
        match &row.op {
            Some(op) => Ok(Grant::Joined(op.clone())),
            None => Err(Error::internal(format!("vm {} is {} without an operation", row.name, row.state.name()))),
        }
    }

    /// Sets the successor slot and makes the operation in progress give up or hurry.
    fn queue_locked(&self, vm: &KeyGuard<'_, VmId>, row: &VmRow, ask: &LifecycleRequest, uid: u32) -> Result<Grant> {
        let weight = Successor::weight(ask.verb);
        if let Some((verb, op)) = self.runtimes.successor(vm.key())
            && Successor::weight(verb) >= weight
        {
            if Successor::deletes(verb) && !Successor::deletes(ask.verb) {
                return Err(refusal(row, ask.verb, "it is about to be deleted: make another with fcctl vm create"));
            }
            if matches!(ask.verb, Verb::StopForce | Verb::Kill | Verb::DeleteForce) {
                self.runtimes.shorten_stop(vm.key());
            }
            return Ok(Grant::Joined(op));
        }
        let op = self.core.begin_end_op(ask.method, &row.id, uid)?;
        let (id, op_row) = (op.id().clone(), op.op());
        let begun = self.core.change(true, |tx| {
            tx.put_op(op_row);
            Ok(())
        });
        match begun {
            Ok(((), ticket)) => ticket.detach(),
            Err(e) => {
                op.refuse(&e);
                return Err(e.context(format!("{} vm {}", ask.verb.name(), row.name)));
            }
        }
        let replaced = self.runtimes.set_successor(vm.key(), Successor { verb: ask.verb, op, timeout: ask.timeout });
        match row.state {
            VmState::Starting => self.runtimes.cancel_boot(vm.key(), cause_for(ask.verb)),
            _ if matches!(ask.verb, Verb::StopForce | Verb::Kill | Verb::DeleteForce) => self.runtimes.shorten_stop(vm.key()),
            _ => {}
        }
        Ok(Grant::Queued { op: id, replaced })
    }

    /// Starts the thread that drives the claim to its end. One that cannot be started drops the
    /// claim, which settles it.
    pub(super) fn begin(&self, claim: Claim) -> Result<CallOutcome> {
        let id = claim.op().id().clone();
        let lifecycle = self.clone();
        self.core.spawn(&format!("op-{id}"), move || lifecycle.run_claim(claim))?;
        Ok(CallOutcome::Op(id))
    }

    pub(super) fn run_claim(&self, mut claim: Claim) {
        loop {
            let _label = crate::locks::operation_scope(format!("{} {}", claim.verb.name(), claim.vm));
            // Nothing is done before the claim is durable.
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
                Err(e) if self.runs_still(&claim.vm) => Outcome::StillThere(e),
                Err(e) => Outcome::BootFailed(e),
            },
            VmState::Deleting => self.remove(claim),
            _ => self.shut_down(claim),
        }
    }

    /// Whether a boot that has failed left a VMM that could not be ended.
    fn runs_still(&self, vm: &VmId) -> bool {
        self.core.row(vm).is_ok_and(|row| self.vmms.identity(&row).is_some())
    }

    /// The claim never became durable and the store has taken it back: the caller hears why.
    fn abort_unpersisted(&self, mut claim: Claim, error: &Error) {
        let op = claim.op.take().expect("unsettled");
        let successor = {
            let guard = self.core.locks.vm.lock(&claim.vm);
            // Whoever claimed it since owns what is under way now.
            let taken = self.core.row(guard.key()).is_ok_and(|row| row.op.is_some_and(|other| other != *op.id()));
            if taken { None } else { self.runtimes.end(guard.key()).1 }
        };
        if let Some(s) = successor {
            self.core.end_op_soon(s.op, Err(error.clone()));
        }
        let mut error = error.clone();
        if matches!(claim.verb, Verb::StopForce | Verb::Kill) {
            // It works whatever the disk does. The row follows when the store takes changes again:
            // see `watch.rs`.
            error = match self.kill_unrecorded(&claim.vm) {
                Ok(()) => error.context("its vmm was ended, which could not be written down"),
                Err(e) => e,
            };
        }
        let name = self.core.row(&claim.vm).map_or_else(|_| claim.vm.to_string(), |row| row.name.to_string());
        op.finish(Err(error.context(format!("{} vm {name}", claim.verb.name()))));
    }

    fn kill_unrecorded(&self, vm: &VmId) -> Result<()> {
        match self.vmms.identity(&self.core.row(vm)?) {
            Some(identity) => self.vmms.kill_vmm(&identity),
            None => Ok(()),
        }
    }
}
