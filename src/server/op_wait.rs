//! Waits for operations on behalf of the callers that began them or call `op.wait`.

use super::{CallError, CallResult, Connection};
use crate::api::call::OnDisconnect;
use crate::api::frame::{Note, rpc_code};
use crate::api::op::{Op, OpReply, OpStarted, OpState, OpWaitRequest};
use crate::daemon::{CallOutcome, Caller, Core, Gone, Hangup, Notes, OpEvent, WatchLine};
use crate::error::{Error, Kind};
use crate::ids::OpId;
use crate::locks::CancelCause;
use crate::sched::Instant;
use serde::Serialize;
use serde_json::value::to_raw_value;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

impl WatchLine for Connection<'_> {
    fn hangup(&self) -> Hangup<'_> {
        Hangup(self.fd())
    }
    fn send_note(&self, note: Note) -> io::Result<()> {
        self.notify(note)
    }
    fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        self.send(bytes, None)
    }
    fn socket(&self) -> Option<Arc<UnixStream>> {
        Some(Connection::socket(self))
    }
}

/// A call that may wait for operations.
pub(super) struct OpWait<'a> {
    pub core: &'a Core,
    pub connection: &'a Connection<'a>,
    /// True if the caller wants notes before the answer.
    pub more: bool,
}

impl OpWait<'_> {
    pub(super) fn hangup(&self) -> Hangup<'_> {
        Hangup(self.connection.fd())
    }

    /// Answers a call that has begun or joined an operation: at once without `more`, and otherwise
    /// when the operation has ended.
    pub(super) fn follow(
        &self,
        outcome: CallOutcome,
        on_disconnect: OnDisconnect,
        notes: Option<&Notes>,
    ) -> CallResult {
        let (id, owned) = match outcome {
            CallOutcome::Done(value) => return raw(&value),
            CallOutcome::Op(id) => (id, true),
            CallOutcome::Joined(id) => (id, false),
        };
        if !self.more {
            // If the start cannot be recorded, the call fails with that error.
            self.core
                .wait_begun()
                .map_err(|e| CallError::from(e).with_op(id.clone()))?;
            return raw(&OpStarted { op: id });
        }
        let _ = self.connection.notify(Note::Op { op: id.clone() });
        let mut notify = |note| {
            // A failed write means that the caller has disconnected. `poll` reports that as well.
            let _ = self.connection.notify(note);
        };
        match self.wait(&id, None, notes, &mut notify) {
            Ok(Some(op)) => ended(op),
            Ok(None) => Err(Error::internal("a wait without a deadline timed out").into()),
            Err(Gone) => {
                if owned && on_disconnect == OnDisconnect::CancelOperation {
                    // The operation may have ended already.
                    let _ = self.core.ops.cancel(&id, CancelCause::CallerHungUp);
                }
                Err(CallError::from(Error::from(Gone)).with_op(id))
            }
        }
    }

    /// Waits for an operation that has begun. Returns true if it succeeded.
    pub(super) fn succeeds(&self, outcome: CallOutcome) -> bool {
        match outcome {
            CallOutcome::Done(_) => true,
            CallOutcome::Op(op) | CallOutcome::Joined(op) => {
                matches!(self.wait(&op, None, None, &mut |_| {}), Ok(Some(op)) if op.state == OpState::Ok)
            }
        }
    }

    /// Answers `op.wait`: waits until the operation has ended, or fails with `timeout` at the
    /// deadline.
    pub(super) fn op_wait(&self, caller: &Caller, request: &OpWaitRequest) -> CallResult {
        let op = self.core.op_find(caller, &request.op)?;
        let deadline = request
            .timeout_ms
            .map(|ms| Instant::now() + Duration::from_millis(ms));
        let mut notify = |note| {
            if self.more {
                let _ = self.connection.notify(note);
            }
        };
        match self.wait(&op.id, deadline, None, &mut notify) {
            Ok(Some(op)) => raw(&OpReply { op }),
            Ok(None) => Err(CallError::from(Error::new(
                Kind::Timeout,
                format!("operation {} is still running", op.id),
            ))
            .with_op(op.id)),
            Err(gone) => Err(Error::from(gone).into()),
        }
    }

    /// Waits for an operation and returns it. Returns None at the deadline, and for an operation
    /// that is no longer kept.
    fn wait(
        &self,
        id: &OpId,
        deadline: Option<Instant>,
        notes: Option<&Notes>,
        notify: &mut dyn FnMut(Note),
    ) -> Result<Option<Op>, Gone> {
        let Ok(mut watcher) = self.core.ops.watch(id) else {
            return Ok(self.core.op_kept(id).ok());
        };
        loop {
            for note in notes.map(Notes::take).unwrap_or_default() {
                notify(note);
            }
            match watcher.next() {
                Some(OpEvent::Progress(progress)) => notify(Note::Progress(progress)),
                Some(OpEvent::Ended(op)) => return Ok(Some(*op)),
                None => {
                    let mut fds = vec![watcher.fd()];
                    fds.extend(notes.map(Notes::fd));
                    if !self.hangup().wait(&fds, deadline)? {
                        return Ok(None);
                    }
                }
            }
        }
    }
}

pub(super) fn raw(reply: &impl Serialize) -> CallResult {
    to_raw_value(reply)
        .map_err(|e| CallError::from(Error::internal("serialize a reply").with_source(e)))
}

/// Turns an operation that has ended into the answer of its call.
pub(super) fn ended(op: Op) -> CallResult {
    match (op.result, op.error) {
        (_, Some(fault)) => Err(CallError {
            code: rpc_code::DOMAIN,
            fault,
        }
        .with_op(op.id)),
        (Some(result), None) => raw(&result),
        (None, None) => {
            Err(CallError::from(Error::internal("the operation has no result")).with_op(op.id))
        }
    }
}
