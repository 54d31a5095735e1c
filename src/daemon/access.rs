//! Who may see what: root and the owner. To anybody else a VM does not exist.

use crate::error::{Error, Kind, Result};
use crate::ids::ID_LEN;
use crate::store::{State, VmRow};
use std::sync::Arc;

/// Shortest prefix of an id that is taken for one.
pub(super) const PREFIX_LEN_MIN: usize = 2;
/// How many VMs an error names when the beginning of an id fits several.
const AMBIGUOUS_SHOWN_MAX: usize = 4;

/// The peer of a connection, from its credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    /// For logs only: it may be another process by now.
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

pub fn vm_not_found(text: &str) -> Error {
    let shown: String = text.chars().take(64).collect();
    Error::new(Kind::VmNotFound, format!("no VM {shown:?}")).hint("fcctl ps -a lists the VMs that are there")
}

/// Finds a VM by its name, its id, or the beginning of an id that fits one VM only. Uses the
/// store's indexes: the cost does not grow with the number of VMs.
pub fn find<'s>(state: &'s State, caller: &Caller, text: &'s str) -> Result<&'s VmRow> {
    let visible = |row: &&'s Arc<VmRow>| caller.may_see(row.owner_uid);
    if let Some(row) = state.vm_by_name_or_id(text).filter(visible) {
        return Ok(row);
    }
    if !(PREFIX_LEN_MIN..ID_LEN).contains(&text.len()) {
        return Err(vm_not_found(text));
    }
    let fits: Vec<_> = state.vms_by_id_prefix(text).filter(visible).take(AMBIGUOUS_SHOWN_MAX + 1).collect();
    match fits.as_slice() {
        [] => Err(vm_not_found(text)),
        [row] => Ok(row),
        many => Err(ambiguous(text, many)),
    }
}

fn ambiguous(text: &str, fits: &[&Arc<VmRow>]) -> Error {
    let ids: Vec<_> = fits.iter().take(AMBIGUOUS_SHOWN_MAX).map(|r| format!("{} ({})", r.id, r.name)).collect();
    let more = if fits.len() > AMBIGUOUS_SHOWN_MAX { " and more" } else { "" };
    Error::new(Kind::AmbiguousPrefix, format!("{text:?} fits several VMs: {}{more}", ids.join(", ")))
        .hint("give the name or more of the id")
}
