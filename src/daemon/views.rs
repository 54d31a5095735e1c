//! Shows VMs to the callers that may see them, one at a time or in pages.

use super::access::{self, Caller, vm_not_found};
use super::call::to_value;
use super::core::Core;
use super::listing::{Position, VmScan};
use super::runtime::Runtimes;
use super::vm_view::{self, view, view_of};
use crate::api::page;
use crate::api::vm::{Vm, VmBrief, VmListReply, VmListRequest, VmReply, VmState};
use crate::error::Result;
use crate::ids::VmId;
use crate::locks::CancelCause;
use crate::store::{Seen, VmRow};
use serde::{Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;
use std::borrow::Cow;

/// Builds the views of VMs from rows.
#[derive(Clone)]
pub struct Views {
    pub(super) core: Core,
    pub(super) runtimes: Runtimes,
}

impl Views {
    /// Returns the VM as its owner sees it.
    pub(super) fn view(&self, id: &VmId) -> Result<Vm> {
        let seen = self
            .core
            .store
            .read(|s| s.vm(id).map(|row| view_of(s, row)));
        seen.map(|vm| self.with_pause(vm))
            .ok_or_else(|| vm_not_found(id.as_str()))
    }

    /// Adds that a guest is paused because the host's disk is full. The row does not contain the
    /// pause, because it could not be written to a full disk.
    pub(super) fn with_pause(&self, mut vm: Vm) -> Vm {
        vm.reason = self.pause_reason(vm.state, &vm.id).or(vm.reason);
        vm
    }

    /// Returns the reason that replaces the row's reason while the guest is paused because of a
    /// full disk.
    fn pause_reason(&self, state: VmState, vm: &VmId) -> Option<String> {
        let is_paused = state == VmState::Running && self.runtimes.is_paused(vm);
        is_paused.then(|| format!("paused: {}", CancelCause::HostDiskFull))
    }

    fn brief<'a>(&self, seen: &'a Seen) -> VmBrief<'a> {
        let brief = vm_view::brief(seen);
        let reason = self
            .pause_reason(seen.row.state, &seen.row.id)
            .map(Cow::Owned);
        VmBrief {
            reason: reason.or(brief.reason),
            ..brief
        }
    }

    /// Returns one page of the VMs that the caller may see.
    pub fn list(
        &self,
        caller: &Caller,
        request: &VmListRequest,
    ) -> Result<VmListReply<Box<RawValue>>> {
        let shown = |state: VmState| {
            request.all || !matches!(state, VmState::Created | VmState::Stopped | VmState::Failed)
        };
        let after = request
            .after
            .as_deref()
            .map(Position::parse)
            .transpose()?
            .map(|Position(at, id)| (at, id));
        let rows = VmScan::new(&self.core.store, caller, after, move |row| shown(row.state));
        let views = rows.map(|seen| {
            let position = Position(seen.row.created_at, seen.row.id.clone());
            (
                position,
                Listed {
                    views: self,
                    seen,
                    is_brief: request.brief,
                },
            )
        });
        let (vms, next) = page::fill(request.limit, views)?;
        Ok(VmListReply { vms, next })
    }

    /// Returns the VM with this name, ID or prefix of an ID, if the caller may see it.
    pub fn show(&self, caller: &Caller, vm: &str) -> Result<VmReply> {
        let vm = self
            .core
            .store
            .read(|s| access::find(s, caller, vm).map(|row| view_of(s, row)))?;
        Ok(VmReply {
            vm: self.with_pause(vm),
        })
    }

    /// Returns the reply of a lifecycle operation, built from the row that its commit is about to
    /// write.
    pub(super) fn vm_value(&self, row: &VmRow) -> Result<Value> {
        to_value(&VmReply {
            vm: self.core.store.read(|s| view_of(s, row)),
        })
    }
}

/// One VM in a list. The view is built when the VM is serialised, because a brief view borrows from
/// the rows.
struct Listed<'a> {
    views: &'a Views,
    seen: Seen,
    is_brief: bool,
}

impl Serialize for Listed<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        if self.is_brief {
            return self.views.brief(&self.seen).serialize(serializer);
        }
        self.views
            .with_pause(view(&self.seen.row, self.seen.workspace.as_deref()))
            .serialize(serializer)
    }
}
