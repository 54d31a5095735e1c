//! The world of a history: one daemon after the other, with fakes that outlive them.

use crate::client::Client;
use crate::points::{PointCommands, PointDriver, PointTransport, Points};
use fcd::testing::config::{Config, Limits, VmDefaults};
use fcd::testing::daemon::{Daemon, Seams};
use fcd::testing::error::{Error, Kind, Result};
use fcd::testing::guest::fake::{Answer, FakeTransport, Gate};
use fcd::testing::host::command::Output;
use fcd::testing::host::{Command, Commands};
use fcd::testing::ids::VmId;
use fcd::testing::locks::Cancel;
use fcd::testing::sched::sim::{self, Group};
use fcd::testing::sched::{Condvar, Instant, Mutex};
use fcd::testing::server::{DirectServer, Dispatch, Limits as ServerLimits, Peer};
use fcd::testing::store::memory;
use fcd::testing::vmm::End;
use fcd::testing::vmm::fake::Fake;
use fcd::testing::workspace::remote::{self, GuestWorkspace};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub const GUEST_PATH: &str = "/root/project";
/// A command that runs until something else ends it.
pub const HELD: &str = "hold";
const ROOTFS_BYTES: usize = 4096;

/// A daemon that is running.
pub struct Running {
    pub daemon: Daemon,
    pub server: DirectServer,
    pub group: Group,
}

pub struct World {
    pub config: Config,
    pub vmm: Arc<Fake>,
    pub guest: FakeTransport,
    pub points: Arc<Points>,
    running: Mutex<Option<Arc<Running>>>,
    published: Condvar,
    /// The callers' ends of all connections to the daemon.
    streams: Mutex<Vec<UnixStream>>,
    guests: Arc<Mutex<BTreeMap<SocketAddr, VmId>>>,
    pub counts: Mutex<Counts>,
    /// The calls that ended a guest: when they were sent and answered.
    pub ends: Mutex<Vec<EndedGuest>>,
}

/// A successful call that ended the guest of a VM.
pub struct EndedGuest {
    pub vm: String,
    pub sent: Instant,
    pub answered: Instant,
}

/// Counts of one history.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub requests: u64,
    pub kills: u64,
    pub checked: u64,
}

fn limits() -> Limits {
    Limits {
        pool_workers: 2,
        pool_workers_per_uid_max: usize::MAX,
        pool_queue: 3,
        boots_max: 1,
        boot_timeout_s: 30,
        stop_timeout_s: 5,
        transfer_idle_s: 5,
        // There is room for one VM and a half.
        mem_mib_max: VmDefaults::default().mem_mib * 2,
        ..Limits::default()
    }
}

/// Creates an image with empty contents.
fn make_image(state_dir: &Path) {
    let dir = state_dir.join("images").join("default");
    std::fs::create_dir_all(&dir).unwrap();
    let mut files = Vec::new();
    for (file, bytes) in [("vmlinux", 3), ("initrd", 2), ("rootfs.ext4", ROOTFS_BYTES)] {
        std::fs::write(dir.join(file), vec![0; bytes]).unwrap();
        files.push(serde_json::json!({"name": file, "bytes": bytes, "sha256": ""}));
    }
    let image = serde_json::json!({"format": 1, "name": "default", "os": "Fake OS",
        "kernel_version": "6.1", "packages": [], "built_at": 7, "guest_version": 4,
        "owner_uid": null, "files": files});
    std::fs::write(dir.join("image.json"), image.to_string()).unwrap();
}

/// Host commands that write the header of a disk and succeed otherwise.
struct SimCommands;

impl Commands for SimCommands {
    fn run(
        &self,
        command: &Command,
        _cancel: &Cancel,
        _on_line: &mut dyn FnMut(&str),
    ) -> Result<Output> {
        let _blocking = fcd::testing::locks::region(fcd::testing::locks::Rank::HostCmd);
        let args: Vec<_> = command
            .args
            .iter()
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        if command.program == "mkfs.ext4" || args.iter().any(|a| a == "rebase") {
            return Ok(Output::default());
        }
        if command.program != "qemu-img" {
            let text = format!("run {}: it is not there", command.program.to_string_lossy());
            return Err(Error::new(Kind::CommandMissing, text));
        }
        let [.., path, size] = args.as_slice() else {
            panic!("{args:?}")
        };
        let mut header = [0u8; 32];
        header[..4].copy_from_slice(b"QFI\xfb");
        (header[7], header[23]) = (3, 16);
        header[24..].copy_from_slice(&size.parse::<u64>().unwrap().to_be_bytes());
        std::fs::write(path, header).map_err(|e| Error::io("write a disk", e))?;
        Ok(Output::default())
    }
}

impl World {
    pub fn new(dir: &Path, points: Points) -> Arc<Self> {
        let config = Config {
            state_dir: dir.join("state"),
            socket: dir.join("fcd.sock"),
            limits: limits(),
            vm: VmDefaults::default(),
            vmm: Default::default(),
            qemu: Default::default(),
            firecracker: Default::default(),
            disk: Default::default(),
            registry: Default::default(),
            network: Default::default(),
            sync: Vec::new(),
            origins: Default::default(),
        };
        std::fs::create_dir_all(&config.state_dir).unwrap();
        make_image(&config.state_dir);
        memory::create(&config.state_dir, "5eed5eed");
        let world = Arc::new(Self {
            config,
            vmm: Arc::new(Fake::new().unwrap()),
            guest: FakeTransport::new(),
            points: Arc::new(points),
            running: Mutex::new(None),
            published: Condvar::new(),
            streams: Mutex::new(Vec::new()),
            guests: Arc::default(),
            counts: Mutex::new(Counts::default()),
            ends: Mutex::new(Vec::new()),
        });
        world.behave();
        world
    }

