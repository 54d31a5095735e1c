//! Calls about the daemon itself.

use super::call::calls;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiVersion {
    pub major: u32,
    pub minor: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InfoReply {
    pub api: ApiVersion,
    /// The version of the package.
    pub version: String,
    pub features: Vec<String>,
    pub pid: u32,
    pub uid: u32,
    pub state_dir: String,
    pub uptime_s: u64,
    /// The guest directories below which a workspace may be.
    pub guest_roots: Vec<String>,
    /// The driver that starts VMs, with its mode, such as `qemu (tcg, microvm)`. A daemon that has
    /// not started a VM yet may know only its name.
    #[serde(default)]
    pub driver: String,
    /// `user`, or `bridge`.
    #[serde(default)]
    pub network: String,
    /// How root disks are made on this host, as in [`super::vm::Vm::disk_driver`]. Null if they
    /// cannot be made.
    #[serde(default)]
    pub disk_driver: Option<String>,
}

/// A kind of file that takes space on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpaceKind {
    /// The disks and logs of VMs.
    Vms,
    Images,
    /// The cached layers of pulled images.
    Layers,
    /// The guest runtimes, which boot images that have no kernel.
    Runtimes,
    Kernels,
    Snapshots,
}

impl SpaceKind {
    /// Returns the plural to show to users.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Vms => "VMs",
            Self::Images => "images",
            Self::Layers => "cached layers",
            Self::Runtimes => "guest runtimes",
            Self::Kernels => "kernels",
            Self::Snapshots => "snapshots",
        }
    }
}

/// The space that objects of one kind use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpaceUse {
    pub kind: SpaceKind,
    pub count: u64,
    /// The number of objects in use: VMs that run, images with VMs or snapshots, snapshots whose VM
    /// exists.
    pub active: u64,
    pub bytes: u64,
    /// The space of the caller's own files that are not in use, which a removal would free.
    pub reclaimable_bytes: u64,
    /// The names of unused images and guest runtimes that the caller may remove. At most 1,000.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reclaimable: Vec<String>,
}

impl SpaceUse {
    pub fn new(kind: SpaceKind) -> Self {
        Self {
            kind,
            count: 0,
            active: 0,
            bytes: 0,
            reclaimable_bytes: 0,
            reclaimable: Vec::new(),
        }
    }

