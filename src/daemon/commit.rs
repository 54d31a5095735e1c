//! Commits a claim, which ends it. In one critical section under the VM's lock, the VM comes to
//! rest, enters the second half of a restart, or passes to its successor. A commit that the store
//! refuses is retried, because the work is done and must be recorded.

use super::call::to_value;
use super::history;
use super::history::What;
use super::lifecycle::{Claim, Lifecycle, Outcome};
use super::operations::ended_row;
use super::recovery;
use super::resources;
use super::rules::take_pending;
use super::rules::{enter, superseded};
use super::runtime::{BootEnd, Successor};
use super::transitions::Verb;
use crate::api::vm::{VmDeleteReply, VmState};
use crate::error::{Error, Kind, Result};
use crate::host::time::now_s;
use crate::host::wait::cancelled_by;
use crate::ids::VmId;
use crate::locks::KeyGuard;
use crate::ops::OpHandle;
use crate::sched::Instant;
use crate::store::{Intent, Ticket, VmRow};
use crate::vmm::End;
use serde_json::Value;
use std::time::Duration;

/// How long to pause between two attempts to commit.
const RETRY_PERIOD: Duration = Duration::from_millis(250);

/// A claim that is being committed.
struct Settlement {
    vm: VmId,
    verb: Verb,
    state: VmState,
    op: OpHandle,
    outcome: Outcome,
    died: Option<BootEnd>,
    successor: Option<Successor>,
    /// True if the VM must not be deleted now, even if it has `rm`.
    keeps: bool,
    /// Successors that a heavier request replaced. Their operations end after the VM's lock is
    /// released.
    replaced: Vec<Successor>,
    /// Why the guest was not asked to shut down, if daemons died while they recovered or adopted
    /// the VM (`recovery.rs`).
    note: Option<String>,
    /// A log line to write after the VM's lock is released.
    warning: Option<String>,
}

/// The next step for the VM.
enum NextStep {
    Rest,
    /// The second half of a restart, in the same operation.
    Restart,
    Successor,
    Gone,
}

/// The result of an attempt to commit that the store has accepted.
struct Written {
    /// The row after the commit, or the last row of a deleted VM.
    row: VmRow,
    ticket: Ticket,
    result: Result<Value>,
    step: NextStep,
}

impl Lifecycle {
    /// Commits the outcome. Returns the claim to continue with: the second half of a restart, or
    /// the successor. Returns None if nothing follows, or if the daemon closes before the store
    /// accepts the commit.
    pub(super) fn commit(&self, mut claim: Claim, outcome: Outcome) -> Option<Claim> {
        let outcome = self.end_if_unwanted(&claim, outcome);
        let op = claim.op.take().expect("unsettled");
        let (vm, verb, state) = (claim.vm.clone(), claim.verb, claim.state);
        let generation = self.core.row(&vm).map_or(0, |row| row.generation);
        let (replaced, warning, note) = (Vec::new(), None, self.recovery.recovery_note(&vm));
        let mut settlement = Settlement {
            vm,
            verb,
            state,
            op,
            outcome,
            died: None,
            successor: None,
            keeps: false,
            replaced,
            note,
            warning,
        };
        loop {
            let written = {
                let guard = self.core.locks.vm.lock(&settlement.vm);
                let since = Instant::now();
                let written = self.commit_locked(&guard, &mut settlement);
                if let Ok(w) = &written {
                    self.core
                        .note(&w.row, Some(w.ticket.seq()), Some(since), || {
                            settlement.history_entry(w)
                        });
                }
                written
            };
            for old in settlement.replaced.drain(..) {
                self.core.end_op_soon(
                    old.op,
                    Err(Error::new(Kind::Superseded, "a later request replaced it")),
                );
            }
            if let Some(warning) = settlement.warning.take() {
                log::warn!("{warning}");
            }
            let durable = written.and_then(|w| {
                self.core
                    .wait_durable(w.ticket)
                    .map(|()| (w.result, w.step))
            });
            match durable {
                Ok((result, step)) => {
                    // If the VMM died between the guest's first answer and the commit, nothing else
                    // cleans up after it.
                    if settlement.died.is_some()
                        && let Err(e) = self.resources.release_boot(&settlement.vm, generation)
                    {
                        log::warn!("clean up after the VMM of VM {}: {e}", settlement.vm);
                    }
                    self.auto_forwarder.follow(&settlement.vm);
                    return self.finish(settlement, result, &step);
                }
                Err(e) => {
                    settlement.op.progress(&format!("wait for the store: {e}"));
                    if self.core.sleep(RETRY_PERIOD) {
                        self.leave_to_next_daemon(settlement, &e);
                        return None;
                    }
                }
            }
        }
    }

