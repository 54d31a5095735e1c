//! QEMU: KVM where that runs a stock kernel, else software emulation; user-mode network or a tap; QMP.
//!
//! In user mode the guest is 10.0.2.15 on a network of its own, the gateway and host 10.0.2.2, the name server 10.0.2.3. What
//! the guest sends to 10.0.2.2 reaches the host's loopback, with the VMM's uid; QEMU has no switch for that alone, so
//! `isolated` in the configuration cuts the guest off from everything but its SSH port.

mod accel;
pub(in crate::vmm) mod argv;
mod attend;
mod checks;
pub(in crate::vmm) mod incoming;
mod qmp;
mod save;
mod throttle;
mod tsc;

use super::console::{Attach, Consoles};
use super::devices;
use super::dial::{self, Patience};
use super::processes::{self, Processes};
use super::run_dir::{self, RUN_DIR};
use super::{Died, Driver, GuestNetwork, Identity, Running, SaveTo, Tagged, Told, VmmSpec};
use crate::api::daemon::Check;
use crate::config::Qemu as Config;
use crate::error::{Error, Kind, Result};
use crate::host::fs::open_dir;
use crate::host::process::{self, Credentials, Process, Spawn};
use crate::host::program;
use crate::host::reach;
use crate::locks::{Cancel, CancelCause, Rank, region};
pub use accel::try_kvm;
use accel::{Picked, Picker};
use qmp::Qmp;
use serde_json::json;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// From the process's start to its first guest instruction; a fraction of a second on an idle host.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// For a VMM that runs already to answer.
const ADOPT_DEADLINE: Duration = Duration::from_secs(5);
/// For a process that was killed because its start failed.
const KILL_DEADLINE: Duration = Duration::from_secs(30);

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub struct Qemu {
    config: Config,
    picker: Picker,
    consoles: Arc<Consoles>,
    processes: Processes,
    /// Fires when the driver goes.
    closing: Cancel,
}

impl Qemu {
    /// Looks at nothing yet. Fails where no event can be had (EMFILE, ENFILE).
    pub fn new(config: Config, consoles: Arc<Consoles>) -> Result<Self> {
        let picker = Picker::new(config.clone());
        let (uids, of_driver) = (config.uids(), config.clone());
        let processes = Processes::try_new(uids, Box::new(move |executable| is_qemu(&of_driver, executable)))?;
        let closing = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        Ok(Self { config, picker, consoles, processes, closing })
    }

    fn spawn(&self, spec: &VmmSpec, picked: &Picked) -> Result<(Process, OwnedFd)> {
        if let Some((uid, _)) = spec.credentials {
            can_reach(uid, &spec.dir.join(RUN_DIR), "the state directory", reach::state_dir_fix)?;
            if let Ok(program) = program::locate(&self.config.binary) {
                can_reach(uid, &program, "QEMU", checks::binary_fix)?;
            }
        }
        let dir = open_dir(&spec.dir)?;
        let run = run_dir::make(&dir, &[argv::QMP_SOCKET, argv::CONTROL_SOCKET, argv::CONSOLE_SOCKET], spec.credentials)?;
        let output = run_dir::open_log(&dir, spec)?;
        let groups = picked.groups.iter().copied().chain(tap_groups(spec)?).collect();
        let credentials = spec.credentials.map(|(uid, gid)| Credentials { uid, gid, groups });
        let process = process::spawn(Spawn {
            program: program::locate(&self.config.binary)?,
            args: argv::argv(spec, &picked.platform, self.config.isolated)?,
            env: vec![("PATH".into(), PATH.into()), ("LC_ALL".into(), "C.UTF-8".into())],
            cwd: spec.dir.join(RUN_DIR),
            output: Some(output),
            credentials,
        })?;
        Ok((process, run))
    }

