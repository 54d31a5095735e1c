//! Changes VMs and their workspaces.

use super::{Image, Tx};
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::locks::KeyGuard;
use crate::store::{VmRow, WorkspaceOf, WorkspaceRow};
use std::sync::Arc;

impl Tx<'_> {
    /// Adds a VM. An existing row is changed only with [`Tx::update_vm`].
    ///
    /// # Errors
    /// `name_taken`, or `internal` if another VM has the ID or the slot.
    pub fn insert_vm(&mut self, row: VmRow) -> Result<()> {
        if self.vm(&row.id).is_some() {
            return Err(Error::internal(format!("VM {} exists already", row.id)));
        }
        self.write_vm(row)
    }

    fn write_vm(&mut self, row: VmRow) -> Result<()> {
        if self
            .vm_by_name(&row.name)
            .is_some_and(|other| other.id != row.id)
        {
            return Err(
                Error::new(Kind::NameTaken, format!("the name {} is taken", row.name))
                    .hint("choose another with --name"),
            );
        }
        if self.vm(&row.id).is_none_or(|old| old.slot != row.slot) && self.slot_is_taken(row.slot) {
            return Err(Error::internal(format!(
                "slot {} belongs to another VM than {}",
                row.slot, row.id
            )));
        }
        self.apply(Image::Vm(row.id.clone(), Some(Arc::new(row))));
        Ok(())
    }

    /// Changes some members of the current row. The guard proves that the VM's lock is held, so
    /// everything that its holder has read of the row is still current. A row is never written as a
    /// whole, so a stale value cannot overwrite a newer one.
    ///
    /// # Errors
    /// `vm_not_found`, and those of [`Tx::insert_vm`].
    pub fn update_vm(
        &mut self,
        vm: &KeyGuard<'_, VmId>,
        change: impl FnOnce(&mut VmRow),
    ) -> Result<()> {
        self.change_vm(vm.key(), change)
    }

    fn change_vm(&mut self, id: &VmId, change: impl FnOnce(&mut VmRow)) -> Result<()> {
        let Some(row) = self.vm(id) else {
            return Err(Error::new(Kind::VmNotFound, format!("no VM {id}")).hint("fcctl ps -a"));
        };
        let mut row = VmRow::clone(row);
        change(&mut row);
        if row.id != *id {
            return Err(Error::internal(format!(
                "a change of VM {id} changed its ID to {}",
                row.id
            )));
        }
        self.write_vm(row)
    }

    /// Removes the VM and its workspace. Returns the VM's row, or `None` if there is no such VM.
    /// The VM's ledger rows stay until they are deleted themselves.
    pub fn remove_vm(&mut self, vm: &KeyGuard<'_, VmId>) -> Option<Arc<VmRow>> {
        self.take_vm(vm.key())
    }

    fn take_vm(&mut self, id: &VmId) -> Option<Arc<VmRow>> {
        let row = self.vm(id).cloned()?;
        self.remove_workspace(id);
        self.apply(Image::Vm(id.clone(), None));
        Some(row)
    }

    /// Adds or replaces a VM without its lock, for tests of the store.
    #[cfg(test)]
    pub fn put_vm(&mut self, row: VmRow) -> Result<()> {
        self.write_vm(row)
    }

    /// Does the same as [`Tx::update_vm`] without the lock, for tests that act for a dead daemon or
    /// use the store alone.
    #[cfg(any(test, feature = "fakes"))]
    pub fn update_vm_unlocked(&mut self, id: &VmId, change: impl FnOnce(&mut VmRow)) -> Result<()> {
        self.change_vm(id, change)
    }

    /// Does the same as [`Tx::remove_vm`] without the lock, for tests of the store.
    #[cfg(test)]
    pub fn remove_vm_unlocked(&mut self, id: &VmId) -> Option<Arc<VmRow>> {
        self.take_vm(id)
    }

    /// Adds or replaces a VM's workspace. The row must be of the VM's current generation. An import
    /// that has outlived its VM's boot must not overwrite what a restore has written.
    ///
    /// # Errors
    /// `vm_not_found` if there is no such VM, `conflict` if it has been restarted.
    pub fn put_workspace(
        &mut self,
        workspace: &KeyGuard<'_, WorkspaceOf>,
        row: WorkspaceRow,
    ) -> Result<()> {
        if row.vm != workspace.key().0 {
            return Err(Error::internal(format!(
                "the workspace of VM {} was written with the lock of VM {}",
                row.vm,
                workspace.key().0
            )));
        }
        self.write_workspace(row)
    }

    fn write_workspace(&mut self, row: WorkspaceRow) -> Result<()> {
        let Some(vm) = self.vm(&row.vm) else {
            return Err(
                Error::new(Kind::VmNotFound, format!("no VM {}", row.vm)).hint("fcctl ps -a")
            );
        };
        if vm.generation != row.generation {
            return Err(
                Error::new(Kind::Conflict, "the VM was restarted during the import")
                    .hint("run the import again"),
            );
        }
        self.apply(Image::Workspace(row.vm.clone(), Some(Arc::new(row))));
        Ok(())
    }

    /// Replaces or removes the workspace of a VM whose disks were replaced. The VM's lock is
    /// sufficient, because no import of an earlier generation can write the row afterwards.
    ///
    /// # Errors
    /// Those of [`Tx::put_workspace`].
    pub fn reset_workspace(
        &mut self,
        vm: &KeyGuard<'_, VmId>,
        row: Option<WorkspaceRow>,
    ) -> Result<()> {
        match row {
            Some(row) => self.write_workspace(WorkspaceRow {
                vm: vm.key().clone(),
                ..row
            }),
            None => {
                self.remove_workspace(vm.key());
                Ok(())
            }
        }
    }

    fn remove_workspace(&mut self, vm: &VmId) {
        self.apply(Image::Workspace(vm.clone(), None));
    }

    /// Does the same as [`Tx::put_workspace`] without the lock, for tests of the store.
    #[cfg(test)]
    pub fn put_workspace_unlocked(&mut self, row: WorkspaceRow) -> Result<()> {
        self.write_workspace(row)
    }

    /// Removes a workspace without the VM's lock, for tests of the store.
    #[cfg(test)]
    pub fn remove_workspace_unlocked(&mut self, vm: &VmId) {
        self.remove_workspace(vm);
    }
}
