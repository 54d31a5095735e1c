//! Turns changes of the store into the events that a caller may see.

use super::access::Caller;
use super::call::to_value;
use super::vm_view::view;
use crate::api::event::{Event, Members, What};
use crate::error::{Error, Result};
use crate::store::OpEnd;
use crate::store::Seen;
use crate::store::StoreChange;
use crate::store::VmChange;
use serde_json::Value;

/// The fields of a VM that its owner sets, and its workspace. If a change also alters the VM's
/// state or reason, changes of these fields are sent in a separate `vm.changed` event. The
/// `vm.state` event contains the other changed fields.
const SETTINGS: [&str; 8] = [
    "name",
    "image",
    "vcpus",
    "mem_mib",
    "disk_bytes",
    "pending",
    "rm",
    "workspace",
];

/// Returns the events of a change that the caller may see.
pub(super) fn events_for(caller: &Caller, store_change: &StoreChange) -> Result<Vec<Event>> {
    let mut events = Vec::new();
    for change in store_change
        .vms
        .iter()
        .filter(|c| c.owner_uid().is_some_and(|uid| caller.may_see(uid)))
    {
        let Some(seen) = change.after.as_ref().or(change.before.as_ref()) else {
            continue;
        };
        let (vm, name) = (Some(seen.row.id.clone()), Some(seen.row.name.clone()));
        let (seq, at, owner_uid) = (store_change.seq, store_change.at, seen.row.owner_uid);
        let event = |what| Event {
            seq,
            at,
            vm: vm.clone(),
            name: name.clone(),
            owner_uid,
            what,
        };
        events.extend(vm_events(change)?.into_iter().map(event));
    }
    for end in store_change
        .ended
        .iter()
        .filter(|end| end.owners().any(|uid| caller.may_see(uid)))
    {
        events.push(Event {
            seq: store_change.seq,
            at: store_change.at,
            vm: end.vm.as_ref().map(|row| row.id.clone()),
            name: end.vm.as_ref().map(|row| row.name.clone()),
            owner_uid: end.vm.as_ref().map_or(end.owner_uid, |row| row.owner_uid),
            what: ended(end),
        });
    }
    Ok(events)
}

fn vm_events(change: &VmChange) -> Result<Vec<What>> {
    let (before, after) = match (&change.before, &change.after) {
        (None, None) => return Ok(vec![]),
        (None, Some(after)) => {
            return Ok(vec![What::Created {
                set: members(after)?,
            }]);
        }
        (Some(before), None) => {
            return Ok(vec![What::Deleted {
                op: before.row.op.clone(),
            }]);
        }
        (Some(before), Some(after)) => (before, after),
    };
    let was = members(before)?;
    let mut set: Members = members(after)?
        .into_iter()
        .filter(|(name, value)| was.get(name) != Some(value))
        .collect();
    let mut events = Vec::new();
    let (from, to) = (before.row.state, after.row.state);
    if from != to || before.row.reason != after.row.reason {
        let (settings, others) = set
            .into_iter()
            .partition(|(name, _)| SETTINGS.contains(&name.as_str()));
        set = settings;
        let op = after.row.op.clone().or_else(|| before.row.op.clone());
        events.push(What::State {
            from,
            to,
            reason: after.row.reason.clone(),
            op,
            set: others,
        });
    }
    if !set.is_empty() {
        events.push(What::Changed { set });
    }
    Ok(events)
}

fn members(seen: &Seen) -> Result<Members> {
    match to_value(&view(&seen.row, seen.workspace.as_deref()))? {
        Value::Object(members) => Ok(members),
        other => Err(Error::internal(format!(
            "a VM is not a JSON object: {other}"
        ))),
    }
}

fn ended(end: &OpEnd) -> What {
    What::OpEnded {
        op: end.id.clone(),
        method: end.method.clone(),
        state: end.state,
        error: end.error.clone(),
    }
}
