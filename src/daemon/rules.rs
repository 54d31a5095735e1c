//! Applies the transition table to rows, and puts rows into new states.

use super::core::Core;
use super::grant::Grant;
use super::transitions::{Decision, Verb, decide};
use crate::api::vm::{Pending, VmState};
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::locks::{CancelCause, KeyGuard};
use crate::ops::OpHandle;
use crate::store::{Intent, VmRow};

impl Core {
    /// Refuses what the transition table does not allow in the row's state.
    pub(super) fn allow(&self, row: &VmRow, verb: Verb) -> Result<()> {
        match decide(row.state, row.intent == Some(Intent::Restart), verb) {
            Decision::Refuse(hint) => Err(refusal(row, verb, hint)),
            _ => Ok(()),
        }
    }

    /// Like [`Self::allow`], under the VM's lock, and records the answer in the history.
    pub(super) fn allow_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
        verb: Verb,
    ) -> Result<()> {
        let allowed = self.allow(row, verb);
        self.note_answer(vm, row, verb, allowed.as_ref().map(|()| &Grant::Nothing));
        allowed
    }
}

/// True if the VM does not run and no operation is in progress.
pub(super) fn is_at_rest(state: VmState) -> bool {
    matches!(state, VmState::Created | VmState::Stopped | VmState::Failed)
}

/// Applies the settings that were waiting for the VM's next start.
pub(super) fn take_pending(row: &mut VmRow) {
    let Pending {
        vcpus,
        mem_mib,
        disk_bytes,
        rates,
    } = row.pending.take().unwrap_or_default();
    row.shape.vcpus = vcpus.unwrap_or(row.shape.vcpus);
    row.shape.mem_mib = mem_mib.unwrap_or(row.shape.mem_mib);
    row.shape.disk_bytes = disk_bytes.unwrap_or(row.shape.disk_bytes);
    row.shape.rates = row.shape.rates.with(&rates);
}

/// Puts a row into a transitional state for `op`. A start also applies the pending settings and
/// begins a new generation.
pub(super) fn enter(row: &mut VmRow, to: VmState, op: &OpHandle, verb: Verb) {
    if to == VmState::Starting {
        take_pending(row);
        row.generation += 1;
        row.synced = None;
        row.unresponsive = false;
        row.paused = false;
        (row.has_balloon, row.balloon_mib) = (false, None);
        // `identity` stays, because the boot first has to kill a VMM that an earlier operation
        // could not kill.
        row.ssh_addr = None;
        row.forget_listeners();
    }
    row.intent = (verb == Verb::Restart && to == VmState::Stopping).then_some(Intent::Restart);
    row.state = to;
    row.reason = None;
    row.op = Some(op.id().clone());
}

pub(super) fn refusal(row: &VmRow, verb: Verb, hint: &str) -> Error {
    Error::new(
        Kind::WrongState,
        format!(
            "{} VM {}: it is {}",
            verb.name(),
            row.name,
            row.state.name()
        ),
    )
    .hint(hint)
    .of_vm(&row.name)
}

pub(super) fn superseded(row: &VmRow, verb: Verb) -> Error {
    Error::new(
        Kind::Superseded,
        format!(
            "{} VM {}: a later request replaced it",
            verb.name(),
            row.name
        ),
    )
    .hint(format!("fcctl vm show {}", row.name))
}

/// Returns the cause that is recorded when a verb cancels transfers, sessions or boots.
pub(super) fn cause_for(verb: Verb) -> CancelCause {
    match verb {
        Verb::Delete | Verb::DeleteForce => CancelCause::VmDeleted,
        Verb::Kill => CancelCause::VmKilled,
        Verb::Restart => CancelCause::VmRestarted,
        _ => CancelCause::VmStopped,
    }
}
