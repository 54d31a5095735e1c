//! The keys of the locks that protect rows. A row is changed only with a guard of its own lock, and
//! each lock has a key of its own type, so the compiler tells the guards apart.

use crate::ids::VmId;
use crate::locks::{LockKey, Rank};

/// A VM's ID is the key of the lock that protects the VM's row.
impl LockKey for VmId {
    const RANK: Rank = Rank::Vm;
}

/// The key of the lock that protects the row of a VM's workspace.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkspaceOf(pub VmId);

impl LockKey for WorkspaceOf {
    const RANK: Rank = Rank::Workspace;
}

/// Shows the ID alone, as the VM's own lock does in `debug locks`.
impl std::fmt::Debug for WorkspaceOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
