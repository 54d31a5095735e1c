//! Claim and drive. A verb asks the transition table, claims under the VM's lock, and a thread of its own works
//! with no lock held; `commit.rs` settles. No moment without an owner.

use super::access::vm_not_found;
use super::captures::Restore;
use super::history::{Answer, What};
use super::runtime::Successor;
use super::transitions::{Decision, Verb, decide};
use super::{Begun, Caller, Daemon, create, recovery, resources};
use crate::api::vm::{Synced, VmReply, VmState};
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::locks::{Cancel, CancelCause, KeyGuard};
use crate::ops::OpHandle;
use crate::store::{Intent, Ticket, Tx, VmRow};
use std::time::Duration;

/// What a caller asks of a VM.
pub(super) struct Ask {
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

/// The right to change one VM's state until it is settled. Dropped unsettled (a panic), the VM becomes `failed`.
pub(super) struct Claim {
    pub daemon: Daemon,
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
            self.daemon.clone().abandon(&self.vm, op);
        }
    }
}

impl Daemon {
    /// Carries out what the transition table says. Returns at once: the work goes on in a thread of its own.
    pub(super) fn lifecycle(&self, caller: &Caller, vm: &str, ask: &Ask) -> Result<Begun> {
        let found = self.resolve(caller, vm)?;
        self.ensure_looked_at(&found, ask.verb)?;
        let guard = self.locks.vm.lock(&found.id);
        let row = self.row(&found.id)?;
        let mut replaced = None;
        let begun = match decide(row.state, row.intent == Some(Intent::Restart), ask.verb) {
            Decision::Claim(to) => {
                let claim = self.claim_locked(&guard, &row, ask, to, caller.uid);
                let seq = claim.as_ref().ok().and_then(|c| Some(c.ticket.as_ref()?.seq()));
                self.note_asked(&row, ask.verb, seq, &claim.as_ref().map(|c| (Answer::Claimed, Some(c.op().id()))));
                drop(guard);
                let claim = claim?;
                self.looks.skip(&found.id);
                return self.begin(claim);
            }
            Decision::Nothing | Decision::Allow => {
                self.note_asked(&row, ask.verb, None, &Ok((Answer::Nothing, None)));
                drop(guard);
                return Begun::done(&VmReply { vm: self.view(&found.id)? });
            }
            Decision::Join => self.join_locked(&guard, &row, ask),
            Decision::Escalate => {
                self.runtimes.shorten_stop(guard.key());
                self.join_locked(&guard, &row, ask)
            }
            Decision::Supersede => self.succeed_locked(&guard, &row, ask, caller.uid, &mut replaced),
            Decision::Refuse(hint) => Err(refusal(&row, ask.verb, hint)),
        };
        let answer = begun.as_ref().map(|begun| match begun {
            Begun::Op(op) => (Answer::Superseded, Some(op)),
            Begun::Joined(op) => (Answer::Joined, Some(op)),
            Begun::Done(_) => (Answer::Nothing, None),
        });
        self.note_asked(&row, ask.verb, None, &answer);
        drop(guard);
        if let Some(old) = replaced {
            self.end_op_soon(old.op, Err(superseded(&row, old.verb)));
        }
        begun
    }

    /// For the history: with the VM's lock held.
    pub(super) fn note_asked(
        &self,
        row: &VmRow,
        verb: Verb,
        seq: Option<u64>,
        answer: &std::result::Result<(Answer, Option<&crate::ids::OpId>), &Error>,
    ) {
        self.note(row, seq, None, || {
            let (answer, op) = match answer {
                Ok((answer, op)) => (*answer, op.cloned()),
                Err(e) if e.kind() == Kind::WrongState => (Answer::Refused, None),
                Err(_) => (Answer::Failed, None),
            };
            What::Asked { verb, state: row.state, restarting: row.intent == Some(Intent::Restart), answer, op }
        });
    }

