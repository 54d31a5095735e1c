//! The VMM drivers, and the interface [`Driver`] that they implement.
//!
//! A driver starts VMMs, finds them by their tags, adopts those that an earlier daemon started, and
//! talks to them. It keeps no record of VMs: the daemon passes a [`VmmSpec`] and an [`Identity`]
//! with each call. [`drivers::Drivers`] combines all drivers, so nothing above this module knows
//! which one runs a VM.
//!
//! Every VMM has a thread that monitors it (`monitor.rs` of each driver). One thread reads all
//! consoles ([`console`]), and one thread per driver waits for processes to exit. Calls that talk
//! to a VMM block, so no lock may be held.

pub mod console;
mod conversation;
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
mod poll_thread;
mod processes;
pub mod qemu;
mod run_dir;
mod shutdown_cause;
mod silence;
mod vmm_log;
mod watch;

use crate::api::daemon::Check;
use crate::api::port::Port;
use crate::api::vm::RateLimits;
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::ids::{Tag, VmId};
use crate::locks::Cancel;
use console::Consoles;
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

#[cfg(any(test, feature = "fakes"))]
pub use crate::host::process::Exit;
pub use crate::host::process::Identity;
pub use end::{End, from_files as end_from_files};
pub use processes::Processes;

/// A callback that receives how a VMM ended.
pub type Died = Box<dyn FnOnce(End) + Send>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    Raw,
    Qcow2,
    /// A block device.
    Device,
}

/// The guest's only network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestNetwork {
    /// The VMM's own network stack, which forwards a loopback port of the host to the guest's SSH
    /// server. If `isolated`, the guest can reach nothing, and only connections through `ports`
    /// reach it. An isolated guest has no IPv6, whatever `ipv6` says.
    UserMode {
        isolated: bool,
        ipv6: bool,
        ports: Vec<Port>,
    },
    /// A tap owned by the VMM's uid: its name, the guest's MAC address, and the guest's address.
    Tap {
        name: String,
        mac: String,
        address: Ipv4Addr,
    },
}

/// Everything a driver needs to run one VM once. All paths are absolute.
#[derive(Clone, Debug)]
pub struct VmmSpec {
    #[cfg_attr(
        not(any(test, feature = "fakes")),
        allow(dead_code, reason = "only the fake driver reads it")
    )]
    pub vm: VmId,
    /// An argument of the VMM's process, with which a restarted daemon finds the process.
    pub tag: Tag,
    /// The VM's directory with mode 0711, owned by root or by the daemon. It holds `disk`, `seed`,
    /// `console.log`, `vmm.log` (the VMM's own output), and `run/`, which belongs to the VMM's uid
    /// and contains its sockets. The driver creates all of these except `disk` and `seed`.
    pub dir: PathBuf,
    /// An ELF kernel with a PVH entry (`vmlinux`). The VMM's uid must be able to read it, `initrd`,
    /// `disk` and `seed`, and to search all directories above them.
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// The image's own kernel arguments, such as `root=/dev/vda init=/sbin/fcd-init`. The driver
    /// appends others.
    pub boot_args: String,
    /// The guest's first block device, with the serial number `root`.
    pub disk: PathBuf,
    pub disk_format: DiskFormat,
    /// The guest's second block device, which is read-only, with the serial number `seed`.
    pub seed: PathBuf,
    /// A raw file from which the guest boots, with the serial number `runtime`. It is read-only,
    /// and the guest's third block device if there is one.
    pub runtime_disk: Option<PathBuf>,
    /// The guest's last block device, a raw file, with the serial number `work`.
    pub work_disk: Option<PathBuf>,
    pub vcpus: u32,
    pub mem_mib: u64,
    /// The user of the VMM's process, if the daemon is root.
    pub credentials: Option<Credentials>,
    pub network: GuestNetwork,
    /// The rate limits. The VMM applies the network limits only with
    /// [`Capabilities::limits_network`].
    pub rates: RateLimits,
    /// True if the guest's initramfs has the balloon driver, which returns memory to the host.
    pub has_balloon: bool,
    /// The size limit of the console log, for both of its files together.
    pub console_bytes_max: u64,
    /// If set, the guest is restored from here and does not boot. The vCPUs, the memory and the
    /// kinds of devices must be the same as when it was saved.
    pub saved: Option<Saved>,
}

