//! The `op.*` calls, and the functions that begin and end operations.

use super::access::Caller;
use super::core::Core;
use crate::api::op::{Op, OpListReply, OpListRequest, OpReply, OpState};
use crate::api::{Fault, page};
use crate::error::{Kind, Result};
use crate::host::time::now_s;
use crate::ids::{OpId, VmId};
use crate::locks::CancelCause;
use crate::ops::{Filter, Limits, OpHandle};
use crate::sched::Instant;
use serde_json::value::RawValue;
use std::time::Duration;

/// How long to wait for a read-only store before giving up recording an operation's result.
const WRITABLE_DEADLINE: Duration = Duration::from_secs(1);

impl Core {
    /// Lists the operations that the caller may see. The cursor is the number of an operation,
    /// which stays the same while the daemon runs.
    pub fn op_list(
        &self,
        caller: &Caller,
        request: &OpListRequest,
    ) -> Result<OpListReply<Box<RawValue>>> {
        let after = request
            .after
            .as_deref()
            .map(|text| text.parse::<u64>().map_err(|_| page::bad_cursor(text)));
        let filter = Filter {
            owner: None,
            vm: None,
            all: request.all,
            after: after.transpose()?,
        };
        let seen = self
            .ops
            .list(&filter)
            .into_iter()
            .filter(|(_, op)| self.sees(caller, op));
        let (ops, next) = page::fill(request.limit, seen)?;
        Ok(OpListReply { ops, next })
    }

    /// Finds an operation by its ID or by a unique prefix of the ID. An operation of another user
    /// on the caller's VM is found only by its full ID.
    pub fn op_find(&self, caller: &Caller, text: &str) -> Result<Op> {
        let found = self.ops.find(text, owner(caller));
        if !found
            .as_ref()
            .is_err_and(|e| e.kind() == Kind::OperationNotFound)
        {
            return found;
        }
        // The operation may belong to another user, root or the daemon, on a VM that the caller
        // owns.
        let on_own_vm = text
            .parse::<OpId>()
            .ok()
            .and_then(|id| self.op_kept(&id).ok())
            .filter(|op| self.sees(caller, op));
        on_own_vm.map_or(found, Ok)
    }

    /// Returns an operation that is in progress or has ended. The store keeps operations with an
    /// idempotency key longer than the registry does.
    pub fn op_kept(&self, id: &OpId) -> Result<Op> {
        self.ops.get(id).or_else(|e| {
            let row = self
                .store
                .read(|s| s.op(id).cloned())
                .filter(|row| row.state.has_ended());
            row.map(|row| (*row).clone()).ok_or(e)
        })
    }

    /// True if the caller may see the operation. Root, the user who began it and the owner of its
    /// VM may.
    fn sees(&self, caller: &Caller, op: &Op) -> bool {
        let is_own_vm = |vm: &VmId| {
            self.store
                .read(|s| s.vm(vm).is_some_and(|row| caller.may_see(row.owner_uid)))
        };
        caller.may_see(op.owner_uid) || op.vm.as_ref().is_some_and(is_own_vm)
    }

    /// Requests cancellation and returns the operation's state right afterwards.
    pub fn op_cancel(&self, caller: &Caller, text: &str) -> Result<OpReply> {
        let op = self.op_find(caller, text)?;
        Ok(OpReply {
            op: self.ops.cancel(&op.id, CancelCause::Requested)?,
        })
    }

    /// Begins an operation of a caller, within the limits of the caller's uid.
    pub(super) fn begin_op(
        &self,
        method: &str,
        vm: Option<VmId>,
        uid: u32,
        may_cancel: bool,
    ) -> Result<OpHandle> {
        self.ops.begin(
            method,
            vm,
            uid,
            may_cancel,
            Limits {
                per_uid_max: self.limits.operations_per_uid_max,
            },
        )
    }

    /// Begins an operation that stops or deletes a VM. No limit applies, because a VM has at most
    /// two such operations and everybody must be able to stop a VM.
    pub(super) fn begin_end_op(&self, method: &str, vm: &VmId, uid: u32) -> Result<OpHandle> {
        self.begin_own_op(method, Some(vm.clone()), uid)
    }

    /// Begins an operation of the daemon itself, without a limit. It fails only if there are no
    /// descriptors left.
    pub(super) fn begin_own_op(
        &self,
        method: &str,
        vm: Option<VmId>,
        uid: u32,
    ) -> Result<OpHandle> {
        self.ops.begin(
            method,
            vm,
            uid,
            false,
            Limits {
                per_uid_max: usize::MAX,
            },
        )
    }

    /// Ends an operation that changes no VM's state: records the result, then reports it.
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
        // The disk may accept the write a moment later. Do not delay the operation's waiters for
        // longer.
        let written = write().or_else(|e| {
            if self.store.wait_writable(Instant::now() + WRITABLE_DEADLINE) {
                write()
            } else {
                Err(e)
            }
        });
        if let Err(e) = written {
            log::warn!("record the end of operation {}: {e}", op.id());
        }
        op.finish(result);
    }

    /// Like [`Self::end_op`], but does not wait until the result is durable. It logs, so no lock
    /// may be held.
    pub(super) fn end_op_soon(&self, op: OpHandle, result: Result<serde_json::Value>) {
        let row = ended_row(op.op(), &result);
        match self.change(true, |tx| {
            tx.put_op(row);
            Ok(())
        }) {
            Ok(((), ticket)) => ticket.detach(),
            Err(e) => log::warn!("record the end of operation {}: {e}", op.id()),
        }
        op.finish(result);
    }

    /// Waits until everything that has begun so far is durable. Only then may a caller learn that
    /// it has begun.
    pub fn wait_begun(&self) -> Result<()> {
        self.wait_durable(self.store.barrier()?)
    }

    /// Records durably that an operation has begun.
    pub(super) fn persist_op(&self, op: &OpHandle) -> Result<()> {
        let row = op.op();
        let ((), ticket) = self.store.change(|tx| {
            tx.put_op(row);
            Ok(())
        })?;
        self.wait_durable(ticket)
    }
}

/// Returns the uid whose operations the caller sees, or `None` for root, who sees all.
fn owner(caller: &Caller) -> Option<u32> {
    (caller.uid != 0).then_some(caller.uid)
}

/// Returns the row of an operation with its result, for a commit that records it before the
/// operation ends.
pub(super) fn ended_row(mut op: Op, result: &Result<serde_json::Value>) -> Op {
    match result {
        Ok(value) => (op.state, op.result) = (OpState::Ok, Some(value.clone())),
        Err(error) => {
            op.state = if error.kind() == Kind::Cancelled {
                OpState::Cancelled
            } else {
                OpState::Failed
            };
            op.error = Some(Fault {
                op: Some(op.id.clone()),
                ..Fault::from(error)
            });
        }
    }
    op.ended_at = Some(now_s());
    (op.progress.parts, op.progress.parts_total) = (Vec::new(), None);
    op
}
