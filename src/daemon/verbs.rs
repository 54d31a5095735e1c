//! The lifecycle verbs as the wire calls them, and the claim that nobody settled.

use super::lifecycle::Ask;
use super::listing::{Position, VmScan};
use super::transitions::Verb;
use super::{Begun, Caller, Daemon, access, to_value};
use crate::api::page;
use crate::api::vm::{
    SshConfigReply, VmDeleteReply, VmDeleteRequest, VmListReply, VmListRequest, VmPruneReply, VmReply, VmState, VmStopRequest,
};
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::ops::OpHandle;
use crate::store::VmRow;
use serde_json::Value;
use serde_json::value::RawValue;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// Longest grace that a caller may ask for.
const STOP_TIMEOUT_MAX: Duration = Duration::from_secs(3600);
const ABANDON_RETRY: Duration = Duration::from_millis(250);

impl Daemon {
    pub fn start(&self, caller: &Caller, vm: &str) -> Result<Begun> {
        self.lifecycle(caller, vm, &Ask { verb: Verb::Start, method: "vm.start", timeout: None, restore: None })
    }

    pub fn stop(&self, caller: &Caller, request: &VmStopRequest) -> Result<Begun> {
        let verb = if request.force { Verb::StopForce } else { Verb::Stop };
        self.lifecycle(caller, &request.vm, &Ask { verb, method: "vm.stop", timeout: grace(request.timeout_ms), restore: None })
    }

    pub fn restart(&self, caller: &Caller, request: &VmStopRequest) -> Result<Begun> {
        let timeout = if request.force { Some(Duration::ZERO) } else { grace(request.timeout_ms) };
        self.lifecycle(caller, &request.vm, &Ask { verb: Verb::Restart, method: "vm.restart", timeout, restore: None })
    }

    pub fn kill(&self, caller: &Caller, vm: &str) -> Result<Begun> {
        self.lifecycle(caller, vm, &Ask { verb: Verb::Kill, method: "vm.kill", timeout: None, restore: None })
    }

    pub fn delete(&self, caller: &Caller, request: &VmDeleteRequest) -> Result<Begun> {
        let verb = if request.force { Verb::DeleteForce } else { Verb::Delete };
        match self.lifecycle(caller, &request.vm, &Ask { verb, method: "vm.delete", timeout: None, restore: None }) {
            Err(e) if request.if_exists && e.kind() == Kind::VmNotFound => Begun::done(&VmDeleteReply { deleted: None }),
            other => other,
        }
    }

    /// Deletes what does not run. Goes on past a VM that somebody else took meanwhile.
    pub fn prune(&self, caller: &Caller) -> Result<(VmPruneReply, Vec<Begun>)> {
        let at_rest: Vec<VmId> = self.store.read(|s| {
            s.vms()
                .filter(|r| r.owner_uid == caller.uid)
                .filter(|r| matches!(r.state, VmState::Created | VmState::Stopped | VmState::Failed))
                .map(|r| r.id.clone())
                .collect()
        });
        let (mut deleted, mut begun) = (Vec::new(), Vec::new());
        for id in at_rest {
            let request = VmDeleteRequest { vm: id.to_string(), force: false, if_exists: true };
            match self.delete(caller, &request) {
                Ok(b) => {
                    begun.push(b);
                    deleted.push(id);
                }
                Err(e) => log::info!("prune leaves {id}: {e}"),
            }
        }
        Ok((VmPruneReply { deleted }, begun))
    }

    pub fn list(&self, caller: &Caller, request: &VmListRequest) -> Result<VmListReply<Box<RawValue>>> {
        let shown = |state: VmState| request.all || !matches!(state, VmState::Created | VmState::Stopped | VmState::Failed);
        let after = request.after.as_deref().map(Position::parse).transpose()?.map(|Position(at, id)| (at, id));
        let rows = VmScan::new(&self.store, caller, after, move |row| shown(row.state));
        let views = rows.map(|seen| {
            let place = Position(seen.row.created_at, seen.row.id.clone());
            (place, access::Listed { daemon: self, seen, is_brief: request.brief })
        });
        let (vms, next) = page::fill(request.limit, views)?;
        Ok(VmListReply { vms, next })
    }

