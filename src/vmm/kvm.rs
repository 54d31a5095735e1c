//! `/dev/kvm`: who may open it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

pub const KVM: &str = "/dev/kvm";

/// May our VMMs open it: with which groups, or why not.
pub type Access = std::result::Result<Vec<u32>, String>;

/// For VMMs of ours: by the mode alone where they will have another uid than we have.
pub fn kvm_access() -> Access {
    access(rustix::process::geteuid().is_root())
}

/// For VMMs of our own uid.
pub fn own_access() -> Access {
    access(false)
}

fn access(has_other_uid: bool) -> Access {
    let stat = match std::fs::metadata(KVM) {
        Ok(stat) => stat,
        Err(_) => return Err(format!("there is no {KVM}")),
    };
    let mode = stat.permissions().mode();
    if !has_other_uid {
        let may = rustix::fs::access(KVM, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK).is_ok();
        return if may { Ok(Vec::new()) } else { Err(format!("this user may not open {KVM}")) };
    }
    if mode & 0o006 == 0o006 {
        Ok(Vec::new())
    } else if mode & 0o060 == 0o060 && stat.gid() != 0 {
        Ok(vec![stat.gid()])
    } else {
        Err(format!("only root may open {KVM}, and VMMs do not run as root"))
    }
}
