//! VMs.

use super::calls;
use super::port::Port;
use crate::ids::{ImageRef, KernelName, OpId, VmId, VmName};
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Never started.
    Created,
    Starting,
    Running,
    Stopping,
    Stopped,
    Deleting,
    Failed,
}

impl VmState {
    pub const ALL: [VmState; 7] = [
        VmState::Created,
        VmState::Starting,
        VmState::Running,
        VmState::Stopping,
        VmState::Stopped,
        VmState::Deleting,
        VmState::Failed,
    ];
    pub const fn name(self) -> &'static str {
        match self {
            VmState::Created => "created",
            VmState::Starting => "starting",
            VmState::Running => "running",
            VmState::Stopping => "stopping",
            VmState::Stopped => "stopped",
            VmState::Deleting => "deleting",
            VmState::Failed => "failed",
        }
    }
}

/// What a guest may reach: `--net`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Net {
    /// Outwards through the host's address, and names.
    #[default]
    Nat,
    /// Nothing. SSH from the host, and so exec and copies, works.
    None,
}

/// Whether the guest's file systems were synced before its VMM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Synced {
    Yes,
    /// It was not asked: kill, or it had not booted.
    No,
    /// It was asked and did not answer in time.
    Timeout,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkspaceState {
    /// An import began and has not been verified to its end.
    Incomplete,
    Complete,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkspaceInfo {
    pub guest_path: String,
    /// Where commands start: `guest_path` or a directory below it.
    pub workdir: String,
    pub state: WorkspaceState,
    pub readonly: bool,
    /// Entries and bytes of the last complete import.
    pub entries: u64,
    pub bytes: u64,
    /// Seconds since the epoch.
    pub prepared_at: u64,
}

/// What a VM's devices may move in a second. None: as much as the host can; in a request: as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimits {
    /// Of each of its disks, reads and writes together.
    pub disk_bytes_per_s: Option<u64>,
    pub disk_ops_per_s: Option<u64>,
    /// What the guest receives.
    pub net_rx_bytes_per_s: Option<u64>,
    /// What the guest sends.
    pub net_tx_bytes_per_s: Option<u64>,
}

impl RateLimits {
    /// The members in their order.
    pub fn all(&self) -> [Option<u64>; 4] {
        [self.disk_bytes_per_s, self.disk_ops_per_s, self.net_rx_bytes_per_s, self.net_tx_bytes_per_s]
    }

    pub fn of([disk_bytes_per_s, disk_ops_per_s, net_rx_bytes_per_s, net_tx_bytes_per_s]: [Option<u64>; 4]) -> Self {
        Self { disk_bytes_per_s, disk_ops_per_s, net_rx_bytes_per_s, net_tx_bytes_per_s }
    }

    /// After a request that says `change`.
    pub fn with(&self, change: &Self) -> Self {
        let (now, change) = (self.all(), change.all());
        Self::of(std::array::from_fn(|i| change[i].map_or(now[i], |n| Some(n).filter(|n| *n > 0))))
    }

    pub fn says_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// A VM as its owner sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vm {
    pub id: VmId,
    pub name: VmName,
    pub owner_uid: u32,
    pub state: VmState,
    /// Why it is in this state, where there is more to say: `the VMM died: signal 9`.
    pub reason: Option<String>,
    pub image: ImageRef,
    /// Instead of the image's.
    #[serde(default)]
    pub kernel: Option<KernelName>,
    pub vcpus: u32,
    pub mem_mib: u64,
    pub disk_bytes: u64,
    /// Of a second disk, which the guest has at `/work`.
    #[serde(default)]
    pub work_disk_bytes: Option<u64>,
    // The members of `RateLimits`, spelt out: serde buffers every member of a struct that has a flattened one, which
    // doubled the time that a client needs to read a list.
    pub disk_bytes_per_s: Option<u64>,
    pub disk_ops_per_s: Option<u64>,
    pub net_rx_bytes_per_s: Option<u64>,
    pub net_tx_bytes_per_s: Option<u64>,
    pub net: Net,
    /// Ports of the host that lead into the guest.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// Settings that `vm.set` changed and that the running guest does not have yet.
    pub pending: Option<Pending>,
    /// Deleted when its holder goes or it stops.
    pub rm: bool,
    /// Seconds since the epoch.
    pub created_at: u64,
    pub started_at: Option<u64>,
    /// The operation that owns the VM now.
    pub op: Option<OpId>,
    /// The VMM's process, while it runs.
    pub pid: Option<u32>,
    /// Where the guest's SSH server is reached from the host.
    pub ssh_addr: Option<std::net::SocketAddr>,
    /// Which driver runs it and how: `qemu (tcg, microvm)`.
    pub driver: Option<String>,
    /// How the root disk was made from the image: `reflink`, `qcow2`, `dm-snapshot`, `copy`.
    pub disk_driver: Option<String>,
    /// Of the last stop.
    pub synced: Option<Synced>,
    /// The VMM runs and does not answer.
    #[serde(default)]
    pub unresponsive: bool,
    /// The guest runs and stands still: `vm.pause`.
    #[serde(default)]
    pub paused: bool,
    /// The guest runs and is to give back all but so much of its memory: `vm.balloon`.
    #[serde(default)]
    pub balloon_mib: Option<u64>,
    pub workspace: Option<WorkspaceInfo>,
}

