//! A driver with an in-memory table of VMMs that a test controls. It is as strict as a real driver:
//! it blocks in the same places (with the same virtual rank), refuses a disk that a live VMM uses,
//! and leaves nothing after an error.
//!
//! The table belongs to the `Fake`, not to a daemon. Another daemon that is opened with the same
//! `Fake` finds its VMMs.

mod controls;
mod observations;
mod processes;
mod vm;

use super::console::{Attach, Consoles};
use super::{
    Capabilities, Died, Driver, End, GuestEvent, Identity, Processes, Running, Vm, VmRef, VmmSpec,
};
use crate::api::daemon::{Check, Severity};
use crate::api::port::Port;
use crate::api::vm::RateLimits;
use crate::error::{Error, Kind, Result};
use crate::host::process;
use crate::host::wait::{WaitResult, cancelled, wait_any};
use crate::ids::{Tag, VmId};
use crate::locks::{Cancel, CancelCause, Condvar, Mutex, Rank, region};
use crate::sched::{HashMap, Instant};
use nix::poll::PollFlags;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;
use vm::FakeVm;

/// The pids of fake VMMs are larger than any real pid (the kernel's PID_MAX_LIMIT is 4194304).
const PID_BASE: u32 = 2_000_000_000;
/// Time after which a wait at a gate panics, because the test forgot to open the gate.
const GATE_DEADLINE: Duration = Duration::from_secs(120);

type OnEvent = Box<dyn Fn(GuestEvent) + Send>;

/// The stages at which an operation can be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A start that has no process yet.
    BeforeSpawn,
    /// A start that has called `spawned`, before the VMM answers.
    AfterSpawn,
    /// A save of a guest.
    Save,
    /// An adoption of an earlier daemon's VMM.
    Adopt,
}

/// The reaction of a guest to Ctrl-Alt-Del.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keyboard {
    /// The guest shuts down.
    Heard,
    Ignored,
}

struct Vmm {
    spec: VmmSpec,
    identity: Identity,
    ssh_addr: SocketAddr,
    /// The way in which the VMM ended, or `None` if it is alive.
    end: Option<End>,
    /// A token that fires when the VMM ends.
    gone: Cancel,
    watchers: Vec<Died>,
    is_paused: bool,
    rates: RateLimits,
    keep_mib: u64,
    /// The ports that the VMM forwards.
    ports: Vec<Port>,
    on_event: Option<OnEvent>,
    /// The guest's end of the console.
    console: Option<UnixStream>,
}

#[derive(Default)]
struct State {
    vmms: Vec<Vmm>,
    gate: Option<(Stage, Cancel)>,
    waiting: usize,
    failures: Vec<String>,
    adopt_failures: Vec<String>,
    /// The gate that holds changes of running guests.
    change_gate: Option<Cancel>,
    changes_held: usize,
    change_failures: Vec<String>,
    is_unkillable: bool,
    ssh_addr: Option<SocketAddr>,
    ssh_addrs: HashMap<VmId, SocketAddr>,
    /// The channels that receive the guests' ends of new vsock connections.
    vsock: HashMap<(VmId, u32), Sender<UnixStream>>,
    keyboard: Option<Keyboard>,
    presses: u64,
    starts: u64,
    checks: u64,
    kills: u64,
    clashes: u64,
    /// The number of times that all processes of the host were listed.
    lists: u64,
    finds: u64,
    adoptions: Vec<VmId>,
}

pub struct Fake {
    state: Mutex<State>,
    changed: Condvar,
    consoles: Consoles,
    /// True if guests react to a keyboard. This is not in `state` because capabilities are queried
    /// under the locks of VMs.
    has_keyboard: AtomicBool,
}

impl Fake {
    pub fn new() -> Result<Self> {
        let state = Mutex::new(Rank::Consoles, State::default());
        Ok(Self {
            state,
            changed: Condvar::new(),
            consoles: Consoles::try_new()?,
            has_keyboard: AtomicBool::new(false),
        })
    }

