//! A daemon with its server on a socket in a temporary directory, its clients and pipes, and the
//! checks at the end of every test.

mod commands;
mod imports;
mod observing;

pub use crate::running::Running;
pub use commands::{Builds, FakeCommands};
pub use imports::{Import, pipe, prepare, write_payload};
pub use observing::{await_that, while_held, while_locked};

use crate::points::{PointCommands, PointDriver, PointTransport, Points};
use fcd::testing::api::Call;
use fcd::testing::api::vm::*;
use fcd::testing::client::{Client, Failure};
use fcd::testing::config::{Config, Limits, Qemu, VmDefaults};
use fcd::testing::daemon::{Caller, Daemon, Leftovers, Seams};
use fcd::testing::guest::Transport;
use fcd::testing::guest::fake::{Answer, FakeTransport};
use fcd::testing::ids::VmId;
use fcd::testing::locks::check;
use fcd::testing::server::{Dispatch, Server};
use fcd::testing::store::{State, Store};
use fcd::testing::vmm::fake::Fake;
use fcd::testing::vmm::{Driver, End, Exit};
use fcd::testing::workspace::remote;
use fcd::testing::workspace::remote::GuestWorkspace;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Deadline for a reply. A healthy daemon is much faster, and meets this deadline even on an
/// overloaded host.
pub const SOON: Duration = Duration::from_secs(20);
/// A short deadline for tests that the negative control must see fail.
pub const PROMPT: Duration = Duration::from_secs(4);
pub const ROOTFS_BYTES: u64 = 64 * 1024;
pub const GUEST_PATH: &str = "/root/project";

pub fn median(mut took: Vec<Duration>) -> Duration {
    took.sort();
    took[took.len() / 2]
}

pub fn soon() -> Instant {
    Instant::now() + SOON
}

/// If this variable is set, every world has its root disks on real dm-snapshot devices: see
/// `tests/e2e/another_host.rs`.
pub const REAL_DISKS: &str = "FCD_TEST_DM_SNAPSHOT";

pub struct World {
    _dir: tempfile::TempDir,
    pub config: Config,
    pub vmm: Arc<Fake>,
    pub guest: FakeTransport,
    pub builds: Arc<Builds>,
    /// The daemon's driver: the fake or a wrapper around it.
    pub driver: Arc<dyn Driver>,
    /// The daemon's transport: the fake or a wrapper around it.
    pub transport: Arc<dyn Transport>,
    /// The points of the current daemon.
    pub points: Arc<Points>,
    /// True if the store has failed or the daemon closed in the middle, so that the end of an
    /// operation may be unrecorded.
    pub may_lose_ends: bool,
    daemon: Option<Daemon>,
    server: Option<Server>,
    /// Maps the address of each guest to its VM.
    guests: Arc<Mutex<HashMap<SocketAddr, VmId>>>,
    last_port: Mutex<u16>,
}

