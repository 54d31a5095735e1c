//! What a request for a VM gets under the VM's lock, and how it enters the VM's history.

use super::core::Core;
use super::history::{Answer, What};
use super::runtime::Successor;
use super::transitions::Verb;
use crate::api::vm::VmState;
use crate::error::{Error, Kind};
use crate::ids::{OpId, VmId};
use crate::locks::KeyGuard;
use crate::ops::OpHandle;
use crate::store::{Intent, Ticket, VmRow};

/// What a request gets. A refusal is an error instead.
pub(super) enum Grant {
    Claimed(ClaimedRow),
    /// The VM is in the wanted state already, or the transition table allows the use.
    Nothing,
    /// The operation in progress, or the queued one, does what was asked for.
    Joined(OpId),
    Queued {
        op: OpId,
        /// The queued operation that lost its place. It ends after the VM's lock is released.
        replaced: Option<Successor>,
    },
}

/// A row that has entered a transitional state. From here on, the holder of `op` drives the VM.
pub(super) struct ClaimedRow {
    pub op: OpHandle,
    pub state: VmState,
    /// The change of the store that wrote the row.
    pub ticket: Ticket,
}

impl Core {
    /// Records what a request got. The VM's lock is still held, so the history has the order in
    /// which requests were answered.
    pub(super) fn note_asked(
        &self,
        _vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
        verb: Verb,
        granted: std::result::Result<&Grant, &Error>,
    ) {
        let seq = if let Ok(Grant::Claimed(claimed)) = granted { Some(claimed.ticket.seq()) } else { None };
        self.note(row, seq, None, || {
            let (answer, op) = match granted {
                Ok(Grant::Claimed(claimed)) => (Answer::Claimed, Some(claimed.op.id())),
                Ok(Grant::Nothing) => (Answer::Nothing, None),
                Ok(Grant::Joined(op)) => (Answer::Joined, Some(op)),
                Ok(Grant::Queued { op, .. }) => (Answer::Queued, Some(op)),
                Err(e) if e.kind() == Kind::WrongState => (Answer::Refused, None),
                Err(_) => (Answer::Failed, None),
            };
            let (state, restarting) = (row.state, row.intent == Some(Intent::Restart));
            What::Asked { verb, state, restarting, answer, op: op.cloned() }
        });
    }
}
