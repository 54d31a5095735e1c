//! The jail of a VMM, made by the jailer (docs/jailer.md, v1.16): a root directory and a uid of its
//! own, and a control group with limits.
//!
//! The jail is `jail/<program>/<tag>/root` in the VM's directory. It is made again for each start,
//! and the files that the VMM opens are linked into it. The control group is `fcd-<install>/<tag>`.
//! The jailer never removes either of them, so fcd does.

use super::rates::BUCKET_BYTES_MIN;
use super::version::install_if_missing;
use crate::config::{Firecracker as Config, VmmLimits};
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::fs::open_dir;
use crate::host::{mount, program};
use crate::ids::Tag;
use crate::vmm::VmmSpec;
use object::elf::{FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, ReadCache};
use rustix::fs::{Mode, OFlags};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const JAIL_DIR: &str = "jail";
const ROOT_DIR: &str = "root";
/// Where control groups of version 2 are mounted (cgroups(7)).
pub const CGROUPS: &str = "/sys/fs/cgroup";
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// The controller for VMs with disk rates.
const IO: &str = "io";
/// How much higher the limits of the control group are than those of the guest. If the kernel
/// throttles a VMM, all of its devices stall, so the VMM's own limits should take effect first.
/// Measured: with equal limits they never did.
const IO_FACTOR: u64 = 2;
/// Block devices by number (sysfs).
const BLOCK_DEVICES: &str = "/sys/dev/block";
/// How many threads a VMM may have in addition to its vCPUs, for its API and its main loop.
const THREADS_MAX: u32 = 16;
/// How much memory a VMM may use in addition to its guest's. It needs a few MiB, and the rest is
/// page cache that the kernel can reclaim.
const OVERHEAD_BYTES: u64 = 256 << 20;
/// A period of `cpu.max`, in microseconds.
const CPU_PERIOD_US: u64 = 100_000;
/// How many files a VMM may have open: disks, its tap and KVM.
const FILES_MAX: u32 = 256;
/// How long to wait until a control group can be removed. It becomes empty a moment after its last
/// process has exited.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
const REMOVE_PERIOD: Duration = Duration::from_millis(5);

/// Names of the files in the jail.
pub const KERNEL: &str = "vmlinux";
pub const INITRD: &str = "initrd";
pub const DISK: &str = "disk";
pub const SEED: &str = "seed";
pub const WORK: &str = "work";
pub const MEMORY: &str = "memory";
pub const DEVICES: &str = "devices";

/// The two programs, checked to be fit for a jail.
pub struct Programs {
    pub jailer: PathBuf,
    pub firecracker: PathBuf,
}

/// # Errors
/// `command_missing` or `unsupported`, with what to do.
pub fn programs(config: &Config) -> Result<Programs> {
    let find = |name: &Path| {
        let path = program::locate(name).map_err(install_if_missing)?;
        path.canonicalize()
            .map_err(|e| Error::io(format!("look at {}", path.display()), e))
    };
    let jailer = find(&config.jailer)?;
    let firecracker = find(&config.binary)?;
    for program in [&jailer, &firecracker] {
        is_roots(program)?;
    }
    is_static(&firecracker)?;
    Ok(Programs {
        jailer,
        firecracker,
    })
}

/// Checks that only root can write a program that runs as root, or that root runs for others.
fn is_roots(program: &Path) -> Result<()> {
    // A user who can write a directory can replace the files in it, unless the directory is sticky.
    for path in program.ancestors() {
        let shown = path.display();
        let stat = std::fs::metadata(path).map_err(|e| Error::io(format!("look at {shown}"), e))?;
        let is_sticky = stat.is_dir() && stat.mode() & 0o1000 != 0;
        if stat.uid() != 0 || (stat.mode() & 0o022 != 0 && !is_sticky) {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "jail {}: users other than root may write {shown}",
                    program.display()
                ),
            )
            .hint(format!("chown root {shown}; chmod go-w {shown}")));
        }
    }
    Ok(())
}

/// Checks that a program is statically linked, because the jail contains no dynamic linker.
fn is_static(program: &Path) -> Result<()> {
    let shown = program.display();
    let dynamic = has_interpreter(program).map_err(|e| Error::io(format!("read {shown}"), e))?;
    if dynamic {
        return Err(Error::new(
            Kind::Unsupported,
            format!("jail {shown}: it is dynamically linked"),
        )
        .hint("use the static one from a release, or set jail = false under [firecracker]"));
    }
    Ok(())
}

