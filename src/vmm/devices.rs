//! The host's devices that a VMM opens, and the users who may open them.
//!
//! The VMMs of a root daemon have their own uids, so the mode of a device decides whether they can
//! open it. If only a group may open it, the VMM gets that group, which weakens the host less than
//! opening the device to all users. With the jailer, the modes do not matter, because it creates
//! nodes of these devices in each jail.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

pub const KVM: &str = "/dev/kvm";
pub const TUN: &str = "/dev/net/tun";

/// The groups that a VMM needs to open a device, or the reason why the VMM cannot open it.
pub type Access = std::result::Result<Vec<u32>, String>;

/// Returns the access that this daemon's VMMs have to a device. They have their own uids if the
/// daemon is root.
pub fn access(device: &str) -> Access {
    access_as(device, rustix::process::geteuid().is_root())
}

/// Returns the access of a VMM to a device. `has_other_uid` is true if the VMM's uid differs from
/// the daemon's.
pub fn access_as(device: &str, has_other_uid: bool) -> Access {
    crate::locks::may_block("file access");
    let stat = std::fs::metadata(device).map_err(|_| format!("there is no {device}"))?;
    if has_other_uid {
        return access_by_mode(device, stat.permissions().mode(), stat.gid());
    }
    let may = rustix::fs::access(
        device,
        rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK,
    )
    .is_ok();
    if may {
        Ok(Vec::new())
    } else {
        Err(format!("this user may not open {device}"))
    }
}

fn access_by_mode(device: &str, mode: u32, gid: u32) -> Access {
    if mode & 0o006 == 0o006 {
        Ok(Vec::new())
    } else if mode & 0o060 == 0o060 && gid != 0 {
        Ok(vec![gid])
    } else {
        let mode = mode & 0o777;
        Err(format!(
            "{device} has mode {mode:04o}: only root may open it, and VMMs do not run as root"
        ))
    }
}

/// Checks that the host has the device, regardless of who may open it.
pub fn exists(device: &str) -> std::result::Result<(), String> {
    crate::locks::may_block("file access");
    match std::fs::metadata(Path::new(device)) {
        Ok(stat) if stat.file_type().is_char_device() => Ok(()),
        Ok(_) => Err(format!("{device} is not a device")),
        Err(_) => Err(format!("there is no {device}")),
    }
}

/// Returns the command that lets VMMs open a device through a group without opening it to all
/// users.
pub fn open_to_group(device: &str) -> String {
    format!("getent group kvm || groupadd --system kvm; chgrp kvm {device} && chmod 0660 {device}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_is_opened_by_its_mode_or_its_group() {
        let by_mode = |mode, gid| access_by_mode(TUN, mode, gid);
        assert_eq!(by_mode(0o20666, 0), Ok(vec![]));
        assert_eq!(by_mode(0o20660, 108), Ok(vec![108]));
        // Membership in the group root would give access to much more than this device.
        for (mode, gid) in [(0o20660, 0), (0o20600, 0), (0o20640, 108), (0o20604, 0)] {
            assert!(
                by_mode(mode, gid).is_err_and(|why| why.contains(TUN)),
                "{mode:o}"
            );
        }
    }

    #[test]
    fn advice_never_opens_a_device_to_all_users() {
        for device in [KVM, TUN] {
            assert!(
                !open_to_group(device).contains("666")
                    && open_to_group(device).contains("chmod 0660")
            );
        }
    }

    #[test]
    fn missing_device_differs_from_a_plain_file() {
        exists("/dev/null").unwrap();
        assert_eq!(
            exists("/dev/no-such").unwrap_err(),
            "there is no /dev/no-such"
        );
        assert_eq!(
            exists("/etc/passwd").unwrap_err(),
            "/etc/passwd is not a device"
        );
    }
}