    /// One conversation with a VMM that runs.
    fn talk<T>(
        &self,
        dir: &Path,
        identity: &Identity,
        doing: &str,
        patience: Patience<'_>,
        ask: impl FnOnce(&mut Qmp<'_>) -> Result<T>,
    ) -> Result<T> {
        let gone = || Error::new(Kind::VmmFailed, format!("{doing}: its VMM has exited"));
        let process = Process::open(identity)?.ok_or_else(gone)?;
        let _blocking = region(Rank::VmmApi);
        let run = run_dir::open(dir, doing)?;
        let control = dial::connect(&run, argv::CONTROL_SOCKET, &process, patience)?.ok_or_else(gone)?;
        Qmp::open(control, patience).and_then(|mut qmp| ask(&mut qmp)).map_err(|e| e.context(doing))
    }

    /// Console first, so that nothing the guest says is lost; then where its SSH port is; then let it run.
    fn set_going(&self, spec: &VmmSpec, process: &Process, run: &OwnedFd, patience: Patience<'_>) -> Result<Running> {
        let exited = || run_dir::exited_early("qemu", spec, process);
        let console = dial::connect(run, argv::CONSOLE_SOCKET, process, patience)?.ok_or_else(exited)?;
        let control = dial::connect(run, argv::QMP_SOCKET, process, patience)?.ok_or_else(exited)?;
        let mark = format!("started {}", spec.tag);
        self.consoles.attach(Attach {
            dir: spec.dir.clone(),
            bytes_max: spec.console_bytes_max,
            from: OwnedFd::from(console).into(),
            mark,
        })?;
        let ask = || -> Result<Running> {
            let mut qmp = Qmp::open(control, patience)?;
            let ssh_addr = ssh_addr(spec, &mut qmp)?;
            if let Some(saved) = &spec.saved {
                save::load(&mut qmp, &saved.memory)?;
            }
            if !spec.rates.is_empty() {
                throttle::set(&mut qmp, spec)?;
            }
            qmp.execute("cont", &json!({}))?;
            Ok(Running { identity: process.identity().clone(), ssh_addr })
        };
        ask().map_err(|e| if e.kind() != Kind::Cancelled && run_dir::is_exiting(process) { exited() } else { e })
    }
}

/// The group that QEMU needs to open the device of its tap.
fn tap_groups(spec: &VmmSpec) -> Result<Vec<u32>> {
    if matches!(spec.network, GuestNetwork::UserMode { .. }) {
        return Ok(Vec::new());
    }
    devices::access_as(devices::TUN, spec.credentials.is_some())
        .map_err(|why| Error::new(Kind::Unsupported, format!("start the VMM: {why}")).hint("run fcctl doctor"))
}

/// QEMU itself would only say that it may not open a file.
fn can_reach(uid: u32, path: &Path, what: &str, fix: fn(&dyn std::fmt::Display) -> String) -> Result<()> {
    let Some(closed) = reach::closed_to_others(path) else { return Ok(()) };
    let closed = closed.display();
    let message = format!("start the VMM: it runs as uid {uid}, which may not enter {closed}, where {what} is");
    Err(Error::new(Kind::Host, message).hint(fix(&closed)))
}

/// Of a VMM that runs already.
fn soon(cancel: &Cancel) -> Patience<'_> {
    Patience { deadline: Instant::now() + ADOPT_DEADLINE, cancel }
}

/// What was saved is read before anything else happens.
fn start_deadline(spec: &VmmSpec) -> Duration {
    if spec.saved.is_some() { save::DEADLINE } else { START_DEADLINE }
}

/// On a tap the guest has an address of its own; in user mode QEMU picked the port.
fn ssh_addr(spec: &VmmSpec, qmp: &mut Qmp<'_>) -> Result<SocketAddr> {
    if let GuestNetwork::Tap { address, .. } = spec.network {
        return Ok(SocketAddr::from((address, argv::GUEST_SSH_PORT)));
    }
    let table = qmp.human("info usernet")?;
    match argv::forwarded_port(&table) {
        Some(port) => Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        None => Err(Error::new(Kind::VmmFailed, "ask the VMM for its SSH port: it forwards none")),
    }
}

fn is_qemu(config: &Config, executable: &Path) -> bool {
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    // A wrapper script runs another file, whose name has QEMU's in it.
    name(executable) == name(&config.binary) || name(executable).contains("qemu")
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.closing.cancel(CancelCause::Finished);
    }
}

impl Driver for Qemu {
    fn describe(&self) -> String {
        self.picker.known().map_or_else(|| "qemu".to_owned(), |picked| picked.platform.to_string())
    }

    fn warm_up(&self, kernel: &Path, cancel: &Cancel) {
        if let Err(e) = self.picker.pick(kernel, cancel) {
            log::debug!("{e}");
        }
    }

    fn consoles(&self) -> &Consoles {
        &self.consoles
    }

    fn start(&self, spec: &VmmSpec, cancel: &Cancel, spawned: &mut dyn FnMut(&Identity)) -> Result<Running> {
        let picked = self.picker.pick(&spec.kernel, cancel)?;
        if let Some(saved) = &spec.saved {
            save::require_same(&saved.driver, &picked.platform.to_string())?;
        }
        if cancel.is_cancelled() {
            return Err(crate::host::wait::cancelled("start the VMM", cancel));
        }
        let (process, run) = self.spawn(spec, &picked)?;
        // From here on an error, a cancel and a panic leave no process.
        let mut undo = crate::undo::Undo::new();
        undo.push("kill the VMM", || self.kill(process.identity(), Instant::now() + KILL_DEADLINE));
        spawned(process.identity());
        let running = {
            let _blocking = region(Rank::VmmApi);
            self.set_going(spec, &process, &run, Patience { deadline: Instant::now() + start_deadline(spec), cancel })?
        };
        undo.commit();
        Ok(running)
    }

