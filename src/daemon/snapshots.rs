//! The calls that create, list, show and delete snapshots. `snapshot_writer.rs` saves the guest,
//! and `restore.rs` starts VMs from snapshots.

use super::access::Caller;
use super::access::PREFIX_LEN_MIN;
use super::call::{CallOutcome, to_value};
use super::core::Core;
use super::create::Creator;
use super::lifecycle::Lifecycle;
use super::listing::Position;
use super::network::Networks;
use super::resources;
use super::runtime::Use;
use super::sessions::Sessions;
use super::snapshot_registry::SnapshotRegistry;
use super::snapshot_writer::{Captured, SnapshotWriter, id_name};
use super::views::Views;
use crate::api::page;
use crate::api::snapshot::{
    Snapshot, SnapshotCreateRequest, SnapshotDeleteReply, SnapshotListReply, SnapshotListRequest,
    SnapshotReply,
};
use crate::error::{Error, Kind, Result};
use crate::host::plural::count;
use crate::host::text::quoted;
use crate::ids::{SnapshotId, SnapshotName, VmName};
use crate::store::{SnapshotRow, State};
use crate::vmm::Driver;
use serde_json::value::RawValue;
use std::sync::Arc;

/// The most snapshots per uid.
pub(super) const SNAPSHOTS_PER_UID_MAX: usize = 64;

/// Makes snapshots, and new VMs from them.
#[derive(Clone)]
pub struct Snapshots {
    pub(super) core: Core,
    pub(super) views: Views,
    pub(super) networks: Networks,
    pub(super) sessions: Sessions,
    pub(super) creator: Creator,
    pub(super) lifecycle: Lifecycle,
    pub(super) snapshot_registry: SnapshotRegistry,
    pub(super) writer: SnapshotWriter,
    pub(super) vmm: Arc<dyn Driver>,
}

impl Snapshots {
    pub fn snapshot_create(
        &self,
        caller: &Caller,
        request: SnapshotCreateRequest,
    ) -> Result<CallOutcome> {
        const METHOD: &str = "snapshot.create";
        let found = self.core.resolve(caller, &request.vm)?;
        self.core
            .store
            .read(|s| allow_another(s, found.owner_uid, request.name.as_ref()))?;
        let op = self
            .core
            .begin_op(METHOD, Some(found.id.clone()), caller.uid, true)?;
        let (row, user) = match self.sessions.join_guest(&found, Use::Transfer, op.cancel()) {
            Ok(joined) => joined,
            Err(e) => {
                op.refuse(&e);
                return Err(e);
            }
        };
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, snapshots) = (op.id().clone(), self.clone());
        self.core.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope(format!("{METHOD} {}", row.id));
            let made = snapshots
                .writer
                .capture(&row, &op)
                .and_then(|captured| snapshots.publish(captured, request.name));
            drop(user);
            let result = made.and_then(|snapshot| to_value(&SnapshotReply { snapshot }));
            snapshots.core.end_op(
                op,
                result.map_err(|e| e.context(format!("save VM {}", row.name)).of_vm(&row.name)),
            );
        })?;
        Ok(CallOutcome::Op(id))
    }

    pub fn snapshot_list(
        &self,
        caller: &Caller,
        request: &SnapshotListRequest,
    ) -> Result<SnapshotListReply<Box<RawValue>>> {
        let after = request.after.as_deref().map(Position::parse).transpose()?;
        // The snapshots of a deleted VM are listed by the VM's former name or ID.
        let is_of_vm = |row: &SnapshotRow| {
            request
                .vm
                .as_ref()
                .is_none_or(|vm| row.vm_name.as_str() == vm || row.vm.as_str() == vm)
        };
        let mut snapshots: Vec<Snapshot> = self.core.store.read(|s| {
            let seen = s
                .snapshots()
                .filter(|row| caller.may_see(row.owner_uid) && is_of_vm(row));
            seen.map(|row| view(row)).collect()
        });
        if let (Some(vm), true) = (&request.vm, snapshots.is_empty()) {
            self.core.resolve(caller, vm)?;
        }
        let position = |snapshot: &Snapshot| Position(snapshot.created_at, snapshot.name.clone());
        snapshots.sort_by_key(position);
        let rest = snapshots
            .into_iter()
            .map(|s| (position(&s), s))
            .filter(|(at, _)| after.as_ref().is_none_or(|after| at > after));
        let (snapshots, next) = page::fill(request.limit, rest)?;
        Ok(SnapshotListReply { snapshots, next })
    }

    pub fn snapshot_show(&self, caller: &Caller, snapshot: &str) -> Result<SnapshotReply> {
        Ok(SnapshotReply {
            snapshot: view(&self.find_snapshot(caller, snapshot)?),
        })
    }

    /// Deletes a snapshot. A VM that was started from the snapshot no longer needs it.
    pub fn snapshot_delete(&self, caller: &Caller, snapshot: &str) -> Result<SnapshotDeleteReply> {
        let SnapshotRow { id, name, .. } = self.find_snapshot(caller, snapshot)?;
        let _delete_guard = self
            .snapshot_registry
            .uses
            .begin_delete(&id)
            .ok_or_else(|| {
                Error::new(
                    Kind::Busy,
                    format!("delete snapshot {name}: a VM is being started from it"),
                )
                .hint("wait until the VM is running: fcctl op list")
            })?;
        let (ledger, ticket) = self.core.change(true, |tx| {
            tx.remove_snapshot(&id);
            Ok(tx.intend(None, 0, resources::snapshot::KIND, id.as_str()))
        })?;
        self.core.wait_durable(ticket)?;
        self.writer.discard_files(&id, ledger);
        Ok(SnapshotDeleteReply { deleted: id })
    }

    /// Finds a snapshot by its name, its ID, or a unique prefix of its ID.
    pub(super) fn find_snapshot(&self, caller: &Caller, text: &str) -> Result<SnapshotRow> {
        let mut found: Vec<SnapshotRow> = self.core.store.read(|s| {
            let seen = || s.snapshots().filter(|row| caller.may_see(row.owner_uid));
            let exact = seen().find(|row| row.name.as_str() == text || row.id.as_str() == text);
            let by_prefix = |row: &SnapshotRow| {
                text.len() >= PREFIX_LEN_MIN && row.id.as_str().starts_with(text)
            };
            exact.map_or_else(
                || {
                    seen()
                        .filter(|row| by_prefix(row))
                        .map(|r| (**r).clone())
                        .collect()
                },
                |r| vec![(**r).clone()],
            )
        });
        match (found.pop(), found.is_empty()) {
            (Some(row), true) => Ok(row),
            (Some(_), false) => Err(Error::new(
                Kind::AmbiguousPrefix,
                format!("{text:?} matches several snapshots"),
            )
            .hint("use the name or a longer part of the ID: fcctl snapshot list")),
            (None, _) => Err(Error::new(
                Kind::SnapshotNotFound,
                format!("no snapshot {}", quoted(text)),
            )
            .hint("fcctl snapshot list")),
        }
    }

    /// Makes the snapshot visible: its row replaces its ledger row. If that fails, discards the
    /// snapshot.
    fn publish(&self, captured: Captured, name: Option<SnapshotName>) -> Result<Snapshot> {
        let published = self.core.store.change(|tx| {
            let row = &captured.row;
            allow_another(tx, row.owner_uid, name.as_ref())?;
            let name = name.unwrap_or_else(|| some_name(tx, &row.vm_name, &row.id));
            let row = SnapshotRow {
                name,
                ..row.clone()
            };
            let snapshot = view(&row);
            tx.put_snapshot(row)?;
            tx.strike(captured.ledger);
            Ok(snapshot)
        });
        published
            .and_then(|(snapshot, ticket)| self.core.wait_durable(ticket).map(|()| snapshot))
            .inspect_err(|_| self.writer.discard(captured))
    }
}

