//! Control groups (version 2) with the limits of a VMM.

use super::super::rates::BUCKET_BYTES_MIN;
use crate::config::{Firecracker as Config, VmmLimits};
use crate::error::{Error, Kind, Result};
use crate::ids::Tag;
use crate::sched::Instant;
use crate::vmm::VmmSpec;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The directory where control groups of version 2 are mounted (cgroups(7)).
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";
pub(super) const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// The controller for VMs with disk rates.
const IO: &str = "io";
/// The ratio of the control group's limits to the guest's limits. If the kernel throttles a VMM,
/// all of its devices stall, so the VMM's own limits should take effect first. In a measurement
/// with equal limits, the VMM's own limits never took effect first.
const IO_FACTOR: u64 = 2;
/// The directory that contains all block devices, named by their numbers (sysfs).
const BLOCK_DEVICES: &str = "/sys/dev/block";
/// The number of threads that a VMM may have in addition to its vCPUs, for its API and its main
/// loop.
const THREADS_MAX: u32 = 16;
/// The memory that a VMM may use in addition to its guest's memory. The VMM needs a few MiB. The
/// rest is page cache, which the kernel can reclaim.
const OVERHEAD_BYTES: u64 = 256 << 20;
/// The period of `cpu.max`, in microseconds.
const CPU_PERIOD_US: u64 = 100_000;
/// How long to wait until a control group can be removed. It becomes empty a moment after its last
/// process has exited.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
const REMOVE_PERIOD: Duration = Duration::from_millis(5);

/// Returns the limits of the control group for this VM, as arguments of `--cgroup`.
///
/// # Errors
/// `unsupported` if a controller is missing or the device of a disk cannot be limited, unless the
/// configuration sets `limits = "best-effort"`.
pub(crate) fn limits(config: &Config, spec: &VmmSpec) -> Result<Vec<String>> {
    crate::locks::may_block("file access");
    if config.limits == VmmLimits::Required && has_disk_rate(spec) {
        io_limits(spec, device_of)?;
    }
    let text =
        std::fs::read_to_string(Path::new(CGROUPS).join("cgroup.controllers")).unwrap_or_default();
    limits_of(
        config.limits,
        spec,
        &text.split_whitespace().collect::<Vec<_>>(),
    )
}

pub(super) fn limits_of(
    wanted: VmmLimits,
    spec: &VmmSpec,
    controllers: &[&str],
) -> Result<Vec<String>> {
    let io = has_disk_rate(spec).then_some(IO);
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .chain(io)
        .filter(|c| !controllers.contains(c))
        .collect();
    if !missing.is_empty() && wanted == VmmLimits::Required {
        let message = format!(
            "limit the VMM: this host's control groups (version 2) have no {}",
            missing.join(", ")
        );
        return Err(Error::new(Kind::Unsupported, message).hint(
            "enable them, or set limits = \"best-effort\" under [firecracker] to run without limits",
        ));
    }
    let quota = (u64::from(spec.vcpus) + 1) * CPU_PERIOD_US;
    let values = [
        ("cpu", format!("cpu.max={quota} {CPU_PERIOD_US}")),
        (
            "memory",
            format!("memory.max={}", (spec.mem_mib << 20) + OVERHEAD_BYTES),
        ),
        ("pids", format!("pids.max={}", spec.vcpus + THREADS_MAX)),
    ];
    Ok(values
        .into_iter()
        .filter(|(controller, _)| controllers.contains(controller))
        .map(|(_, value)| value)
        .collect())
}

/// Returns the missing controllers among those that every VM needs, and whether the host has the
/// controller for disk rates.
pub(crate) fn missing_controllers() -> (Vec<&'static str>, bool) {
    crate::locks::may_block("file access");
    let text =
        std::fs::read_to_string(Path::new(CGROUPS).join("cgroup.controllers")).unwrap_or_default();
    let has = |controller: &str| text.split_whitespace().any(|has| has == controller);
    (
        CONTROLLERS.into_iter().filter(|c| !has(c)).collect(),
        has(IO),
    )
}

fn has_disk_rate(spec: &VmmSpec) -> bool {
    spec.rates
        .disk_bytes_per_s
        .or(spec.rates.disk_ops_per_s)
        .is_some()
}