    fn find(&self, tag: &str) -> Result<Option<Identity>> {
        self.processes.find(tag)
    }

    fn list(&self, tag_prefix: &str) -> Result<Vec<Tagged>> {
        self.processes.list(tag_prefix)
    }

    fn adopt(&self, spec: &VmmSpec, identity: &Identity) -> Result<Running> {
        let doing = "take up the VMM again";
        let gone = || Error::new(Kind::VmmFailed, format!("{doing}: it has exited"));
        let process = self.processes.verify(identity, &spec.tag)?.ok_or_else(gone)?;
        let _blocking = region(Rank::VmmApi);
        let cancel = Cancel::try_new().map_err(|e| Error::io(doing, e))?;
        let patience = Patience { deadline: Instant::now() + ADOPT_DEADLINE, cancel: &cancel };
        let run = run_dir::open(&spec.dir, doing)?;
        let console = dial::connect(&run, argv::CONSOLE_SOCKET, &process, patience)?.ok_or_else(gone)?;
        let mark = "reconnected; what the guest said since fcd ended is lost".to_owned();
        self.consoles.attach(Attach {
            dir: spec.dir.clone(),
            bytes_max: spec.console_bytes_max,
            from: OwnedFd::from(console).into(),
            mark,
        })?;
        let control = dial::connect(&run, argv::CONTROL_SOCKET, &process, patience)?.ok_or_else(gone)?;
        let mut qmp = Qmp::open(control, patience).map_err(|e| e.context(doing))?;
        let ssh_addr = ssh_addr(spec, &mut qmp).map_err(|e| e.context(doing))?;
        Ok(Running { identity: identity.clone(), ssh_addr })
    }

    fn is_alive(&self, identity: &Identity) -> bool {
        process::is_alive(identity)
    }

    fn is_ours(&self, identity: &Identity, tag: &str) -> bool {
        self.processes.verify(identity, tag).is_ok_and(|process| process.is_some())
    }

    fn runs(&self, identity: &Identity) -> bool {
        self.processes.runs(identity)
    }