    /// Ends the operation and its successor with an error. The rows still record what is in
    /// progress, so the next daemon finishes it.
    fn leave_to_next_daemon(&self, settlement: Settlement, e: &Error) {
        let late = {
            let guard = self.core.locks.vm.lock(&settlement.vm);
            self.runtimes.end(guard.key()).1
        };
        settlement.op.finish(Err(e.clone()));
        for successor in settlement.successor.into_iter().chain(late) {
            successor.op.finish(Err(e.clone()));
        }
    }

    /// Ends a guest whose boot succeeded although the boot had been cancelled, and returns the
    /// resulting outcome. Returns any other outcome unchanged.
    fn end_if_unwanted(&self, claim: &Claim, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Booted(running) if claim.cancel.is_cancelled() => {
                let ended = self.core.row(&claim.vm).and_then(|row| {
                    self.vmms.kill_vmm(&running.identity)?;
                    self.resources.release_boot(&row.id, row.generation)
                });
                match ended {
                    Ok(()) => Outcome::BootFailed(cancelled_by(&claim.cancel)),
                    Err(e) => Outcome::StillThere(e),
                }
            }
            other => other,
        }
    }

    /// Makes one attempt to commit, in one transaction.
    fn commit_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        settlement: &mut Settlement,
    ) -> Result<Written> {
        let (died, successor) = self.runtimes.end(vm.key());
        settlement.died = settlement.died.take().or(died);
        settlement.keeps |= self.runtimes.take_keep(vm.key());
        if let Some(late) = successor
            && let Some(old) = settlement.take_heavier(late)
        {
            settlement.replaced.push(old);
        }
        let mut row = self.core.row(vm.key())?;
        if matches!(settlement.outcome, Outcome::Deleted) {
            return self.commit_deleted(vm, settlement, row);
        }
        let at = now_s();
        let settled = settle(&mut row, settlement, at);
        let (step, result) = self.choose(&mut row, settlement, settled);
        row.op = None;
        if let Some(next) = settlement.next(&step) {
            next.enter(&mut row);
        }
        let result = result.and_then(|()| self.views.vm_value(&row));
        // Make the rows before the transaction, because the registry's lock cannot be taken under
        // the store's.
        let ended =
            (!matches!(step, NextStep::Restart)).then(|| ended_row(settlement.op.op(), &result));
        let begun = settlement.next(&step).map(|next| next.op.op());
        let ((), ticket) = self.core.change(true, |tx| {
            for op in ended.into_iter().chain(begun) {
                tx.put_op(op);
            }
            recovery::end(tx, vm.key());
            if row.state == VmState::Starting {
                recovery::forget(tx, vm.key());
                resources::intend(&self.resources, tx, &row);
            }
            // Settle again, on the row as this transaction sees it.
            tx.update_vm(vm, |row| {
                // The result of the operation was determined above.
                drop(settle(row, settlement, at));
                (row.intent, row.op) = (None, None);
                if let Some(next) = settlement.next(&step) {
                    next.enter(row);
                }
            })
        })?;
        if let Some(next) = settlement.next(&step) {
            self.arm_locked(vm, next.op, next.state, next.verb);
        }
        Ok(Written {
            row,
            ticket,
            result,
            step,
        })
    }

    fn commit_deleted(
        &self,
        vm: &KeyGuard<'_, VmId>,
        settlement: &Settlement,
        row: VmRow,
    ) -> Result<Written> {
        let result = to_value(&VmDeleteReply {
            deleted: Some(vm.key().clone()),
        });
        let op = ended_row(settlement.op.op(), &result);
        let ((), ticket) = self.core.change(true, |tx| {
            tx.put_op(op);
            recovery::forget(tx, vm.key());
            tx.remove_vm(vm);
            Ok(())
        })?;
        Ok(Written {
            row,
            ticket,
            result,
            step: NextStep::Gone,
        })
    }

    /// Decides what follows for the VM, and the result of its operation. If an `rm` VM has settled,
    /// begins the operation that deletes it.
    fn choose(
        &self,
        row: &mut VmRow,
        settlement: &mut Settlement,
        mut settled: Result<()>,
    ) -> (NextStep, Result<()>) {
        let restarting = row.intent.take() == Some(Intent::Restart);
        if settlement.successor.is_none() {
            if restarting && settled.is_ok() {
                // The second half may need more memory than the first.
                settled = self.room_for_restart(row);
                if settled.is_ok() {
                    return (NextStep::Restart, settled);
                }
            }
            let is_kept = !row.rm || settlement.keeps;
            if is_kept || row.state == VmState::Running || settlement.state == VmState::Deleting {
                return (NextStep::Rest, settled);
            }
            // The daemon deletes a settled `rm` VM with its own operation. If a delete has already
            // failed, the VM stays, because another delete would fail as well.
            return match self
                .core
                .begin_own_op("vm.delete", Some(row.id.clone()), row.owner_uid)
            {
                Ok(op) => {
                    settlement.successor = Some(Successor {
                        verb: Verb::DeleteForce,
                        op,
                        timeout: None,
                    });
                    (NextStep::Successor, settled)
                }
                Err(e) => {
                    settlement.warning = Some(format!(
                        "delete VM {}, which is marked for deletion: {e}",
                        row.name
                    ));
                    (NextStep::Rest, settled)
                }
            };
        }
        let unfinished = restarting || settlement.state == VmState::Starting;
        let result = match settled {
            Ok(()) if unfinished => Err(superseded(row, settlement.verb)),
            other => other,
        };
        (NextStep::Successor, result)
    }

    fn room_for_restart(&self, row: &VmRow) -> Result<()> {
        let mut next = row.clone();
        take_pending(&mut next);
        let room = self
            .core
            .store
            .read(|s| self.capacity.reserve_memory(s, &next));
        room.map_err(|e| e.context(format!("restart VM {}: it was stopped", row.name)))
    }

    /// Returns the claim to continue with, if something follows. Ends the operation, unless the
    /// second half of its restart follows.
    fn finish(
        &self,
        settlement: Settlement,
        result: Result<Value>,
        step: &NextStep,
    ) -> Option<Claim> {
        let Settlement {
            vm, op, successor, ..
        } = settlement;
        let (op, verb, state, timeout) = match (step, successor) {
            (NextStep::Restart, _) => (op, Verb::Start, VmState::Starting, None),
            (NextStep::Successor, Some(s)) => {
                op.finish(result);
                let to = s.target();
                (s.op, s.verb, to, s.timeout)
            }
            (_, successor) => {
                op.finish(result.clone());
                if let Some(s) = successor {
                    self.core.end_op_soon(s.op, result);
                }
                return None;
            }
        };
        let cancel = op.cancel().clone();
        Some(Claim {
            lifecycle: self.clone(),
            vm,
            op: Some(op),
            state,
            verb,
            timeout,
            restore: None,
            cancel,
            ticket: None,
        })
    }
}