impl Vm {
    pub fn rates(&self) -> RateLimits {
        RateLimits {
            disk_bytes_per_s: self.disk_bytes_per_s,
            disk_ops_per_s: self.disk_ops_per_s,
            net_rx_bytes_per_s: self.net_rx_bytes_per_s,
            net_tx_bytes_per_s: self.net_tx_bytes_per_s,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pending {
    pub vcpus: Option<u32>,
    pub mem_mib: Option<u64>,
    pub disk_bytes: Option<u64>,
    /// 0: there will be no limit.
    #[serde(flatten)]
    pub rates: RateLimits,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmCreateRequest {
    /// Adjective-noun when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<VmName>,
    /// `default` when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageRef>,
    /// One of `kernel.list` instead of the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_mib: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Size of a second, empty disk, which the guest has at `/work`; it lives as long as the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work_disk_bytes: Option<u64>,
    /// Of each of its disks, reads and writes together; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes_per_s: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_ops_per_s: Option<u64>,
    /// What the guest receives; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_rx_bytes_per_s: Option<u64>,
    /// What the guest sends; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_tx_bytes_per_s: Option<u64>,
    /// `nat` when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<Net>,
    /// Each port of the host is one VM's, from its creation to its deletion.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// The daemon deletes it when it stops, when its holder goes, or when the daemon restarts without one.
    #[serde(default)]
    pub rm: bool,
    /// Stay on the line (`more`): a `created` note at once, the answer when the VM is gone. When the connection
    /// goes, an `rm` VM is deleted.
    #[serde(default)]
    pub hold: bool,
}

impl VmCreateRequest {
    pub fn rates(&self) -> RateLimits {
        RateLimits::of([self.disk_bytes_per_s, self.disk_ops_per_s, self.net_rx_bytes_per_s, self.net_tx_bytes_per_s])
    }
}

/// A VM by name, id, or unambiguous prefix of an id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRequest {
    pub vm: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStopRequest {
    pub vm: String,
    /// Kill the VMM at once; joins and shortens a graceful stop.
    #[serde(default)]
    pub force: bool,
    /// How long the guest may take before it is forced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmDeleteRequest {
    pub vm: String,
    /// Also when it runs.
    #[serde(default)]
    pub force: bool,
    /// A VM that is not there is no error.
    #[serde(default)]
    pub if_exists: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmListRequest {
    /// Also those that do not run.
    #[serde(default)]
    pub all: bool,
    /// Continue behind this place: `next` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// At most so many items; fewer may come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSetRequest {
    pub vm: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_mib: Option<u64>,
    /// May only grow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Of each of its disks, reads and writes together; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes_per_s: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_ops_per_s: Option<u64>,
    /// What the guest receives; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_rx_bytes_per_s: Option<u64>,
    /// What the guest sends; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_tx_bytes_per_s: Option<u64>,
    /// A guest that runs has the rates at once; there is nothing else that it could have at once.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub now: bool,
    /// Whether it is deleted when its holder goes or it stops. Holds at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rm: Option<bool>,
}

impl VmSetRequest {
    pub fn rates(&self) -> RateLimits {
        RateLimits::of([self.disk_bytes_per_s, self.disk_ops_per_s, self.net_rx_bytes_per_s, self.net_tx_bytes_per_s])
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmBalloonRequest {
    pub vm: String,
    /// What the guest is to keep of its memory, until its next start; none: only look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_mib: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmBalloonReply {
    pub vm: Vm,
    /// What the guest keeps now. It gives back by and by, and takes again at once what it cannot do without.
    pub kept_mib: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmLogsRequest {
    pub vm: String,
    /// Only the last lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<u64>,
    /// Stay on the line (`more`) until the VM is deleted or the caller goes.
    #[serde(default)]
    pub follow: bool,
}

/// Console output as text; bytes that are no UTF-8 are replaced, control characters are the client's to show.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogChunk {
    pub text: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmWaitRequest {
    pub vm: String,
    /// `stopped` when not given, which `failed` fulfils too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<VmState>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmReply {
    pub vm: Vm,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmListReply<V = Vm> {
    /// From the oldest to the newest.
    pub vms: Vec<V>,
    /// There are more: ask again with `after` set to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmDeleteReply {
    /// None when it was not there and `if_exists` was said.
    pub deleted: Option<VmId>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmPruneReply {
    pub deleted: Vec<VmId>,
}

/// What a plain ssh client needs. The key is the VM's own and goes to its owner only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SshConfigReply {
    pub vm: VmId,
    pub name: VmName,
    pub addr: std::net::SocketAddr,
    pub user: String,
    /// OpenSSH format.
    pub private_key: String,
    /// `ssh-ed25519 AAAA...`
    pub host_key: String,
    pub workdir: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStatsRequest {
    /// All of the caller's that run when none is named.
    #[serde(default)]
    pub vms: Vec<String>,
    /// Continue behind this place: `next` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// At most so many items; fewer may come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// What a VM has used of the host since its VMM began: counters only grow until its next start. None: nobody counts that here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStats {
    pub vm: VmId,
    pub name: VmName,
    /// When it was looked at, in milliseconds since the epoch.
    pub at_ms: u64,
    /// Of the VMM's process, the guest's included.
    pub cpu_ns: u64,
    /// That the VMM has now.
    pub memory_bytes: u64,
    /// The guest's size.
    pub memory_max_bytes: u64,
    /// From and to the host's block devices.
    pub disk_read_bytes: Option<u64>,
    pub disk_written_bytes: Option<u64>,
    /// By the guest, on a bridge.
    pub net_received_bytes: Option<u64>,
    pub net_sent_bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatsReply<S = VmStats> {
    pub stats: Vec<S>,
    /// There are more: ask again with `after` set to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// What a VMM counts, in its own words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmMetricsReply {
    pub vm: VmId,
    pub name: VmName,
    /// Whose words they are.
    pub driver: Option<String>,
    /// The oldest first. Firecracker tells what has happened since it told last, once a minute and when it is asked: these are those that
    /// nobody has read yet, as far as they were kept, and one of now. QEMU tells what has happened since its start.
    pub metrics: Vec<serde_json::Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConnectRequest {
    pub vm: String,
    /// Of the guest's vsock (vsock(7)).
    pub port: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogsReply {
    /// Bytes sent in `log` notes.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmForkRequest {
    pub vm: String,
    /// Of the new VM; adjective-noun when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<VmName>,
}

calls! {
    /// Makes the row; nothing boots. With `hold` it is answered when the VM is gone.
    VmCreate = "vm.create" (VmCreateRequest) -> VmReply;
    /// An operation. Already running: ok.
    VmStart = "vm.start" (VmRequest) -> VmReply;
    /// An operation; hang-up does not cancel it. Already stopped: ok.
    VmStop = "vm.stop" (VmStopRequest) -> VmReply;
    VmRestart = "vm.restart" (VmStopRequest) -> VmReply;
    VmKill = "vm.kill" (VmRequest) -> VmReply;
    VmDelete = "vm.delete" (VmDeleteRequest) -> VmDeleteReply;
    VmList = "vm.list" (VmListRequest) -> VmListReply;
    VmShow = "vm.show" (VmRequest) -> VmReply;
    VmStatsCall = "vm.stats" (VmStatsRequest) -> VmStatsReply;
    /// An operation; hang-up cancels it. A new VM goes on from where another is, which runs on.
    VmFork = "vm.fork" (VmForkRequest) -> VmReply;
    VmMetrics = "vm.metrics" (VmRequest) -> VmMetricsReply;
    /// A stream to what listens on a vsock port of the guest's: a connected socket, which comes with the first byte of the reply
    /// (SCM_RIGHTS) and needs the daemon no more. With Firecracker the end of one direction is that of both.
    VmConnect = "vm.connect" (VmConnectRequest) -> VmReply;
    /// The guest's vCPUs stand still until `vm.resume`; nothing new is begun in it.
    VmPause = "vm.pause" (VmRequest) -> VmReply;
    VmResume = "vm.resume" (VmRequest) -> VmReply;
    VmSet = "vm.set" (VmSetRequest) -> VmReply;
    /// Has the guest give memory back, or take it again.
    VmBalloon = "vm.balloon" (VmBalloonRequest) -> VmBalloonReply;
    /// `log` notes (`more`), then the reply.
    VmLogs = "vm.logs" (VmLogsRequest) -> LogsReply;
    VmWait = "vm.wait" (VmWaitRequest) -> VmReply;
    /// Deletes the caller's VMs that are `created`, `stopped` or `failed`.
    VmPrune = "vm.prune" (super::Empty) -> VmPruneReply;
    VmSshConfig = "vm.ssh_config" (VmRequest) -> SshConfigReply;
}

super::page::list_calls! {
    VmList: vms of Vm;
    VmStatsCall: stats of VmStats;
}
