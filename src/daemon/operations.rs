//! `op.*` over the registry, for those who may see the operation.

use super::{Caller, Daemon};
use crate::api::op::{Op, OpListReply, OpListRequest, OpReply};
use crate::error::{Error, Kind, Result};

impl Daemon {
    pub fn op_list(&self, caller: &Caller, request: &OpListRequest) -> OpListReply {
        let ops = self.ops.list(|op| caller.may_see(op.owner_uid) && (request.all || !op.state.has_ended()));
        OpListReply { ops }
    }

    pub fn op_find(&self, caller: &Caller, text: &str) -> Result<Op> {
        self.ops.find(text, |op| caller.may_see(op.owner_uid))
    }

    /// Asks it to stop. The answer shows it as it is then.
    pub fn op_cancel(&self, caller: &Caller, text: &str) -> Result<OpReply> {
        let op = self.op_find(caller, text)?;
        if op.state.has_ended() {
            return Err(Error::new(Kind::WrongState, format!("operation {} has ended already", op.id)));
        }
        if !op.may_cancel {
            return Err(Error::new(Kind::WrongState, format!("operation {} ({}) cannot be cancelled", op.id, op.method))
                .hint("stop, kill and delete always finish; fcctl op wait waits for it"));
        }
        self.ops.cancel(&op.id, "op cancel was asked for")?;
        Ok(OpReply { op: self.op_find(caller, op.id.as_str())? })
    }
}
