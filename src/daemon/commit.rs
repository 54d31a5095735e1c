//! Commit: the claim's VM goes to rest, to the second half of a restart, or to its successor, in
//! one section under its lock. A commit that the store refuses is tried again: the work is done and
//! must be written down.

use super::call::to_value;
use super::core::now_s;
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
use crate::host::wait::cancelled_by;
use crate::ids::VmId;
use crate::locks::KeyGuard;
use crate::ops::OpHandle;
use crate::store::{Intent, Ticket, VmRow};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Between two tries of a commit that the store refused.
const RETRY_PERIOD: Duration = Duration::from_millis(250);

/// A claim on its way out.
struct Settlement {
    vm: VmId,
    verb: Verb,
    state: VmState,
    op: OpHandle,
    outcome: Outcome,
    died: Option<BootEnd>,
    successor: Option<Successor>,
    /// Lost to a later request that is heavier. Their operations end after the VM's lock is
    /// released.
    replaced: Vec<Successor>,
    /// Why a guest was not asked to shut down: see `recovery.rs`.
    note: Option<String>,
    /// A log line for after the VM's lock is released.
    warning: Option<String>,
}

/// Where the VM goes.
enum NextStep {
    Rest,
    /// The second half of a restart, by the same operation.
    Restart,
    Successor,
    Gone,
}

/// What one try of a commit wrote.
struct Written {
    /// The row after the commit. A VM that is gone has the row from before.
    row: VmRow,
    ticket: Ticket,
    result: Result<Value>,
    then: NextStep,
}

impl Lifecycle {
    /// The claim to drive on with: a restart's second half, or the successor.
    pub(super) fn commit(&self, mut claim: Claim, outcome: Outcome) -> Option<Claim> {
        let outcome = self.end_if_unwanted(&claim, outcome);
        let op = claim.op.take().expect("unsettled");
        let (vm, verb, state) = (claim.vm.clone(), claim.verb, claim.state);
        let generation = self.core.row(&vm).map_or(0, |row| row.generation);
        let (replaced, warning, note) = (Vec::new(), None, self.recovery.recovery_note(&vm));
        let mut ending = Settlement { vm, verb, state, op, outcome, died: None, successor: None, replaced, note, warning };
        loop {
            let written = {
                let guard = self.core.locks.vm.lock(&ending.vm);
                let since = Instant::now();
                let written = self.commit_locked(&guard, &mut ending);
                if let Ok(w) = &written {
                    self.core.note(&w.row, Some(w.ticket.seq()), Some(since), || ending.history_entry(w));
                }
                written
            };
            for old in ending.replaced.drain(..) {
                self.core.end_op_soon(old.op, Err(Error::new(Kind::Superseded, "a later request took its place")));
            }
            if let Some(warning) = ending.warning.take() {
                log::warn!("{warning}");
            }
            let durable = written.and_then(|w| self.core.wait_durable(w.ticket).map(|()| (w.result, w.then)));
            match durable {
                Ok((result, then)) => {
                    // A VMM that died between the guest's first answer and the commit: nobody else
                    // cleans up after it.
                    if ending.died.is_some()
                        && let Err(e) = self.resources.release_boot(&ending.vm, generation)
                    {
                        log::warn!("clean up after the vmm of {}: {e}", ending.vm);
                    }
                    return self.finish(ending, result, &then);
                }
                Err(e) => {
                    ending.op.progress(&format!("waits for the store: {e}"));
                    if self.core.sleep(RETRY_PERIOD) {
                        // The rows say what was under way; the next daemon finishes it.
                        ending.op.finish(Err(e));
                        return None;
                    }
                }
            }
        }
    }

    /// A guest that booted although a stop came meanwhile is ended before the commit.
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

