//! Calls about VMs.

use super::call::calls;
use super::image::short_digest;
use super::port::{AutoPorts, Port};
pub use super::rates::RateLimits;
pub use super::vm_brief::{VmBrief, WorkspaceInfo};
pub use super::vm_commands::CommandDefaults;
pub use super::vm_enums::{Init, Net, Restart, Synced, VmState, WorkspaceState};
use crate::ids::{HostName, ImageRef, KernelName, LabelKey, Labels, OpId, VmId, VmName};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A VM as its owner sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vm {
    pub id: VmId,
    pub name: VmName,
    pub owner_uid: u32,
    pub state: VmState,
    /// Details about the state, such as `the VMM died: signal 9`.
    pub reason: Option<String>,
    pub image: ImageRef,
    /// The digest of the image, such as `sha256:...`. Null for a VM of an earlier version of fcd.
    #[serde(default)]
    pub image_digest: Option<String>,
    /// The kernel that the VM boots instead of the image's.
    #[serde(default)]
    pub kernel: Option<KernelName>,
    #[serde(default)]
    pub init: Init,
    pub vcpus: u32,
    pub mem_mib: u64,
    pub disk_bytes: u64,
    /// The size of a second disk, which the guest mounts at `/work`.
    #[serde(default)]
    pub work_disk_bytes: Option<u64>,
    // The members of `RateLimits` are not flattened, because serde would then buffer every member
    // of this struct, which doubled the time that a client needs to read a list.
    pub disk_bytes_per_s: Option<u64>,
    pub disk_ops_per_s: Option<u64>,
    pub net_rx_bytes_per_s: Option<u64>,
    pub net_tx_bytes_per_s: Option<u64>,
    pub net: Net,
    /// The host ports that are forwarded to the guest.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// The automatic forwards. Left out unless the VM's owner asked for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_ports: Option<AutoPorts>,
    /// Settings that `vm.set` has changed and that will apply at the guest's next start.
    pub pending: Option<Pending>,
    /// True if the VM is deleted when it stops or its holder disconnects.
    pub rm: bool,
    #[serde(default)]
    pub restart: Restart,
    /// When the VM was created, in seconds since the epoch.
    pub created_at: u64,
    pub started_at: Option<u64>,
    /// The operation that currently changes the VM.
    pub op: Option<OpId>,
    /// The pid of the VMM while it runs.
    pub pid: Option<u32>,
    /// The address of the running guest on the bridge. Left out in user mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<Ipv4Addr>,
    /// The IPv6 address of the running guest on the bridge. Left out if it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip6: Option<Ipv6Addr>,
    /// The address at which the host reaches the guest's SSH server.
    pub ssh_addr: Option<std::net::SocketAddr>,
    /// The driver that runs the VM, with its mode, such as `qemu (tcg, microvm)`.
    pub driver: Option<String>,
    /// How the root disk was created from the image: `reflink`, `qcow2`, `dm-snapshot` or `copy`.
    pub disk_driver: Option<String>,
    /// The result of syncing the guest at its last stop.
    pub synced: Option<Synced>,
    /// True if the VMM runs but does not respond.
    #[serde(default)]
    pub unresponsive: bool,
    /// True if the guest is paused (`vm.pause`).
    #[serde(default)]
    pub paused: bool,
    /// How much memory the guest keeps (`vm.balloon`). It returns the rest to the host.
    #[serde(default)]
    pub balloon_mib: Option<u64>,
    pub workspace: Option<WorkspaceInfo>,
    /// The host name of the guest, if it is not the VM's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_name: Option<HostName>,
    /// The name servers that the guest uses instead of fcd's. Left out if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
    /// The defaults of commands in this VM. Left out if nothing was chosen.
    #[serde(default, skip_serializing_if = "CommandDefaults::is_empty")]
    pub commands: CommandDefaults,
    /// The labels that users gave the VM. Left out if there are none.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

impl Vm {
    /// Returns the members that [`VmBrief`] contains.
    pub fn brief(&self) -> VmBrief<'_> {
        VmBrief {
            id: Cow::Borrowed(&self.id),
            name: Cow::Borrowed(&self.name),
            state: self.state,
            reason: self.reason.as_deref().map(Cow::Borrowed),
            image: Cow::Borrowed(&self.image),
            short_digest: self
                .image_digest
                .as_deref()
                .map(|digest| Cow::Borrowed(short_digest(digest))),
            vcpus: self.vcpus,
            mem_mib: self.mem_mib,
            disk_bytes: self.disk_bytes,
            created_at: self.created_at,
            unresponsive: self.unresponsive,
            paused: self.paused,
            ports: Cow::Borrowed(&self.ports),
            refused_ports: AutoPorts::refused_ports(self.auto_ports.as_ref()),
            ip: self.ip,
            ip6: self.ip6,
            workspace: self.workspace.clone(),
            labels: self.labels.clone(),
        }
    }

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
    /// The rate limits that will apply. A limit of 0 will be removed.
    #[serde(flatten)]
    pub rates: RateLimits,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmCreateRequest {
    /// The name of the VM. Defaults to a generated name, adjective-noun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<VmName>,
    /// The image of the VM. Defaults to `image` under `[vm]` in the daemon's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageRef>,
    /// A kernel from `kernel.list` to boot instead of the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelName>,
    /// The first process of the guest. Defaults to `fcd`. `image` needs an image from a registry or
    /// an archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<Init>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_mib: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// The size of a second, empty disk, which the guest mounts at `/work`. It is deleted with the
    /// VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work_disk_bytes: Option<u64>,
    /// The limit for each disk, with reads and writes counted together. 0 removes the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes_per_s: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_ops_per_s: Option<u64>,
    /// The limit for traffic to the guest. 0 removes the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_rx_bytes_per_s: Option<u64>,
    /// The limit for traffic from the guest. 0 removes the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_tx_bytes_per_s: Option<u64>,
    /// The network that the guest can reach. Defaults to `nat`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<Net>,
    /// The host ports to forward to the guest. They stay reserved for the VM until the VM is
    /// deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// Also forward the ports on which processes in the guest listen, as long as they do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub auto_ports: bool,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The host name of the guest. Defaults to the VM's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_name: Option<HostName>,
    /// The name servers of the guest, at most three. Defaults to fcd's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
    /// The user who runs commands, as `USER[:GROUP]` with names or numbers. Defaults to the
    /// image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The absolute path in which commands run. Defaults to the workspace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// Variables that every command gets. Snapshots and forks keep them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<(String, String)>,
    /// Delete the VM when it stops, when its holder disconnects, or when the daemon restarts while
    /// nobody holds it.
    #[serde(default)]
    pub rm: bool,
    /// When the daemon starts the VM by itself. `always` excludes `rm`.
    #[serde(default, skip_serializing_if = "Restart::is_no")]
    pub restart: Restart,
    /// Requires `more`. A `created` note comes immediately, and the reply when the VM has been
    /// deleted. If the caller disconnects, an `rm` VM is deleted.
    #[serde(default)]
    pub hold: bool,
}

impl VmCreateRequest {
    pub fn rates(&self) -> RateLimits {
        RateLimits {
            disk_bytes_per_s: self.disk_bytes_per_s,
            disk_ops_per_s: self.disk_ops_per_s,
            net_rx_bytes_per_s: self.net_rx_bytes_per_s,
            net_tx_bytes_per_s: self.net_tx_bytes_per_s,
        }
    }
}

/// A VM by name, id or unambiguous prefix of its id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRequest {
    pub vm: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStopRequest {
    pub vm: String,
    /// Kill the VMM immediately. This also cuts short a graceful stop in progress.
    #[serde(default)]
    pub force: bool,
    /// How long the guest may take to shut down before the VMM is killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Keep a VM with `rm` until its holder disconnects, so that its disk can be read.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmDeleteRequest {
    pub vm: String,
    /// Delete the VM even if it runs.
    #[serde(default)]
    pub force: bool,
    /// Do not fail if the VM does not exist.
    #[serde(default)]
    pub if_exists: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmListRequest {
    /// Include VMs that do not run.
    #[serde(default)]
    pub all: bool,
    /// Return only the members of [`VmBrief`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub brief: bool,
    /// The cursor of the page: `next` of the previous one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The most items to return; there may be fewer.
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
    /// The new size of the root disk, which may only grow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// The limit for each disk, with reads and writes counted together. 0 removes the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes_per_s: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_ops_per_s: Option<u64>,
    /// The limit for traffic to the guest. 0 removes the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_rx_bytes_per_s: Option<u64>,
    /// The limit for traffic from the guest. 0 removes the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_tx_bytes_per_s: Option<u64>,
    /// Apply the rates to the running guest immediately. No other setting can be applied to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub now: bool,
    /// True to delete the VM when it stops or its holder disconnects, false to keep it. Applies
    /// immediately.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rm: Option<bool>,
    /// When the daemon starts the VM by itself. Applies immediately.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<Restart>,
    /// The labels to add, or to replace if their keys exist. Applies immediately.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The labels to remove before any are added. A label that does not exist is not an error.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove_labels: Vec<LabelKey>,
}

impl VmSetRequest {
    pub fn rates(&self) -> RateLimits {
        RateLimits {
            disk_bytes_per_s: self.disk_bytes_per_s,
            disk_ops_per_s: self.disk_ops_per_s,
            net_rx_bytes_per_s: self.net_rx_bytes_per_s,
            net_tx_bytes_per_s: self.net_tx_bytes_per_s,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRenameRequest {
    pub vm: String,
    pub name: VmName,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmBalloonRequest {
    pub vm: String,
    /// How much memory the guest keeps until its next start. If absent, the call only reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_mib: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmPortsRequest {
    pub vm: String,
    pub ports: Vec<Port>,
    /// Also begin, or stop, to forward the ports on which processes in the guest listen.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub auto: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmPortsReply {
    pub vm: Vm,
    /// The ports that were added or removed, with the numbers that were picked.
    pub ports: Vec<Port>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmBalloonReply {
    pub vm: Vm,
    /// How much memory the guest keeps now. It returns memory gradually and takes back what it
    /// needs immediately.
    pub kept_mib: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmLogsRequest {
    pub vm: String,
    /// Send only this many of the last lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<u64>,
    /// Keep sending (`more`) until the VM is deleted or the caller disconnects.
    #[serde(default)]
    pub follow: bool,
}

/// Console output as text. Bytes that are not UTF-8 are replaced; the client has to handle control
/// characters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogChunk {
    pub text: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmWaitRequest {
    pub vm: String,
    /// The state to wait for. Defaults to `stopped`. `failed` also ends a wait for `stopped`.
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
    /// The VMs, oldest first.
    pub vms: Vec<V>,
    /// The cursor of the next page, or None if there are no more items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmDeleteReply {
    /// The deleted VM. None if the VM did not exist and `if_exists` was set.
    pub deleted: Option<VmId>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmPruneReply {
    pub deleted: Vec<VmId>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SshConfigRequest {
    pub vm: String,
    /// The user of the guest to log in as. Defaults to the user of the VM's commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// The address, the keys and the user with which an ordinary SSH client reaches a VM. The private
/// key works for this VM only, and only root and the VM's owner can get it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SshConfigReply {
    pub vm: VmId,
    pub name: VmName,
    pub addr: std::net::SocketAddr,
    pub user: String,
    /// The private key with which the client logs in, in OpenSSH's format.
    pub private_key: String,
    /// The guest's public host key, such as `ssh-ed25519 AAAA...`.
    pub host_key: String,
    pub workdir: Option<String>,
    /// A file in the guest with the VM's variables, for a shell to read. Left out if login shells
    /// and commands have them anyway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_file: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStatsRequest {
    /// The VMs to report. If empty, the reply has all running VMs that the caller may see.
    #[serde(default)]
    pub vms: Vec<String>,
    /// The cursor of the page: `next` of the previous one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The most items to return; there may be fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// The host resources that a VM has used since its VMM started. Counters grow until the next start.
/// A value is null if this host cannot count it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStats {
    pub vm: VmId,
    pub name: VmName,
    /// When the values were read, in milliseconds since the epoch.
    pub at_ms: u64,
    /// CPU time of the VMM's process, including the guest's.
    pub cpu_ns: u64,
    /// Memory that the VMM currently uses.
    pub memory_bytes: u64,
    /// The guest's memory size.
    pub memory_max_bytes: u64,
    /// Bytes read from the host's block devices.
    pub disk_read_bytes: Option<u64>,
    pub disk_written_bytes: Option<u64>,
    /// Bytes that the guest has received. They are counted only on a bridge.
    pub net_received_bytes: Option<u64>,
    pub net_sent_bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatsReply<S = VmStats> {
    pub stats: Vec<S>,
    /// The cursor of the next page, or None if there are no more items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// The metrics of a VMM in its own format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmMetricsReply {
    pub vm: VmId,
    pub name: VmName,
    /// The driver that defines the format.
    pub driver: Option<String>,
    /// The reports, oldest first. Firecracker writes a report once a minute and on request. Each
    /// covers the time since the previous report. The reply contains a new report and all kept
    /// reports that were not read yet. QEMU's report covers the time since its start.
    pub metrics: Vec<serde_json::Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConnectRequest {
    pub vm: String,
    /// The guest's vsock port (vsock(7)).
    pub port: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogsReply {
    /// The number of bytes sent in `log` notes.
    pub bytes: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmForkRequest {
    pub vm: String,
    /// The name of the new VM. Defaults to a generated name, adjective-noun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<VmName>,
    /// Labels of the new VM, in addition to those of the original. A label with the same key is
    /// replaced.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

calls! {
    /// Creates the VM without booting it. With `hold`, replies when the VM has been deleted, and
    /// deletes an `rm` VM if the caller disconnects.
    VmCreate = "vm.create" (VmCreateRequest) -> VmReply [Anybody, Keyed, Nothing, NoFds];
    /// Succeeds if the VM is already running.
    VmStart = "vm.start" (VmRequest) -> VmReply [Owner, Keyed, CancelOperation, NoFds];
    /// Succeeds if the VM is already stopped.
    VmStop = "vm.stop" (VmStopRequest) -> VmReply [Owner, Keyed, FinishOperation, NoFds];
    VmRestart = "vm.restart" (VmStopRequest) -> VmReply [Owner, Keyed, FinishOperation, NoFds];
    VmKill = "vm.kill" (VmRequest) -> VmReply [Owner, Keyed, FinishOperation, NoFds];
    VmDelete = "vm.delete" (VmDeleteRequest) -> VmDeleteReply [Owner, Keyed, FinishOperation, NoFds];
    VmList = "vm.list" (VmListRequest) -> VmListReply [Anybody, Unkeyed, Nothing, NoFds];
    VmShow = "vm.show" (VmRequest) -> VmReply [Owner, Unkeyed, Nothing, NoFds];
    VmStatsCall = "vm.stats" (VmStatsRequest) -> VmStatsReply [Anybody, Unkeyed, Nothing, NoFds];
    /// Clones a running VM, which continues to run.
    VmFork = "vm.fork" (VmForkRequest) -> VmReply [Owner, Keyed, CancelOperation, NoFds];
    VmMetrics = "vm.metrics" (VmRequest) -> VmMetricsReply [Owner, Unkeyed, Nothing, NoFds];
    /// Connects to a vsock port of the guest. The connected socket comes with the first byte of the
    /// reply (SCM_RIGHTS) and does not depend on the daemon. Firecracker does not support
    /// half-close.
    VmConnect = "vm.connect" (VmConnectRequest) -> VmReply [Owner, Unkeyed, Nothing, ReturnsFd, feature "vsock"];
    /// Pauses the guest's vCPUs until `vm.resume`. No new command can start in a paused guest.
    VmPause = "vm.pause" (VmRequest) -> VmReply [Owner, Keyed, Nothing, NoFds];
    VmResume = "vm.resume" (VmRequest) -> VmReply [Owner, Keyed, Nothing, NoFds];
    VmSet = "vm.set" (VmSetRequest) -> VmReply [Owner, Keyed, Nothing, NoFds];
    /// Gives a VM another name, in any state. The ID stays, and so does the host name of a running
    /// guest until its next start.
    VmRename = "vm.rename" (VmRenameRequest) -> VmReply [Owner, Keyed, Nothing, NoFds];
    /// Makes the guest return memory to the host or take it back, and reports how much the guest
    /// keeps.
    VmBalloon = "vm.balloon" (VmBalloonRequest) -> VmBalloonReply [Owner, Keyed, Nothing, NoFds];
    /// Publishes ports, at once if the VM is running. Adds all of them or none.
    VmPortAdd = "vm.port_add" (VmPortsRequest) -> VmPortsReply [Owner, Keyed, Nothing, NoFds, feature "ports"];
    /// Stops publishing these ports, which must be the VM's. Open connections may be cut.
    VmPortRemove = "vm.port_remove" (VmPortsRequest) -> VmPortsReply [Owner, Keyed, Nothing, NoFds, feature "ports"];
    /// Sends `log` notes (`more`), then the reply.
    VmLogs = "vm.logs" (VmLogsRequest) -> LogsReply [Owner, Unkeyed, EndCall, NoFds];
    VmWait = "vm.wait" (VmWaitRequest) -> VmReply [Owner, Unkeyed, EndCall, NoFds];
    /// Deletes the caller's VMs in the states `created`, `stopped` and `failed`.
    VmPrune = "vm.prune" (super::Empty) -> VmPruneReply [Anybody, Unkeyed, Nothing, NoFds];
    VmSshConfig = "vm.ssh_config" (SshConfigRequest) -> SshConfigReply [Owner, Unkeyed, Nothing, NoFds];
}

/// The call `vm.list` with `brief` set in the request.
pub struct VmListBrief;

impl super::Call for VmListBrief {
    const METHOD: &'static str = VmList::METHOD;
    type Request = VmListRequest;
    type Reply = VmListReply<VmBrief<'static>>;
}

super::page::list_calls! {
    VmList: vms of Vm;
    VmListBrief: vms of VmBrief<'static>;
    VmStatsCall: stats of VmStats;
}
