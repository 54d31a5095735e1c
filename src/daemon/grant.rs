//! The answers to requests for a VM, which are decided under its lock and recorded in its history.

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

/// The answer to a request. A refusal is an error instead.
pub(super) enum Grant {
    Claimed(ClaimedRow),
    /// The VM is in the wanted state already, or the transition table allows the use.
    Nothing,
    /// The operation in progress, or the queued one, does what was requested.
    Joined(OpId),
    Queued {
        op: OpId,
        /// The replaced successor. Its operation ends after the VM's lock is released.
        replaced: Option<Successor>,
    },
}

/// A claim: the row has entered a transitional state, and the holder of `op` owns the VM.
pub(super) struct ClaimedRow {
    pub op: OpHandle,
    pub state: VmState,
    /// The change of the store that wrote the row.
    pub ticket: Ticket,
    /// The successor of an earlier claim, which the store has undone. Its operation ends after the
    /// VM's lock is released.
    pub stale: Option<Successor>,
}

impl Core {
    /// Records the answer to a request. The VM's lock is still held, so the history lists answers
    /// in the order in which they were given.
    pub(super) fn note_answer(
        &self,
        _vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
        verb: Verb,
        answered: std::result::Result<&Grant, &Error>,
    ) {
        let seq = if let Ok(Grant::Claimed(claimed)) = answered {
            Some(claimed.ticket.seq())
        } else {
            None
        };
        self.note(row, seq, None, || {
            let (answer, op) = match answered {
                Ok(Grant::Claimed(claimed)) => (Answer::Claimed, Some(claimed.op.id())),
                Ok(Grant::Nothing) => (Answer::Nothing, None),
                Ok(Grant::Joined(op)) => (Answer::Joined, Some(op)),
                Ok(Grant::Queued { op, .. }) => (Answer::Queued, Some(op)),
                Err(e) if e.kind() == Kind::WrongState => (Answer::Refused, None),
                Err(_) => (Answer::Failed, None),
            };
            let (state, restarting) = (row.state, row.intent == Some(Intent::Restart));
            What::Asked {
                verb,
                state,
                restarting,
                answer,
                op: op.cloned(),
            }
        });
    }
}
