//! Waits for a VM to reach a state, or to be deleted.

use super::access::Caller;
use super::lifecycle::Lifecycle;
use super::views::Views;
use super::waiting::{Gone, Hangup};
use crate::api::vm::{Vm, VmReply, VmState, VmWaitRequest};
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::sched::Instant;
use std::time::Duration;

impl Lifecycle {
    /// Waits until the VM is deleted. If the holder hangs up first, a VM with `rm` is deleted.
    pub fn hold(&self, vm: Vm, holder: Hangup<'_>) -> Result<VmReply> {
        let mut last = vm;
        let ended = self
            .views
            .wait_vm(&last.id.clone(), holder, None, &mut |vm| {
                last = vm.clone();
                false
            });
        match ended {
            Ok(_) => Err(Error::internal("a hold without a deadline timed out")),
            Err(WaitEnd::VmGone) => Ok(VmReply { vm: last }),
            Err(WaitEnd::CallerGone) => {
                if last.rm {
                    self.delete_unasked(&last.id);
                }
                Err(Error::new(Kind::Cancelled, "the holder hung up"))
            }
            Err(WaitEnd::Failed(e)) => Err(e),
        }
    }
}

impl Views {
    /// Waits until the VM is in the requested state. A wait for `stopped` also ends at `failed`.
    ///
    /// # Errors
    /// `timeout`; `vm_not_found` if the VM is deleted first; `cancelled` if the caller hangs up.
    pub fn wait_state(
        &self,
        caller: &Caller,
        request: &VmWaitRequest,
        waiter: Hangup<'_>,
    ) -> Result<VmReply> {
        let wanted = request.state.unwrap_or(VmState::Stopped);
        let row = self.core.resolve(caller, &request.vm)?;
        let deadline = request
            .timeout_ms
            .map(|ms| Instant::now() + Duration::from_millis(ms));
        let fulfils =
            |state| state == wanted || (wanted == VmState::Stopped && state == VmState::Failed);
        let mut seen = None;
        let ended = self.wait_vm(&row.id, waiter, deadline, &mut |vm| {
            seen = Some(vm.clone());
            fulfils(vm.state)
        });
        match (ended, seen) {
            (Ok(true), Some(vm)) => Ok(VmReply { vm }),
            (Ok(_), vm) => {
                let now = vm.map_or("gone", |vm| vm.state.name());
                Err(Error::new(
                    Kind::Timeout,
                    format!(
                        "wait for VM {} to be {}: it is {now}",
                        row.name,
                        wanted.name()
                    ),
                ))
            }
            (Err(WaitEnd::VmGone), _) => Err(super::access::vm_not_found(row.name.as_str())),
            (Err(WaitEnd::CallerGone), _) => Err(Gone.into()),
            (Err(WaitEnd::Failed(e)), _) => Err(e),
        }
    }

    /// Waits until the VM has its directory, which the first start creates. Returns false if the VM
    /// is deleted before that.
    pub(super) fn wait_directory(&self, id: &VmId, waiter: Hangup<'_>) -> Result<bool> {
        crate::locks::may_block("file access");
        let dir = self.core.vm_dir(id);
        match self.wait_vm(id, waiter, None, &mut |_| dir.exists()) {
            Ok(is_there) => Ok(is_there),
            Err(WaitEnd::VmGone) => Ok(false),
            Err(WaitEnd::CallerGone) => Err(Gone.into()),
            Err(WaitEnd::Failed(e)) => Err(e),
        }
    }

    fn wait_vm(
        &self,
        id: &VmId,
        waiter: Hangup<'_>,
        deadline: Option<Instant>,
        done: &mut dyn FnMut(&Vm) -> bool,
    ) -> Result<bool, WaitEnd> {
        let changed = self
            .core
            .store
            .watch(Some(id.clone()))
            .map_err(WaitEnd::Failed)?;
        loop {
            changed.clear();
            match self.view(id) {
                Ok(vm) if done(&vm) => return Ok(true),
                Ok(_) => {}
                Err(_) => return Err(WaitEnd::VmGone),
            }
            match waiter.wait(&[changed.fd(), self.core.closing.fd()], deadline) {
                Ok(true) if self.core.closing.is_cancelled() => {
                    return Err(WaitEnd::Failed(Error::new(
                        Kind::ShuttingDown,
                        "the daemon is shutting down",
                    )));
                }
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(Gone) => return Err(WaitEnd::CallerGone),
            }
        }
    }
}

/// The reason that a wait ended early.
enum WaitEnd {
    VmGone,
    CallerGone,
    Failed(Error),
}
