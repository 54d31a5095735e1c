//! Finds out how root disks are made on this host.

use crate::config::{self, DiskDriver};
use crate::disk::{Method, Probe};
use crate::error::Result;
use crate::vmm::Driver;
use std::path::Path;

/// Returns how root disks in `dir` are made: as configured, or in the best way that works.
pub(super) fn probe(disk: &config::Disk, vmm: &dyn Driver, dir: &Path) -> Result<Probe> {
    let wanted = match disk.driver {
        DiskDriver::Auto => None,
        DiskDriver::Reflink => Some(Method::Reflink),
        DiskDriver::Qcow2 => Some(Method::Qcow2),
        DiskDriver::DmSnapshot => Some(Method::DmSnapshot),
        DiskDriver::Copy => Some(Method::Copy),
    };
    crate::disk::probe(dir, wanted, vmm.capabilities().reads_qcow2)
}