    fn wait_exit(&self, identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool> {
        processes::wait_exit(identity, deadline, cancel)
    }

    fn kill(&self, identity: &Identity, deadline: Instant) -> Result<()> {
        processes::kill(identity, deadline)
    }

    fn watch(&self, dir: &Path, identity: &Identity, died: Died) -> Result<()> {
        self.processes.watch(dir, &self.consoles, identity, died)
    }

    fn watch_guest(&self, dir: &Path, identity: &Identity, told: Box<dyn Fn(Told) + Send>) -> Result<()> {
        let Some(process) = Process::open(identity)? else { return Ok(()) };
        let note = self.processes.notes.open(identity)?;
        let attended = attend::Attended { process, dir: dir.to_owned(), closing: self.closing.clone(), told, note };
        crate::host::thread::spawn(&format!("vmm-{}", identity.pid), move || attended.run()).map(drop)
    }

    fn save(&self, spec: &VmmSpec, identity: &Identity, to: SaveTo<'_>, cancel: &Cancel) -> Result<String> {
        let patience = Patience { deadline: Instant::now() + save::DEADLINE, cancel };
        let saved = self.talk(&spec.dir, identity, "save the guest", patience, |qmp| {
            save::save(qmp, to.memory)?;
            save::version(qmp)
        });
        if saved.is_err() {
            // By another token: the first one may have fired.
            let never = Cancel::try_new().map_err(|e| Error::io("save the guest", e))?;
            if let Err(e) = self.talk(&spec.dir, identity, "give up saving the guest", soon(&never), save::give_up) {
                log::warn!("{e}");
            }
        }
        saved
    }

    fn can_load(&self, driver: &str, _elsewhere: bool) -> Result<()> {
        match self.picker.known() {
            Some(picked) => save::require_same(driver, &picked.platform.to_string()),
            None if driver.starts_with("qemu") => Ok(()),
            None => save::require_same(driver, "qemu"),
        }
    }

    fn set_paused(&self, dir: &Path, identity: &Identity, is_paused: bool, cancel: &Cancel) -> Result<()> {
        let (doing, command) = if is_paused { ("pause the guest", "stop") } else { ("let the guest go on", "cont") };
        self.talk(dir, identity, doing, soon(cancel), |qmp| {
            if !is_paused {
                save::give_up(qmp)?;
            }
            qmp.execute(command, &json!({})).map(drop)
        })
    }

    /// Neither of its networks has rates.
    fn limits_network(&self, _running: Option<&Identity>) -> bool {
        false
    }

    fn set_rates(&self, spec: &VmmSpec, identity: &Identity, cancel: &Cancel) -> Result<()> {
        self.talk(&spec.dir, identity, "limit the guest's disks", soon(cancel), |qmp| throttle::set(qmp, spec))
    }

    fn set_balloon(&self, spec: &VmmSpec, identity: &Identity, keep_mib: u64, cancel: &Cancel) -> Result<()> {
        let value = json!({ "value": keep_mib << 20 });
        self.talk(&spec.dir, identity, "set the balloon", soon(cancel), |qmp| qmp.execute("balloon", &value).map(drop))
    }

    fn balloon_mib(&self, spec: &VmmSpec, identity: &Identity, cancel: &Cancel) -> Result<u64> {
        let doing = "look at the balloon";
        let answer = self.talk(&spec.dir, identity, doing, soon(cancel), |qmp| qmp.execute("query-balloon", &json!({})))?;
        let bytes = answer["actual"].as_u64();
        bytes.map(|b| b >> 20).ok_or_else(|| Error::new(Kind::VmmFailed, format!("{doing}: the answer names no size")))
    }

    fn metrics(&self, spec: &VmmSpec, identity: &Identity, cancel: &Cancel) -> Result<Vec<serde_json::Value>> {
        const COMMAND: &str = "query-blockstats";
        let ask = |qmp: &mut Qmp<'_>| qmp.execute(COMMAND, &json!({}));
        self.talk(&spec.dir, identity, "read the VMM's metrics", soon(cancel), ask).map(|stats| vec![json!({ COMMAND: stats })])
    }

    /// It could only by the host's kernel (vhost-vsock), where numbers of guests are the whole host's.
    fn connect(&self, _identity: &Identity, _port: u32, _cancel: &Cancel) -> Result<UnixStream> {
        Err(Error::new(Kind::Unsupported, "qemu's guests have no vsock").hint("reach a port of its network: fcctl run -p PORT"))
    }

    /// microvm has no keyboard, and no other way to tell a guest without a daemon of its own.
    fn press_ctrl_alt_del(&self, _identity: &Identity, _cancel: &Cancel) -> Result<bool> {
        Ok(false)
    }

    fn leaves_remains(&self) -> bool {
        false
    }

    fn clear(&self, _dir: &Path, _tag: &str) -> Result<()> {
        Ok(())
    }

    fn remains(&self, _vms: &Path, _tag_prefix: &str) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn makes_device_nodes(&self) -> bool {
        false
    }

    fn reads_qcow2(&self) -> bool {
        true
    }

    fn checks(&self) -> Vec<Check> {
        checks::checks(&self.config, self.picker.known().as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_that_ends_at_once_is_an_error_that_says_why() {
        let temp = tempfile::tempdir().unwrap();
        // Not QEMU at all, but a program that says what it does not like and leaves.
        let binary = "/bin/ls".into();
        let accel = crate::config::Accel::Tcg;
        let machine = crate::config::Machine::Q35;
        let driver =
            Qemu::new(Config { binary, accel, machine, ..Config::default() }, Arc::new(Consoles::try_new().unwrap())).unwrap();
        let path = |name: &str| temp.path().join(name);
        let spec = VmmSpec {
            vm: "0123456789ab".parse().unwrap(),
            tag: "fc-test-0123456789ab-1".into(),
            dir: temp.path().to_owned(),
            kernel: path("k"),
            initrd: path("i"),
            boot_args: String::new(),
            disk: path("d"),
            disk_format: crate::vmm::DiskFormat::Raw,
            seed: path("s"),
            work_disk: None,
            vcpus: 1,
            mem_mib: 128,
            credentials: None,
            network: crate::vmm::GuestNetwork::UserMode { isolated: false, ports: Vec::new() },
            rates: crate::api::vm::RateLimits::default(),
            has_balloon: true,
            console_bytes_max: 1 << 16,
            saved: None,
        };
        let mut told = None;
        let e = driver.start(&spec, &Cancel::try_new().unwrap(), &mut |i| told = Some(i.clone())).unwrap_err();
        assert_eq!(
            e.to_string(),
            "start the VMM: qemu ended with exit status 2: /bin/ls: invalid option -- 'e'; Try '/bin/ls --help' for more information."
        );
        assert_eq!(e.kind(), Kind::VmmFailed);
        let identity = told.expect("told before anything else");
        assert!(!driver.is_alive(&identity));
        assert!(driver.wait_exit(&identity, Instant::now(), &Cancel::try_new().unwrap()).unwrap());
        driver.kill(&identity, Instant::now()).unwrap();
        let (told, tellings) = std::sync::mpsc::channel();
        driver.watch(temp.path(), &identity, Box::new(move |how| told.send(how).unwrap())).unwrap();
        assert_eq!(tellings.recv_timeout(Duration::from_secs(10)).unwrap().to_string(), "the vmm died: exit status 2");
    }
}
