//! The driver for QEMU. It uses KVM if KVM runs a stock kernel, and software emulation otherwise.
//! Guests have a user-mode network or a tap, and fcd controls QEMU with QMP.
//!
//! In user mode each guest has the address 10.0.2.15 on a private network. 10.0.2.2 is the gateway
//! and the host, and 10.0.2.3 is the name server. Connections from the guest to 10.0.2.2 reach the
//! host's loopback under the VMM's uid. QEMU cannot turn off only this access, so `isolated` in the
//! configuration cuts the guest off from everything but its SSH port.
//!
//! With IPv6 the guest has the address fec0::15, and connections to fec0::2 reach the host's `::1`.
//! An isolated guest has no IPv6.

mod accel;
pub(in crate::vmm) mod argv;
mod checks;
pub(in crate::vmm) mod forward;
pub(in crate::vmm) mod incoming;
mod monitor;
mod pause;
mod qmp;
mod save;
#[cfg(test)]
mod scripted;
mod throttle;
mod tsc;
mod vm;

use super::console::{Attach, Consoles};
use super::devices;
use super::dial::{self, Deadline};
use super::processes::{HostProcesses, Processes};
use super::run_dir::{self, RUN_DIR};
use super::{
    Capabilities, Driver, GuestEvent, GuestNetwork, Identity, Running, Vm, VmRef, VmmSpec,
};
use crate::api::daemon::Check;
use crate::config::Qemu as Config;
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::command::PATH;
use crate::host::fs::open_dir;
use crate::host::process::{self, Process, Spawn};
use crate::host::program;
use crate::host::reach;
use crate::locks::{Cancel, CancelCause, Rank, region};
use crate::sched::Instant;
pub use accel::try_kvm;
use accel::{Picked, Picker};
use monitor::Monitor;
use qmp::Qmp;
use serde_json::json;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vm::QemuVm;

/// How long a VMM may take from its start to the first instruction of its guest. An idle host needs
/// a fraction of a second.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long a running VMM may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// How long a VMM whose start failed may take to exit after it was killed.
const KILL_DEADLINE: Duration = Duration::from_secs(30);

pub struct Qemu {
    config: Config,
    picker: Picker,
    consoles: Arc<Consoles>,
    processes: HostProcesses,
    /// Fires when the driver is dropped.
    closing: Cancel,
}

impl Qemu {
    /// Creates the driver without checking the host. Fails if no eventfd can be created (EMFILE,
    /// ENFILE).
    pub fn new(config: Config, consoles: Arc<Consoles>) -> Result<Self> {
        let picker = Picker::new(config.clone());
        let (uids, of_driver) = (config.uids(), config.clone());
        let processes = HostProcesses::try_new(
            consoles.clone(),
            uids,
            Box::new(move |executable| is_qemu(&of_driver, executable)),
        )?;
        let closing = Cancel::try_new().map_err(|e| Error::io("create an eventfd", e))?;
        Ok(Self {
            config,
            picker,
            consoles,
            processes,
            closing,
        })
    }

    fn spawn(&self, spec: &VmmSpec, picked: &Picked) -> Result<(Process, OwnedFd)> {
        if let Some(Credentials { uid, .. }) = spec.credentials {
            // The directory itself is open to the VMM's group.
            can_reach(uid, &spec.dir, "the state directory", reach::state_dir_fix)?;
            if let Ok(program) = program::locate(&self.config.binary) {
                can_reach(uid, &program, "QEMU", checks::binary_fix)?;
            }
        }
        let dir = open_dir(&spec.dir)?;
        let run = run_dir::make(
            &dir,
            &[argv::QMP_SOCKET, argv::CONTROL_SOCKET, argv::CONSOLE_SOCKET],
            spec.credentials,
        )?;
        let output = run_dir::open_log(&dir, spec)?;
        let groups = picked
            .groups
            .iter()
            .copied()
            .chain(tap_groups(spec)?)
            .collect();
        let process = process::spawn(Spawn {
            program: program::locate(&self.config.binary)?,
            args: argv::argv(spec, &picked.platform, self.config.isolated)?,
            env: vec![
                ("PATH".into(), PATH.into()),
                ("LC_ALL".into(), "C.UTF-8".into()),
            ],
            cwd: spec.dir.join(RUN_DIR),
            output: Some(output),
            credentials: spec.credentials,
            groups,
        })?;
        Ok((process, run))
    }

