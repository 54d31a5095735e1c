//! The driver for Firecracker, which uses KVM, a tap and the jailer, and has an API on a Unix
//! socket.
//!
//! # Starting
//!
//! The client speaks HTTP over the API socket, one connection per conversation. The requests before
//! the guest starts (`PreBoot`) and afterwards (`Booted`) belong to two types, so a call in the
//! wrong phase does not compile. `refusal.rs` turns each known refusal into a kind and a hint.
//! Firecracker needs a raw disk and a tap, and therefore the bridge.
//!
//! Each VMM runs in the VM's `run/`, which holds its API socket and the pipe for the guest's serial
//! console. Firecracker also opens that pipe for reading and drops output that does not fit, so an
//! unread log never blocks a guest. fcd reaches the socket of a running VMM through
//! `/proc/<pid>/cwd`, which works with and without a jail.
//!
//! # The jail
//!
//! The jail is `jail/<program>/<tag>/root` below the VM's directory. It is created for each start
//! and contains hard links to the files that the VMM opens. The VMM runs under the VM's uid and gid
//! and in the control group `fcd-<install>/<tag>`. The jail and the control group are one resource
//! in the ledger, and fcd removes both. If a controller is missing, the start fails, unless `limits
//! = "best-effort"`.
//!
//! The jail does not have its own network namespace. Firecracker opens its tap by name, so the tap
//! would have to be in that namespace and could not be on the bridge. The jail has its own PID
//! namespace, in which the VMM is the first process. The daemon creates the namespace in a thread
//! that only starts the jailer (`host/process/spawn.rs`): with the jailer's `--new-pid-ns` the VMM
//! would not be the daemon's child, so the daemon could not read its exit status. The first process
//! of a PID namespace ignores every signal that it does not handle, except SIGKILL.
//!
//! # Limits
//!
//! Rates are token buckets per drive and interface. A bucket holds one second's worth, but at least
//! 2 MiB. A guest that controls its VMM is not bound by them, so the control group also limits the
//! disks (`io.max`), at twice the rate. At the same rate the kernel would throttle first and stall
//! all devices, because one thread serves them. The jailer accepts no value with a `=`, so fcd
//! writes `io.max` itself after the guest has started.
//!
//! # Memory
//!
//! Every VM whose image has the balloon driver (`guest_version` 2) has a balloon. The guest reports
//! freed pages, and the VMM returns them to the host. Firecracker's metrics are differences since
//! the last report, so they cannot feed `vm stats`, whose counters survive a restart of the daemon.
//! The VMM writes the metrics into a pipe, which fcd reads only on request.
//!
//! A snapshot of a booted guest is a `Diff`, which contains the pages that the guest has touched.
//! It is `Full` if some of the guest's memory is in swap, which a `Diff` would miss. It is also
//! `Full` for a restored guest, because some of that guest's pages are in another file.
//!
//! # vsock
//!
//! Every VM has a vsock. Its socket is in the VMM's working directory. `vm.connect` passes the
//! connected descriptor to the caller, so no thread of the daemon copies data. Before version 1.17,
//! Firecracker holds back data to the guest after a resume until the guest's driver has handled the
//! end of its old streams, and only a save notifies the driver. So a resume begins a save with an
//! impossible path. A resume of a running guest does nothing.
//!
//! # Stopping
//!
//! If a guest has not synced after half of the grace period, or cannot be reached over SSH, fcd
//! presses Ctrl-Alt-Del if the guest's init handles it (`guest_version` 3). Guests of older images
//! would be reset.
//!
//! # Tests
//!
//! `it` `firecracker::` runs against `tests/fake/firecracker/`, which answers, refuses, hangs and
//! dies like a recorded Firecracker. With `FCD_FIRECRACKER`, `e2e` `firecracker::` runs the state
//! machine of a real Firecracker on this host's `/dev/kvm`, and real guests with nested KVM in a
//! test host.

pub(in crate::vmm) mod api;
mod checks;
mod configure;
mod gone;
mod http;
pub(in crate::vmm) mod incoming;
mod jail;
pub(in crate::vmm) mod metrics;
mod monitor;
mod pipes;
mod rates;
pub(in crate::vmm) mod refusal;
mod running;
mod save;
mod spawn;
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
    Capabilities, Driver, GuestEvent, GuestNetwork, Identity, Running, Vm, VmRef, VmmSpec,
};
use crate::api::daemon::Check;
use crate::config::Firecracker as Config;
use crate::error::{Error, Kind, Result};
use crate::host::process::Process;
use crate::ids::Tag;
use crate::locks::{Cancel, CancelCause, Rank, region};
use crate::sched::Instant;
use api::PreBoot;
use configure::{configure, load};
use monitor::Monitor;
use pipes::{CONSOLE_PIPE, open_pipe};
use running::{booted, place};
use spawn::{Spawned, is_jailed, spawn};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vm::FirecrackerVm;