/// Limits reads and writes of the VMM's control group on the devices that hold the VM's disks, to
/// [`IO_FACTOR`] times the guest's rates. These limits hold even if a guest controls its VMM. fcd
/// sets them itself because the jailer accepts no value with a `=`. Does nothing if the VMM has no
/// control group, or if the VM has never had a rate.
///
/// # Errors
/// `unsupported` if the host has no such limits, unless the configuration sets
/// `limits = "best-effort"`.
pub(crate) fn limit_io(wanted: VmmLimits, spec: &VmmSpec) -> Result<()> {
    crate::locks::may_block("file access");
    let group = group(&spec.tag);
    let file = group.join("io.max");
    if !group.exists() || (!has_disk_rate(spec) && !file.exists()) {
        return Ok(());
    }
    let doing = || format!("limit the disk I/O of {}", spec.tag);
    let limit = || -> Result<()> {
        let lines = io_limits(spec, device_of)?;
        if !file.exists() {
            for above in [
                Path::new(CGROUPS),
                &Path::new(CGROUPS).join(parent_group(spec.tag.install())),
            ] {
                std::fs::write(above.join("cgroup.subtree_control"), format!("+{IO}"))
                    .map_err(|e| no_io(&e))?;
            }
        }
        // The kernel accepts one device per write.
        lines
            .iter()
            .try_for_each(|line| std::fs::write(&file, line).map_err(|e| no_io(&e)))
    };
    match limit().map_err(|e| e.context(doing())) {
        Err(e) if wanted == VmmLimits::BestEffort => {
            log::warn!("{e}; continuing without this limit, as configured");
            Ok(())
        }
        done => done,
    }
}

fn no_io(e: &std::io::Error) -> Error {
    Error::new(Kind::Unsupported, format!("set io.max of its control group: {e}"))
        .hint("enable the io controller of control groups (version 2), or set limits = \"best-effort\" under [firecracker]")
}

/// Returns the lines for `io.max`, one per device. Each limit is [`IO_FACTOR`] times the total rate
/// of all disks on that device, or `max` if no rate is set.
pub(super) fn io_limits(
    spec: &VmmSpec,
    device_of: impl Fn(&Path) -> Result<String>,
) -> Result<Vec<String>> {
    let mut disks_on: BTreeMap<String, u64> = BTreeMap::new();
    for (_, path) in spec.disks() {
        *disks_on.entry(device_of(path)?).or_default() += 1;
    }
    let value = |rate: Option<u64>, disks: u64| {
        rate.map_or_else(
            || "max".to_owned(),
            |n| {
                n.saturating_mul(disks)
                    .saturating_mul(IO_FACTOR)
                    .to_string()
            },
        )
    };
    // The VMM's own bucket lets at least this many bytes pass at once.
    let bytes_per_s = spec
        .rates
        .disk_bytes_per_s
        .map(|rate| rate.max(BUCKET_BYTES_MIN));
    let line = |(device, disks): (String, u64)| {
        let (bytes, ops) = (
            value(bytes_per_s, disks),
            value(spec.rates.disk_ops_per_s, disks),
        );
        format!("{device} rbps={bytes} wbps={bytes} riops={ops} wiops={ops}")
    };
    Ok(disks_on.into_iter().map(line).collect())
}

/// Returns `MAJOR:MINOR` of the device that holds this file, or of the device itself. For a
/// partition, it is the number of the whole disk, because the kernel does not limit partitions.
pub(super) fn device_of(path: &Path) -> Result<String> {
    crate::locks::may_block("file access");
    use rustix::fs::{major, minor};
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let shown = path.display();
    let stat =
        std::fs::metadata(path).map_err(|e| Error::io(format!("find the device of {shown}"), e))?;
    let number = if stat.file_type().is_block_device() {
        stat.rdev()
    } else {
        stat.dev()
    };
    let number = format!("{}:{}", major(number), minor(number));
    let none = || {
        Error::new(Kind::Unsupported, format!("limit the disk {shown}: its file system is not on a single block device"))
            .hint("put the state directory on ext4 or XFS, remove the rate, or set limits = \"best-effort\" under [firecracker]")
    };
    let device = Path::new(BLOCK_DEVICES)
        .join(&number)
        .canonicalize()
        .map_err(|_| none())?;
    if !device.join("partition").exists() {
        return Ok(number);
    }
    let whole = device
        .parent()
        .map(|whole| std::fs::read_to_string(whole.join("dev")));
    whole
        .and_then(std::result::Result::ok)
        .map(|text| text.trim().to_owned())
        .ok_or_else(none)
}

/// Returns the name of the control group that contains the groups of an installation's VMs.
pub(crate) fn parent_group(install: &str) -> String {
    format!("fcd-{install}")
}

fn group(tag: &Tag) -> PathBuf {
    Path::new(CGROUPS)
        .join(parent_group(tag.install()))
        .join(tag.as_str())
}

/// Removes the VMM's control group, if it exists, and kills the processes in it. This also ends a
/// VMM that a guest controls and that has hidden its arguments.
pub(super) fn remove_group(tag: &Tag) -> Result<()> {
    crate::locks::may_block("file access");
    let group = group(tag);
    // cgroup.kill exists since Linux 5.14 (cgroups(7)).
    let _ = std::fs::write(group.join("cgroup.kill"), "1");
    let deadline = Instant::now() + REMOVE_DEADLINE;
    loop {
        match std::fs::remove_dir(&group) {
            Ok(()) => return Ok(()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                return Ok(());
            }
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::park_timeout(REMOVE_PERIOD)
            }
            Err(e) => {
                return Err(Error::io(
                    format!("remove control group {}", group.display()),
                    e,
                ));
            }
        }
    }
}
