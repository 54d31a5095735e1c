//! `op.*` over the registry, for those who may see the operation.

use super::access::Caller;
use super::core::Core;
use super::core::now_s;
use crate::api::op::{Op, OpListReply, OpListRequest, OpReply, OpState};
use crate::api::{Fault, page};
use crate::error::{Kind, Result};
use crate::ids::{OpId, VmId};
use crate::locks::CancelCause;
use crate::ops::{Filter, Limits, OpHandle};
use serde_json::value::RawValue;
use std::time::{Duration, Instant};

/// For a store that has refused the end of an operation to take it.
const WRITABLE_DEADLINE: Duration = Duration::from_secs(1);

impl Core {
    /// A place in this list is the operation's number, which holds while the daemon runs.
    pub fn op_list(&self, caller: &Caller, request: &OpListRequest) -> Result<OpListReply<Box<RawValue>>> {
        let after = request.after.as_deref().map(|text| text.parse::<u64>().map_err(|_| page::bad_cursor(text)));
        let filter = Filter { owner: None, vm: None, all: request.all, after: after.transpose()? };
        let seen = self.ops.list(&filter).into_iter().filter(|(_, op)| self.sees(caller, op));
        let (ops, next) = page::fill(request.limit, seen)?;
        Ok(OpListReply { ops, next })
    }

    /// By id or by a prefix of it that fits one operation only.
    pub fn op_find(&self, caller: &Caller, text: &str) -> Result<Op> {
        let found = self.ops.find(text, owner(caller));
        if !found.as_ref().is_err_and(|e| e.kind() == Kind::OperationNotFound) {
            return found;
        }
        // Another user, root or the daemon itself began it, on a VM that the caller owns.
        let whole = text.parse::<OpId>().ok().and_then(|id| self.op_kept(&id).ok()).filter(|op| self.sees(caller, op));
        whole.map_or(found, Ok)
    }

    /// An operation that is under way or has ended. The store keeps those that a key stands for
    /// longer than the registry.
    pub fn op_kept(&self, id: &OpId) -> Result<Op> {
        self.ops.get(id).or_else(|e| {
            let row = self.store.read(|s| s.op(id).cloned()).filter(|row| row.state.has_ended());
            row.map(|row| (*row).clone()).ok_or(e)
        })
    }

    /// Who may see an operation: root, who began it, and the owner of its VM.
    fn sees(&self, caller: &Caller, op: &Op) -> bool {
        let of_theirs = |vm: &VmId| self.store.read(|s| s.vm(vm).is_some_and(|row| caller.may_see(row.owner_uid)));
        caller.may_see(op.owner_uid) || op.vm.as_ref().is_some_and(of_theirs)
    }

    /// Asks it to stop. The answer shows it as it is then.
    pub fn op_cancel(&self, caller: &Caller, text: &str) -> Result<OpReply> {
        let op = self.op_find(caller, text)?;
        Ok(OpReply { op: self.ops.cancel(&op.id, CancelCause::Requested)? })
    }

    /// Begins an operation of a caller's, within its share.
    pub(super) fn begin_op(&self, method: &str, vm: Option<VmId>, uid: u32, may_cancel: bool) -> Result<OpHandle> {
        self.ops.begin(method, vm, uid, may_cancel, Limits { per_uid_max: self.limits.operations_per_uid_max })
    }

    /// The same for what ends something: there are at most two of a VM, and no limit may keep
    /// anybody from them.
    pub(super) fn begin_end_op(&self, method: &str, vm: &VmId, uid: u32) -> Result<OpHandle> {
        self.begin_own_op(method, Some(vm.clone()), uid)
    }

    /// Begins an operation of the daemon's own, which no limit may stop. Only a lack of descriptors
    /// can.
    pub(super) fn begin_own_op(&self, method: &str, vm: Option<VmId>, uid: u32) -> Result<OpHandle> {
        self.ops.begin(method, vm, uid, false, Limits { per_uid_max: usize::MAX })
    }

    /// Ends an operation that changes no VM's state: written down, then told.
    pub(super) fn end_op(&self, op: OpHandle, result: Result<serde_json::Value>) {
        let row = ended_row(op.op(), &result);
        let write = || {
            let row = row.clone();
            let written = self.change(true, |tx| {
                tx.put_op(row);
                Ok(())
            });
            written.and_then(|((), ticket)| self.wait_durable(ticket))
        };
        // A disk that refuses once takes it a moment later; longer nobody waits for that.
        let written =
            write().or_else(|e| if self.store.wait_writable(Instant::now() + WRITABLE_DEADLINE) { write() } else { Err(e) });
        if let Err(e) = written {
            log::warn!("write down the end of operation {}: {e}", op.id());
        }
        op.finish(result);
    }

    /// Like `end_op`, but does not wait until the end is durable. It logs, so no lock may be held.
    pub(super) fn end_op_soon(&self, op: OpHandle, result: Result<serde_json::Value>) {
        let row = ended_row(op.op(), &result);
        match self.change(true, |tx| {
            tx.put_op(row);
            Ok(())
        }) {
            Ok(((), ticket)) => ticket.detach(),
            Err(e) => log::warn!("write down the end of operation {}: {e}", op.id()),
        }
        op.finish(result);
    }

    /// Until everything that was begun so far is durable: only then may a caller be told that it
    /// was.
    pub fn wait_begun(&self) -> Result<()> {
        self.wait_durable(self.store.barrier()?)
    }

    /// Writes down that an operation has begun.
    pub(super) fn persist_op(&self, op: &OpHandle) -> Result<()> {
        let row = op.op();
        let ((), ticket) = self.store.change(|tx| {
            tx.put_op(row);
            Ok(())
        })?;
        self.wait_durable(ticket)
    }
}

/// Whose operations the caller sees: everybody's for root.
fn owner(caller: &Caller) -> Option<u32> {
    (caller.uid != 0).then_some(caller.uid)
}

/// The row of an operation as its end will leave it: for a commit that writes it down first.
pub(super) fn ended_row(mut op: Op, result: &Result<serde_json::Value>) -> Op {
    match result {
        Ok(value) => (op.state, op.result) = (OpState::Ok, Some(value.clone())),
        Err(error) => {
            op.state = if error.kind() == Kind::Cancelled { OpState::Cancelled } else { OpState::Failed };
            op.error = Some(Fault { op: Some(op.id.clone()), ..Fault::from(error) });
        }
    }
    op.ended_at = Some(now_s());
    op
}
