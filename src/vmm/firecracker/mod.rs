//! Firecracker: KVM, a tap, an API on a Unix socket, under the jailer.
//!
//! # Starting
//!
//! The client speaks HTTP over the API socket, one connection per conversation. What may be asked
//! before the guest starts (`PreBoot`) and after (`Booted`) are two types, so a call in the wrong
//! phase does not compile. `refusal.rs` turns each known refusal into a kind and a hint.
//! Firecracker needs a raw disk and a tap, and therefore the bridge.
//!
//! Each VMM runs in the VM's `run/`, which holds its API socket and the pipe for the guest's serial
//! console. Firecracker opens that pipe for reading too and drops what does not fit, so a log that
//! nobody reads never blocks a guest. A conversation with a running VMM goes through
//! `/proc/<pid>/cwd`, which works with and without a jail.
//!
//! # The jail
//!
//! The jail is `jail/<program>/<tag>/root` below the VM's directory. It is made for each start and
//! contains hard links to what the VMM opens. The VMM runs under the VM's uid and gid and in the
//! control group `fcd-<install>/<tag>`. Jail and control group are one resource in the ledger, and
//! fcd removes both. If a controller is missing, the start fails, unless `limits = "best-effort"`.
//!
//! The jail has no network namespace of its own. Firecracker opens its tap by name, so the tap
//! would have to be in that namespace and could not be on the bridge. It has a PID namespace of its
//! own, in which the VMM is the first process. The daemon makes it with a thread that only starts
//! the jailer (`host/process.rs`): with the jailer's `--new-pid-ns` the VMM would not be the
//! daemon's child, and nobody could read its exit status. The first process of a PID namespace
//! ignores every signal that it does not handle, except SIGKILL.
//!
//! # Limits
//!
//! Rates are token buckets per drive and interface, of one second's worth and at least 2 MiB. A
//! guest that takes over its VMM escapes them, so the control group limits the disks too
//! (`io.max`), at twice the rate: one thread serves all devices of a VMM, and the kernel would stop
//! them all. The jailer accepts no value with a `=`, so fcd writes `io.max` itself, after the guest
//! has started.
//!
//! # Memory
//!
//! Every VM whose image has the balloon driver (`guest_version` 2) has a balloon. The guest reports
//! freed pages, and the VMM returns them to the host. Firecracker's metrics are differences since
//! the last report, so they cannot feed `vm stats`, whose counters survive a restart of the daemon.
//! The metrics go into a pipe that is read only on request.
//!
//! A snapshot of a booted guest is a `Diff`, which contains the pages that the guest has touched.
//! It is `Full` if some of its memory is in swap, which a `Diff` would miss, and for a restored
//! guest, whose other pages are in another file.
//!
//! # vsock
//!
//! Every VM has a vsock. Its socket is in the VMM's working directory. `vm.connect` passes the
//! connected descriptor to the caller, so no thread of the daemon copies data. Firecracker before
//! 1.17 holds back data to the guest after a resume until the guest's driver has noticed that its
//! old streams ended, and only a save makes it notice. So a resume begins a save with an impossible
//! path, and a guest that is already running is left alone.
//!
//! # Stopping
//!
//! If a guest has not synced after half of the grace period, or cannot be reached over SSH, it gets
//! Ctrl-Alt-Del, provided that its init handles it (`guest_version` 3). Older kernels would reset.
//!
//! # Tests
//!
//! `it` `firecracker::` runs against `tests/fake/firecracker/`, which answers, refuses, hangs and
//! dies as a recorded one does. With `FCD_FIRECRACKER`, `e2e` `firecracker::` runs the state
//! machine of a real one on this host's `/dev/kvm`, and real guests by nested KVM in a test host.

pub(in crate::vmm) mod api;
mod checks;
mod gone;
mod http;
pub(in crate::vmm) mod incoming;
mod jail;
pub(in crate::vmm) mod metrics;
mod monitor;
mod rates;
pub(in crate::vmm) mod refusal;
mod running;
mod save;
mod version;
mod vm;
mod vsock;

pub use gone::{empty_group, remove_group};
pub use jail::require_mount;

