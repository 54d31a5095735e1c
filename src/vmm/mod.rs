//! VMMs: what a driver must do, and the drivers.

pub mod console;
pub mod devices;
mod dial;
pub mod drivers;
mod end;
#[cfg(feature = "fakes")]
pub mod fake;
pub mod firecracker;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod log_file;
mod processes;
pub mod qemu;
mod run_dir;
mod watch;

use crate::api::daemon::Check;
use crate::api::port::Port;
use crate::api::vm::RateLimits;
use crate::error::Result;
use crate::ids::VmId;
use crate::locks::Cancel;
use console::Consoles;
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub use crate::host::process::{Exit, Identity};
pub use end::{End, from_console as end_from_console};

/// Who hears how a VMM ended.
pub type Died = Box<dyn FnOnce(End) + Send>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    Raw,
    Qcow2,
    /// A block device.
    Device,
}

/// The guest's one network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestNetwork {
    /// The VMM's own network stack, which forwards a port of the host's loopback to the guest's SSH server. `isolated`: and
    /// passes nothing else but what comes in by `ports`.
    UserMode { isolated: bool, ports: Vec<Port> },
    /// A tap that is the VMM's uid's: its name, the guest's Ethernet address, and the address under which the guest's SSH
    /// server is reached.
    Tap { name: String, mac: String, address: Ipv4Addr },
}

/// Everything a driver needs to run one VM once. All paths are absolute.
#[derive(Clone, Debug)]
pub struct VmmSpec {
    pub vm: VmId,
    /// `fc-<install>-<vm>-<generation>`: in the process's arguments, so that it can be found again.
    pub tag: String,
    /// The VM's directory, root's or the daemon's own, 0711. Holds `disk`, `seed`, `console.log`, `vmm.log` (what
    /// the VMM itself says), and `run/`, which belongs to the VMM's uid and where it makes its sockets; the driver
    /// makes all but the first two.
    pub dir: PathBuf,
    /// An ELF kernel with a PVH entry (`vmlinux`), as `initrd`, `disk` and `seed` readable by the VMM's uid, which
    /// also needs search permission on every directory above.
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// The image's own kernel arguments, as `root=/dev/vda init=/sbin/fcd-init`; the driver adds its own.
    pub boot_args: String,
    /// The guest's first block device; its serial number is `root`.
    pub disk: PathBuf,
    pub disk_format: DiskFormat,
    /// The second block device, read-only; its serial number is `seed`.
    pub seed: PathBuf,
    /// A third one, raw, read and written; its serial number is `work`.
    pub work_disk: Option<PathBuf>,
    pub vcpus: u32,
    pub mem_mib: u64,
    /// uid and gid of the VMM's process, when the daemon is root.
    pub credentials: Option<(u32, u32)>,
    pub network: GuestNetwork,
    /// Of the network only where [`Driver::limits_network`].
    pub rates: RateLimits,
    /// The guest's initramfs has the driver of a balloon, by which it gives memory back.
    pub has_balloon: bool,
    /// Bound of the console log, both files together.
    pub console_bytes_max: u64,
    /// The guest goes on from where it was saved; it does not boot. vCPUs, memory and the kind of each device are as they were then.
    pub saved: Option<Saved>,
}

/// What [`Driver::save`] left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Readable by the VMM's uid, as search permission goes; nobody writes it while a guest runs that began with it.
    pub memory: PathBuf,
    /// State of the devices, where the driver keeps it apart.
    pub devices: PathBuf,
    /// [`Driver::describe`] of when it was saved.
    pub driver: String,
}

/// Where a guest is saved to.
#[derive(Clone, Copy, Debug)]
pub struct SaveTo<'a> {
    /// Two files that are there, empty, and that the VMM's uid may write.
    pub memory: &'a Path,
    pub devices: &'a Path,
}

impl VmmSpec {
    /// By their serial numbers, those that the guest writes.
    pub fn disks(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let work = self.work_disk.as_deref().map(|path| ("work", path));
        std::iter::once(("root", self.disk.as_path())).chain(work)
    }
}

/// A live VMM that was found by its tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tagged {
    pub tag: String,
    pub identity: Identity,
}

/// A VMM that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    pub identity: Identity,
    /// Where the guest's SSH server is reached.
    pub ssh_addr: SocketAddr,
}

/// What a driver tells of a guest that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The VMM has answered for the first time.
    Answered,
    /// The guest stands still because the host's disk is full (true), or goes on by itself, with room again (false).
    Paused(bool),
    /// The VMM has not answered for so long that it is taken to hang (true), or answers again (false).
    Unresponsive(bool),
}

/// Nothing above this module knows which driver it talks to.
pub trait Driver: Send + Sync {
    /// For people: `qemu (tcg, microvm)`.
    fn describe(&self) -> String;

    /// Finds out now what the first start would find out, which may take seconds: whether this host's
    /// virtualisation runs `kernel`. Never an error: `describe` and `checks` tell.
    fn warm_up(&self, kernel: &Path, cancel: &Cancel);

    /// The console logs of its VMs.
    fn consoles(&self) -> &Consoles;