fn view(row: &SnapshotRow) -> Snapshot {
    Snapshot {
        id: row.id.clone(),
        name: row.name.clone(),
        owner_uid: row.owner_uid,
        vm: row.vm.clone(),
        vm_name: row.vm_name.clone(),
        created_at: row.created_at,
        image: row.shape.image.said_by(row.owner_uid),
        vcpus: row.shape.vcpus,
        mem_mib: row.shape.mem_mib,
        disk_bytes: row.shape.disk_bytes,
        work_disk_bytes: row.shape.work_disk_bytes,
        net: row.shape.net,
        driver: row.driver.clone(),
        vmm_version: row.vmm_version.clone(),
        bytes: row.bytes,
    }
}

fn allow_another(state: &State, owner_uid: u32, name: Option<&SnapshotName>) -> Result<()> {
    if let Some(name) = name.filter(|name| state.snapshot_by_name(name).is_some()) {
        let text = format!("the snapshot name {name} is taken");
        return Err(Error::new(Kind::NameTaken, text).hint("choose another with --name"));
    }
    let owned = state
        .snapshots()
        .filter(|row| row.owner_uid == owner_uid)
        .count();
    if owned < SNAPSHOTS_PER_UID_MAX {
        return Ok(());
    }
    Err(Error::new(
        Kind::Exhausted,
        format!(
            "uid {owner_uid} has {}, which is the limit",
            count(owned as u64, "snapshot")
        ),
    )
    .hint("delete some: fcctl snapshot list, fcctl snapshot delete"))
}

/// Picks a free name: `web-1`, `web-2` and so on, or a name made of the ID if none of these is
/// free.
fn some_name(state: &State, vm: &VmName, id: &SnapshotId) -> SnapshotName {
    let candidates = (1..=SNAPSHOTS_PER_UID_MAX * 2)
        .filter_map(|n| format!("{vm}-{n}").parse::<SnapshotName>().ok());
    candidates
        .into_iter()
        .find(|name| state.snapshot_by_name(name).is_none())
        .unwrap_or_else(|| id_name(id))
}