    /// One try, all of it in one section of the store.
    fn commit_locked(&self, vm: &KeyGuard<'_, VmId>, ending: &mut Settlement) -> Result<Written> {
        let (died, successor) = self.runtimes.end(vm.key());
        ending.died = ending.died.take().or(died);
        if let Some(late) = successor
            && let Some(old) = ending.take_heavier(late)
        {
            ending.replaced.push(old);
        }
        let mut row = self.core.row(vm.key())?;
        if matches!(ending.outcome, Outcome::Deleted) {
            return self.write_gone(vm, ending, row);
        }
        let at = now_s();
        let settled = settle(&mut row, ending, at);
        let (then, result) = self.choose(&mut row, ending, settled);
        row.op = None;
        if let Some((op, verb, to)) = ending.next(&then) {
            enter(&mut row, to, op, verb);
        }
        let result = result.and_then(|()| self.views.vm_value(&row));
        // The registry's lock is a leaf like the store's: the rows are made before.
        let ended = (!matches!(then, NextStep::Restart)).then(|| ended_row(ending.op.op(), &result));
        let begun = ending.next(&then).map(|(op, ..)| op.op());
        let ((), ticket) = self.core.change(true, |tx| {
            for op in ended.into_iter().chain(begun) {
                tx.put_op(op);
            }
            recovery::end(tx, vm.key());
            if row.state == VmState::Starting {
                recovery::forget(tx, vm.key());
                resources::intend(&self.resources, tx, &row);
            }
            // Settle once more, on the row as this section sees it.
            tx.update_vm(vm, |row| {
                // The answer is known already.
                drop(settle(row, ending, at));
                (row.intent, row.op) = (None, None);
                if let Some((op, verb, to)) = ending.next(&then) {
                    enter(row, to, op, verb);
                }
            })
        })?;
        if let Some((op, verb, to)) = ending.next(&then) {
            self.arm_locked(vm, op, to, verb);
        }
        Ok(Written { row, ticket, result, then })
    }

    fn write_gone(&self, vm: &KeyGuard<'_, VmId>, ending: &Settlement, row: VmRow) -> Result<Written> {
        let result = to_value(&VmDeleteReply { deleted: Some(vm.key().clone()) });
        let op = ended_row(ending.op.op(), &result);
        let ((), ticket) = self.core.change(true, |tx| {
            tx.put_op(op);
            recovery::forget(tx, vm.key());
            tx.remove_vm(vm);
            Ok(())
        })?;
        Ok(Written { row, ticket, result, then: NextStep::Gone })
    }

    /// Where the VM goes, and what the operation that let go of it answers.
    fn choose(&self, row: &mut VmRow, ending: &mut Settlement, mut settled: Result<()>) -> (NextStep, Result<()>) {
        let restarting = row.intent.take() == Some(Intent::Restart);
        if ending.successor.is_none() {
            if restarting && settled.is_ok() {
                // It may want more memory than it had.
                settled = self.room_for_restart(row);
                if settled.is_ok() {
                    return (NextStep::Restart, settled);
                }
            }
            if !row.rm || row.state == VmState::Running || ending.state == VmState::Deleting {
                return (NextStep::Rest, settled);
            }
            // An rm VM that came to rest is deleted, by an operation of the daemon's own. One whose
            // delete has failed stays: another would fail as well.
            return match self.core.begin_own_op("vm.delete", Some(row.id.clone()), row.owner_uid) {
                Ok(op) => {
                    ending.successor = Some(Successor { verb: Verb::DeleteForce, op, timeout: None });
                    (NextStep::Successor, settled)
                }
                Err(e) => {
                    ending.warning = Some(format!("delete VM {}, which was to be removed: {e}", row.name));
                    (NextStep::Rest, settled)
                }
            };
        }
        let unfinished = restarting || ending.state == VmState::Starting;
        let result = match settled {
            Ok(()) if unfinished => Err(superseded(row, ending.verb)),
            other => other,
        };
        (NextStep::Successor, result)
    }

    fn room_for_restart(&self, row: &VmRow) -> Result<()> {
        let mut next = row.clone();
        take_pending(&mut next);
        let room = self.core.store.read(|s| self.capacity.reserve_memory(s, &next));
        room.map_err(|e| e.context(format!("restart vm {}: it was stopped", row.name)))
    }

