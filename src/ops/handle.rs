//! Defines the handles for the code that carries out an operation.

use super::{EndedOp, Ops};
use crate::api::op::{Op, Progress};
use crate::error::{Error, Result};
use crate::ids::OpId;
use crate::locks::Cancel;

/// The handle of an operation in progress. If the handle is dropped without a result, for example
/// by a panic, the operation fails with `internal`.
#[must_use = "dropping it ends the operation as failed"]
pub struct OpHandle {
    reporter: Reporter,
    cancel: Cancel,
    is_finished: bool,
}

/// Reports progress, also from other threads. It has no effect once the operation has ended.
#[derive(Clone)]
pub struct Reporter {
    ops: Ops,
    id: OpId,
}

impl Reporter {
    /// Sets the current stage, such as `wait for ssh`, and clears the numbers of the previous one.
    pub fn progress(&self, stage: &str) {
        self.update(|p| {
            let is_new = p.stage != stage || p.done.is_some();
            if is_new {
                *p = Progress {
                    stage: stage.to_owned(),
                    ..Progress::default()
                };
            }
            is_new
        });
    }

    pub fn progress_bytes(&self, done: u64, total: Option<u64>) {
        self.progress_units(done, total, "bytes");
    }

    /// Sets the numbers of the current stage. `unit` is, for example, `bytes`, `files` or `steps`.
    pub fn progress_units(&self, done: u64, total: Option<u64>, unit: &str) {
        self.update(|p| {
            if p.unit.as_deref() != Some(unit) {
                p.unit = Some(unit.to_owned());
            }
            (p.done, p.total) = (Some(done), total);
            true
        });
    }

    /// Sets the whole progress at once.
    pub fn replace(&self, progress: Progress) {
        self.update(|p| {
            *p = progress;
            true
        });
    }

    fn update(&self, change: impl FnOnce(&mut Progress) -> bool) {
        let mut state = self.ops.shared.state.lock();
        let Some(entry) = state.entries.get_mut(&self.id) else {
            return;
        };
        if !entry.op.state.has_ended() && change(&mut entry.op.progress) {
            entry.changed();
        }
    }
}

impl OpHandle {
    pub(super) fn new(ops: Ops, id: OpId, cancel: Cancel) -> Self {
        Self {
            reporter: Reporter { ops, id },
            cancel,
            is_finished: false,
        }
    }

    pub fn id(&self) -> &OpId {
        &self.reporter.id
    }
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }
    pub fn reporter(&self) -> Reporter {
        self.reporter.clone()
    }
    /// Returns the operation in its current state.
    pub fn op(&self) -> Op {
        self.reporter
            .ops
            .get(self.id())
            .expect("an operation under way is never pruned")
    }

    /// See [`Reporter::progress`].
    pub fn progress(&self, stage: &str) {
        self.reporter.progress(stage);
    }

    /// Ends the operation as `ok`, as `cancelled` if the error has that kind, or as `failed`. Wakes
    /// all threads that wait for the operation.
    pub fn finish(mut self, result: Result<serde_json::Value>) -> EndedOp {
        self.end(result)
            .expect("an operation under way is never pruned")
    }

    /// Removes an operation that was refused before it did anything, so that refused calls do not
    /// displace others from the history. If a thread already waits for or watches the operation,
    /// the operation ends with the error instead.
    pub fn refuse(mut self, error: &Error) {
        let shared = self.reporter.ops.shared.clone();
        let mut state = shared.state.lock();
        self.is_finished = true;
        if !state.discard(&self.reporter.id) {
            state.end(&self.reporter.id, Err(error.clone()), shared.retention);
        }
    }

    fn end(&mut self, result: Result<serde_json::Value>) -> Option<EndedOp> {
        self.is_finished = true;
        let shared = &self.reporter.ops.shared;
        shared
            .state
            .lock()
            .end(&self.reporter.id, result, shared.retention)
    }
}

impl Drop for OpHandle {
    fn drop(&mut self) {
        if self.is_finished {
            return;
        }
        let why = if std::thread::panicking() {
            "the operation panicked"
        } else {
            "the operation ended without a result"
        };
        if let Some(ended) = self.end(Err(Error::internal(why).hint("see the daemon's log"))) {
            (self.reporter.ops.shared.on_dropped)(ended);
        }
    }
}