/// Runs `body` on a thread with another uid. The daemon sees clients of this thread as that user
/// (SO_PEERCRED). Needs root.
pub fn as_uid<T: Send>(uid: u32, body: impl FnOnce() -> T + Send) -> T {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root: run the tests as root"
    );
    let alone = || {
        // SAFETY: the raw system calls change only this thread. The C library's functions would
        // change all threads.
        #[allow(unsafe_code)]
        let done = unsafe {
            libc::syscall(libc::SYS_setgroups, 0, 0)
                | libc::syscall(libc::SYS_setresgid, uid, uid, uid)
                | libc::syscall(libc::SYS_setresuid, uid, uid, uid)
        };
        assert_eq!(
            done,
            0,
            "become uid {uid}: {}",
            std::io::Error::last_os_error()
        );
        body()
    };
    std::thread::scope(|scope| scope.spawn(alone).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Creates a temporary directory, in memory if possible, so that no test depends on the disk's
/// speed.
fn temp_dir() -> tempfile::TempDir {
    if std::env::var_os(REAL_DISKS).is_some() {
        // The directory will contain device nodes, which the tmpfs for tests may not allow.
        return tempfile::tempdir().unwrap();
    }
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn limits() -> Limits {
    Limits {
        pool_workers: 2,
        pool_workers_per_uid_max: usize::MAX,
        mem_mib_max: 64 * 1024,
        boots_max: 8,
        ..Limits::default()
    }
}

/// Creates an image with empty contents in the files that the image registry expects.
pub fn make_image(state_dir: &Path, name: &str) {
    make_image_of(state_dir, name, None);
}

/// Creates an image with empty contents that this user has built, or that has no owner.
pub fn make_image_of(state_dir: &Path, name: &str, owner_uid: Option<u32>) {
    let dir = state_dir.join("images").join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let mut files = Vec::new();
    for (file, bytes) in [("vmlinux", 3), ("initrd", 2), ("rootfs.ext4", ROOTFS_BYTES)] {
        std::fs::write(dir.join(file), vec![0; bytes as usize]).unwrap();
        files.push(serde_json::json!({"name": file, "bytes": bytes, "sha256": ""}));
    }
    let image = serde_json::json!({"format": 1, "name": name, "os": "Fake OS", "kernel_version": "6.1",
        "packages": [], "built_at": 7, "guest_version": 4, "owner_uid": owner_uid, "files": files});
    std::fs::write(dir.join("image.json"), image.to_string()).unwrap();
}

/// The shutdown command in guests that boot with a guest runtime.
const RUNTIME_SHUTDOWN_COMMAND: &str = "/.fcd/lib/shutdown";

impl World {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut Config)) -> Self {
        Self::with_driver(|fake| fake, change)
    }

    /// Creates a world with its files on a real file system, whatever the speed of the disk.
    pub fn on_disk(change: impl FnOnce(&mut Config)) -> Self {
        Self::with_parts(tempfile::tempdir().unwrap(), |fake| fake, change)
    }

    pub fn with_driver<D: Driver + 'static>(
        around: impl FnOnce(Arc<Fake>) -> Arc<D>,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        Self::with_parts(temp_dir(), around, change)
    }

    fn with_parts<D: Driver + 'static>(
        dir: tempfile::TempDir,
        around: impl FnOnce(Arc<Fake>) -> Arc<D>,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let mut config = Config {
            state_dir: dir.path().join("state"),
            socket: dir.path().join("fcd.sock"),
            limits: limits(),
            vm: VmDefaults::default(),
            vmm: fcd::testing::config::Vmm::default(),
            qemu: Qemu::default(),
            firecracker: fcd::testing::config::Firecracker::default(),
            disk: fcd::testing::config::Disk::default(),
            registry: Default::default(),
            network: fcd::testing::config::Network::default(),
            sync: Vec::new(),
            origins: Default::default(),
        };
        if std::env::var_os(REAL_DISKS).is_some() {
            config.disk.driver = fcd::testing::config::DiskDriver::DmSnapshot;
        }
        change(&mut config);
        std::fs::create_dir(&config.state_dir).unwrap();
        make_image(&config.state_dir, "default");
        let (vmm, guest) = (Arc::new(Fake::new().unwrap()), FakeTransport::new());
        let guests: Arc<Mutex<HashMap<SocketAddr, VmId>>> = Arc::default();
        let driver = around(vmm.clone());
        let transport = Arc::new(guest.clone());
        let mut world = Self {
            _dir: dir,
            config,
            vmm,
            guest,
            builds: Arc::default(),
            driver,
            transport,
            points: Arc::default(),
            may_lose_ends: false,
            daemon: None,
            server: None,
            guests,
            last_port: Mutex::new(1000),
        };
        world.behave();
        world.open();
        world.daemon().reconciler.reconcile();
        world
    }

    /// Sets how guests answer: a shutdown ends the guest, and imports and exports succeed.
    fn behave(&self) {
        for command in [
            fcd::testing::image::SHUTDOWN_COMMAND,
            RUNTIME_SHUTDOWN_COMMAND,
        ] {
            let (vmm, guests) = (self.vmm.clone(), self.guests.clone());
            self.guest.on(command, move |call| {
                let vm = guests.lock().unwrap().get(&call.addr).cloned();
                if let Some(vm) = vm {
                    vmm.die(&vm, &fcd::testing::vmm::End::GuestShutDown);
                }
                Answer::status(0).stdout("synced\n")
            });
        }
        self.guest.on("/usr/lib/fcd/busybox sh -c", |_| {
            Answer::status(0).stdout("ready\n")
        });
        let place = GuestWorkspace::new(GUEST_PATH);
        self.guest.on(&remote::begin_command(&place), |_| {
            Answer::status(0).stdout("fcd-begin 1\n")
        });
        let finish = remote::Finish::default();
        self.guest
            .on(&remote::finish_command(&place, &finish), |_| {
                Answer::status(0).stdout("fcd-finish 1 3\n")
            });
        self.guest.on(&remote::export_patch_command(&place), |_| {
            Answer::status(0).stdout("a patch")
        });
    }

    fn open(&mut self) {
        let points = Arc::new(Points::default());
        let seams = Seams {
            vmm: Arc::new(PointDriver(self.driver.clone(), points.clone())),
            transport: Arc::new(PointTransport(self.transport.clone(), points.clone())),
            commands: Arc::new(PointCommands(
                FakeCommands(self.builds.clone()),
                points.clone(),
            )),
            installations: None,
        };
        let daemon = Daemon::open(self.config.clone(), seams).unwrap();
        daemon.core.effects.follow(points.clone());
        daemon.core.store.faults().ask(points.clone());
        self.points = points;
        let dispatch = Arc::new(Dispatch::new(daemon.clone()));
        self.server = Some(
            Server::bind(
                &self.config.socket,
                fcd::testing::server::Limits::from(&self.config.limits),
                dispatch,
            )
            .unwrap(),
        );
        self.daemon = Some(daemon);
    }

    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("open")
    }

    /// Drains the daemon as SIGTERM does. Returns the state that it had in memory.
    pub fn shut(&mut self) -> State {
        let (daemon, server) = (
            self.daemon.take().expect("open"),
            self.server.take().expect("open"),
        );
        let left = fcd::testing::server::drain(
            &server,
            &daemon,
            Instant::now() + Duration::from_millis(50),
            soon(),
        );
        assert_eq!(left, 0, "connections are left");
        // The thread that reports the end of the last VMM may still run.
        await_that("nothing is left", || {
            daemon.leftovers() == Leftovers::default()
        });
        let state = daemon.core.store.read(State::clone);
        for (_, op) in daemon.core.ops.list(&fcd::testing::ops::Filter {
            all: true,
            ..Default::default()
        }) {
            if let Some(row) = state.op(&op.id) {
                if self.may_lose_ends && !row.state.has_ended() {
                    continue;
                }
                assert_eq!(
                    row.state, op.state,
                    "operation {} ({}) in the store and in memory",
                    op.id, op.method
                );
            }
        }
        self.vmm.forget_watchers();
        state
    }

    /// Drains the daemon while clients still use it. Only [`World::reopen`] is possible afterwards.
    pub fn close(&self) {
        let server = self.server.as_ref().expect("open");
        let soon_idle = Instant::now() + Duration::from_millis(50);
        let left = fcd::testing::server::drain(server, self.daemon(), soon_idle, soon());
        assert_eq!(left, 0, "connections are left");
    }

    /// Waits until the threads of a dead daemon (see [`Points`]) have ended, and drops it.
    pub fn crash(&mut self) {
        assert!(self.points.is_dead());
        let (daemon, server) = (
            self.daemon.take().expect("open"),
            self.server.take().expect("open"),
        );
        server.stop_accepting();
        daemon.close(Instant::now(), soon());
        server.hang_up();
        assert_eq!(server.drain(soon()), 0, "connections are left");
        await_that("the dead daemon's threads end", || {
            daemon.core.thread_count() == 0
        });
        self.vmm.forget_watchers();
    }

    /// Opens a new daemon on the state of the previous one. The VMMs keep running, and the caller
    /// decides when to reconcile.
    pub fn reopen(&mut self) {
        if self.daemon.is_some() {
            self.shut();
        }
        self.open();
    }

    /// Opens the daemon again and reconciles every VM.
    pub fn restart_daemon(&mut self) {
        self.reopen();
        self.daemon().reconciler.reconcile();
    }

    /// Makes a VM's VMM exit, although the daemon has not asked for it.
    #[track_caller]
    pub fn kill_vmm(&self, vm: &VmId, exit: Exit) {
        assert!(self.vmm.die(vm, &End::Vmm(exit)), "no VMM of {vm}");
    }

    pub fn vm_dir(&self, vm: &VmId) -> PathBuf {
        self.config.state_dir.join("vms").join(vm.as_str())
    }

    /// Stops the daemon and changes rows as if it had died during an operation.
    pub fn edit_rows(&mut self, change: impl FnOnce(&mut fcd::testing::store::Tx)) {
        if self.daemon.is_some() {
            self.shut();
        }
        let store = Store::open(&self.config.state_dir).unwrap();
        store
            .change_durable(|tx| {
                change(tx);
                Ok(())
            })
            .unwrap();
        store.close();
    }

    /// Lets every uid connect: see [`as_uid`].
    pub fn open_to_everybody(&self) {
        use std::os::unix::fs::PermissionsExt;
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap()
        };
        set(self._dir.path(), 0o755);
        set(&self.config.socket, 0o666);
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.config.socket).unwrap_or_else(|e| panic!("connect: {e}"))
    }

    pub fn call<C: Call>(&self, request: &C::Request) -> Result<C::Reply, Failure> {
        self.client().call::<C>(request)
    }

    /// Begins a call on its own connection. Another thread reads the replies.
    pub fn begin<C: Call>(&self, request: C::Request, fds: Vec<OwnedFd>) -> Running<C::Reply>
    where
        C::Request: Send + 'static,
        C::Reply: Send + 'static,
    {
        Running::begin::<C>(self.client(), request, fds)
    }

    /// Makes a call and waits for its result.
    pub fn run<C: Call>(&self, request: C::Request) -> Result<C::Reply, Failure>
    where
        C::Request: Send + 'static,
        C::Reply: Send + 'static,
    {
        self.begin::<C>(request, vec![]).finish(SOON)
    }

    pub fn create(&self, name: &str) -> Vm {
        self.call::<VmCreate>(&VmCreateRequest {
            name: Some(name.parse().unwrap()),
            ..Default::default()
        })
        .unwrap()
        .vm
    }

    /// Gives the VM's next guest its own address. Returns the address.
    pub fn place(&self, vm: &VmId) -> SocketAddr {
        let mut port = self.last_port.lock().unwrap();
        *port += 1;
        let addr = SocketAddr::from(([127, 0, 0, 1], *port));
        self.guests.lock().unwrap().insert(addr, vm.clone());
        self.vmm.set_ssh_addr_of(vm, addr);
        addr
    }

    /// Creates and starts a VM. Returns the VM and its guest's address.
    pub fn running(&self, name: &str) -> (Vm, SocketAddr) {
        let vm = self.create(name);
        let addr = self.place(&vm.id);
        (
            self.start(name).unwrap_or_else(|e| panic!("start: {e}")),
            addr,
        )
    }

    pub fn start(&self, name: &str) -> Result<Vm, Failure> {
        self.run::<VmStart>(request(name)).map(|r| r.vm)
    }
    pub fn stop(&self, name: &str) -> Result<Vm, Failure> {
        self.run::<VmStop>(stop(name)).map(|r| r.vm)
    }
    pub fn delete(&self, name: &str) -> Result<VmDeleteReply, Failure> {
        self.run::<VmDelete>(delete(name))
    }
    pub fn show(&self, name: &str) -> Result<Vm, Failure> {
        self.call::<VmShow>(&request(name)).map(|r| r.vm)
    }
    pub fn state(&self, name: &str) -> VmState {
        self.show(name)
            .unwrap_or_else(|e| panic!("show {name}: {e}"))
            .state
    }
}

