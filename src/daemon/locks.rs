//! The locks of operations. Nothing outside `src/daemon` names them.

use crate::ids::VmId;
use crate::locks::{LockSet, Rank};

/// The key of a VM's workspace lock. It has its own type, so that its guard cannot be confused with
/// a guard of the VM's lock.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkspaceOf(pub VmId);

/// Shows the ID alone, as the VM's own lock does in `debug locks`.
impl std::fmt::Debug for WorkspaceOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

pub struct OpLocks {
    /// Protects state checks and state changes of one VM. It is held only briefly.
    pub vm: LockSet<VmId>,
    /// Allows one import or export at a time per VM. It is held during guest I/O.
    pub workspace: LockSet<WorkspaceOf>,
    /// Keeps names unique. It is a set with one key, so that its holder is shown in `debug locks`.
    pub create_vm: LockSet<()>,
    /// Protects changes of the image registry.
    pub image_ops: LockSet<()>,
}

impl OpLocks {
    pub fn new() -> Self {
        Self {
            vm: LockSet::new(Rank::Vm),
            workspace: LockSet::new(Rank::Workspace),
            create_vm: LockSet::new(Rank::CreateVm),
            image_ops: LockSet::new(Rank::ImageOps),
        }
    }

    /// Returns the number of keys that are held or waited for, which is 0 if nothing is in
    /// progress.
    #[cfg(any(test, feature = "fakes"))]
    pub fn entries(&self) -> usize {
        self.vm.len() + self.workspace.len() + self.create_vm.len() + self.image_ops.len()
    }
}