    /// Reports an event of this VM's live VMM. Returns false if no VMM is alive or nothing watches
    /// it.
    pub fn report(&self, vm: &VmId, event: GuestEvent) -> bool {
        let mut state = self.state.lock();
        let live = state
            .vmms
            .iter_mut()
            .find(|v| v.spec.vm == *vm && v.end.is_none());
        let Some(on_event) = live.and_then(|v| v.on_event.take()) else {
            return false;
        };
        drop(state);
        on_event(event);
        let mut state = self.state.lock();
        if let Some(vmm) = state
            .vmms
            .iter_mut()
            .find(|v| v.spec.vm == *vm && v.end.is_none())
        {
            vmm.on_event.get_or_insert(on_event);
        }
        true
    }

    /// Ends this VM's VMM with `how`. Returns false if no VMM is alive.
    pub fn die(&self, vm: &VmId, how: &End) -> bool {
        self.end(|vmm| &vmm.spec.vm == vm, how)
    }

    /// Writes text to the guest's console, as the guest would.
    pub fn guest_says(&self, vm: &VmId, text: &str) {
        let state = self.state.lock();
        let console = state
            .vmms
            .iter()
            .rev()
            .find(|vmm| &vmm.spec.vm == vm)
            .and_then(|vmm| vmm.console.as_ref());
        // A few lines always fit into the socket's buffer.
        console
            .map(|mut console| console.write_all(text.as_bytes()))
            .transpose()
            .expect("the console is read");
    }

    /// Drops watchers and consoles, as if the daemon were killed. The VMMs keep running.
    pub fn forget_watchers(&self) {
        // The callbacks are dropped after the lock is released, because they own objects of the
        // daemon.
        let mut gone: Vec<(Vec<Died>, Option<OnEvent>)> = Vec::new();
        for vmm in &mut self.state.lock().vmms {
            gone.push((std::mem::take(&mut vmm.watchers), vmm.on_event.take()));
            vmm.console = None;
        }
    }

    /// Like [`Fake::forget_watchers`], but drops nothing: the daemon was killed by a simulation.
    #[cfg(feature = "sim")]
    pub fn leak_watchers(&self) {
        for vmm in &mut self.state.lock().vmms {
            std::mem::forget((std::mem::take(&mut vmm.watchers), vmm.on_event.take()));
        }
    }

    fn end(&self, which: impl Fn(&Vmm) -> bool, how: &End) -> bool {
        let _whole = crate::sched::whole();
        let mut state = self.state.lock();
        let Some(vmm) = state
            .vmms
            .iter_mut()
            .find(|vmm| vmm.end.is_none() && which(vmm))
        else {
            return false;
        };
        vmm.end = Some(how.clone());
        vmm.console = None;
        let (gone, watchers, on_event) = (
            vmm.gone.clone(),
            std::mem::take(&mut vmm.watchers),
            vmm.on_event.take(),
        );
        drop(state);
        drop(on_event);
        gone.cancel(CancelCause::Finished);
        watchers
            .into_iter()
            .for_each(|died| report(how.clone(), died));
        true
    }

    fn with<T>(&self, identity: &Identity, f: impl FnOnce(&mut Vmm) -> T) -> Option<T> {
        self.state
            .lock()
            .vmms
            .iter_mut()
            .find(|vmm| vmm.identity == *identity)
            .map(f)
    }

    fn pass_gate(&self, stage: Stage, cancel: &Cancel) -> Result<()> {
        let gate = match &self.state.lock().gate {
            Some((at, gate)) if *at == stage => gate.clone(),
            _ => return check(cancel),
        };
        self.state.lock().waiting += 1;
        self.changed.notify_all();
        let woken = {
            let _blocking = region(Rank::VmmApi);
            wait_any(
                &[(gate.fd(), PollFlags::POLLIN)],
                Instant::now() + GATE_DEADLINE,
                cancel,
            )
        };
        self.state.lock().waiting -= 1;
        match woken.map_err(|e| Error::io("wait at the gate", e))? {
            WaitResult::Ready => Ok(()),
            WaitResult::Cancelled => Err(cancelled("start the VMM", cancel)),
            WaitResult::Deadline => Err(Error::new(
                Kind::Timeout,
                "start the VMM: the test did not open the gate",
            )),
        }
    }

