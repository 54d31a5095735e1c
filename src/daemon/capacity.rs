//! Checks the sizes of VMs, and reserves memory of the host for them.

use super::core::Core;
use crate::api::vm::VmState;
use crate::config::MEM_MIB_MIN;
use crate::disk::root::SIZE_UNIT_BYTES;
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::store::{State, VmRow};

/// The smallest size of a work disk. A smaller ext4 file system cannot have a journal.
const WORK_DISK_BYTES_MIN: u64 = 16 << 20;

/// Checks sizes of VMs against the limits.
#[derive(Clone)]
pub(super) struct Capacity {
    pub(super) core: Core,
    /// The memory limit for all VMs together.
    pub(super) mem_mib_max: u64,
}

impl Capacity {
    pub(super) fn check_vcpus(&self, vcpus: u32) -> Result<()> {
        let max = self.core.limits.vcpus_max;
        if vcpus == 0 || vcpus > max {
            return Err(Error::invalid(format!("{vcpus} vCPUs: use 1 to {max}"))
                .hint("limits.vcpus_max sets the maximum"));
        }
        Ok(())
    }

    pub(super) fn check_memory(&self, mem_mib: u64) -> Result<()> {
        if mem_mib < MEM_MIB_MIN {
            return Err(Error::invalid(format!(
                "{mem_mib} MiB of memory: a guest needs at least {MEM_MIB_MIN}"
            ))
            .hint("use for example --memory 1G"));
        }
        let max = self.mem_mib_max;
        if mem_mib > max {
            return Err(Error::new(
                Kind::MemoryLimit,
                format!("{mem_mib} MiB of memory: this host allows at most {max}"),
            )
            .hint("ask for less, or set limits.mem_mib_max"));
        }
        Ok(())
    }

    pub(super) fn check_disk(&self, bytes: u64, at_least: u64) -> Result<()> {
        let max = self.core.limits.disk_bytes_max;
        if bytes < at_least {
            return Err(Error::invalid(format!(
                "a disk of {}: it needs at least {} and cannot shrink",
                size(bytes),
                size(at_least)
            ))
            .hint(format!(
                "leave out --disk, or use at least --disk {}",
                size(at_least)
            )));
        }
        if !bytes.is_multiple_of(SIZE_UNIT_BYTES) {
            return Err(Error::invalid(format!(
                "a disk of {}: it must be a multiple of {}",
                size(bytes),
                size(SIZE_UNIT_BYTES)
            ))
            .hint("use whole MiB, for example --disk 4096M"));
        }
        if bytes > max {
            return Err(Error::invalid(format!(
                "a disk of {}: use at most {}",
                size(bytes),
                size(max)
            ))
            .hint("limits.disk_bytes_max sets the maximum"));
        }
        Ok(())
    }

    pub(super) fn check_work_disk(&self, bytes: u64) -> Result<()> {
        let max = self.core.limits.disk_bytes_max;
        if (WORK_DISK_BYTES_MIN..=max).contains(&bytes) && bytes.is_multiple_of(SIZE_UNIT_BYTES) {
            return Ok(());
        }
        let (least, most) = (size(WORK_DISK_BYTES_MIN), size(max));
        Err(Error::invalid(format!(
            "a work disk of {}: use {least} to {most} in whole MiB",
            size(bytes)
        ))
        .hint("use for example --work-disk 20G; limits.disk_bytes_max sets the maximum"))
    }

    /// Checks that there is enough memory for the VM. Call this in the transaction of a claim, so
    /// that the sum over all started VMs stays within the limits.
    pub(super) fn reserve_memory(&self, state: &State, row: &VmRow) -> Result<()> {
        let check = |used: u64, max: u64, whose: &str, key: &str| {
            if used + row.shape.mem_mib <= max {
                return Ok(());
            }
            Err(Error::new(
                Kind::MemoryLimit,
                format!(
                    "reserve {} MiB of memory: {used} of {whose} {max} MiB are in use",
                    row.shape.mem_mib
                ),
            )
            .hint(format!(
                "stop another VM, give it less with fcctl vm set, or raise limits.{key}"
            )))
        };
        check(
            reserved_mib(state, None, &row.id),
            self.mem_mib_max,
            "this host's",
            "mem_mib_max",
        )?;
        match self.core.limits.mem_mib_per_uid_max {
            0 => Ok(()),
            max => check(
                reserved_mib(state, Some(row.owner_uid), &row.id),
                max,
                "the owner's",
                "mem_mib_per_uid_max",
            ),
        }
    }
}

/// Formats a size as `--disk` accepts it, or in bytes if it is not a whole number of MiB.
fn size(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes.is_multiple_of(MIB) {
        format!("{}M", bytes / MIB)
    } else {
        format!("{bytes} bytes")
    }
}

/// Returns the memory of all VMs that are starting, running or stopping, except `apart`, whose
/// memory is being checked. If `owner_uid` is given, counts only the VMs of that user.
fn reserved_mib(state: &State, owner_uid: Option<u32>, apart: &VmId) -> u64 {
    state
        .vms()
        .filter(|r| {
            matches!(
                r.state,
                VmState::Starting | VmState::Running | VmState::Stopping
            )
        })
        .filter(|r| r.id != *apart)
        .filter(|r| owner_uid.is_none_or(|uid| uid == r.owner_uid))
        .map(|r| r.shape.mem_mib)
        .sum()
}
