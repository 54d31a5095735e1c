//! The lifecycle verbs as API calls.

use super::access::Caller;
use super::call::CallOutcome;
use super::lifecycle::{Lifecycle, LifecycleRequest};
use super::transitions::Verb;
use crate::api::vm::{VmDeleteReply, VmDeleteRequest, VmPruneReply, VmState, VmStopRequest};
use crate::error::{Kind, Result};
use crate::ids::VmId;
use std::time::Duration;

/// The longest grace period. A longer period in a request is shortened to this.
const STOP_TIMEOUT_MAX: Duration = Duration::from_secs(3600);

impl Lifecycle {
    pub fn start(&self, caller: &Caller, vm: &str) -> Result<CallOutcome> {
        self.request(
            caller,
            vm,
            &LifecycleRequest {
                verb: Verb::Start,
                method: "vm.start",
                timeout: None,
                restore: None,
            },
        )
    }

    pub fn stop(&self, caller: &Caller, request: &VmStopRequest) -> Result<CallOutcome> {
        let verb = if request.force {
            Verb::StopForce
        } else {
            Verb::Stop
        };
        let stop = LifecycleRequest {
            verb,
            method: "vm.stop",
            timeout: grace(request.timeout_ms),
            restore: None,
        };
        if !request.keep {
            return self.request(caller, &request.vm, &stop);
        }
        let vm = self.core.resolve(caller, &request.vm)?.id;
        self.runtimes.set_keep(&vm, true);
        let begun = self.request(caller, vm.as_str(), &stop);
        if !matches!(begun, Ok(CallOutcome::Op(_) | CallOutcome::Joined(_))) {
            self.runtimes.set_keep(&vm, false);
        }
        begun
    }

    pub fn restart(&self, caller: &Caller, request: &VmStopRequest) -> Result<CallOutcome> {
        let timeout = if request.force {
            Some(Duration::ZERO)
        } else {
            grace(request.timeout_ms)
        };
        self.request(
            caller,
            &request.vm,
            &LifecycleRequest {
                verb: Verb::Restart,
                method: "vm.restart",
                timeout,
                restore: None,
            },
        )
    }

    pub fn kill(&self, caller: &Caller, vm: &str) -> Result<CallOutcome> {
        self.request(
            caller,
            vm,
            &LifecycleRequest {
                verb: Verb::Kill,
                method: "vm.kill",
                timeout: None,
                restore: None,
            },
        )
    }

    pub fn delete(&self, caller: &Caller, request: &VmDeleteRequest) -> Result<CallOutcome> {
        let verb = if request.force {
            Verb::DeleteForce
        } else {
            Verb::Delete
        };
        match self.request(
            caller,
            &request.vm,
            &LifecycleRequest {
                verb,
                method: "vm.delete",
                timeout: None,
                restore: None,
            },
        ) {
            Err(e) if request.if_exists && e.kind() == Kind::VmNotFound => {
                CallOutcome::done(&VmDeleteReply { deleted: None })
            }
            other => other,
        }
    }

    /// Begins to delete the caller's own VMs that do not run. Returns their IDs and, in the same
    /// order, the outcomes. A VM that cannot be deleted is skipped, for example because another
    /// operation has claimed it.
    pub fn prune(&self, caller: &Caller) -> Result<(VmPruneReply, Vec<CallOutcome>)> {
        let settled: Vec<VmId> = self.core.store.read(|s| {
            s.vms()
                .filter(|r| r.owner_uid == caller.uid)
                .filter(|r| {
                    matches!(
                        r.state,
                        VmState::Created | VmState::Stopped | VmState::Failed
                    )
                })
                .map(|r| r.id.clone())
                .collect()
        });
        let (mut deleted, mut outcomes) = (Vec::new(), Vec::new());
        for id in settled {
            let request = VmDeleteRequest {
                vm: id.to_string(),
                force: false,
                if_exists: true,
            };
            match self.delete(caller, &request) {
                Ok(outcome) => {
                    outcomes.push(outcome);
                    deleted.push(id);
                }
                Err(e) => log::info!("prune skips VM {id}: {e}"),
            }
        }
        Ok((VmPruneReply { deleted }, outcomes))
    }
}

fn grace(timeout_ms: Option<u64>) -> Option<Duration> {
    timeout_ms.map(|ms| Duration::from_millis(ms).min(STOP_TIMEOUT_MAX))
}
