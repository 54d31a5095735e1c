//! The op-level locks. Nothing outside `src/daemon` names them.

use crate::ids::VmId;
use crate::locks::{LockSet, Rank};

pub struct OpLocks {
    /// State checks and state changes of one VM: held for moments.
    pub vm: LockSet<VmId>,
    /// One import or export at a time on a VM: held across guest I/O.
    pub workspace: LockSet<VmId>,
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