use super::console::{Attach, Consoles};
use super::dial::{self, Deadline};
use super::processes::{HostProcesses, Processes};
use super::run_dir;
use super::{
    Capabilities, DiskFormat, Driver, GuestEvent, GuestNetwork, Identity, Running, SaveTo, Vm,
    VmRef, VmmSpec,
};
use crate::api::daemon::Check;
use crate::config::Firecracker as Config;
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::command::PATH;
use crate::host::fs::{open_at, open_dir};
use crate::host::process::{self, Process, Spawn};
use crate::host::program;
use crate::ids::Tag;
use crate::locks::{Cancel, CancelCause, Rank, region};
use crate::vmm::devices::{self, KVM, TUN};
use api::{
    BootSource, Booted, CacheType, Drive, LoadSnapshot, MachineConfig, NetworkInterface,
    NetworkOverride, PreBoot, Vsock, text,
};
use monitor::Monitor;
use rates::RateLimiter;
use running::{booted, place};
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use std::ffi::OsString;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm::FirecrackerVm;

const SSH_PORT: u16 = 22;
const API_SOCKET: &str = "api.sock";
const CONSOLE_PIPE: &str = "console";
const METRICS_PIPE: &str = "metrics";
/// The name of the guest's network interface.
const INTERFACE: &str = "eth0";
/// How long a VMM may take from its start to the first instruction of its guest. On an idle host it
/// is a fraction of a second.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long a running VMM may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// How long it may take to write a guest's memory to the disk or to read it.
const SAVE_DEADLINE: Duration = Duration::from_secs(600);
/// How long a VMM whose start failed may take to exit after it was killed.
const KILL_DEADLINE: Duration = Duration::from_secs(30);
/// `reboot=k` makes the guest reset, which ends the VMM (docs/getting-started.md). There is no
/// other power switch.
const KERNEL_ARGS: &str = "console=ttyS0 reboot=k panic=-1 net.ifnames=0 quiet cryptomgr.notests random.trust_cpu=on audit=0 \
                           i8042.noaux i8042.nomux fcd.off=reset";

pub struct Firecracker {
    config: Config,
    consoles: Arc<Consoles>,
    processes: HostProcesses,
    needs_kvm: bool,
    /// Fires when the driver is dropped.
    closing: Cancel,
}

