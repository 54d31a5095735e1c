//! Finds VMs that a caller may see. Only root and the owner may see a VM. Other callers get the
//! same error as for a VM that does not exist.

use crate::error::{Error, Kind, Result};
use crate::host::text::quoted;
use crate::ids::ID_LEN;
use crate::store::{State, VmRow};
use std::sync::Arc;

/// The shortest text that is looked up as a prefix of an ID.
pub(super) const PREFIX_LEN_MIN: usize = 2;
/// The most VMs that an error names if a prefix of an ID matches several.
const AMBIGUOUS_SHOWN_MAX: usize = 4;

/// The peer of a connection, from its credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    /// The process id. Use it in logs only, because it may have been reused.
    pub pid: i32,
}

impl Caller {
    pub fn may_see(&self, owner_uid: u32) -> bool {
        self.uid == 0 || self.uid == owner_uid
    }

    /// True for root and for the user who runs the daemon.
    pub fn is_privileged(&self) -> bool {
        self.uid == 0 || self.uid == nix::unistd::geteuid().as_raw()
    }
}

pub(super) fn vm_not_found(text: &str) -> Error {
    Error::new(Kind::VmNotFound, format!("no VM {}", quoted(text)))
        .hint("list your VMs: fcctl ps -a")
}

/// Finds a VM by its name, its ID, or a unique prefix of its ID. VMs that the caller may not see
/// are ignored. Uses the store's indexes, so the cost does not grow with the number of VMs.
pub(super) fn find<'s>(state: &'s State, caller: &Caller, text: &'s str) -> Result<&'s VmRow> {
    let visible = |row: &&'s Arc<VmRow>| caller.may_see(row.owner_uid);
    if let Some(row) = state.vm_by_name_or_id(text).filter(visible) {
        return Ok(row);
    }
    if !(PREFIX_LEN_MIN..ID_LEN).contains(&text.len()) {
        return Err(vm_not_found(text));
    }
    let matches: Vec<_> = state
        .vms_by_id_prefix(text)
        .filter(visible)
        .take(AMBIGUOUS_SHOWN_MAX + 1)
        .collect();
    match matches.as_slice() {
        [] => Err(vm_not_found(text)),
        [row] => Ok(row),
        many => Err(ambiguous(text, many)),
    }
}

fn ambiguous(text: &str, matches: &[&Arc<VmRow>]) -> Error {
    let ids: Vec<_> = matches
        .iter()
        .take(AMBIGUOUS_SHOWN_MAX)
        .map(|r| format!("{} ({})", r.id, r.name))
        .collect();
    let more = if matches.len() > AMBIGUOUS_SHOWN_MAX {
        " and more"
    } else {
        ""
    };
    Error::new(
        Kind::AmbiguousPrefix,
        format!("{text:?} matches several VMs: {}{more}", ids.join(", ")),
    )
    .hint("use the name or a longer part of the ID")
}