/// A guest that [`Vm::save`] has saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The guest's memory. The VMM's uid must be able to read it. It must not be written while a
    /// guest that was restored from it runs.
    pub memory: PathBuf,
    /// The state of the devices, if the driver stores it in a separate file.
    pub devices: PathBuf,
    /// The result of [`Driver::describe`] when the guest was saved.
    pub driver: String,
}

/// The files to save a guest to.
#[derive(Clone, Copy, Debug)]
pub struct SaveTo<'a> {
    /// This file and `devices` exist and are empty, and the VMM's uid may write them.
    pub memory: &'a Path,
    pub devices: &'a Path,
}

impl VmmSpec {
    /// Returns a reference to the VM that was started from this specification as this process.
    #[cfg(any(test, feature = "fakes"))]
    pub fn running_as(&self, identity: &Identity) -> VmRef {
        VmRef {
            dir: self.dir.clone(),
            identity: identity.clone(),
            mem_mib: self.mem_mib,
        }
    }

    /// Returns the disks that the guest can write, with their serial numbers.
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

/// A running VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    pub identity: Identity,
    /// The address of the guest's SSH server, as seen from the host.
    pub ssh_addr: SocketAddr,
}

/// A change in a running VMM or its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// The VMM has answered for the first time.
    Answered,
    /// True if the VMM has paused the guest because the host's disk is full, false if the guest
    /// runs again.
    Paused(bool),
    /// True if the VMM has not responded for so long that it probably hangs, false if it responds
    /// again.
    Unresponsive(bool),
}

/// The differences between drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The VMM limits the traffic of a guest. Otherwise the code that owns the tap must limit it.
    pub limits_network: bool,
    /// A disk may be a qcow2 file.
    pub reads_qcow2: bool,
    /// Guests have a keyboard, so [`Vm::press_ctrl_alt_del`] is supported.
    pub has_keyboard: bool,
    /// VMMs get their own nodes of [`devices::KVM`] and [`devices::TUN`], so that the modes of the
    /// host's nodes do not matter.
    pub makes_device_nodes: bool,
    /// A VMM leaves resources on the host other than its process and files. [`Driver::clear`]
    /// removes them.
    pub leaves_remains: bool,
}

/// The data that a driver needs to reach a running VM.
#[derive(Clone, Debug)]
pub struct VmRef {
    /// The VM's directory, as in [`VmmSpec`].
    pub dir: PathBuf,
    pub identity: Identity,
    pub mem_mib: u64,
}

/// A running VM. The methods talk to its VMM.
pub trait Vm {
    /// Pauses the guest. Succeeds if it is paused already.
    fn pause(&self, cancel: &Cancel) -> Result<()>;

    /// Resumes the guest. Succeeds if it runs already.
    fn resume(&self, cancel: &Cancel) -> Result<()>;

