//! VMMs: what a driver must do, and the drivers.

use crate::api::daemon::Check;
use crate::error::Result;
use crate::ids::VmId;
use crate::locks::Cancel;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

/// A process that cannot be mistaken for another: never a pid alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`, in clock ticks since boot.
    pub start_time: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

/// Everything a driver needs to run one VM once. All paths are absolute.
#[derive(Clone, Debug)]
pub struct VmmSpec {
    pub vm: VmId,
    /// `fc-<install>-<vm>-<generation>`: in the process's arguments, so that it can be found again.
    pub tag: String,
    /// The VM's directory, root's or the daemon's own, 0711. Holds `disk`, `seed`, `console.log`, and `run/`,
    /// which belongs to the VMM's uid and where it makes its sockets.
    pub dir: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub disk: PathBuf,
    pub disk_format: DiskFormat,
    pub seed: PathBuf,
    pub vcpus: u32,
    pub mem_mib: u64,
    /// uid and gid of the VMM's process, when the daemon is root.
    pub credentials: Option<(u32, u32)>,
    /// Bound of the console log, both files together.
    pub console_bytes_max: u64,
}

/// A VMM that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    pub identity: Identity,
    /// Where the guest's SSH server is reached.
    pub ssh_addr: SocketAddr,
}

/// Nothing above this module knows which driver it talks to.
pub trait Driver: Send + Sync {
    /// For people: `qemu (tcg, microvm)`.
    fn describe(&self) -> String;

    /// Starts the process and answers once the VMM runs the guest; the guest boots on. `spawned` is told the
    /// identity as soon as there is one, before anything else is asked of the process. On an error or a cancel
    /// no process is left.
    fn start(&self, spec: &VmmSpec, cancel: &Cancel, spawned: &mut dyn FnMut(&Identity)) -> Result<Running>;

    /// The live process that carries this tag, whoever started it.
    fn find(&self, tag: &str) -> Result<Option<Identity>>;

    /// Takes up a VMM that an earlier daemon started: checks identity, executable and tag, opens its console
    /// again (the gap is marked in the log), asks for its SSH address.
    fn adopt(&self, spec: &VmmSpec, identity: &Identity) -> Result<Running>;

    /// Whether it lives still. A zombie does not.
    fn is_alive(&self, identity: &Identity) -> bool;

    /// Waits until the process has exited; false when the deadline or the cancel came first.
    fn wait_exit(&self, identity: &Identity, deadline: Instant, cancel: &Cancel) -> Result<bool>;

    /// Ends the process (SIGKILL by pidfd) and waits until it has exited. Already gone: ok.
    fn kill(&self, identity: &Identity, deadline: Instant) -> Result<()>;

    /// Calls `died` once, from a thread of the driver's, when the process exits; with how, where it is known.
    fn watch(&self, identity: &Identity, died: Box<dyn FnOnce(String) + Send>) -> Result<()>;

    /// What the driver needs, found and picked.
    fn checks(&self) -> Vec<Check>;
}