pub fn root() -> Caller {
    Caller {
        uid: 0,
        gid: 0,
        pid: 0,
    }
}

pub fn ssh_config(vm: &str) -> SshConfigRequest {
    SshConfigRequest {
        vm: vm.into(),
        ..Default::default()
    }
}

pub fn request(vm: &str) -> VmRequest {
    VmRequest { vm: vm.into() }
}

pub fn stop(vm: &str) -> VmStopRequest {
    VmStopRequest {
        vm: vm.into(),
        force: false,
        timeout_ms: None,
        keep: false,
    }
}

pub fn delete(vm: &str) -> VmDeleteRequest {
    VmDeleteRequest {
        vm: vm.into(),
        force: true,
        if_exists: false,
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if let (Some(daemon), Some(server)) = (&self.daemon, &self.server) {
                server.stop_accepting();
                server.hang_up();
                daemon.close(Instant::now(), Instant::now() + PROMPT);
            }
            return;
        }
        if self.daemon.is_some() {
            let memory = self.shut();
            let store = Store::open(&self.config.state_dir).unwrap();
            store.read(|disk| {
                assert!(
                    *disk == memory,
                    "on disk:\n{disk:#?}\nin memory:\n{memory:#?}"
                )
            });
            store.close();
        }
        assert_eq!(self.vmm.clashes(), 0, "two VMMs on one disk");
        assert_eq!(check::violations(), 0);
    }
}
