//! The sections `[vmm]` and `[firecracker]`.

use crate::error::{Error, Kind, Result};
use serde::Deserialize;
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum VmmDriver {
    /// QEMU: it runs everywhere.
    #[default]
    Qemu,
    /// Needs root, a bridge, and a KVM that runs stock kernels.
    Firecracker,
    /// Firecracker where everything that it needs is available when the daemon starts, else QEMU. `fcctl doctor` names the
    /// first thing that is missing.
    Auto,
}

/// What VMs are started with. Those that run are looked after whatever this says.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Vmm {
    pub driver: VmmDriver,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Firecracker {
    pub binary: PathBuf,
    pub jailer: PathBuf,
    /// Whether VMMs run under the jailer.
    pub jail: bool,
    /// What a VMM may take of the host, by its control group.
    pub limits: VmmLimits,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum VmmLimits {
    /// A start is refused where the host lacks a controller.
    #[default]
    Required,
    /// As far as the host has controllers.
    BestEffort,
}

impl Default for Firecracker {
    fn default() -> Self {
        Self { binary: "firecracker".into(), jailer: "jailer".into(), jail: true, limits: VmmLimits::Required }
    }
}

/// # Errors
/// `invalid_config`.
pub fn validate(vmm: &Vmm, network_is_bridge: bool) -> Result<()> {
    if vmm.driver == VmmDriver::Firecracker && !network_is_bridge {
        let message = "driver = \"firecracker\" under [vmm]: it has no user-mode network";
        return Err(Error::new(Kind::InvalidConfig, message).hint("set driver = \"bridge\" under [network], as root"));
    }
    Ok(())
}
