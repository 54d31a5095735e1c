//! The locks of operations. Nothing outside `src/daemon` names them.

use crate::ids::VmId;
use crate::locks::{LockKey, LockSet, Rank};
use crate::store::WorkspaceOf;

/// The only key of `create_vm`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VmNames;

impl LockKey for VmNames {
    const RANK: Rank = Rank::CreateVm;
}

/// The only key of `image_ops`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ImageNames;

impl LockKey for ImageNames {
    const RANK: Rank = Rank::ImageOps;
}

pub struct OpLocks {
    /// Protects state checks and state changes of one VM. It is held only briefly.
    pub vm: LockSet<VmId>,
    /// Allows one import or export at a time per VM. It is held during guest I/O.
    pub workspace: LockSet<WorkspaceOf>,
    /// Protects the reservation of VM names, ports and addresses in memory. It is a set with one
    /// key, so that its holder is shown in `debug locks`.
    pub create_vm: LockSet<VmNames>,
    /// Protects the reservation of image names in memory.
    pub image_ops: LockSet<ImageNames>,
}

impl OpLocks {
    pub fn new() -> Self {
        Self {
            vm: LockSet::default(),
            workspace: LockSet::default(),
            create_vm: LockSet::default(),
            image_ops: LockSet::default(),
        }
    }

    /// Returns the number of keys that are held or waited for, which is 0 if nothing is in
    /// progress.
    #[cfg(any(test, feature = "fakes"))]
    pub fn entries(&self) -> usize {
        self.vm.len() + self.workspace.len() + self.create_vm.len() + self.image_ops.len()
    }
}
