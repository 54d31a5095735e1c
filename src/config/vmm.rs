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
}

impl Default for Firecracker {
    fn default() -> Self {
        Self { binary: "firecracker".into() }
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