    /// Tells the waiters and makes the claim to drive on with.
    fn finish(&self, ending: Settlement, result: Result<Value>, then: &NextStep) -> Option<Claim> {
        let Settlement { vm, op, successor, .. } = ending;
        let (op, verb, state, timeout) = match (then, successor) {
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
        Some(Claim { lifecycle: self.clone(), vm, op: Some(op), state, verb, timeout, restore: None, cancel, ticket: None })
    }
}

impl Settlement {
    /// What the VM's history says about a commit.
    fn history_entry(&self, written: &Written) -> What {
        let ending = match (&self.outcome, &self.died) {
            (Outcome::Booted(_), None) => history::CommitKind::Booted,
            (Outcome::Booted(_) | Outcome::BootFailed(_), Some(_)) => history::CommitKind::BootDied,
            (Outcome::BootFailed(e), None) if e.kind() == Kind::Cancelled => history::CommitKind::BootCancelled,
            (Outcome::BootFailed(_), None) => history::CommitKind::BootFailed,
            (Outcome::Ended { .. }, _) => history::CommitKind::Ended,
            (Outcome::StillThere(_), _) => history::CommitKind::StillThere,
            (Outcome::Deleted, _) => history::CommitKind::Deleted,
        };
        let state = (!matches!(written.then, NextStep::Gone)).then_some(written.row.state);
        let next = self.next(&written.then).map(|(op, ..)| op.id().clone());
        What::Committed { op: self.op.id().clone(), ending, state, next }
    }

    /// Of two that want to come next the heavier does; gives back the other.
    fn take_heavier(&mut self, late: Successor) -> Option<Successor> {
        match &self.successor {
            Some(early) if Successor::weight(early.verb) > Successor::weight(late.verb) => Some(late),
            _ => self.successor.replace(late),
        }
    }

    /// The operation that owns the VM next, its verb, and the state that it begins in.
    fn next(&self, then: &NextStep) -> Option<(&OpHandle, Verb, VmState)> {
        match then {
            NextStep::Restart => Some((&self.op, Verb::Start, VmState::Starting)),
            NextStep::Successor => self.successor.as_ref().map(|s| (&s.op, s.verb, s.target())),
            NextStep::Rest | NextStep::Gone => None,
        }
    }
}

/// Puts the outcome into the row; what the operation answers. `at`: seconds since the epoch.
fn settle(row: &mut VmRow, ending: &Settlement, at: u64) -> Result<()> {
    let rest = |row: &mut VmRow, state: VmState, reason: Option<String>| {
        row.state = state;
        row.reason = reason;
        row.identity = None;
        row.ssh_addr = None;
    };
    match (&ending.outcome, &ending.died) {
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
            let before = if row.started_at.is_none() { VmState::Created } else { VmState::Stopped };
            if let Some(how) = died {
                rest(row, VmState::Failed, Some(how.to_string()));
                return Err(died_booting(row, how));
            }
            match was_cancelled {
                true => rest(row, before, None),
                false => rest(row, VmState::Failed, Some(e.to_string())),
            }
            Err(e.clone().context(format!("start vm {}", row.name)).of_vm(&row.name))
        }
        (Outcome::Ended { synced }, _) => {
            rest(row, VmState::Stopped, ending.note.clone());
            row.synced = Some(*synced);
            Ok(())
        }
        (Outcome::StillThere(e), _) => {
            row.state = VmState::Failed;
            row.reason = Some(e.to_string());
            Err(e.clone().context(format!("{} vm {}", ending.verb.name(), row.name)).of_vm(&row.name))
        }
        (Outcome::Deleted, _) => Ok(()),
    }
}

fn died_booting(row: &VmRow, how: &BootEnd) -> Error {
    if *how == BootEnd::HostDiskFull {
        return Error::new(Kind::DiskFull, format!("start vm {}: {how}", row.name))
            .hint("free some space (df -h), then try again");
    }
    Error::new(Kind::VmmFailed, format!("start vm {}: {how}", row.name)).hint(format!("fcctl logs {}", row.name))
}
