//! Checks the configured uids of VMs against the existing VMs. A VM keeps its slot, and so its uid,
//! but the configuration may change between two starts of the daemon.

use crate::config::{Network, Qemu};
use crate::error::{Error, Kind, Result};
use crate::store::State;

/// True if the last uid belongs to the name server's helper process.
fn has_name_server(network: &Network) -> bool {
    network.is_bridge() && network.dns
}

/// Returns the number of uids available to VMs.
pub(super) fn for_vms(qemu: &Qemu, network: &Network) -> u32 {
    qemu.uid_count - u32::from(has_name_server(network))
}

/// Checks that no VM has the name server's uid or a uid outside the range. The daemon cannot find
/// the VMM of a VM outside the range.
///
/// # Errors
/// `invalid_config`.
pub(super) fn require(qemu: &Qemu, network: &Network, state: &State) -> Result<()> {
    let Some(last) = state.vms().max_by_key(|row| row.slot) else {
        return Ok(());
    };
    check(
        qemu,
        has_name_server(network),
        last.name.as_str(),
        last.slot,
    )
}

/// Checks the VM with the highest slot.
fn check(qemu: &Qemu, has_name_server: bool, name: &str, slot: u32) -> Result<()> {
    let (count, kept) = (qemu.uid_count, u32::from(has_name_server));
    if slot.saturating_add(kept) < count {
        return Ok(());
    }
    let (uid, enough) = (
        qemu.uid_base.saturating_add(slot),
        slot.saturating_add(kept + 1),
    );
    let whose = if slot < count {
        "which is the name server's"
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
    fn vm_never_has_the_uid_of_the_name_server() {
        let qemu = Qemu {
            uid_base: 5000,
            uid_count: 10,
            ..Qemu::default()
        };
        assert_eq!(qemu.name_server_uid(), 5009);
        assert!(check(&qemu, true, "web", 8).is_ok());
        let e = check(&qemu, true, "web", 9).unwrap_err();
        assert_eq!(
            e.to_string(),
            "qemu.uid_count = 10 is too small: VM web has uid 5009, which is the name server's"
        );
        assert!(
            e.hint_text()
                .unwrap()
                .starts_with("set uid_count = 11 or more under [qemu]"),
            "{e:?}"
        );
        assert!(check(&qemu, false, "web", 9).is_ok());
        let e = check(&qemu, false, "web", 10).unwrap_err();
        assert!(
            e.kind() == Kind::InvalidConfig
                && e.to_string()
                    .ends_with("uid 5010, which is outside of the range"),
            "{e}"
        );
    }
}