    pub fn show(&self, caller: &Caller, vm: &str) -> Result<VmReply> {
        let vm = self.store.read(|s| access::find(s, caller, vm).map(|row| access::view_of(s, row)))?;
        Ok(VmReply { vm: self.with_pause(vm) })
    }

    pub fn ssh_config(&self, caller: &Caller, vm: &str) -> Result<SshConfigReply> {
        let row = self.resolve(caller, vm)?;
        self.allow(&row, Verb::Guest)?;
        let target = self.target(&row)?;
        let workdir = self.store.read(|s| s.workspace(&row.id).map(|w| w.workdir.clone()));
        let host_key = crate::disk::seed::public_line(&target.host_key)?;
        Ok(SshConfigReply {
            vm: row.id,
            name: row.name,
            addr: target.addr,
            user: target.user,
            private_key: target.private_key,
            host_key,
            workdir,
        })
    }

    /// What a lifecycle operation answers: the row as it is about to be.
    pub(super) fn vm_value(&self, row: &VmRow) -> Result<Value> {
        to_value(&VmReply { vm: self.store.read(|s| access::view_of(s, row)) })
    }

    /// A claim that was dropped: its work panicked, or its thread could not be started. In a thread of its own,
    /// for this one may hold anything.
    pub(super) fn abandon(&self, vm: &VmId, op: OpHandle) {
        let (daemon, vm) = (self.clone(), vm.clone());
        let body = move || {
            // Whatever it was that panicked may do so once more; the VM must not stay as it is for that.
            let settle = || catch_unwind(AssertUnwindSafe(|| daemon.fail_abandoned(&vm, &op)));
            while let Err(e) = settle().unwrap_or_else(|_| Err(Error::internal("it panicked again"))) {
                log::error!("settle {vm} after a failure in the daemon: {e}");
                if daemon.pause(ABANDON_RETRY) {
                    break;
                }
            }
            let failed = Error::internal(format!("vm {vm}: the daemon failed in the middle")).hint("see the daemon's log");
            daemon.end_op(op, Err(failed));
            if daemon.row(&vm).is_ok_and(|row| row.rm && row.op.is_none()) {
                daemon.delete_unasked(&vm);
            }
        };
        if let Err(e) = self.spawn("abandon", body) {
            log::error!("settle an abandoned claim: {e}");
        }
    }

    fn fail_abandoned(&self, vm: &VmId, op: &OpHandle) -> Result<()> {
        let row = match self.row(vm) {
            Ok(row) if row.op.as_ref() == Some(op.id()) => row,
            _ => return Ok(()),
        };
        if let Some(identity) = self.identity(&row) {
            self.kill_vmm(&identity)?;
        }
        self.release_boot(vm, row.generation)?;
        let guard = self.locks.vm.lock(vm);
        let successor = self.runtimes.end(guard.key()).1;
        let changed = self.change(true, |tx| {
            tx.update_vm(&guard, |r| {
                r.state = VmState::Failed;
                r.reason = Some("the daemon failed in the middle: see its log".to_owned());
                (r.op, r.intent, r.identity, r.ssh_addr) = (None, None, None, None);
            })
        });
        drop(guard);
        if let Some(s) = successor {
            self.end_op_soon(s.op, Err(Error::internal(format!("vm {vm}: the daemon failed before it came to this"))));
        }
        self.wait_durable(changed?.1)
    }
}

fn grace(timeout_ms: Option<u64>) -> Option<Duration> {
    timeout_ms.map(|ms| Duration::from_millis(ms).min(STOP_TIMEOUT_MAX))
}
