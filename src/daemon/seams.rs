//! The daemon's seams to the outside world, and the choice of the VMM driver.

use super::{auto, gone};
use crate::config::{Config, VmmDriver};
use crate::error::Result;
use crate::guest::Transport;
use crate::host::Commands;
use crate::vmm::Driver;
use crate::vmm::console::Consoles;
use crate::vmm::drivers::Drivers;
use crate::vmm::firecracker::Firecracker;
use crate::vmm::qemu::Qemu;
use std::sync::Arc;

/// The seams where tests put fakes.
pub struct Seams {
    pub vmm: Arc<dyn Driver>,
    pub transport: Arc<dyn Transport>,
    pub commands: Arc<dyn Commands>,
    /// Finds installations that are gone. `None` if the daemon is not root, because an installation
    /// without root leaves nothing behind on the host.
    pub installations: Option<Arc<dyn gone::Installations>>,
}

impl Seams {
    /// Returns the seams of a real daemon. `installations` is left for the caller to set.
    pub fn real(config: &Config) -> Result<Self> {
        Ok(Self {
            vmm: Arc::new(drivers(config)?),
            transport: Arc::new(crate::guest::SshTransport),
            commands: Arc::new(crate::host::HostCommands),
            installations: None,
        })
    }
}

/// Returns the configured driver for new boots, and the other drivers for VMs that they started
/// earlier.
fn drivers(config: &Config) -> Result<Drivers> {
    let consoles = Arc::new(Consoles::try_new()?);
    let qemu = Arc::new(Qemu::new(config.qemu.clone(), consoles.clone())?);
    let firecracker = Arc::new(Firecracker::new(
        config.firecracker.clone(),
        config.qemu.uids(),
        consoles,
    )?);
    Ok(match config.vmm.driver {
        VmmDriver::Qemu => Drivers::new(qemu, vec![firecracker]),
        VmmDriver::Firecracker => Drivers::new(firecracker, vec![qemu]),
        VmmDriver::Auto => {
            let settings = auto::Settings {
                state_dir: &config.state_dir,
                network: &config.network,
                disk: &config.disk,
                qemu: &config.qemu,
                image: &config.vm.image,
            };
            let is_root = nix::unistd::geteuid().is_root();
            let missing = auto::missing(&settings, firecracker.as_ref(), is_root);
            let check = auto::check(missing.as_ref());
            log::info!("{}", check.found);
            match missing {
                None => Drivers::new(firecracker, vec![qemu]).with_check(check),
                Some(_) => Drivers::new(qemu, vec![firecracker]).with_check(check),
            }
        }
    })
}