fn has_interpreter(program: &Path) -> std::io::Result<bool> {
    let file = ReadCache::new(std::fs::File::open(program)?);
    let invalid = |_| std::io::Error::other("it is not a 64-bit ELF file");
    let header = FileHeader64::<LittleEndian>::parse(&file).map_err(invalid)?;
    let endian = header.endian().map_err(invalid)?;
    let segments = header.program_headers(endian, &file).map_err(invalid)?;
    Ok(segments.iter().any(|s| s.p_type(endian) == PT_INTERP))
}

/// Returns the limits of the control group for this VM, as arguments of `--cgroup`.
///
/// # Errors
/// `unsupported` if a controller is missing, unless the configuration says `best-effort`.
pub fn limits(config: &Config, spec: &VmmSpec) -> Result<Vec<String>> {
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

fn limits_of(wanted: VmmLimits, spec: &VmmSpec, controllers: &[&str]) -> Result<Vec<String>> {
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
            "enable them, or set limits = \"best-effort\" under [firecracker] to do without",
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

/// Returns which of the controllers that every VM needs this host lacks, and whether it has the one
/// for disk rates.
pub fn missing_controllers() -> (Vec<&'static str>, bool) {
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

/// Limits what the VMM's control group reads and writes on the devices that hold the VM's disks, to
/// [`IO_FACTOR`] times the guest's rates. These limits hold even if a guest has taken over its VMM.
/// fcd sets them because the jailer accepts no value with a `=`. Does nothing without a control
/// group, or if there is no rate and never was one.
///
/// # Errors
/// `unsupported` if the host has no such limits, unless the configuration says `best-effort`.
pub fn limit_io(wanted: VmmLimits, spec: &VmmSpec) -> Result<()> {
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
            log::warn!("{e}; continuing without, as configured");
            Ok(())
        }
        done => done,
    }
}

fn no_io(e: &std::io::Error) -> Error {
    Error::new(Kind::Unsupported, format!("set io.max of its control group: {e}"))
        .hint("enable the io controller of control groups (version 2), or set limits = \"best-effort\" under [firecracker]")
}

/// Returns the lines for `io.max`, one per device. Each limit is the total for all disks on that
/// device, or `max` if no rate is set.
fn io_limits(spec: &VmmSpec, device_of: impl Fn(&Path) -> Result<String>) -> Result<Vec<String>> {
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
    // The VMM lets at least this much pass at once.
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

/// Returns `MAJOR:MINOR` of the device that holds this file, or of the device itself. It is that of
/// a whole disk, because the kernel does not limit partitions.
fn device_of(path: &Path) -> Result<String> {
    use rustix::fs::{major, minor};
    use std::os::unix::fs::FileTypeExt;
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
        Error::new(Kind::Unsupported, format!("limit the disk {shown}: its file system has no block device of its own"))
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

/// The name of the control group that holds those of an installation's VMs.
pub fn parent_group(install: &str) -> String {
    format!("fcd-{install}")
}

fn group(tag: &Tag) -> PathBuf {
    Path::new(CGROUPS)
        .join(parent_group(tag.install()))
        .join(tag.as_str())
}

/// Returns the jail's root directory, as seen from the host.
pub fn root(dir: &Path, program: &Path, tag: &Tag) -> PathBuf {
    dir.join(JAIL_DIR)
        .join(program.file_name().unwrap_or_default())
        .join(tag.as_str())
        .join(ROOT_DIR)
}

/// Checks that the file system allows device nodes and programs, because the jail contains both.
///
/// # Errors
/// `unsupported`, with the mount that forbids it.
pub fn require_mount(dir: &Path) -> Result<()> {
    let flags = mount::flags(dir)
        .map_err(|e| Error::io(format!("look at the file system of {}", dir.display()), e))?;
    require_flags(dir, flags)
}

fn require_flags(dir: &Path, flags: mount::Flags) -> Result<()> {
    let forbids = flags.names();
    if forbids.is_empty() {
        return Ok(());
    }
    let (at, dir) = (mount::point(dir), dir.display());
    let lifted: Vec<_> = forbids
        .iter()
        .map(|name| name.trim_start_matches("no"))
        .collect();
    let message = format!(
        "create a jail in {dir}: {} is mounted {}, but a jail contains device nodes and a program",
        at.display(),
        forbids.join(" and ")
    );
    let hint = format!(
        "mount -o remount,{} {}, or set another state_dir",
        lifted.join(","),
        at.display()
    );
    Err(Error::new(Kind::Unsupported, message).hint(hint))
}

/// Creates the jail with the files that the VMM opens, and returns its root. An earlier jail with
/// this tag is removed.
pub fn make(spec: &VmmSpec, programs: &Programs) -> Result<OwnedFd> {
    let doing = || format!("create the jail of {}", spec.tag);
    require_mount(&spec.dir)?;
    clear(&spec.dir, &spec.tag)?;
    let root = root(&spec.dir, &programs.firecracker, &spec.tag);
    std::fs::create_dir_all(&root).map_err(|e| Error::io(doing(), e))?;
    let mut files = vec![
        (&spec.kernel, KERNEL),
        (&spec.initrd, INITRD),
        (&spec.disk, DISK),
        (&spec.seed, SEED),
    ];
    files.extend(spec.work_disk.as_ref().map(|work| (work, WORK)));
    files.extend(
        spec.saved
            .iter()
            .flat_map(|saved| [(&saved.memory, MEMORY), (&saved.devices, DEVICES)]),
    );
    for (from, name) in files {
        std::fs::hard_link(from, root.join(name)).map_err(|e| {
            let e = Error::io(format!("{}: link {}", doing(), from.display()), e);
            e.hint("put images and VMs on one file system")
        })?;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(&root, flags, Mode::empty())
        .map_err(|e| Error::io(doing(), std::io::Error::from(e)))
}

/// Opens the root of an existing jail.
pub fn find(dir: &Path, tag: &Tag) -> Result<Option<OwnedFd>> {
    let jail = dir.join(JAIL_DIR);
    let roots = names(&jail)
        .into_iter()
        .map(|program| jail.join(program).join(tag.as_str()).join(ROOT_DIR));
    roots
        .into_iter()
        .find(|root| root.is_dir())
        .map(|root| open_dir(&root))
        .transpose()
}

/// Returns the jailer's arguments. Firecracker's own arguments follow `--`.
pub fn args(
    spec: &VmmSpec,
    programs: &Programs,
    owner: Credentials,
    limits: &[String],
) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--id".into(), spec.tag.as_str().into()];
    let mut option = |name: &str, value: OsString| args.extend([OsString::from(name), value]);
    option("--exec-file", programs.firecracker.clone().into());
    option("--uid", owner.uid.to_string().into());
    option("--gid", owner.gid.to_string().into());
    option("--chroot-base-dir", spec.dir.join(JAIL_DIR).into());
    option("--resource-limit", format!("no-file={FILES_MAX}").into());
    // Without limits the jailer creates no control group, but for version 2 it would still require
    // a mount.
    option(
        "--cgroup-version",
        if limits.is_empty() { "1" } else { "2" }.into(),
    );
    if !limits.is_empty() {
        option("--parent-cgroup", parent_group(spec.tag.install()).into());
    }
    for limit in limits {
        option("--cgroup", limit.into());
    }
    args.push("--".into());
    args
}

/// Removes the jail and the control group with this tag. Succeeds if there are none. The VMM must
/// have exited.
pub fn clear(dir: &Path, tag: &Tag) -> Result<()> {
    remove_group(tag)?;
    let jail = dir.join(JAIL_DIR);
    for program in names(&jail) {
        // Links are not followed, because the VMM's uid may have created them.
        let removed = crate::host::fs::remove_tree(&jail.join(&program).join(tag.as_str()));
        removed.map_err(|e| Error::io(format!("remove the jail of {tag}"), e))?;
        // This fails if there is a jail of another start.
        let _ = std::fs::remove_dir(jail.join(program));
    }
    let _ = std::fs::remove_dir(&jail);
    Ok(())
}

/// Removes the control group and kills the processes in it. A VMM that a guest has taken over may
/// have hidden its arguments.
fn remove_group(tag: &Tag) -> Result<()> {
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

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|e| e.file_name().into_string().ok())
        .collect()
}

/// Returns the tags of this installation for which there is a control group or a jail in a VM's
/// directory.
pub fn remains(vms: &Path, install: &str) -> Vec<String> {
    let mut found = names(&Path::new(CGROUPS).join(parent_group(install)));
    for vm in names(vms) {
        let jail = vms.join(vm).join(JAIL_DIR);
        found.extend(
            names(&jail)
                .iter()
                .flat_map(|program| names(&jail.join(program))),
        );
    }
    let prefix = Tag::prefix(install);
    found.retain(|name| name.starts_with(&prefix));
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn spec(dir: &Path) -> VmmSpec {
        let path = |name: &str| dir.join(name);
        for name in ["k", "i", "vm/d", "vm/s"] {
            std::fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            std::fs::write(path(name), name).unwrap();
        }
        VmmSpec {
            vm: "0123456789ab".parse().unwrap(),
            tag: "fc-11223344-0123456789ab-3".parse().unwrap(),
            dir: path("vm"),
            kernel: path("k"),
            initrd: path("i"),
            boot_args: String::new(),
            disk: path("vm/d"),
            disk_format: crate::vmm::DiskFormat::Raw,
            seed: path("vm/s"),
            work_disk: None,
            vcpus: 2,
            mem_mib: 512,
            credentials: Some(Credentials {
                uid: 1234,
                gid: 1234,
            }),
            network: crate::vmm::GuestNetwork::UserMode {
                isolated: false,
                ports: Vec::new(),
            },
            rates: crate::api::vm::RateLimits::default(),
            has_balloon: true,
            console_bytes_max: 1 << 16,
            saved: None,
        }
    }

    #[test]
    fn jail_is_recreated_and_removed_without_following_links() {
        let temp = tempfile::tempdir().unwrap();
        let (spec, vms) = (spec(temp.path()), temp.path());
        let programs = Programs {
            jailer: "/j".into(),
            firecracker: "/opt/firecracker".into(),
        };
        let outside = temp.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("kept"), "x").unwrap();
        for _ in 0..2 {
            drop(make(&spec, &programs).unwrap());
            let root = spec
                .dir
                .join("jail/firecracker")
                .join(spec.tag.as_str())
                .join("root");
            assert_eq!(std::fs::read_to_string(root.join("disk")).unwrap(), "vm/d");
            assert_eq!(std::fs::read_dir(&root).unwrap().count(), 4);
            symlink(&outside, root.join("link")).unwrap();
            assert_eq!(remains(vms, "11223344"), [spec.tag.as_str()]);
        }
        let later = VmmSpec {
            tag: "fc-11223344-0123456789ab-4".parse().unwrap(),
            ..spec.clone()
        };
        drop(make(&later, &programs).unwrap());
        clear(&spec.dir, &spec.tag).unwrap();
        assert_eq!(remains(vms, "11223344"), [later.tag.as_str()]);
        clear(&spec.dir, &later.tag).unwrap();
        clear(&spec.dir, &spec.tag).unwrap();
        assert!(!spec.dir.join(JAIL_DIR).exists());
        assert_eq!(remains(vms, "11223344"), [""; 0]);
        assert!(outside.join("kept").exists() && spec.disk.exists() && spec.kernel.exists());
    }

    /// Uses a mount namespace of its own.
    #[test]
    fn jail_on_nodev_or_noexec_file_system_is_rejected() {
        let dir = Path::new("/srv");
        require_flags(dir, mount::Flags::default()).unwrap();
        let e = require_flags(
            dir,
            mount::Flags {
                nodev: true,
                noexec: true,
            },
        )
        .unwrap_err();
        assert_eq!(e.kind(), Kind::Unsupported);
        assert!(e.to_string().contains("mounted nodev and noexec"), "{e}");
        assert!(
            e.hint_text()
                .is_some_and(|hint| hint.contains("remount,dev,exec ")),
            "{e}"
        );
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        let at = temp.path().to_owned();
        let refused = crate::host::thread::spawn("mounts", move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let script = format!(
                "mount --make-rprivate / && mount -t tmpfs -o nodev test '{}'",
                at.display()
            );
            let mounted = crate::host::Command::new("sh").args(["-c", &script]);
            crate::host::command::run_any_status(
                &mounted,
                &crate::locks::Cancel::try_new().unwrap(),
                &mut |_| {},
            )
            .unwrap();
            let made = spec(&at);
            let programs = Programs {
                jailer: "/j".into(),
                firecracker: "/opt/firecracker".into(),
            };
            make(&made, &programs)
                .map(drop)
                .map_err(|e| (e.kind(), e.to_string()))
        });
        let (kind, text) = refused.unwrap().join().unwrap().unwrap_err();
        assert!(
            kind == Kind::Unsupported
                && text.contains(&format!("{} is mounted nodev", temp.path().display())),
            "{text}"
        );
    }

    #[test]
    fn missing_controller_is_error_unless_best_effort() {
        let temp = tempfile::tempdir().unwrap();
        let spec = spec(temp.path());
        let all = limits_of(
            VmmLimits::Required,
            &spec,
            &["cpuset", "cpu", "io", "memory", "pids"],
        )
        .unwrap();
        assert_eq!(
            all,
            [
                "cpu.max=300000 100000",
                "memory.max=805306368",
                "pids.max=18"
            ]
        );
        let e = limits_of(VmmLimits::Required, &spec, &["cpu", "pids"]).unwrap_err();
        assert!(
            e.kind() == Kind::Unsupported
                && e.to_string().contains("memory")
                && e.hint_text().is_some(),
            "{e}"
        );
        assert_eq!(
            limits_of(VmmLimits::BestEffort, &spec, &["pids"]).unwrap(),
            ["pids.max=18"]
        );
        assert_eq!(
            limits_of(VmmLimits::BestEffort, &spec, &[]).unwrap(),
            [""; 0]
        );
    }

    #[test]
    fn disk_rates_become_limits_of_host_devices() {
        let temp = tempfile::tempdir().unwrap();
        let rate = |disk_bytes_per_s, disk_ops_per_s| crate::api::vm::RateLimits {
            disk_bytes_per_s,
            disk_ops_per_s,
            ..Default::default()
        };
        let spec = VmmSpec {
            work_disk: Some(temp.path().join("vm/s")),
            ..spec(temp.path())
        };
        let device_of_all = |_: &Path| Ok("8:0".to_owned());
        for (rates, line) in [
            (
                rate(Some(5 << 20), Some(100)),
                "rbps=20971520 wbps=20971520 riops=400 wiops=400",
            ),
            (
                rate(Some(1 << 20), None),
                "rbps=8388608 wbps=8388608 riops=max wiops=max",
            ),
            (
                rate(Some(u64::MAX), None),
                "rbps=18446744073709551615 wbps=18446744073709551615 riops=max wiops=max",
            ),
            (rate(None, None), "rbps=max wbps=max riops=max wiops=max"),
        ] {
            let spec = VmmSpec {
                rates,
                ..spec.clone()
            };
            assert_eq!(
                io_limits(&spec, device_of_all).unwrap(),
                [format!("8:0 {line}")]
            );
            // Succeeds because there is no such control group.
            limit_io(VmmLimits::Required, &spec).unwrap();
        }
        let one = VmmSpec {
            rates: rate(None, Some(50)),
            work_disk: None,
            ..spec.clone()
        };
        assert_eq!(
            io_limits(&one, device_of_all).unwrap(),
            ["8:0 rbps=max wbps=max riops=100 wiops=100"]
        );
        let two = VmmSpec {
            work_disk: spec.work_disk.clone(),
            ..one.clone()
        };
        let each = |path: &Path| {
            Ok(if path == two.disk {
                "253:0".to_owned()
            } else {
                "8:0".to_owned()
            })
        };
        assert_eq!(
            io_limits(&two, each).unwrap(),
            ["253:0", "8:0"].map(|d| format!("{d} rbps=max wbps=max riops=100 wiops=100"))
        );
        // The io controller is needed only with a disk rate.
        assert_eq!(
            limits_of(VmmLimits::Required, &spec, &CONTROLLERS)
                .unwrap()
                .len(),
            3
        );
        let e = limits_of(VmmLimits::Required, &one, &CONTROLLERS).unwrap_err();
        assert!(
            e.kind() == Kind::Unsupported
                && e.to_string().ends_with("no io")
                && e.hint_text().is_some(),
            "{e}"
        );
        assert_eq!(
            limits_of(VmmLimits::BestEffort, &one, &CONTROLLERS)
                .unwrap()
                .len(),
            3
        );
        assert_eq!(
            limits_of(VmmLimits::Required, &one, &["io", "cpu", "memory", "pids"])
                .unwrap()
                .len(),
            3,
            "io limits are set separately"
        );
        // A tmpfs is not on a device.
        let e = device_of(Path::new("/dev/shm")).unwrap_err();
        assert!(
            e.kind() == Kind::Unsupported && e.hint_text().is_some(),
            "{e}"
        );
    }

    #[test]
    fn dynamic_or_writable_program_is_not_jailed() {
        let temp = tempfile::tempdir().unwrap();
        assert!(has_interpreter(Path::new("/bin/sh")).unwrap());
        let text = temp.path().join("text");
        std::fs::write(&text, "#!/bin/sh\n").unwrap();
        assert!(has_interpreter(&text).is_err());
        assert_eq!(
            is_static(Path::new("/bin/sh")).unwrap_err().kind(),
            Kind::Unsupported
        );
        if nix::unistd::geteuid().is_root() {
            let set = |mode| {
                std::fs::set_permissions(&text, std::os::unix::fs::PermissionsExt::from_mode(mode))
                    .unwrap()
            };
            set(0o755);
            is_roots(&text).unwrap();
            set(0o775);
            assert_eq!(is_roots(&text).unwrap_err().kind(), Kind::Unsupported);
        }
    }
}