impl Settlement {
    /// Describes a commit for the VM's history.
    fn history_entry(&self, written: &Written) -> What {
        let ending = match (&self.outcome, &self.died) {
            (Outcome::Booted(_), None) => history::CommitKind::Booted,
            (Outcome::Booted(_) | Outcome::BootFailed(_), Some(_)) => history::CommitKind::BootDied,
            (Outcome::BootFailed(e), None) if e.kind() == Kind::Cancelled => {
                history::CommitKind::BootCancelled
            }
            (Outcome::BootFailed(_), None) => history::CommitKind::BootFailed,
            (Outcome::Ended { .. }, _) => history::CommitKind::Ended,
            (Outcome::StillThere(_), _) => history::CommitKind::StillThere,
            (Outcome::Deleted, _) => history::CommitKind::Deleted,
        };
        let state = (!matches!(written.step, NextStep::Gone)).then_some(written.row.state);
        let next = self.next(&written.step).map(|next| next.op.id().clone());
        What::Committed {
            op: self.op.id().clone(),
            ending,
            state,
            next,
        }
    }

    /// Keeps the heavier of the two successors and returns the other. Returns None if `late` is the
    /// only successor.
    fn take_heavier(&mut self, late: Successor) -> Option<Successor> {
        match &self.successor {
            Some(early) if Successor::weight(early.verb) > Successor::weight(late.verb) => {
                Some(late)
            }
            _ => self.successor.replace(late),
        }
    }