    fn spawn(&self, spec: &VmmSpec) -> Result<Identity> {
        let gone = Cancel::try_new().map_err(|e| Error::io("make a fake VMM", e))?;
        let boot_id = process::boot_id()?.to_owned();
        let mut state = self.state.lock();
        if state
            .vmms
            .iter()
            .any(|vmm| vmm.end.is_none() && vmm.spec.disk == spec.disk)
        {
            state.clashes += 1;
            return Err(Error::new(
                Kind::VmmFailed,
                format!(
                    "start the VMM: {} is in use by another VMM",
                    spec.disk.display()
                ),
            ));
        }
        state.starts += 1;
        let pid = PID_BASE + u32::try_from(state.starts).expect("few starts");
        let identity = Identity {
            pid,
            start_time: state.starts,
            boot_id,
        };
        let ssh_addr = state.ssh_addrs.get(&spec.vm).copied().or(state.ssh_addr);
        let ssh_addr = ssh_addr.unwrap_or_else(|| SocketAddr::from((Ipv4Addr::LOCALHOST, 9)));
        let spec = spec.clone();
        let (end, watchers, is_paused, on_event, console) = (None, vec![], false, None, None);
        let (identity_of, rates, keep_mib) = (identity.clone(), spec.rates, spec.mem_mib);
        let ports = match &spec.network {
            super::GuestNetwork::UserMode { ports, .. } => ports.clone(),
            super::GuestNetwork::Tap { .. } => Vec::new(),
        };
        state.vmms.push(Vmm {
            spec,
            identity: identity_of,
            ssh_addr,
            end,
            gone,
            watchers,
            is_paused,
            rates,
            keep_mib,
            ports,
            on_event,
            console,
        });
        Ok(identity)
    }

    fn open_console(&self, spec: &VmmSpec, identity: &Identity, mark: String) -> Result<()> {
        let (ours, guests) = UnixStream::pair().map_err(|e| Error::io("make a fake console", e))?;
        self.consoles.attach(Attach {
            dir: spec.dir.clone(),
            bytes_max: spec.console_bytes_max,
            from: std::os::fd::OwnedFd::from(ours).into(),
            mark,
        })?;
        self.with(identity, |vmm| vmm.console = Some(guests));
        Ok(())
    }

    fn boot(&self, spec: &VmmSpec, identity: &Identity, cancel: &Cancel) -> Result<Running> {
        self.pass_gate(Stage::AfterSpawn, cancel)?;
        let failure = {
            let failures = &mut self.state.lock().failures;
            (!failures.is_empty()).then(|| failures.remove(0))
        };
        if let Some(message) = failure {
            return Err(Error::new(
                Kind::VmmFailed,
                format!("start the VMM: {message}"),
            ));
        }
        if let Some(saved) = &spec.saved {
            let read = std::fs::read(&saved.memory)
                .and_then(|memory| Ok((memory, std::fs::read(&saved.devices)?)));
            let (memory, devices) = read.map_err(|e| Error::io("load the saved guest", e))?;
            if memory.is_empty() || memory != devices {
                return Err(Error::new(
                    Kind::VmmFailed,
                    "load the saved guest: the files do not hold a saved guest",
                ));
            }
        }
        self.open_console(spec, identity, format!("started {}", spec.tag))?;
        let end = self.with(identity, |vmm| (vmm.end.clone(), vmm.ssh_addr));
        match end {
            Some((None, ssh_addr)) => Ok(Running {
                identity: identity.clone(),
                ssh_addr,
            }),
            Some((Some(how), _)) => Err(Error::new(
                Kind::VmmFailed,
                format!("start the VMM: it ended with {how}"),
            )),
            None => Err(Error::internal("the fake VMM is not in the table")),
        }
    }
}

fn check(cancel: &Cancel) -> Result<()> {
    if cancel.is_cancelled() {
        Err(cancelled("start the VMM", cancel))
    } else {
        Ok(())
    }
}

/// Calls `died` on a new thread, as the real watcher does.
fn report(how: End, died: Died) {
    crate::host::thread::spawn("vmm-died", move || died(how)).expect("spawn a thread");
}