    /// Connects to a VMM that has just been spawned, and starts or restores its guest. The console
    /// is attached first, so that none of the guest's output is lost.
    fn configure_and_run(
        &self,
        spec: &VmmSpec,
        process: &Process,
        run: &OwnedFd,
        deadline: Deadline<'_>,
    ) -> Result<Running> {
        let exited = || run_dir::exited_early("qemu", spec, process);
        let console =
            dial::connect(run, argv::CONSOLE_SOCKET, process, deadline)?.ok_or_else(exited)?;
        let control =
            dial::connect(run, argv::QMP_SOCKET, process, deadline)?.ok_or_else(exited)?;
        let mark = format!("started {}", spec.tag);
        self.consoles.attach(Attach {
            dir: spec.dir.clone(),
            bytes_max: spec.console_bytes_max,
            from: OwnedFd::from(console).into(),
            mark,
        })?;
        let ask = || -> Result<Running> {
            let mut qmp = Qmp::open(control, deadline)?;
            let ssh_addr = ssh_addr(spec, &mut qmp)?;
            if let Some(saved) = &spec.saved {
                save::load(&mut qmp, &saved.memory)?;
            }
            if !spec.rates.is_empty() {
                throttle::set(&mut qmp, spec)?;
            }
            qmp.execute("cont", &json!({}))?;
            Ok(Running {
                identity: process.identity().clone(),
                ssh_addr,
            })
        };
        ask().map_err(|e| {
            if e.kind() != Kind::Cancelled && run_dir::is_exiting(process) {
                exited()
            } else {
                e
            }
        })
    }
}

/// Returns the groups that QEMU needs to open its tap device, or none in user mode.
fn tap_groups(spec: &VmmSpec) -> Result<Vec<u32>> {
    if matches!(spec.network, GuestNetwork::UserMode { .. }) {
        return Ok(Vec::new());
    }
    devices::access_as(devices::TUN, spec.credentials.is_some()).map_err(|why| {
        Error::new(Kind::Unsupported, format!("start the VMM: {why}")).hint("run fcctl doctor")
    })
}

/// Checks that `uid` can reach this path. QEMU itself would only report that it cannot open a file.
fn can_reach(
    uid: u32,
    path: &Path,
    what: &str,
    fix: fn(&dyn std::fmt::Display) -> String,
) -> Result<()> {
    let Some(closed) = reach::closed_to_others(path) else {
        return Ok(());
    };
    let closed = closed.display();
    let message =
        format!("start the VMM: its uid {uid} may not enter {closed}, which contains {what}");
    Err(Error::new(Kind::Host, message).hint(fix(&closed)))
}

/// Returns how long a start may take. A saved guest gets more time, because its memory has to be
/// read first.
fn start_deadline(spec: &VmmSpec) -> Duration {
    if spec.saved.is_some() {
        save::DEADLINE
    } else {
        START_DEADLINE
    }
}

/// Returns the address of the guest's SSH server. On a tap this is the guest's own address. In user
/// mode it is a port of the host that QEMU picked.
fn ssh_addr(spec: &VmmSpec, qmp: &mut Qmp<'_>) -> Result<SocketAddr> {
    let published = match &spec.network {
        GuestNetwork::Tap { address, .. } => {
            return Ok(SocketAddr::from((*address, argv::GUEST_SSH_PORT)));
        }
        GuestNetwork::UserMode { ports, .. } => ports,
    };
    match forward::ssh_port(&forward::list(qmp)?, published) {
        Some(port) => Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        None => Err(Error::new(
            Kind::VmmFailed,
            "find the guest's SSH port: the VMM forwards none",
        )),
    }
}

fn is_qemu(config: &Config, executable: &Path) -> bool {
    let name = |p: &Path| {
        p.file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    // A wrapper script runs another executable, with QEMU in its name.
    name(executable) == name(&config.binary) || name(executable).contains("qemu")
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.closing.cancel(CancelCause::Finished);
    }
}

