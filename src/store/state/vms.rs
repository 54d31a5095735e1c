//! Finds VMs, and free slots for new ones.

use super::{Age, State};
use crate::error::{Error, Kind, Result};
use crate::ids::{VmId, VmName};
use crate::store::VmRow;
use std::ops::Bound;
use std::sync::Arc;

impl State {
    pub fn vm(&self, id: &VmId) -> Option<&Arc<VmRow>> {
        self.vms.get(id)
    }

    /// Returns all VMs, sorted by ID.
    pub fn vms(&self) -> impl Iterator<Item = &Arc<VmRow>> {
        self.vms.values()
    }

    pub fn vm_by_name(&self, name: &VmName) -> Option<&Arc<VmRow>> {
        self.names.get(name).and_then(|id| self.vms.get(id))
    }

    /// Finds a VM by its name or else its ID. `text` may be anything.
    pub fn vm_by_name_or_id(&self, text: &str) -> Option<&Arc<VmRow>> {
        self.names
            .get(text)
            .and_then(|id| self.vms.get(id))
            .or_else(|| self.vms.get(text))
    }

    /// Returns the VMs whose ID begins with `prefix`, sorted by ID. Visits only those VMs.
    pub fn vms_by_id_prefix<'s>(&'s self, prefix: &'s str) -> impl Iterator<Item = &'s Arc<VmRow>> {
        let from = (Bound::Included(prefix), Bound::Unbounded);
        self.vms
            .range::<str, _>(from)
            .map(|(_, row)| row)
            .take_while(move |row| row.id.as_str().starts_with(prefix))
    }

    /// Returns the VMs of one owner or of all, from the oldest to the newest. With `after`, returns
    /// only VMs after that position, even if the VM at that position was deleted.
    pub fn vms_by_age(
        &self,
        owner_uid: Option<u32>,
        after: Option<&Age>,
    ) -> impl Iterator<Item = &Arc<VmRow>> {
        let ages = match owner_uid {
            None => Some(&self.ages),
            Some(uid) => self.owners.get(&uid),
        };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        ages.into_iter()
            .flat_map(move |ages| ages.range((from, Bound::Unbounded)))
            .map(|(_, row)| row)
    }

    /// Returns the smallest free slot. `limit` is the number of slots.
    ///
    /// # Errors
    /// `vm_limit` if all are taken.
    pub fn free_slot(&self, limit: u32) -> Result<u32> {
        let mut free = 0;
        for slot in &self.slots {
            if *slot != free {
                break;
            }
            free += 1;
        }
        if free < limit {
            return Ok(free);
        }
        Err(Error::new(
            Kind::VmLimit,
            format!("all {limit} slots for VMs are taken"),
        )
        .hint("delete one: fcctl ps -a, fcctl rm NAME"))
    }

    pub(in crate::store) fn slot_is_taken(&self, slot: u32) -> bool {
        self.slots.contains(&slot)
    }
}