    /// Sets how guests answer: a shutdown ends the guest, and imports and exports succeed.
    fn behave(&self) {
        let (vmm, guests) = (self.vmm.clone(), self.guests.clone());
        self.guest
            .on(fcd::testing::image::SHUTDOWN_COMMAND, move |call| {
                let vm = guests.lock().get(&call.addr).cloned();
                if let Some(vm) = vm {
                    vmm.die(&vm, &End::GuestShutDown);
                }
                Answer::status(0).stdout("synced\n")
            });
        self.guest.on("/usr/lib/fcd/busybox sh -c", |_| {
            Answer::status(0).stdout("ready\n")
        });
        let place = GuestWorkspace::new(GUEST_PATH);
        self.guest.on(&remote::begin_command(&place), |_| {
            Answer::status(0).stdout("fcd-begin 1\n")
        });
        let finish = remote::finish_command(&place, &remote::Finish::default());
        self.guest
            .on(&finish, |_| Answer::status(0).stdout("fcd-finish 1 3\n"));
        self.guest.on(&remote::export_patch_command(&place), |_| {
            Answer::status(0).stdout("a patch")
        });
        let never = Gate::closed();
        self.guest.on(HELD, move |_| Answer::status(0).hold(&never));
    }

    /// Gives the VM's guests an address of their own.
    pub fn place(&self, vm: &VmId) {
        let mut guests = self.guests.lock();
        if guests.values().any(|placed| placed == vm) {
            return;
        }
        let port = 1000 + u16::try_from(guests.len()).unwrap();
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        guests.insert(addr, vm.clone());
        drop(guests);
        self.vmm.set_ssh_addr_of(vm, addr);
    }

    pub fn addr(&self, vm: &VmId) -> Option<SocketAddr> {
        let guests = self.guests.lock();
        let placed = guests.iter().find(|(_, placed)| *placed == vm);
        placed.map(|(addr, _)| *addr)
    }

    /// Starts a daemon in a group of its own, which reconciles its VMs and then sweeps.
    pub fn start_daemon(self: &Arc<Self>) -> Group {
        let (group, world) = (sim::enter(), self.clone());
        let body = move || world.serve(group);
        sim::spawn_into(group, || {
            drop(fcd::testing::host::thread::spawn("daemon", body).unwrap())
        });
        group
    }

    fn serve(&self, group: Group) {
        let seams = Seams {
            vmm: Arc::new(PointDriver(self.vmm.clone(), self.points.clone())),
            transport: Arc::new(PointTransport(
                Arc::new(self.guest.clone()),
                self.points.clone(),
            )),
            commands: Arc::new(PointCommands(SimCommands, self.points.clone())),
            installations: None,
        };
        let daemon = match Daemon::open(self.config.clone(), seams) {
            Ok(daemon) => daemon,
            Err(e) => return sim::fail(&format!("open the daemon: {e}")),
        };
        daemon.core.effects.follow(self.points.clone());
        daemon.core.store.faults().ask(self.points.clone());
        daemon.core.history.record();
        let dispatch = Arc::new(Dispatch::new(daemon.clone()));
        let limits = ServerLimits::from(&self.config.limits);
        let server = DirectServer::new(limits, dispatch).unwrap();
        let running = Running {
            daemon: daemon.clone(),
            server,
            group,
        };
        *self.running.lock() = Some(Arc::new(running));
        self.published.notify_all();
        daemon.reconciler.reconcile();
        daemon.reconciler.run_sweeper();
    }

    /// Returns the running daemon. Waits for it if it is starting.
    pub fn running(&self) -> Arc<Running> {
        let mut running = self.running.lock();
        loop {
            if let Some(running) = &*running {
                return running.clone();
            }
            let deadline = Instant::now() + Duration::from_secs(3600);
            self.published.wait_until(&mut running, deadline);
        }
    }

    /// Takes the daemon away after it was killed, or to shut it down. Callers lose their
    /// connections if it was killed.
    pub fn take_daemon(&self, was_killed: bool) -> Option<Arc<Running>> {
        let running = self.running.lock().take();
        let streams = std::mem::take(&mut *self.streams.lock());
        if was_killed {
            self.counts.lock().kills += 1;
            self.vmm.leak_watchers();
            for stream in streams {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
        running
    }

    /// Connects to the running daemon.
    pub fn client(&self, uid: u32) -> Client {
        let running = self.running();
        let peer = Peer {
            uid,
            gid: uid,
            pid: 1,
        };
        let connect = || running.server.connect(peer);
        let stream =
            sim::spawn_into(running.group, connect).unwrap_or_else(|e| panic!("connect: {e}"));
        let client = Client::new(stream);
        self.streams.lock().push(client.stream());
        let is_current = |current: &Arc<Running>| current.group == running.group;
        if !self.running.lock().as_ref().is_some_and(is_current) {
            client.hang_up();
        }
        client
    }
}