    /// Adds one object.
    pub fn add(&mut self, bytes: u64, is_active: bool) {
        self.count += 1;
        self.active += u64::from(is_active);
        self.bytes += bytes;
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpaceReply {
    pub kinds: Vec<SpaceUse>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Ok,
    Warn,
    Fail,
}

/// The result of one check. Its `id` is stable.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    pub id: String,
    pub severity: Severity,
    /// The finding, and the choice that fcd made because of it.
    pub found: String,
    /// A command that fixes the problem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Check {
    pub fn ok(id: &str, found: impl Into<String>) -> Self {
        Self {
            id: id.to_owned(),
            severity: Severity::Ok,
            found: found.into(),
            fix: None,
        }
    }
    pub fn warn(id: &str, found: impl Into<String>, fix: &str) -> Self {
        Self {
            id: id.to_owned(),
            severity: Severity::Warn,
            found: found.into(),
            fix: Some(fix.to_owned()),
        }
    }
    pub fn fail(id: &str, found: impl Into<String>, fix: &str) -> Self {
        Self {
            severity: Severity::Fail,
            ..Self::warn(id, found, fix)
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DoctorReply {
    pub checks: Vec<Check>,
}

/// The origin of a setting's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConfigSource {
    Default,
    File,
    Environment,
    Flag,
}

/// A setting of the running daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConfigValue {
    /// The setting's name, such as `limits.pool_workers`.
    pub key: String,
    /// The value as in the configuration file.
    pub value: String,
    pub source: ConfigSource,
    /// The path of the file, the environment variable or the flag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConfigReply {
    pub values: Vec<ConfigValue>,
}

/// Something on the host that fcd created and no longer needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Leak {
    /// The kind of resource, such as `process` or `directory`.
    pub kind: String,
    /// The resource's name on the host.
    pub name: String,
    pub why: String,
    pub removed: bool,
    /// The reason why the resource could not be removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaksRequest {
    /// Also remove the leaks.
    #[serde(default)]
    pub fix: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeaksReply {
    pub leaks: Vec<Leak>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UninstallRequest {
    /// Only report what would be removed.
    #[serde(default)]
    pub dry_run: bool,
}

/// Something on the host that belongs to the installation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstalledItem {
    /// `directory`, `socket`, `tap`, `bridge`, `table` or `control_group`.
    pub kind: String,
    /// The item's name or path on the host.
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UninstallReply {
    pub items: Vec<InstalledItem>,
    /// Files in the state directory that fcd did not make. They stay, and so does the directory.
    pub kept: Vec<String>,
}

/// A lock that is held or awaited.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockRecord {
    /// The name of the lock set, such as `vm_locks`.
    pub set: String,
    pub key: String,
    pub holder: Option<LockParty>,
    pub waiters: Vec<LockParty>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockParty {
    pub thread: String,
    /// The thread's operation, such as `vm.stop 1f0c...`.
    pub operation: String,
    /// How long the thread has held or awaited the lock.
    pub for_us: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DebugLocksReply {
    pub locks: Vec<LockRecord>,
    /// The number of lock order violations since the daemon started. Only builds with the lock
    /// checker count them.
    pub violations: u64,
    pub checked: bool,
    /// The threads that wait for the disk.
    #[serde(default)]
    pub durable_waits: Vec<LockParty>,
    #[serde(default)]
    pub classes: Vec<LockClass>,
    /// The nestings of locks that have occurred. Only builds with the lock checker record them and
    /// the places where threads had to wait.
    #[serde(default)]
    pub edges: Vec<LockEdge>,
    #[serde(default)]
    pub contention: Vec<LockContention>,
    /// The number of lines of the log that were dropped because nobody read it in time.
    #[serde(default)]
    pub log_lines_dropped: u64,
}

/// How often threads have waited for a class of locks, and held one, since the daemon started.
/// Element `i` counts durations of less than 2^i microseconds that no earlier element counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockClass {
    pub class: String,
    pub waits: Vec<u64>,
    pub holds: Vec<u64>,
}

/// A lock of class `to` was taken while one of class `from` was held.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockEdge {
    pub from: String,
    pub to: String,
    /// Where both locks were taken in the source when this first occurred.
    pub from_site: String,
    pub to_site: String,
}

/// A place in the source where threads had to wait for a lock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockContention {
    pub class: String,
    pub site: String,
    pub count: u64,
}

calls! {
    Info = "fcd.info" (super::Empty) -> InfoReply [Anybody, Unkeyed, Nothing, NoFds];
    /// Reports the space that VMs, images, caches, kernels and snapshots use, and how much of it
    /// can be freed.
    Space = "fcd.space" (super::Empty) -> SpaceReply [Anybody, Unkeyed, Nothing, NoFds];
    Doctor = "fcd.doctor" (super::Empty) -> DoctorReply [Anybody, Unkeyed, Nothing, NoFds];
    /// The values of some settings may be secrets, such as a proxy with a password.
    ConfigShow = "fcd.config" (super::Empty) -> ConfigReply [Privileged, Unkeyed, Nothing, NoFds];
    Leaks = "fcd.leaks" (LeaksRequest) -> LeaksReply [Privileged, Unkeyed, Nothing, NoFds];
    /// Makes the daemon exit and remove what it has on the host: the state directory, the socket,
    /// the network. Refused while there are VMs.
    Uninstall = "fcd.uninstall" (UninstallRequest) -> UninstallReply
        [Privileged, Unkeyed, Nothing, NoFds];
    DebugLocks = "debug.locks" (super::Empty) -> DebugLocksReply [Anybody, Unkeyed, Nothing, NoFds];
}