impl Driver for Qemu {
    fn describe(&self) -> String {
        self.picker
            .known()
            .map_or_else(|| "qemu".to_owned(), |picked| picked.platform.to_string())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            limits_network: false,
            reads_qcow2: true,
            // The `microvm` board has no keyboard, and QEMU cannot signal a guest in another way
            // without an agent in the guest.
            has_keyboard: false,
            makes_device_nodes: false,
            leaves_remains: false,
        }
    }

    fn warm_up(&self, kernel: &Path, cancel: &Cancel) {
        if let Err(e) = self.picker.pick(kernel, cancel) {
            log::debug!("{e}");
        }
    }

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
        let picked = self.picker.pick(&spec.kernel, cancel)?;
        if let Some(saved) = &spec.saved {
            save::require_same(&saved.driver, &picked.platform.to_string())?;
        }
        if cancel.is_cancelled() {
            return Err(crate::host::wait::cancelled("start the VMM", cancel));
        }
        let (process, run) = self.spawn(spec, &picked)?;
        // From here on, an error, a cancel or a panic must not leave a process behind.
        let mut undo = crate::undo::Undo::new();
        undo.push("kill the VMM", || {
            self.processes
                .kill(process.identity(), Instant::now() + KILL_DEADLINE)
        });
        spawned(process.identity());
        let running = {
            let _blocking = region(Rank::VmmApi);
            self.configure_and_run(
                spec,
                &process,
                &run,
                Deadline {
                    at: Instant::now() + start_deadline(spec),
                    cancel,
                },
            )?
        };
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
        let _blocking = region(Rank::VmmApi);
        let cancel = Cancel::try_new().map_err(|e| Error::io(doing, e))?;
        let deadline = Deadline {
            at: Instant::now() + ANSWER_DEADLINE,
            cancel: &cancel,
        };
        let run = run_dir::open(&spec.dir, doing)?;
        let console =
            dial::connect(&run, argv::CONSOLE_SOCKET, &process, deadline)?.ok_or_else(gone)?;
        let mark = "reconnected; output since fcd stopped is lost".to_owned();
        self.consoles.attach(Attach {
            dir: spec.dir.clone(),
            bytes_max: spec.console_bytes_max,
            from: OwnedFd::from(console).into(),
            mark,
        })?;
        let control =
            dial::connect(&run, argv::CONTROL_SOCKET, &process, deadline)?.ok_or_else(gone)?;
        let mut qmp = Qmp::open(control, deadline).map_err(|e| e.context(doing))?;
        let ssh_addr = ssh_addr(spec, &mut qmp).map_err(|e| e.context(doing))?;
        Ok(Running {
            identity: identity.clone(),
            ssh_addr,
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
        let note = self.processes.notes.open(identity)?;
        let monitor = Monitor {
            process,
            dir: dir.to_owned(),
            closing: self.closing.clone(),
            on_event,
            note,
        };
        crate::host::thread::spawn(&format!("vmm-{}", identity.pid), move || monitor.run())
            .map(drop)
    }

    fn vm(&self, at: VmRef) -> Result<Box<dyn Vm + '_>> {
        Ok(Box::new(QemuVm { at }))
    }

    fn can_load(&self, driver: &str, _elsewhere: bool) -> Result<()> {
        match self.picker.known() {
            Some(picked) => save::require_same(driver, &picked.platform.to_string()),
            None if driver.starts_with("qemu") => Ok(()),
            None => save::require_same(driver, "qemu"),
        }
    }

    fn checks(&self) -> Vec<Check> {
        checks::checks(&self.config, self.picker.known().as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_of_exiting_qemu_fails_with_its_output() {
        let temp = tempfile::tempdir().unwrap();
        // This program is not QEMU. It rejects its arguments and exits.
        let binary = "/bin/ls".into();
        let accel = crate::config::Accel::Tcg;
        let machine = crate::config::Machine::Q35;
        let driver = Qemu::new(
            Config {
                binary,
                accel,
                machine,
                ..Config::default()
            },
            Arc::new(Consoles::try_new().unwrap()),
        )
        .unwrap();
        let path = |name: &str| temp.path().join(name);
        let spec = VmmSpec {
            vm: "0123456789ab".parse().unwrap(),
            tag: "fc-test-0123456789ab-1".parse().unwrap(),
            dir: temp.path().to_owned(),
            kernel: path("k"),
            initrd: path("i"),
            boot_args: String::new(),
            disk: path("d"),
            disk_format: crate::vmm::DiskFormat::Raw,
            seed: path("s"),
            runtime_disk: None,
            work_disk: None,
            vcpus: 1,
            mem_mib: 128,
            credentials: None,
            network: crate::vmm::GuestNetwork::UserMode {
                isolated: false,
                ipv6: false,
                ports: Vec::new(),
            },
            rates: crate::api::vm::RateLimits::default(),
            has_balloon: true,
            console_bytes_max: 1 << 16,
            saved: None,
        };
        let mut spawned = None;
        let e = driver
            .start(&spec, &Cancel::try_new().unwrap(), &mut |i| {
                spawned = Some(i.clone())
            })
            .unwrap_err();
        assert_eq!(
            e.to_string(),
            "start the VMM: qemu ended with exit status 2: /bin/ls: invalid option -- 'e'; Try '/bin/ls --help' for more information."
        );
        assert_eq!(e.kind(), Kind::VmmFailed);
        let identity = spawned.expect("the identity is reported first");
        assert!(!driver.processes().is_alive(&identity));
        assert!(
            driver
                .processes()
                .wait_exit(&identity, Instant::now(), &Cancel::try_new().unwrap())
                .unwrap()
        );
        driver.processes().kill(&identity, Instant::now()).unwrap();
        let (sender, ends) = std::sync::mpsc::channel();
        driver
            .processes()
            .watch(
                temp.path(),
                &identity,
                Box::new(move |how| sender.send(how).unwrap()),
            )
            .unwrap();
        assert_eq!(
            ends.recv_timeout(Duration::from_secs(10))
                .unwrap()
                .to_string(),
            "the VMM died: exit status 2"
        );
    }
}