    /// Refuses what the table does not allow in the row's state.
    pub(super) fn allow(&self, row: &VmRow, verb: Verb) -> Result<()> {
        match decide(row.state, row.intent == Some(Intent::Restart), verb) {
            Decision::Refuse(hint) => Err(refusal(row, verb, hint)),
            _ => Ok(()),
        }
    }

    /// The same where the lock is held, so that it has its place in the VM's history.
    pub(super) fn allow_locked(&self, _vm: &KeyGuard<'_, VmId>, row: &VmRow, verb: Verb) -> Result<()> {
        let allowed = self.allow(row, verb);
        self.note_asked(row, verb, None, &allowed.as_ref().map(|()| (Answer::Nothing, None)));
        allowed
    }

    /// Takes the VM: the row's state, its operation, the ends of whatever used the guest.
    fn claim_locked(&self, vm: &KeyGuard<'_, VmId>, row: &VmRow, ask: &Ask, to: VmState, uid: u32) -> Result<Claim> {
        let op = match to {
            VmState::Starting => self.begin_op(ask.method, Some(row.id.clone()), uid, true)?,
            _ => self.begin_end_op(ask.method, &row.id, uid)?,
        };
        let essential = matches!(ask.verb, Verb::StopForce | Verb::Kill | Verb::Delete | Verb::DeleteForce);
        let op_row = op.op();
        let changed = self.change(essential, |tx| {
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
                let (verb, timeout, cancel) = (ask.verb, ask.timeout, op.cancel().clone());
                let (vm, restore, ticket) = (vm.key().clone(), ask.restore.clone(), Some(ticket));
                Ok(Claim { daemon: self.clone(), vm, op: Some(op), state: to, verb, timeout, restore, cancel, ticket })
            }
            Err(e) => {
                let e = e.context(format!("{} vm {}", ask.verb.name(), row.name));
                op.refuse(&e);
                Err(e)
            }
        }
    }

