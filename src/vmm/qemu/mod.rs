//! QEMU: KVM where that runs a stock kernel, else software emulation; user-mode network or a tap; QMP.
//!
//! In user mode the guest is 10.0.2.15 on a network of its own, the gateway and host 10.0.2.2, the name server 10.0.2.3. What
//! the guest sends to 10.0.2.2 reaches the host's loopback, with the VMM's uid; QEMU has no switch for that alone, so
//! `isolated` in the configuration cuts the guest off from everything but its SSH port.

mod accel;
mod argv;
mod attend;
mod checks;
mod qmp;
mod tsc;

use super::console::{Attach, Consoles, VMM_LOG};
use super::watch::{Watcher, tell};
use super::{Driver, GuestNetwork, Identity, Running, Told, VmmSpec};
use crate::api::daemon::Check;
use crate::config::Qemu as Config;
use crate::error::{Error, Kind, Result};
use crate::host::command::{printable, read_bounded};
use crate::host::fs::{open_at, open_dir};
use crate::host::process::{self, Credentials, Exit, Process, Spawn};
use crate::locks::{Cancel, Rank, region};
use accel::{Picked, Picker};
use qmp::{Patience, Qmp};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::process::Signal;
use serde_json::json;
use std::io::{Seek, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// From the process's start to its first guest instruction; a fraction of a second on an idle host.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// For a VMM that runs already to answer.
const ADOPT_DEADLINE: Duration = Duration::from_secs(5);
/// For a process that was killed because its start failed.
const KILL_DEADLINE: Duration = Duration::from_secs(30);
/// From a hang-up to the exit.
const EXIT_GRACE: Duration = Duration::from_secs(1);
/// How much of what QEMU said goes into an error.
const SAID_BYTES_MAX: u64 = 2048;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const RUN_DIR: &str = "run";

pub struct Qemu {
    config: Config,
    picker: Picker,
    consoles: Consoles,
    watcher: Watcher,
    /// Fires when the driver goes.
    closing: Cancel,
}

impl Qemu {
    /// Looks at nothing yet. Fails where no event can be had (EMFILE, ENFILE).
    pub fn new(config: Config) -> Result<Self> {
        let picker = Picker::new(config.clone());
        let closing = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        Ok(Self { config, picker, consoles: Consoles::try_new()?, watcher: Watcher::try_new()?, closing })
    }

    /// The process, if it lives and is a QEMU of ours with this tag.
    fn verify(&self, identity: &Identity, tag: &str) -> Result<Option<Process>> {
        let Some(process) = Process::open(identity)?.filter(Process::is_alive) else { return Ok(None) };
        let is_ours = is_qemu(&self.config, identity.pid)
            && process::arguments(identity.pid).iter().any(|a| a == tag.as_bytes())
            && process::uid(identity.pid).is_some_and(|uid| may_be_ours(&self.config, uid));
        Ok((is_ours && process.is_alive()).then_some(process))
    }

    fn spawn(&self, spec: &VmmSpec, picked: &Picked) -> Result<(Process, OwnedFd)> {
        let io = |e: std::io::Error| Error::io(format!("open {}", spec.dir.join(VMM_LOG).display()), e);
        let dir = open_dir(&spec.dir)?;
        let run = make_run_dir(&dir, spec.credentials)?;
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::TRUNC;
        let output = open_at(&dir, VMM_LOG, flags, 0o600).map_err(io)?;
        let credentials = spec.credentials.map(|(uid, gid)| Credentials { uid, gid, groups: picked.groups.clone() });
        let process = process::spawn(Spawn {
            program: self.config.binary.clone(),
            args: argv::argv(spec, &picked.platform, self.config.isolated)?,
            env: vec![("PATH".into(), PATH.into()), ("LC_ALL".into(), "C.UTF-8".into())],
            cwd: spec.dir.join(RUN_DIR),
            output: Some(output),
            credentials,
        })?;
        Ok((process, run))
    }

    /// Console first, so that nothing the guest says is lost; then where its SSH port is; then let it run.
    fn set_going(&self, spec: &VmmSpec, process: &Process, run: &OwnedFd, patience: Patience<'_>) -> Result<Running> {
        let exited = || exited_early(spec, process);
        let console = qmp::connect(run, argv::CONSOLE_SOCKET, process, patience)?.ok_or_else(exited)?;
        let control = qmp::connect(run, argv::QMP_SOCKET, process, patience)?.ok_or_else(exited)?;
        let mark = format!("started {}", spec.tag);
        self.consoles.attach(Attach { dir: spec.dir.clone(), bytes_max: spec.console_bytes_max, socket: console, mark })?;
        let ask = || -> Result<Running> {
            let mut qmp = Qmp::open(control, patience)?;
            let ssh_addr = ssh_addr(spec, &mut qmp)?;
            qmp.execute("cont", &json!({}))?;
            Ok(Running { identity: process.identity().clone(), ssh_addr })
        };
        ask().map_err(|e| if e.kind() != Kind::Cancelled && is_exiting(process) { exited() } else { e })
    }
}

/// One that hangs up is about to exit, and then what it said tells more than that it hung up.
fn is_exiting(process: &Process) -> bool {
    process.wait_uncancelled(Instant::now() + EXIT_GRACE).unwrap_or(false)
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

/// `run/`: the VMM's own, with nothing in it from an earlier life. What the VMM's uid left there is not followed.
fn make_run_dir(dir: &OwnedFd, credentials: Option<(u32, u32)>) -> Result<OwnedFd> {
    let make = || -> rustix::io::Result<OwnedFd> {
        match rustix::fs::mkdirat(dir, RUN_DIR, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let run = rustix::fs::openat(dir, RUN_DIR, flags, Mode::empty())?;
        for name in [argv::QMP_SOCKET, argv::CONTROL_SOCKET, argv::CONSOLE_SOCKET] {
            match rustix::fs::unlinkat(&run, name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(e) => return Err(e),
            }
        }
        if let Some((uid, gid)) = credentials {
            rustix::fs::fchown(&run, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        rustix::fs::fchmod(&run, Mode::RWXU)?;
        Ok(run)
    };
    make().map_err(|e| Error::io("make the VMM's run directory", e))
}

/// With what QEMU itself said.
fn exited_early(spec: &VmmSpec, process: &Process) -> Error {
    let exit = process.exit().unwrap_or(Exit::Unknown);
    let said = last_said(&spec.dir).map_or_else(String::new, |said| format!(": {said}"));
    Error::new(Kind::VmmFailed, format!("start the VMM: qemu ended with {exit}{said}"))
        .hint(format!("see {}, or run fcctl doctor", spec.dir.join(VMM_LOG).display()))
}

fn last_said(dir: &Path) -> Option<String> {
    let mut file = open_at(open_dir(dir).ok()?, VMM_LOG, OFlags::RDONLY, 0).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(SAID_BYTES_MAX))).ok()?;
    let bytes = read_bounded(file, SAID_BYTES_MAX).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(2)..].join("; ");
    (!last.is_empty()).then(|| printable(&last))
}

fn is_qemu(config: &Config, pid: u32) -> bool {
    let Some(executable) = process::executable(pid) else { return false };
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    // A wrapper script runs another file, whose name has QEMU's in it.
    name(&executable) == name(&config.binary) || name(&executable).contains("qemu")
}

/// As a user, only what runs as that user; as root, what runs as root or as a VM.
fn may_be_ours(config: &Config, uid: u32) -> bool {
    let me = rustix::process::geteuid().as_raw();
    uid == me || (me == 0 && uid >= config.uid_base && uid - config.uid_base < config.uid_count)
}

fn how(exit: Exit) -> String {
    match exit {
        Exit::Status(0) => "the guest shut down".to_owned(),
        other => other.to_string(),
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.closing.cancel("the driver ends");
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
            self.set_going(spec, &process, &run, Patience { deadline: Instant::now() + START_DEADLINE, cancel })?
        };
        undo.commit();
        Ok(running)
    }

    fn find(&self, tag: &str) -> Result<Option<Identity>> {
        for identity in process::find_by_argument(tag)? {
            if self.verify(&identity, tag)?.is_some() {
                return Ok(Some(identity));
            }
        }
        Ok(None)
    }

    fn list(&self, tag_prefix: &str) -> Result<Vec<String>> {
        let mut tags = process::arguments_beginning(tag_prefix)?;
        tags.retain(|tag| self.find(tag).is_ok_and(|found| found.is_some()));
        Ok(tags)
    }

    fn adopt(&self, spec: &VmmSpec, identity: &Identity) -> Result<Running> {
        let doing = "take up the VMM again";
        let gone = || Error::new(Kind::VmmFailed, format!("{doing}: it has exited"));
        let process = self.verify(identity, &spec.tag)?.ok_or_else(gone)?;
        let _blocking = region(Rank::VmmApi);
        let cancel = Cancel::try_new().map_err(|e| Error::io(doing, e))?;
        let patience = Patience { deadline: Instant::now() + ADOPT_DEADLINE, cancel: &cancel };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let run = OwnedFd::from(open_at(open_dir(&spec.dir)?, RUN_DIR, flags, 0).map_err(|e| Error::io(doing, e))?);
        let console = qmp::connect(&run, argv::CONSOLE_SOCKET, &process, patience)?.ok_or_else(gone)?;
        let mark = "reconnected; what the guest said since fcd ended is lost".to_owned();
        self.consoles.attach(Attach { dir: spec.dir.clone(), bytes_max: spec.console_bytes_max, socket: console, mark })?;
        let control = qmp::connect(&run, argv::CONTROL_SOCKET, &process, patience)?.ok_or_else(gone)?;
        let mut qmp = Qmp::open(control, patience).map_err(|e| e.context(doing))?;
        let ssh_addr = ssh_addr(spec, &mut qmp).map_err(|e| e.context(doing))?;
        Ok(Running { identity: identity.clone(), ssh_addr })
    }

    fn is_alive(&self, identity: &Identity) -> bool {
        process::is_alive(identity)
    }

    fn is_ours(&self, identity: &Identity, tag: &str) -> bool {
        self.verify(identity, tag).is_ok_and(|process| process.is_some())
    }

    fn wait_exit(&self, identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool> {
        let Some(process) = Process::open(identity)? else { return Ok(true) };
        let _blocking = region(Rank::VmmApi);
        match process.wait(deadline, cancel) {
            Err(e) if e.kind() == Kind::Cancelled => Ok(false),
            other => other,
        }
    }

    fn kill(&self, identity: &Identity, deadline: Instant) -> Result<()> {
        let Some(process) = Process::open(identity)? else { return Ok(()) };
        process.signal(Signal::KILL)?;
        let _blocking = region(Rank::VmmApi);
        if process.wait_uncancelled(deadline)? {
            return Ok(());
        }
        Err(Error::new(Kind::Timeout, format!("kill the VMM: process {} has not exited in time", identity.pid)))
    }

    fn watch(&self, identity: &Identity, died: Box<dyn FnOnce(String) + Send>) -> Result<()> {
        let died = Box::new(move |exit| died(how(exit)));
        match Process::open(identity)? {
            Some(process) => self.watcher.add(process, died),
            None => {
                tell(process::exit_of_gone(identity), died);
                Ok(())
            }
        }
    }

    fn watch_guest(&self, dir: &Path, identity: &Identity, told: Box<dyn Fn(Told) + Send>) -> Result<()> {
        let Some(process) = Process::open(identity)? else { return Ok(()) };
        let attended = attend::Attended { process, dir: dir.to_owned(), closing: self.closing.clone(), told };
        crate::host::thread::spawn(&format!("vmm-{}", identity.pid), move || attended.run()).map(drop)
    }

    fn set_paused(&self, dir: &Path, identity: &Identity, is_paused: bool, cancel: &Cancel) -> Result<()> {
        let (doing, command) = if is_paused { ("pause the guest", "stop") } else { ("let the guest go on", "cont") };
        let gone = || Error::new(Kind::VmmFailed, format!("{doing}: its VMM has exited"));
        let process = Process::open(identity)?.ok_or_else(gone)?;
        let _blocking = region(Rank::VmmApi);
        let patience = Patience { deadline: Instant::now() + ADOPT_DEADLINE, cancel };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let run = OwnedFd::from(open_at(open_dir(dir)?, RUN_DIR, flags, 0).map_err(|e| Error::io(doing, e))?);
        let control = qmp::connect(&run, argv::CONTROL_SOCKET, &process, patience)?.ok_or_else(gone)?;
        let mut qmp = Qmp::open(control, patience).map_err(|e| e.context(doing))?;
        qmp.execute(command, &json!({})).map(drop).map_err(|e| e.context(doing))
    }

    fn checks(&self) -> Vec<Check> {
        checks::checks(&self.config, self.picker.known().as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_directory_is_made_anew_and_links_are_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = open_dir(temp.path()).unwrap();
        make_run_dir(&dir, None).unwrap();
        std::fs::write(temp.path().join("victim"), "x").unwrap();
        std::os::unix::fs::symlink("../victim", temp.path().join("run/qmp.sock")).unwrap();
        make_run_dir(&dir, None).unwrap();
        assert_eq!(std::fs::read_dir(temp.path().join("run")).unwrap().count(), 0);
        assert!(temp.path().join("victim").exists());
        std::fs::remove_dir(temp.path().join("run")).unwrap();
        std::os::unix::fs::symlink("/tmp", temp.path().join("run")).unwrap();
        assert!(make_run_dir(&dir, None).is_err());
    }

    #[test]
    fn what_qemu_said_last_is_quoted() {
        let temp = tempfile::tempdir().unwrap();
        assert_eq!(last_said(temp.path()), None);
        std::fs::write(temp.path().join(VMM_LOG), "one\n\ntwo\nqemu: \x1b[31mno\n").unwrap();
        assert_eq!(last_said(temp.path()).unwrap(), "two; qemu: \\u{1b}[31mno");
    }

    #[test]
    fn a_qemu_that_ends_at_once_is_an_error_that_says_why() {
        let temp = tempfile::tempdir().unwrap();
        // Not QEMU at all, but a program that says what it does not like and leaves.
        let binary = "/bin/ls".into();
        let accel = crate::config::Accel::Tcg;
        let machine = crate::config::Machine::Q35;
        let driver = Qemu::new(Config { binary, accel, machine, ..Config::default() }).unwrap();
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
            console_bytes_max: 1 << 16,
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
        driver.watch(&identity, Box::new(move |how| told.send(how).unwrap())).unwrap();
        assert_eq!(tellings.recv_timeout(Duration::from_secs(10)).unwrap(), "exit status 2");
    }
}
