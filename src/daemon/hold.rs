//! Waits for a VM's state, by its holder and by anybody else.

use super::access::Caller;
use super::lifecycle::Lifecycle;
use super::views::Views;
use super::waiting::{Gone, Hangup};
use crate::api::vm::{Vm, VmReply, VmState, VmWaitRequest};
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use std::time::{Duration, Instant};

impl Lifecycle {
    /// Until the VM is gone. When the holder goes first, an `rm` VM is deleted.
    pub fn hold(&self, vm: Vm, holder: Hangup<'_>) -> Result<VmReply> {
        let mut last = vm;
        let ended = self.views.wait_vm(&last.id.clone(), holder, None, &mut |vm| {
            last = vm.clone();
            false
        });
        match ended {
            Ok(_) => Err(Error::internal("a hold without a deadline ran into one")),
            Err(Stop::VmGone) => Ok(VmReply { vm: last }),
            Err(Stop::CallerGone) => {
                if last.rm {
                    self.delete_unasked(&last.id);
                }
                Err(Error::new(Kind::Cancelled, "the holder went away"))
            }
            Err(Stop::Failed(e)) => Err(e),
        }
    }
}

impl Views {
    /// Until the VM is in a state, or is deleted, or the time is over.
    pub fn wait_state(&self, caller: &Caller, request: &VmWaitRequest, waiter: Hangup<'_>) -> Result<VmReply> {
        let wanted = request.state.unwrap_or(VmState::Stopped);
        let row = self.core.resolve(caller, &request.vm)?;
        let deadline = request.timeout_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
        let fulfils = |state| state == wanted || (wanted == VmState::Stopped && state == VmState::Failed);
        let mut seen = None;
        let ended = self.wait_vm(&row.id, waiter, deadline, &mut |vm| {
            seen = Some(vm.clone());
            fulfils(vm.state)
        });
        match (ended, seen) {
            (Ok(true), Some(vm)) => Ok(VmReply { vm }),
            (Ok(_), vm) => {
                let now = vm.map_or("gone", |vm| vm.state.name());
                Err(Error::new(Kind::Timeout, format!("wait for vm {} to be {}: it is {now}", row.name, wanted.name())))
            }
            (Err(Stop::VmGone), _) => Err(super::access::vm_not_found(row.name.as_str())),
            (Err(Stop::CallerGone), _) => Err(Error::new(Kind::Cancelled, "the caller went away")),
            (Err(Stop::Failed(e)), _) => Err(e),
        }
    }

    /// Until the VM has its directory, which its first start makes. False: the VM is gone.
    pub(super) fn wait_directory(&self, id: &VmId, waiter: Hangup<'_>) -> Result<bool> {
        let dir = self.core.vm_dir(id);
        match self.wait_vm(id, waiter, None, &mut |_| dir.exists()) {
            Ok(is_there) => Ok(is_there),
            Err(Stop::VmGone) => Ok(false),
            Err(Stop::CallerGone) => Err(Error::new(Kind::Cancelled, "the caller went away")),
            Err(Stop::Failed(e)) => Err(e),
        }
    }

    fn wait_vm(
        &self,
        id: &VmId,
        waiter: Hangup<'_>,
        deadline: Option<Instant>,
        done: &mut dyn FnMut(&Vm) -> bool,
    ) -> Result<bool, Stop> {
        let changed = self.core.store.watch(Some(id.clone())).map_err(Stop::Failed)?;
        loop {
            changed.clear();
            match self.view(id) {
                Ok(vm) if done(&vm) => return Ok(true),
                Ok(_) => {}
                Err(_) => return Err(Stop::VmGone),
            }
            match waiter.wait(&[changed.fd(), self.core.closing.fd()], deadline) {
                Ok(true) if self.core.closing.is_cancelled() => {
                    return Err(Stop::Failed(Error::new(Kind::ShuttingDown, "the daemon is shutting down")));
                }
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(Gone) => return Err(Stop::CallerGone),
            }
        }
    }
}

/// Why a wait ended before its time.
enum Stop {
    VmGone,
    CallerGone,
    Failed(Error),
}