    /// Records what a boot needs in its claim: memory, and the ledger's rows of all that it is about to take.
    fn intend_boot(&self, vm: &KeyGuard<'_, VmId>, tx: &mut Tx) -> Result<()> {
        let row = tx.vm(vm.key()).cloned().ok_or_else(|| vm_not_found(vm.key().as_str()))?;
        self.reserve_memory(tx, &row)?;
        recovery::forget(tx, vm.key());
        resources::intend(self, tx, &row);
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

    fn join_locked(&self, vm: &KeyGuard<'_, VmId>, row: &VmRow, ask: &Ask) -> Result<Begun> {
        if ask.verb == Verb::Start && self.runtimes.successor(vm.key()).is_some() {
            return Err(refusal(row, ask.verb, "it is about to end: fcctl vm wait {vm}, then fcctl start {vm}"));
        }
        match &row.op {
            Some(op) => Ok(Begun::Joined(op.clone())),
            None => Err(Error::internal(format!("vm {} is {} without an operation", row.name, row.state.name()))),
        }
    }

    /// Sets the successor slot and makes the operation under way give up or hurry. `replaced` gets the successor that
    /// was there before; its operation is the caller's to end once the lock is released.
    fn succeed_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
        ask: &Ask,
        uid: u32,
        replaced: &mut Option<Successor>,
    ) -> Result<Begun> {
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
            return Ok(Begun::Joined(op));
        }
        let op = self.begin_end_op(ask.method, &row.id, uid)?;
        let (id, op_row) = (op.id().clone(), op.op());
        let begun = self.change(true, |tx| {
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
        *replaced = self.runtimes.set_successor(vm.key(), Successor { verb: ask.verb, op, timeout: ask.timeout });
        match row.state {
            VmState::Starting => self.runtimes.cancel_boot(vm.key(), cause_for(ask.verb)),
            _ if matches!(ask.verb, Verb::StopForce | Verb::Kill | Verb::DeleteForce) => self.runtimes.shorten_stop(vm.key()),
            _ => {}
        }
        Ok(Begun::Op(id))
    }

    /// Starts the thread that drives the claim to its end. One that cannot be started drops the claim, which
    /// settles it.
    pub(super) fn begin(&self, claim: Claim) -> Result<Begun> {
        let id = claim.op().id().clone();
        let daemon = self.clone();
        self.spawn(&format!("op-{id}"), move || daemon.drive(claim))?;
        Ok(Begun::Op(id))
    }

    pub(super) fn drive(&self, mut claim: Claim) {
        loop {
            let _label = crate::locks::operation_scope(format!("{} {}", claim.verb.name(), claim.vm));
            // Nothing is done before the claim is durable.
            if let Some(ticket) = claim.ticket.take()
                && let Err(e) = self.wait_settled(&ticket)
            {
                return self.undurable(claim, &e);
            }
            let outcome = self.work(&claim);
            match self.commit(claim, outcome) {
                Some(next) => claim = next,
                None => return,
            }
        }
    }

    fn work(&self, claim: &Claim) -> Outcome {
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
        self.row(vm).is_ok_and(|row| self.identity(&row).is_some())
    }

    /// The claim never became durable and the store has taken it back: the caller hears why.
    fn undurable(&self, mut claim: Claim, error: &Error) {
        let op = claim.op.take().expect("unsettled");
        let successor = {
            let guard = self.locks.vm.lock(&claim.vm);
            // Whoever claimed it since owns what is under way now.
            let taken = self.row(guard.key()).is_ok_and(|row| row.op.is_some_and(|other| other != *op.id()));
            if taken { None } else { self.runtimes.end(guard.key()).1 }
        };
        if let Some(s) = successor {
            self.end_op_soon(s.op, Err(error.clone()));
        }
        let mut error = error.clone();
        if matches!(claim.verb, Verb::StopForce | Verb::Kill) {
            // It works whatever the disk does. The row follows when the store takes changes again: see `watch.rs`.
            error = match self.kill_unrecorded(&claim.vm) {
                Ok(()) => error.context("its vmm was ended, which could not be written down"),
                Err(e) => e,
            };
        }
        let name = self.row(&claim.vm).map_or_else(|_| claim.vm.to_string(), |row| row.name.to_string());
        op.finish(Err(error.context(format!("{} vm {name}", claim.verb.name()))));
    }

    fn kill_unrecorded(&self, vm: &VmId) -> Result<()> {
        match self.identity(&self.row(vm)?) {
            Some(identity) => self.kill_vmm(&identity),
            None => Ok(()),
        }
    }
}

/// Puts a row into a transitional state.
pub(super) fn enter(row: &mut VmRow, to: VmState, op: &OpHandle, verb: Verb) {
    if to == VmState::Starting {
        create::take_pending(row);
        row.generation += 1;
        row.synced = None;
        row.unresponsive = false;
        row.paused = false;
        (row.has_balloon, row.balloon_mib) = (false, None);
        // One that could not be ended stays known until the boot has ended it.
        row.ssh_addr = None;
    }
    row.intent = (verb == Verb::Restart && to == VmState::Stopping).then_some(Intent::Restart);
    row.state = to;
    row.reason = None;
    row.op = Some(op.id().clone());
}

pub(super) fn refusal(row: &VmRow, verb: Verb, hint: &str) -> Error {
    Error::new(Kind::WrongState, format!("{} vm {}: it is {}", verb.name(), row.name, row.state.name()))
        .hint(hint)
        .of_vm(&row.name)
}

pub(super) fn superseded(row: &VmRow, verb: Verb) -> Error {
    Error::new(Kind::Superseded, format!("{} vm {}: a later request took its place", verb.name(), row.name))
        .hint(format!("fcctl vm show {}", row.name))
}

/// Why transfers, sessions and boots end.
pub(super) fn cause_for(verb: Verb) -> CancelCause {
    match verb {
        Verb::Delete | Verb::DeleteForce => CancelCause::VmDeleted,
        Verb::Kill => CancelCause::VmKilled,
        Verb::Restart => CancelCause::VmRestarted,
        _ => CancelCause::VmStopped,
    }
}