    /// Starts the process and answers once the VMM runs the guest; the guest boots on. `spawned` is told the
    /// identity as soon as there is one, before anything else is asked of the process. On an error or a cancel
    /// no process is left.
    fn start(&self, spec: &VmmSpec, cancel: &Cancel, spawned: &mut dyn FnMut(&Identity)) -> Result<Running>;

    /// The live process that carries this tag, whoever started it.
    fn find(&self, tag: &str) -> Result<Option<Identity>>;

    /// All live processes whose tag begins so, from one look at the host.
    fn list(&self, tag_prefix: &str) -> Result<Vec<Tagged>>;

    /// Takes up a VMM that an earlier daemon started: checks identity, executable and tag, opens its console
    /// again (the gap is marked in the log), asks for its SSH address.
    fn adopt(&self, spec: &VmmSpec, identity: &Identity) -> Result<Running>;

    /// Whether it lives still. A zombie does not.
    fn is_alive(&self, identity: &Identity) -> bool;

    /// Whether it lives still and is the VMM with this tag: a number that somebody else's process has by now, or that somebody
    /// wrote, is nobody to adopt or to end.
    fn is_ours(&self, identity: &Identity, tag: &str) -> bool;

    /// Whether it is a process of this driver's program.
    fn runs(&self, identity: &Identity) -> bool;

    /// Waits until the process has exited; false when the deadline or the cancel came first.
    fn wait_exit(&self, identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool>;

    /// Ends the process (SIGKILL by pidfd) and waits until it has exited. Already gone: ok. An error (`timeout`)
    /// when it has not exited by the deadline: what it holds must not be reused.
    fn kill(&self, identity: &Identity, deadline: Instant) -> Result<()>;

    /// Calls `died` once, from a thread of its own, when the process exits or if it has. `dir` is the VM's directory, whose
    /// console tells how its guest ended. Never after the driver is dropped.
    fn watch(&self, dir: &Path, identity: &Identity, died: Died) -> Result<()>;

    /// Calls `told` from a thread of the driver's at each change of what [`Told`] names, with `Paused(false)` at the end.
    fn watch_guest(&self, dir: &Path, identity: &Identity, told: Box<dyn Fn(Told) + Send>) -> Result<()>;

    /// Lets the guest of the VM in `dir` stand still, or go on; one that does so already is ok.
    fn set_paused(&self, dir: &Path, identity: &Identity, is_paused: bool, cancel: &Cancel) -> Result<()>;

    /// Saves the memory and the devices of a guest that stands still, and leaves it so. The VMM has brought all that the guest wrote to its
    /// disks to their files when this returns. Returns the VMM's version.
    fn save(&self, spec: &VmmSpec, identity: &Identity, to: SaveTo<'_>, cancel: &Cancel) -> Result<String>;

    /// Whether this driver, as it starts VMs now, lets a guest go on that was saved by `driver`, in another VM's directory if it must.
    fn can_load(&self, driver: &str, elsewhere: bool) -> Result<()>;

    /// Whether it limits what a guest sends and receives, a VMM that runs or one that it is to start. Otherwise the tap's owner does.
    fn limits_network(&self, running: Option<&Identity>) -> bool;

    /// From now on the running guest's devices move no more than `spec.rates` says.
    fn set_rates(&self, spec: &VmmSpec, identity: &Identity, cancel: &Cancel) -> Result<()>;

    /// The running guest is to keep so much of the memory that it was started with, and to give back the rest.
    fn set_balloon(&self, spec: &VmmSpec, identity: &Identity, keep_mib: u64, cancel: &Cancel) -> Result<()>;

    /// What it keeps now.
    fn balloon_mib(&self, spec: &VmmSpec, identity: &Identity, cancel: &Cancel) -> Result<u64>;

    /// What the VMM counts, in its own words, the oldest first; of now is the last.
    fn metrics(&self, spec: &VmmSpec, identity: &Identity, cancel: &Cancel) -> Result<Vec<serde_json::Value>>;

    /// A stream to what listens on this port of the guest's vsock. It ends with the VMM, and lives on without the daemon.
    fn connect(&self, identity: &Identity, port: u32, cancel: &Cancel) -> Result<UnixStream>;

    /// Presses Ctrl-Alt-Del on the guest's keyboard; false where its guests have none.
    fn press_ctrl_alt_del(&self, identity: &Identity, cancel: &Cancel) -> Result<bool>;

    /// Whether there is more on the host of a VMM with a tag than its process: what `clear` removes.
    fn leaves_remains(&self) -> bool;

    /// Removes what the VMM with this tag, of the VM in `dir`, had on the host beside its files; gone already is ok. It must have exited.
    fn clear(&self, dir: &Path, tag: &str) -> Result<()>;

    /// The tags that begin so of which such a thing is on the host. `vms`: where the directories of VMs are.
    fn remains(&self, vms: &Path, tag_prefix: &str) -> Result<Vec<String>>;

    /// Whether its VMMs get nodes of their own of [`devices::KVM`] and [`devices::TUN`], so that the modes of the host's nodes do
    /// not matter.
    fn makes_device_nodes(&self) -> bool;

    /// Whether a disk may be a qcow2 file.
    fn reads_qcow2(&self) -> bool;

    /// What the driver needs, found and picked.
    fn checks(&self) -> Vec<Check>;
}