const API_SOCKET: &str = "api.sock";
/// How long a VMM may take from its start to the first instruction of its guest. An idle host needs
/// a fraction of a second.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long a running VMM may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// How long a VMM may take to write a guest's memory to the disk or to read it.
const SAVE_DEADLINE: Duration = Duration::from_secs(600);
/// How long a VMM whose start failed may take to exit after it was killed.
const KILL_DEADLINE: Duration = Duration::from_secs(30);

pub struct Firecracker {
    config: Config,
    consoles: Arc<Consoles>,
    processes: HostProcesses,
    needs_kvm: bool,
    /// Fires when the driver is dropped.
    closing: Cancel,
}

impl Firecracker {
    /// Creates the driver without checking the host. `uids` are the uids of VMs if the daemon is
    /// root. Fails with the eventfd's error (EMFILE, ENFILE).
    pub fn new(config: Config, uids: Range<u32>, consoles: Arc<Consoles>) -> Result<Self> {
        let name = |path: &Path| {
            path.file_name()
                .map(|n| n.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        let names = [name(&config.binary), name(&config.jailer)];
        let is_program = move |executable: &Path| {
            let executable = name(executable);
            // A program with a version in its name, or one whose file was replaced while it runs,
            // also counts. So does a jailer, which is about to become Firecracker.
            names.contains(&executable)
                || executable.starts_with("firecracker")
                || executable.starts_with("jailer")
        };
        let processes = HostProcesses::try_new(consoles.clone(), uids, Box::new(is_program))?;
        let closing = Cancel::try_new().map_err(|e| Error::io("create an eventfd", e))?;
        Ok(Self {
            config,
            consoles,
            processes,
            needs_kvm: true,
            closing,
        })
    }

    /// Adds the cause to the error of a failed start if the jailer or Firecracker is not suitable
    /// for a jail, or if they are from different releases.
    fn with_cause(&self, e: Error, spec: &VmmSpec, cancel: &Cancel) -> Error {
        if e.kind() == Kind::Cancelled || !is_jailed(&self.config, spec) {
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

    /// True if this daemon's VMMs run in jails, which only root can create.
    fn jails_all(&self) -> bool {
        self.config.jail && rustix::process::geteuid().is_root()
    }

    /// Allows hosts without KVM, for a fake Firecracker.
    #[cfg(feature = "fakes")]
    pub fn without_kvm(mut self) -> Self {
        self.needs_kvm = false;
        self
    }

    /// Configures a VMM that has just been spawned, and starts or restores its guest.
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
                Some(saved) => load(vmm, spec, saved)?,
            };
            // Set this limit last, because reading the kernel must not count against the guest's
            // rate.
            jail::limit_io(self.config.limits, spec)?;
            // The VMM has already opened the pipe, which holds the guest's first output.
            self.read_console(spec, place, format!("started {}", spec.tag))?;
            Ok(Running {
                identity: process.identity().clone(),
                ssh_addr,
            })
        };
        // A VMM that rejects a load also exits, but the error of its rejection is more useful than
        // its exit status.
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

impl Drop for Firecracker {
    fn drop(&mut self) {
        self.closing.cancel(CancelCause::Finished);
    }
}

impl Driver for Firecracker {
    fn describe(&self) -> String {
        // Name the jail, because a saved guest contains the paths of its disks, which depend on the
        // jail.
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
            // The jailer creates the nodes (src/jailer/src/env.rs, `mknod_and_own_dev`).
            makes_device_nodes: is_jailed,
            leaves_remains: is_jailed,
        }
    }

    /// Does nothing, because `checks` finds out what Firecracker needs without a probe.
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
        let vmm = spawn(&self.config, spec, self.needs_kvm)?;
        let identity = vmm.process.identity();
        // From here on, an error, a cancel or a panic must not leave a process behind.
        let mut undo = crate::undo::Undo::new();
        undo.push("kill the VMM", || {
            self.processes
                .kill(identity, Instant::now() + KILL_DEADLINE)
        });
        spawned(identity);
        let within = if spec.saved.is_some() {
            SAVE_DEADLINE
        } else {
            START_DEADLINE
        };
        let running = {
            let _blocking = region(Rank::VmmApi);
            self.configure_and_run(
                spec,
                &vmm,
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