impl Firecracker {
    /// Does not look at the host yet. `uids` are those of VMs, if the daemon is root. Fails with
    /// the error of an eventfd (EMFILE, ENFILE).
    pub fn new(config: Config, uids: Range<u32>, consoles: Arc<Consoles>) -> Result<Self> {
        let name = |path: &Path| {
            path.file_name()
                .map(|n| n.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        let names = [name(&config.binary), name(&config.jailer)];
        let is_program = move |executable: &Path| {
            let executable = name(executable);
            // A program with a version in its name, or one that was replaced while it runs, counts
            // as well. A jailer is about to become Firecracker.
            names.contains(&executable)
                || executable.starts_with("firecracker")
                || executable.starts_with("jailer")
        };
        let processes = HostProcesses::try_new(consoles.clone(), uids, Box::new(is_program))?;
        let closing = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        Ok(Self {
            config,
            consoles,
            processes,
            needs_kvm: true,
            closing,
        })
    }

    /// Returns the groups that a VMM without a jail needs to open its devices. A jailed one has
    /// nodes of its own.
    fn device_groups(&self, spec: &VmmSpec) -> Result<Vec<u32>> {
        let mut groups = Vec::new();
        for device in [KVM, TUN].into_iter().filter(|_| self.needs_kvm) {
            let access = if self.is_jailed(spec) {
                devices::exists(device).map(|()| Vec::new())
            } else {
                devices::access_as(device, spec.credentials.is_some())
            };
            let refused = |why| {
                Error::new(Kind::Unsupported, format!("start the VMM: {why}"))
                    .hint("run fcctl doctor")
            };
            groups.extend(access.map_err(refused)?);
        }
        groups.dedup();
        Ok(groups)
    }

    /// Adds to the error of a failed start if the jailer is not one, or is from another release.
    fn with_cause(&self, e: Error, spec: &VmmSpec, cancel: &Cancel) -> Error {
        if e.kind() == Kind::Cancelled || !self.is_jailed(spec) {
            return e;
        }
        let found = jail::programs(&self.config).and_then(|programs| {
            version::require_same_release(&programs.jailer, &programs.firecracker, cancel)
        });
        match found {
            Err(cause) if cause.kind() == Kind::Unsupported => {
                let hint = cause.hint_text().unwrap_or(version::INSTALL).to_owned();
                Error::new(Kind::Unsupported, format!("{e}; {cause}")).hint(hint)
            }
            _ => e,
        }
    }

    fn is_jailed(&self, spec: &VmmSpec) -> bool {
        self.config.jail && spec.credentials.is_some()
    }

    /// True if this daemon's VMMs run in jails, which only root can make.
    fn jails_all(&self) -> bool {
        self.config.jail && rustix::process::geteuid().is_root()
    }

    /// For a fake Firecracker.
    #[cfg(feature = "fakes")]
    pub fn without_kvm(mut self) -> Self {
        self.needs_kvm = false;
        self
    }

    fn spawn(&self, spec: &VmmSpec) -> Result<Spawned> {
        let groups = self.device_groups(spec)?;
        let dir = open_dir(&spec.dir)?;
        let own_args =
            ["--api-sock", API_SOCKET, "--level", "Error", "--show-level"].map(OsString::from);
        let output = run_dir::open_log(&dir, spec)?;
        let env = vec![
            ("PATH".into(), PATH.into()),
            ("LC_ALL".into(), "C.UTF-8".into()),
        ];
        let (place, files, spawn) = match spec.credentials.filter(|_| self.is_jailed(spec)) {
            Some(owner) => {
                let programs = jail::programs(&self.config)?;
                let limits = jail::limits(&self.config, spec)?;
                let place = jail::make(spec, &programs)?;
                let mut args = jail::args(spec, &programs, owner, &limits);
                args.extend(own_args);
                // The jailer changes its uid on its own.
                let spawn = Spawn {
                    program: programs.jailer,
                    args,
                    env,
                    cwd: "/".into(),
                    output: Some(output),
                    credentials: None,
                    groups: Vec::new(),
                };
                (place, Files::jailed(spec), spawn)
            }
            None => {
                let place = run_dir::make(
                    &dir,
                    &[
                        API_SOCKET,
                        CONSOLE_PIPE,
                        METRICS_PIPE,
                        vsock::SOCKET,
                        jail::MEMORY,
                        jail::DEVICES,
                    ],
                    spec.credentials,
                )?;
                if let Some(saved) = &spec.saved {
                    save::link(
                        &place,
                        SaveTo {
                            memory: &saved.memory,
                            devices: &saved.devices,
                        },
                    )?;
                }
                let args = ["--id".into(), spec.tag.as_str().into()]
                    .into_iter()
                    .chain(own_args)
                    .collect();
                let cwd = spec.dir.join(run_dir::RUN_DIR);
                let program =
                    program::locate(&self.config.binary).map_err(version::install_if_missing)?;
                let spawn = Spawn {
                    program,
                    args,
                    env,
                    cwd,
                    output: Some(output),
                    credentials: spec.credentials,
                    groups,
                };
                (place, Files::bare(spec)?, spawn)
            }
        };
        for name in [CONSOLE_PIPE, METRICS_PIPE] {
            make_pipe(&place, name, spec.credentials)?;
        }
        // With the jailer's --new-pid-ns, the VMM would not be our child, and its exit status could
        // not be read.
        let process = if self.is_jailed(spec) {
            process::spawn_in_own_pids(spawn)?
        } else {
            process::spawn(spawn)?
        };
        Ok(Spawned {
            process,
            place,
            files,
        })
    }

    /// Configures a VMM that has just been spawned, and runs its guest.
    fn configure_and_run(
        &self,
        spec: &VmmSpec,
        spawned: &Spawned,
        deadline: Deadline<'_>,
    ) -> Result<Running> {
        let Spawned {
            process,
            place,
            files,
        } = spawned;
        let exited = || run_dir::exited_early("firecracker", spec, process);
        let socket = dial::connect(place, API_SOCKET, process, deadline)?.ok_or_else(exited)?;
        let configure = || -> Result<Running> {
            let (mut vmm, instance) = PreBoot::open(socket, deadline)?;
            version::require(&instance.vmm_version)?;
            let ssh_addr = match &files.saved {
                None => {
                    let ssh_addr = configure(&mut vmm, spec, files)?;
                    vmm.start()?;
                    ssh_addr
                }
                Some((memory, devices)) => load(vmm, spec, memory, devices)?,
            };
            // Only now, because reading the kernel must not count against the guest's rate.
            jail::limit_io(self.config.limits, spec)?;
            // The VMM has the pipe open by now, and the guest's first output waits in it.
            self.read_console(spec, place, format!("started {}", spec.tag))?;
            Ok(Running {
                identity: process.identity().clone(),
                ssh_addr,
            })
        };
        // After a refused load the VMM exits, but its refusal is the better error.
        let says_why = |e: &Error| e.kind() == Kind::Cancelled || files.saved.is_some();
        configure().map_err(|e| {
            if !says_why(&e) && run_dir::is_exiting(process) {
                exited()
            } else {
                e
            }
        })
    }

    fn read_console(&self, spec: &VmmSpec, run: &OwnedFd, mark: String) -> Result<()> {
        let from = open_pipe(run, CONSOLE_PIPE)?;
        self.consoles.attach(Attach {
            dir: spec.dir.clone(),
            bytes_max: spec.console_bytes_max,
            from,
            mark,
        })
    }
}

/// A VMM that runs no guest yet.
struct Spawned {
    process: Process,
    /// The directory with its socket and console.
    place: OwnedFd,
    files: Files,
}

/// The paths of a VMM's files as the VMM sees them.
struct Files {
    kernel: String,
    initrd: String,
    disk: String,
    seed: String,
    work: Option<String>,
    /// The memory and the devices of a saved guest.
    saved: Option<(String, String)>,
}

impl Files {
    fn bare(spec: &VmmSpec) -> Result<Self> {
        let text = |path: &Path| text(path).map(str::to_owned);
        Ok(Self {
            kernel: text(&spec.kernel)?,
            initrd: text(&spec.initrd)?,
            disk: text(&spec.disk)?,
            seed: text(&spec.seed)?,
            work: spec.work_disk.as_deref().map(text).transpose()?,
            // They are linked into the VMM's working directory.
            saved: spec
                .saved
                .as_ref()
                .map(|_| (jail::MEMORY.to_owned(), jail::DEVICES.to_owned())),
        })
    }

    fn jailed(spec: &VmmSpec) -> Self {
        let at = |name: &str| format!("/{name}");
        Self {
            kernel: at(jail::KERNEL),
            initrd: at(jail::INITRD),
            disk: at(jail::DISK),
            seed: at(jail::SEED),
            work: spec.work_disk.as_ref().map(|_| at(jail::WORK)),
            saved: spec
                .saved
                .as_ref()
                .map(|_| (at(jail::MEMORY), at(jail::DEVICES))),
        }
    }
}

/// Configures a guest that boots. The guest numbers its disks in the order in which they are added.
fn configure(vmm: &mut PreBoot<'_>, spec: &VmmSpec, files: &Files) -> Result<std::net::SocketAddr> {
    let (name, address) = tap(spec)?;
    let GuestNetwork::Tap { mac, .. } = &spec.network else {
        return Err(Error::internal("the guest has no tap"));
    };
    if spec.disk_format == DiskFormat::Qcow2 {
        return Err(Error::new(
            Kind::Unsupported,
            "start the VMM: firecracker cannot read this VM's qcow2 disk",
        )
        .hint("set driver = \"qemu\" under [vmm] for it, or create a new VM"));
    }
    vmm.machine(&MachineConfig {
        vcpu_count: spec.vcpus,
        mem_size_mib: spec.mem_mib,
    })?;
    let boot_args = format!("{} {KERNEL_ARGS}", spec.boot_args.trim());
    vmm.boot_source(&BootSource {
        kernel_image_path: &files.kernel,
        initrd_path: &files.initrd,
        boot_args: &boot_args,
    })?;
    let work = files.work.as_deref().map(|path| ("work", path));
    let rates = &spec.rates;
    let limiter = RateLimiter::new(rates.disk_bytes_per_s, rates.disk_ops_per_s);
    for (drive_id, path_on_host) in [("root", files.disk.as_str()), ("seed", &files.seed)]
        .into_iter()
        .chain(work)
    {
        vmm.drive(&Drive {
            drive_id,
            path_on_host,
            is_root_device: drive_id == "root",
            is_read_only: drive_id == "seed",
            cache_type: CacheType::Writeback,
            rate_limiter: limiter.filter(|_| drive_id != "seed"),
        })?;
    }
    vmm.network(&NetworkInterface {
        iface_id: INTERFACE,
        host_dev_name: name,
        guest_mac: mac,
        rx_rate_limiter: RateLimiter::new(rates.net_rx_bytes_per_s, None),
        tx_rate_limiter: RateLimiter::new(rates.net_tx_bytes_per_s, None),
    })?;
    vmm.entropy()?;
    vmm.vsock(&Vsock {
        guest_cid: vsock::GUEST_CID,
        uds_path: vsock::SOCKET,
    })?;
    if spec.has_balloon {
        vmm.balloon()?;
    }
    vmm.serial(CONSOLE_PIPE)?;
    vmm.metrics(METRICS_PIPE)?;
    Ok(api::ssh_addr(address))
}

/// Loads a saved guest, whose disks and console keep their paths.
fn load(
    mut vmm: PreBoot<'_>,
    spec: &VmmSpec,
    memory: &str,
    devices: &str,
) -> Result<std::net::SocketAddr> {
    let (tap, address) = tap(spec)?;
    vmm.serial(CONSOLE_PIPE)?;
    vmm.metrics(METRICS_PIPE)?;
    let mut vmm = vmm.load(&LoadSnapshot::new(
        devices,
        memory,
        &[NetworkOverride {
            iface_id: INTERFACE,
            host_dev_name: tap,
        }],
    ))?;
    // The saved state contains the rates of that time.
    limit(&mut vmm, spec)?;
    Ok(api::ssh_addr(address))
}

fn limit(vmm: &mut Booted<'_>, spec: &VmmSpec) -> Result<()> {
    let rates = &spec.rates;
    for (disk, _) in spec.disks() {
        vmm.drive_rates(disk, rates.disk_bytes_per_s, rates.disk_ops_per_s)?;
    }
    vmm.network_rates(
        INTERFACE,
        rates.net_rx_bytes_per_s,
        rates.net_tx_bytes_per_s,
    )
}

fn tap(spec: &VmmSpec) -> Result<(&str, std::net::Ipv4Addr)> {
    match &spec.network {
        GuestNetwork::Tap { name, address, .. } => Ok((name, *address)),
        GuestNetwork::UserMode { .. } => Err(Error::new(
            Kind::Unsupported,
            "start the VMM: firecracker has no user-mode network",
        )
        .hint("set driver = \"bridge\" under [network], or driver = \"qemu\" under [vmm]")),
    }
}

fn make_pipe(run: &OwnedFd, name: &str, credentials: Option<Credentials>) -> Result<()> {
    let io = |e: rustix::io::Errno| {
        Error::io(
            format!("create a pipe for the {name}"),
            std::io::Error::from(e),
        )
    };
    rustix::fs::mknodat(run, name, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).map_err(io)?;
    if let Some(Credentials { uid, gid }) = credentials {
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(
            run,
            name,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            flags,
        )
        .map_err(io)?;
    }
    Ok(())
}

/// Opens a pipe for reading. The VMM's uid owns the directory by now, so anything but a pipe is
/// rejected.
fn open_pipe(run: &OwnedFd, name: &str) -> Result<File> {
    let doing = format!("open the pipe for the {name}");
    let file = open_at(run, name, OFlags::RDONLY | OFlags::NONBLOCK, 0)
        .map_err(|e| Error::io(doing.clone(), e))?;
    let stat = rustix::fs::fstat(file.as_fd())
        .map_err(|e| Error::io(doing.clone(), std::io::Error::from(e)))?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo {
        return Ok(file);
    }
    Err(Error::new(
        Kind::Denied,
        format!("{doing}: it is not a pipe"),
    ))
}

impl Drop for Firecracker {
    fn drop(&mut self) {
        self.closing.cancel(CancelCause::Finished);
    }
}

impl Driver for Firecracker {
    fn describe(&self) -> String {
        // A saved guest contains the paths of its disks, which depend on the jail.
        if self.jails_all() {
            "firecracker (kvm, jailed)"
        } else {
            "firecracker (kvm)"
        }
        .to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        let is_jailed = self.jails_all();
        Capabilities {
            limits_network: true,
            reads_qcow2: false,
            has_keyboard: true,
            // The jailer makes them (src/jailer/src/env.rs, `mknod_and_own_dev`).
            makes_device_nodes: is_jailed,
            leaves_remains: is_jailed,
        }
    }

    /// Does nothing, because what Firecracker needs is known without trying. See `checks`.
    fn warm_up(&self, _kernel: &Path, _cancel: &Cancel) {}

    fn consoles(&self) -> &Consoles {
        &self.consoles
    }

    fn processes(&self) -> &dyn Processes {
        &self.processes
    }

    fn start(
        &self,
        spec: &VmmSpec,
        cancel: &Cancel,
        spawned: &mut dyn FnMut(&Identity),
    ) -> Result<Running> {
        if cancel.is_cancelled() {
            return Err(crate::host::wait::cancelled("start the VMM", cancel));
        }
        let spawned_now = self.spawn(spec)?;
        let process = &spawned_now.process;
        // From here on, an error, a cancel or a panic must not leave a process.
        let mut undo = crate::undo::Undo::new();
        undo.push("kill the VMM", || {
            self.processes
                .kill(process.identity(), Instant::now() + KILL_DEADLINE)
        });
        spawned(process.identity());
        let within = if spec.saved.is_some() {
            SAVE_DEADLINE
        } else {
            START_DEADLINE
        };
        let running = {
            let _blocking = region(Rank::VmmApi);
            self.configure_and_run(
                spec,
                &spawned_now,
                Deadline {
                    at: Instant::now() + within,
                    cancel,
                },
            )
        }
        .map_err(|e| self.with_cause(e, spec, cancel))?;
        undo.commit();
        Ok(running)
    }

    fn adopt(&self, spec: &VmmSpec, identity: &Identity) -> Result<Running> {
        let doing = "adopt the VMM";
        let gone = || Error::new(Kind::VmmFailed, format!("{doing}: it has exited"));
        let process = self
            .processes
            .verify(identity, spec.tag.as_str())?
            .ok_or_else(gone)?;
        let GuestNetwork::Tap { address, .. } = spec.network else {
            return Err(Error::new(
                Kind::VmmFailed,
                format!("{doing}: it has no tap"),
            ));
        };
        let _blocking = region(Rank::VmmApi);
        let cancel = Cancel::try_new().map_err(|e| Error::io(doing, e))?;
        let mark = "reconnected; output since fcd stopped may be lost".to_owned();
        let deadline = Deadline {
            at: Instant::now() + ANSWER_DEADLINE,
            cancel: &cancel,
        };
        drop(booted(&process, deadline, doing)?);
        self.read_console(spec, &place(&process, doing)?, mark)?;
        Ok(Running {
            identity: identity.clone(),
            ssh_addr: api::ssh_addr(address),
        })
    }

    fn watch_guest(
        &self,
        dir: &Path,
        identity: &Identity,
        on_event: Box<dyn Fn(GuestEvent) + Send>,
    ) -> Result<()> {
        let Some(process) = Process::open(identity)? else {
            return Ok(());
        };
        let monitor = Monitor {
            process,
            dir: dir.to_owned(),
            closing: self.closing.clone(),
            on_event,
        };
        crate::host::thread::spawn(&format!("vmm-{}", identity.pid), move || monitor.run())
            .map(drop)
    }

    fn vm(&self, at: VmRef) -> Result<Box<dyn Vm + '_>> {
        let limits = self.config.limits;
        Ok(Box::new(FirecrackerVm { at, limits }))
    }

    fn can_load(&self, driver: &str, elsewhere: bool) -> Result<()> {
        let doing = "restore a saved guest";
        if !driver.starts_with("firecracker") {
            return Err(Error::new(
                Kind::Unsupported,
                format!("{doing}: it was saved by {driver}, but VMs now run on firecracker"),
            )
            .hint("set driver = \"qemu\" under [vmm]"));
        }
        if driver != self.describe() {
            let text = format!(
                "{doing}: it was saved by {driver}, but VMs now run on {}",
                self.describe()
            );
            return Err(Error::new(Kind::Unsupported, text)
                .hint("set jail under [firecracker] back to its former value"));
        }
        if elsewhere && !self.jails_all() {
            // The saved state contains the paths of the disks, and they cannot be overridden.
            return Err(Error::new(
                Kind::Unsupported,
                format!("{doing} in another VM: without a jail it would use the other VM's disks"),
            )
            .hint("set jail = true under [firecracker], as root"));
        }
        Ok(())
    }

    fn clear(&self, dir: &Path, tag: &Tag) -> Result<()> {
        jail::clear(dir, tag)
    }

    fn remains(&self, vms: &Path, install: &str) -> Result<Vec<String>> {
        Ok(jail::remains(vms, install))
    }

    fn checks(&self) -> Vec<Check> {
        checks::checks(&self.config)
    }
}