    /// Saves the memory and the devices of a paused guest, which stays paused. Afterwards all data
    /// that the guest wrote to its disks is in their files. Returns the VMM's version.
    fn save(&self, spec: &VmmSpec, to: SaveTo<'_>, cancel: &Cancel) -> Result<String>;

    /// Applies `spec.rates` to the guest's devices.
    fn set_rates(&self, spec: &VmmSpec, cancel: &Cancel) -> Result<()>;

    /// Asks the guest to keep `keep_mib` of its memory and to return the rest to the host.
    fn set_balloon(&self, keep_mib: u64, cancel: &Cancel) -> Result<()>;

    /// Returns how much memory the guest currently keeps.
    fn balloon_mib(&self, cancel: &Cancel) -> Result<u64>;

    /// Returns the VMM's metrics in its own format, the oldest first. The last value is current.
    fn metrics(&self, cancel: &Cancel) -> Result<Vec<serde_json::Value>>;

    /// Connects to a port of the guest's vsock. The stream outlives the daemon and ends with the
    /// VMM.
    fn connect(&self, port: u32, cancel: &Cancel) -> Result<UnixStream>;

    /// Forwards `add` to the guest and stops forwarding `remove`, for a guest on the VMM's own
    /// network. Ports to remove may be missing. After an error, no port of `add` is forwarded.
    fn forward(&self, _add: &[Port], _remove: &[Port], _cancel: &Cancel) -> Result<()> {
        Err(no_own_network())
    }

    /// Returns the ports that the VMM forwards to the guest, including [`Running::ssh_addr`].
    fn forwarded(&self, _cancel: &Cancel) -> Result<Vec<Port>> {
        Err(no_own_network())
    }

    /// Presses Ctrl-Alt-Del on the guest's keyboard.
    fn press_ctrl_alt_del(&self, _cancel: &Cancel) -> Result<()> {
        let message = "press Ctrl-Alt-Del: guests of this driver have no keyboard";
        Err(Error::new(Kind::Unsupported, message))
    }
}

fn no_own_network() -> Error {
    let message = "forward ports: VMMs of this driver have no network of their own";
    Error::new(Kind::Unsupported, message).hint("set driver = \"bridge\" under [network]")
}

/// A kind of VMM, such as QEMU or Firecracker.
pub trait Driver: Send + Sync {
    /// Returns a description for users, for example `qemu (tcg, microvm)`.
    fn describe(&self) -> String;

    /// Returns the capabilities of VMMs that this driver starts.
    fn capabilities(&self) -> Capabilities;

    /// Returns the capabilities of a running VMM, or None if the VMM has exited.
    fn capabilities_of(&self, _running: &Identity) -> Option<Capabilities> {
        Some(self.capabilities())
    }

    /// Probes the host in advance for the first start, for example whether its virtualisation runs
    /// `kernel`. This may take seconds. Failures show up in `describe` and `checks`.
    fn warm_up(&self, kernel: &Path, cancel: &Cancel);

    /// Returns the console logs of the driver's VMs.
    fn consoles(&self) -> &Consoles;

    /// Returns the processes of the driver's VMMs.
    fn processes(&self) -> &dyn Processes;

    /// Starts a VMM, and returns as soon as the guest runs, while it is still booting. Calls
    /// `spawned` with the process's identity before sending the process any request. After an error
    /// or a cancel the process has been killed.
    fn start(
        &self,
        spec: &VmmSpec,
        cancel: &Cancel,
        spawned: &mut dyn FnMut(&Identity),
    ) -> Result<Running>;

    /// Adopts a VMM that an earlier daemon started. Checks its identity, executable and tag,
    /// reopens its console (the log gets a line that marks the gap), and finds its SSH address.
    fn adopt(&self, spec: &VmmSpec, identity: &Identity) -> Result<Running>;

    /// Returns a handle of a running VM. Fails if its VMM is known to have exited.
    fn vm(&self, at: VmRef) -> Result<Box<dyn Vm + '_>>;

    /// Calls `on_event` from a thread of the driver for each [`GuestEvent`], until the VMM exits. A
    /// driver that reports pauses reports `Paused(false)` last. Reports nothing if the VMM has
    /// already exited.
    fn watch_guest(
        &self,
        dir: &Path,
        identity: &Identity,
        on_event: Box<dyn Fn(GuestEvent) + Send>,
    ) -> Result<()>;

    /// Checks that this driver can restore a guest that was saved by `driver`. `elsewhere` is true
    /// if the guest is to be restored in another VM's directory.
    fn can_load(&self, driver: &str, elsewhere: bool) -> Result<()>;

    /// Removes the resources that the VMM with this tag has left on the host, except for files of
    /// the VM in `dir`. Succeeds if none are left. The VMM must have exited.
    fn clear(&self, _dir: &Path, _tag: &Tag) -> Result<()> {
        Ok(())
    }

    /// Returns the tags of this installation whose VMMs have left resources to clear. The VMs'
    /// directories are in `vms`.
    fn remains(&self, _vms: &Path, _install: &str) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Checks what the driver needs on this host, for `fcctl doctor`.
    fn checks(&self) -> Vec<Check>;
}