    /// Returns the operation that owns the VM next, if something follows.
    fn next(&self, step: &NextStep) -> Option<NextOperation<'_>> {
        match step {
            NextStep::Restart => Some(NextOperation {
                op: &self.op,
                verb: Verb::Start,
                state: VmState::Starting,
            }),
            NextStep::Successor => self.successor.as_ref().map(|s| NextOperation {
                op: &s.op,
                verb: s.verb,
                state: s.target(),
            }),
            NextStep::Rest | NextStep::Gone => None,
        }
    }
}

/// An operation that begins in the critical section that ends another operation.
struct NextOperation<'a> {
    op: &'a OpHandle,
    verb: Verb,
    /// The state that the VM enters.
    state: VmState,
}

impl NextOperation<'_> {
    fn enter(&self, row: &mut VmRow) {
        enter(row, self.state, self.op, self.verb);
    }
}

/// Writes the outcome into the row and returns the operation's result. `at` is in seconds since the
/// epoch.
fn settle(row: &mut VmRow, settlement: &Settlement, at: u64) -> Result<()> {
    let rest = |row: &mut VmRow, state: VmState, reason: Option<String>| {
        row.state = state;
        row.reason = reason;
        row.identity = None;
        row.ssh_addr = None;
        row.forget_listeners();
    };
    match (&settlement.outcome, &settlement.died) {
        (Outcome::Booted(_), Some(how)) => {
            rest(row, VmState::Failed, Some(how.to_string()));
            Err(died_booting(row, how))
        }
        (Outcome::Booted(running), None) => {
            row.state = VmState::Running;
            row.identity = Some(running.identity.clone());
            row.ssh_addr = Some(running.ssh_addr);
            row.started_at = Some(at);
            Ok(())
        }
        (Outcome::BootFailed(e), died) => {
            let was_cancelled = e.kind() == Kind::Cancelled;
            let before = if row.started_at.is_none() {
                VmState::Created
            } else {
                VmState::Stopped
            };
            if let Some(how) = died {
                rest(row, VmState::Failed, Some(how.to_string()));
                return Err(died_booting(row, how));
            }
            match was_cancelled {
                true => rest(row, before, None),
                false => rest(row, VmState::Failed, Some(e.to_string())),
            }
            Err(e
                .clone()
                .context(format!("start VM {}", row.name))
                .of_vm(&row.name))
        }
        (Outcome::Ended { synced }, _) => {
            rest(row, VmState::Stopped, settlement.note.clone());
            row.synced = Some(*synced);
            Ok(())
        }
        (Outcome::StillThere(e), _) => {
            row.state = VmState::Failed;
            row.reason = Some(e.to_string());
            Err(e
                .clone()
                .context(format!("{} VM {}", settlement.verb.name(), row.name))
                .of_vm(&row.name))
        }
        (Outcome::Deleted, _) => Ok(()),
    }
}

fn died_booting(row: &VmRow, how: &BootEnd) -> Error {
    if *how == BootEnd::HostDiskFull {
        return Error::new(Kind::DiskFull, format!("start VM {}: {how}", row.name))
            .hint("free some disk space (df -h), then try again");
    }
    if *how == BootEnd::VmmDied(End::NoInit) {
        return Error::new(Kind::Unsupported, format!("start VM {}: {how}", row.name))
            .hint("create a VM without --init image");
    }
    Error::new(Kind::VmmFailed, format!("start VM {}: {how}", row.name))
        .hint(format!("fcctl logs {}", row.name))
}
