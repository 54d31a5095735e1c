//! Settles claims that were dropped without a commit, because their work panicked or their thread
//! could not be started. The operation ends as `internal` and the VM as `failed`.

use super::lifecycle::Lifecycle;
use crate::api::vm::VmState;
use crate::error::{Error, Result};
use crate::ids::VmId;
use crate::ops::OpHandle;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

const ABANDON_RETRY: Duration = Duration::from_millis(250);

impl Lifecycle {
    /// Settles a dropped claim on another thread, because the current thread may hold any lock.
    pub(super) fn abandon(&self, vm: &VmId, op: OpHandle) {
        let (lifecycle, vm) = (self.clone(), vm.clone());
        let body = move || {
            // The same code may panic again. Even then, the VM must leave its transitional state.
            let settle = || catch_unwind(AssertUnwindSafe(|| lifecycle.fail_abandoned(&vm, &op)));
            while let Err(e) =
                settle().unwrap_or_else(|_| Err(Error::internal("it panicked again")))
            {
                log::error!("settle VM {vm} after an error in the daemon: {e}");
                if lifecycle.core.sleep(ABANDON_RETRY) {
                    break;
                }
            }
            let failed = Error::internal(format!(
                "VM {vm}: the operation failed because of an error in the daemon"
            ))
            .hint("see the daemon's log");
            lifecycle.core.end_op(op, Err(failed));
            if lifecycle
                .core
                .row(&vm)
                .is_ok_and(|row| row.rm && row.op.is_none())
            {
                lifecycle.delete_unasked(&vm);
            }
        };
        if let Err(e) = self.core.spawn("abandon", body) {
            log::error!("settle an abandoned claim: {e}");
        }
    }

    fn fail_abandoned(&self, vm: &VmId, op: &OpHandle) -> Result<()> {
        let row = match self.core.row(vm) {
            Ok(row) if row.op.as_ref() == Some(op.id()) => row,
            _ => return Ok(()),
        };
        if let Some(identity) = self.vmms.identity(&row) {
            self.vmms.kill_vmm(&identity)?;
        }
        self.resources.release_boot(vm, row.generation)?;
        let guard = self.core.locks.vm.lock(vm);
        let successor = self.runtimes.end(guard.key()).1;
        let changed = self.core.change(true, |tx| {
            tx.update_vm(&guard, |r| {
                r.state = VmState::Failed;
                r.reason = Some(
                    "an operation failed because of an error in the daemon: see its log".to_owned(),
                );
                (r.op, r.intent, r.identity, r.ssh_addr) = (None, None, None, None);
                r.forget_listeners();
            })
        });
        drop(guard);
        if let Some(s) = successor {
            self.core.end_op_soon(
                s.op,
                Err(Error::internal(format!(
                    "VM {vm}: an earlier operation failed because of an error in the daemon"
                ))),
            );
        }
        self.core.wait_durable(changed?.1)
    }
}
