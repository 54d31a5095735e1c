//! The sections `[vmm]` and `[firecracker]`.

use super::section::{choices, section};
use crate::error::{Error, Kind, Result};
use std::path::PathBuf;

choices! {
    /// The VMM that new VMs run on.
    pub enum VmmDriver {
        /// QEMU, which runs everywhere.
        Qemu = "qemu",
        /// Firecracker. It needs root, a bridge, and a KVM that boots ordinary kernels.
        Firecracker = "firecracker",
        /// Firecracker if everything it needs is available when the daemon starts, else QEMU.
        /// `fcctl doctor` names the first thing that is missing.
        Auto = "auto",
    }
}

section! {
    /// The VMM. VMs that are running stay on the one they were started with.
    pub struct Vmm {
        /// The VMM that new VMs run on.
        driver: VmmDriver = VmmDriver::Qemu,
    }
}

choices! {
    /// The behaviour on a host without the control groups that limit a VMM.
    pub enum VmmLimits {
        /// Starting a VM fails if the host lacks a controller.
        Required = "required",
        /// The limits of missing controllers are not set.
        BestEffort = "best-effort",
    }
}

section! {
    /// How VMs run on Firecracker. See `fcctl help firecracker`.
    pub struct Firecracker {
        /// The program. It must be static, and only root may write to it.
        binary: PathBuf = "firecracker".into(),
        /// Firecracker's jailer, of the same version.
        jailer: PathBuf = "jailer".into(),
        /// Runs VMMs under the jailer. Without it a VMM has the daemon's view of the host.
        jail: bool = true,
        /// The behaviour if the host cannot limit a VMM's CPU, memory, threads and disk rates.
        limits: VmmLimits = VmmLimits::Required,
    }
}

/// # Errors
/// `invalid_config`.
pub(super) fn validate(vmm: &Vmm, network_is_bridge: bool) -> Result<()> {
    if vmm.driver == VmmDriver::Firecracker && !network_is_bridge {
        let message = "driver = \"firecracker\" under [vmm]: it has no user-mode network";
        return Err(Error::new(Kind::InvalidConfig, message)
            .hint("set driver = \"bridge\" under [network], as root"));
    }
    Ok(())
}