impl Driver for Fake {
    fn describe(&self) -> String {
        "fake".to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            limits_network: true,
            reads_qcow2: true,
            has_keyboard: self.has_keyboard.load(Ordering::SeqCst),
            makes_device_nodes: false,
            leaves_remains: false,
        }
    }

    fn warm_up(&self, _kernel: &Path, _cancel: &Cancel) {}

    fn consoles(&self) -> &Consoles {
        &self.consoles
    }

    fn processes(&self) -> &dyn Processes {
        self
    }

    fn start(
        &self,
        spec: &VmmSpec,
        cancel: &Cancel,
        spawned: &mut dyn FnMut(&Identity),
    ) -> Result<Running> {
        self.pass_gate(Stage::BeforeSpawn, cancel)?;
        let identity = self.spawn(spec)?;
        // From here on, an error, a cancel or a panic must not leave a VMM.
        let mut undo = crate::undo::Undo::new();
        undo.push("kill the VMM", || {
            self.end(
                |vmm| vmm.identity == identity,
                &End::Vmm(process::Exit::Signal(9)),
            );
            Ok(())
        });
        spawned(&identity);
        let running = self.boot(spec, &identity, cancel)?;
        undo.commit();
        Ok(running)
    }

    fn adopt(&self, spec: &VmmSpec, identity: &Identity) -> Result<Running> {
        let never = Cancel::try_new().map_err(|e| Error::io("adopt the VMM", e))?;
        self.pass_gate(Stage::Adopt, &never)?;
        if let Some(message) = self.state.lock().adopt_failures.pop() {
            return Err(Error::new(Kind::Timeout, message));
        }
        let ssh_addr = self.with(identity, |vmm| {
            (vmm.end.is_none() && vmm.spec.tag == spec.tag).then_some(vmm.ssh_addr)
        });
        let gone = || Error::new(Kind::VmmFailed, "adopt the VMM: it has exited");
        let ssh_addr = ssh_addr.flatten().ok_or_else(gone)?;
        self.state.lock().adoptions.push(spec.vm.clone());
        self.open_console(
            spec,
            identity,
            "reconnected; output since fcd stopped is lost".to_owned(),
        )?;
        Ok(Running {
            identity: identity.clone(),
            ssh_addr,
        })
    }

    fn vm(&self, at: VmRef) -> Result<Box<dyn Vm + '_>> {
        let identity = at.identity;
        Ok(Box::new(FakeVm {
            fake: self,
            identity,
        }))
    }

    fn can_load(&self, driver: &str, _elsewhere: bool) -> Result<()> {
        let refused = || {
            Error::new(
                Kind::Unsupported,
                format!("restore a saved guest: it was saved by {driver}"),
            )
        };
        if driver == "fake" {
            Ok(())
        } else {
            Err(refused())
        }
    }

    fn watch_guest(&self, _dir: &Path, identity: &Identity, on_event: OnEvent) -> Result<()> {
        on_event(GuestEvent::Answered);
        let mut on_event = Some(on_event);
        // The previous callback is dropped after the lock is released, with everything that it
        // owns.
        let _earlier = self.with(identity, |vmm| {
            if vmm.end.is_none() {
                vmm.on_event.replace(on_event.take()?)
            } else {
                None
            }
        });
        Ok(())
    }

    fn checks(&self) -> Vec<Check> {
        self.state.lock().checks += 1;
        vec![Check {
            id: "fake".into(),
            severity: Severity::Ok,
            found: "VMs are simulated".into(),
            fix: None,
        }]
    }
}

/// Returns a spec for a VM in `state_dir`. The files that it names need not exist.
pub fn spec(tag: Tag, state_dir: &Path) -> VmmSpec {
    let vm = tag.vm().clone();
    let dir: PathBuf = state_dir.join(vm.as_str());
    VmmSpec {
        tag,
        kernel: dir.join("vmlinux"),
        initrd: dir.join("initrd"),
        boot_args: String::new(),
        saved: None,
        disk: dir.join("disk"),
        disk_format: super::DiskFormat::Raw,
        seed: dir.join("seed"),
        runtime_disk: None,
        work_disk: None,
        vcpus: 1,
        mem_mib: 128,
        credentials: None,
        network: super::GuestNetwork::UserMode {
            isolated: false,
            ipv6: false,
            ports: Vec::new(),
        },
        rates: crate::api::vm::RateLimits::default(),
        has_balloon: true,
        console_bytes_max: 1 << 20,
        vm,
        dir,
    }
}

#[cfg(test)]
mod tests;
