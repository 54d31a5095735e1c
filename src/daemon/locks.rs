//! The op-level locks. Nothing outside `src/daemon` names them.

use crate::ids::VmId;
use crate::locks::{LockSet, Rank};

/// A VM's workspace. A type of its own, so that its guard is no evidence that the VM's lock is
/// held.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkspaceOf(pub VmId);

/// As `debug locks` shows the VM's own lock.
impl std::fmt::Debug for WorkspaceOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

pub struct OpLocks {
    /// State checks and state changes of one VM: held for moments.
    pub vm: LockSet<VmId>,
    /// One import or export at a time on a VM: held across guest I/O.
    pub workspace: LockSet<WorkspaceOf>,
    /// Name uniqueness. One key, so that its holder shows in `debug locks`.
    pub create_vm: LockSet<()>,
    /// Changes of the image registry.
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

    /// Keys held or waited for, over all sets; 0 when nothing is under way.
    pub fn entries(&self) -> usize {
        self.vm.len() + self.workspace.len() + self.create_vm.len() + self.image_ops.len()
    }
}
