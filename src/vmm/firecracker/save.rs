//! Saves a guest to two files, which are linked into a directory where the VMM can open them.
//!
//! The guest is paused while its memory is written, so as little as possible is written. A guest
//! that has booted is saved as a [`SnapshotType::Diff`], unless part of its memory is in the host's
//! swap.

use super::api::{Booted, SnapshotType};
use super::running::booted;
use super::{SAVE_DEADLINE, jail};
use crate::config::VmmLimits;
use crate::error::{Error, Result};
use crate::host::process::Process;
use crate::locks::Cancel;
use crate::sched::Instant;
use crate::vmm::dial::Deadline;
use crate::vmm::{SaveTo, VmmSpec, run_dir};
use rustix::fs::{AtFlags, CWD};
use std::os::fd::OwnedFd;

pub(super) const DOING: &str = "save the guest";

/// Saves the guest of a running VMM. Returns the VMM's version.
pub(super) fn save_guest(
    process: &Process,
    spec: &VmmSpec,
    limits: VmmLimits,
    to: SaveTo<'_>,
    cancel: &Cancel,
) -> Result<String> {
    let deadline = Deadline {
        at: Instant::now() + SAVE_DEADLINE,
        cancel,
    };
    // Use the host's path. The jail's own root is another mount, so hard links into it are not
    // possible.
    let place = match jail::find(&spec.dir, &spec.tag)? {
        Some(root) => root,
        None => run_dir::open(&spec.dir, DOING)?,
    };
    // Lift the rate limit, because the files are on the same disk.
    let unlimited = VmmSpec {
        rates: crate::api::vm::RateLimits::default(),
        ..spec.clone()
    };
    jail::limit_io(VmmLimits::BestEffort, &unlimited)?;
    let saved = link(&place, to).and_then(|()| {
        let mut vmm = booted(process, deadline, DOING)?;
        save(&mut vmm, process).map(|()| vmm.version().to_owned())
    });
    jail::limit_io(limits, spec)?;
    unlink(&place)?;
    saved
}

fn save(vmm: &mut Booted<'_>, process: &Process) -> Result<()> {
    // Swap is checked before and after, because the kernel may swap out a paused guest at any time.
    // During the save, Firecracker does not touch the missing pages, because the thread that saves
    // also serves the devices.
    if vmm.has_booted()? && !is_swapped(process) {
        vmm.save(SnapshotType::Diff, jail::DEVICES, jail::MEMORY)?;
        if !is_swapped(process) {
            return Ok(());
        }
    }
    vmm.save(SnapshotType::Full, jail::DEVICES, jail::MEMORY)
}

/// True if part of the process's memory is in swap, or if its status cannot be read.
fn is_swapped(process: &Process) -> bool {
    crate::locks::may_block("file access");
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.identity().pid))
        .unwrap_or_default();
    swapped_kib(&status) != Some(0)
}

/// Parses `VmSwap:        0 kB` (proc(5)).
fn swapped_kib(status: &str) -> Option<u64> {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSwap:"))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Links the files into `place`. First removes any files with these names, because the VMM may have
/// created some.
pub(super) fn link(place: &OwnedFd, to: SaveTo<'_>) -> Result<()> {
    crate::locks::may_block("file access");
    unlink(place)?;
    for (path, name) in [(to.memory, jail::MEMORY), (to.devices, jail::DEVICES)] {
        let linked = rustix::fs::linkat(CWD, path, place, name, AtFlags::empty());
        linked.map_err(|e| {
            Error::io(
                format!("link {} for the VMM", path.display()),
                std::io::Error::from(e),
            )
        })?;
    }
    Ok(())
}

fn unlink(place: &OwnedFd) -> Result<()> {
    crate::locks::may_block("file access");
    for name in [jail::MEMORY, jail::DEVICES] {
        match rustix::fs::unlinkat(place, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(e) => {
                return Err(Error::io(
                    "unlink a file of the VMM",
                    std::io::Error::from(e),
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_is_read_from_process_status() {
        assert_eq!(
            swapped_kib("VmPTE:\t      44 kB\nVmSwap:\t       0 kB\nThreads:\t1\n"),
            Some(0)
        );
        assert_eq!(swapped_kib("VmSwap:\t     128 kB\n"), Some(128));
        for unknown in ["", "VmSwap:\n", "Name:\tx\n", "VmSwap:\tmany kB\n"] {
            assert_eq!(swapped_kib(unknown), None, "{unknown:?}");
        }
        assert!(swapped_kib(&std::fs::read_to_string("/proc/self/status").unwrap()).is_some());
    }
}
