//! Checks the configured uids of VMs against the existing VMs. A VM keeps its slot, and so its uid,
//! but the configuration may change between two starts of the daemon.

use crate::config::Qemu;
use crate::error::{Error, Kind, Result};
use crate::store::State;

/// The uids at the end of the range that belong to helper processes.
const HELPER_UIDS: u32 = 1;

/// Returns the number of uids available to VMs.
pub(super) fn for_vms(qemu: &Qemu) -> u32 {
    qemu.uid_count - HELPER_UIDS
}

/// Checks that no VM has the uid of helper processes or a uid outside the range. The daemon cannot
/// find the VMM of a VM outside the range.
///
/// # Errors
/// `invalid_config`.
pub(super) fn require(qemu: &Qemu, state: &State) -> Result<()> {
    let Some(last) = state.vms().max_by_key(|row| row.slot) else {
        return Ok(());
    };
    check(qemu, last.name.as_str(), last.slot)
}

/// Checks the VM with the highest slot.
fn check(qemu: &Qemu, name: &str, slot: u32) -> Result<()> {
    let count = qemu.uid_count;
    if slot.saturating_add(HELPER_UIDS) < count {
        return Ok(());
    }
    let (uid, enough) = (
        qemu.uid_base.saturating_add(slot),
        slot.saturating_add(HELPER_UIDS + 1),
    );
    let whose = if slot < count {
        "which is that of helper processes"
    } else {
        "which is outside of the range"
    };
    Err(Error::new(
        Kind::InvalidConfig,
        format!("qemu.uid_count = {count} is too small: VM {name} has uid {uid}, {whose}"),
    )
    .hint(format!(
        "set uid_count = {enough} or more under [qemu], or delete the VM with the earlier settings"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_never_has_the_uid_of_helper_processes() {
        let qemu = Qemu {
            uid_base: 5000,
            uid_count: 10,
            ..Qemu::default()
        };
        assert_eq!(qemu.helper_uid(), 5009);
        assert!(check(&qemu, "web", 8).is_ok());
        let e = check(&qemu, "web", 9).unwrap_err();
        assert_eq!(
            e.to_string(),
            "qemu.uid_count = 10 is too small: VM web has uid 5009, which is that of helper processes"
        );
        assert!(
            e.hint_text()
                .unwrap()
                .starts_with("set uid_count = 11 or more under [qemu]"),
            "{e:?}"
        );
        let e = check(&qemu, "web", 10).unwrap_err();
        assert!(
            e.kind() == Kind::InvalidConfig
                && e.to_string()
                    .ends_with("uid 5010, which is outside of the range"),
            "{e}"
        );
    }
}
