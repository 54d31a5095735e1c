//! Firecracker's API (src/firecracker/swagger/firecracker.yaml, v1.16), as much as a driver needs. What may be asked before the guest
//! starts and what after are two types, so that a call in the wrong phase does not compile; a start or a load turns the one into
//! the other.

use super::checks;
use super::http::{Answer, Connection, Method};
use super::refusal::refused;
use crate::error::{Error, Kind, Result};
use crate::vmm::dial::Patience;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The first version that needs [`Booted::reset_vsock`] after a pause, and the first that no longer does: 1.17 fixed it
/// (firecracker-microvm/firecracker#6100).
const HOLDS_VSOCK_SINCE: (u32, u32) = (1, 16);
const HOLDS_VSOCK_UNTIL: (u32, u32) = (1, 17);
/// Where no file can be made, in a jail or out of it.
const NO_PLACE: &str = "/proc/none/none";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum State {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

/// `GET /`.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct Instance {
    pub id: String,
    pub state: State,
    pub vmm_version: String,
}

#[derive(Debug, Serialize)]
pub struct MachineConfig {
    pub vcpu_count: u32,
    pub mem_size_mib: u64,
}

#[derive(Debug, Serialize)]
pub struct BootSource<'a> {
    pub kernel_image_path: &'a str,
    pub initrd_path: &'a str,
    pub boot_args: &'a str,
}

/// The first one added is the guest's first, whatever its name.
#[derive(Debug, Serialize)]
pub struct Drive<'a> {
    /// Letters, digits and `_`.
    pub drive_id: &'a str,
    pub path_on_host: &'a str,
    pub is_root_device: bool,
    pub is_read_only: bool,
    /// `Writeback` honours the guest's flushes; `Unsafe`, Firecracker's default, does not.
    pub cache_type: CacheType,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Absent: as it is; of a size of 0: none (docs/api_requests/patch-block.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RateLimiter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// `size` passes at once, and again after `refill_time` milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TokenBucket {
    pub size: u64,
    pub refill_time: u64,
}

/// Of a bucket for bytes: no smaller than the largest request (Linux' `max_sectors_kb` is 1280 by default), for each that does not fit
/// is a line in the VMM's log.
pub const BUCKET_BYTES_MIN: u64 = 2 << 20;

impl TokenBucket {
    const NONE: Self = Self { size: 0, refill_time: 0 };

    fn ops(per_s: u64) -> Self {
        Self { size: per_s, refill_time: 1000 }
    }

    fn bytes(per_s: u64) -> Self {
        let size = per_s.max(BUCKET_BYTES_MIN);
        let ms = u128::from(size) * 1000 / u128::from(per_s.max(1));
        Self { size, refill_time: u64::try_from(ms).unwrap_or(u64::MAX) }
    }
}

impl RateLimiter {
    /// For a device that is added.
    pub fn new(bytes_per_s: Option<u64>, ops_per_s: Option<u64>) -> Option<Self> {
        let limiter = Self { bandwidth: bytes_per_s.map(TokenBucket::bytes), ops: ops_per_s.map(TokenBucket::ops) };
        Some(limiter).filter(|l| *l != Self::default())
    }

    /// For one that is there, whatever it had.
    fn instead(bytes_per_s: Option<u64>, ops_per_s: Option<u64>) -> Self {
        let bandwidth = bytes_per_s.map_or(TokenBucket::NONE, TokenBucket::bytes);
        Self { bandwidth: Some(bandwidth), ops: Some(ops_per_s.map_or(TokenBucket::NONE, TokenBucket::ops)) }
    }
}

#[derive(Debug, Serialize)]
struct DriveRates<'a> {
    drive_id: &'a str,
    rate_limiter: RateLimiter,
}

#[derive(Debug, Serialize)]
struct NetworkRates<'a> {
    iface_id: &'a str,
    rx_rate_limiter: RateLimiter,
    tx_rate_limiter: RateLimiter,
}

/// Its size is what the guest gives back.
#[derive(Debug, Serialize)]
struct Balloon {
    amount_mib: u64,
    deflate_on_oom: bool,
    stats_polling_interval_s: u32,
    /// The guest reports pages that it no longer uses, and the VMM gives them back to the host (since 1.14).
    free_page_reporting: bool,
}

#[derive(Debug, Serialize)]
struct BalloonSize {
    amount_mib: u64,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct BalloonStatistics {
    pub actual_mib: u64,
}

/// Between two times that the guest tells of its memory. How large the balloon is, which is all that is asked for, is known at any
/// time, but told only where there are statistics.
const STATISTICS_PERIOD_S: u32 = 60;

#[derive(Clone, Copy, Debug, Serialize)]
pub enum CacheType {
    Writeback,
}

#[derive(Debug, Serialize)]
pub struct NetworkInterface<'a> {
    pub iface_id: &'a str,
    /// It must be there: one that is not is made, without a word.
    pub host_dev_name: &'a str,
    pub guest_mac: &'a str,
    /// What the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

#[derive(Debug, Serialize)]
struct Serial<'a> {
    serial_out_path: &'a str,
}

#[derive(Debug, Serialize)]
struct Metrics<'a> {
    metrics_path: &'a str,
}

#[derive(Debug, Serialize)]
struct Entropy {}

#[derive(Debug, Serialize)]
pub struct Vsock<'a> {
    pub guest_cid: u32,
    /// It must not be there; a snapshot keeps it, and the next VMM makes it again.
    pub uds_path: &'a str,
}

#[derive(Debug, Serialize)]
struct Action {
    action_type: &'static str,
}

/// Everything but the interfaces is where it was when it was saved.
#[derive(Debug, Serialize)]
pub struct LoadSnapshot<'a> {
    snapshot_path: &'a str,
    mem_backend: MemBackend<'a>,
    network_overrides: &'a [NetworkOverride<'a>],
    resume_vm: bool,
}

#[derive(Debug, Serialize)]
struct MemBackend<'a> {
    backend_type: &'static str,
    backend_path: &'a str,
}

#[derive(Debug, Serialize)]
pub struct NetworkOverride<'a> {
    pub iface_id: &'a str,
    pub host_dev_name: &'a str,
}

impl<'a> LoadSnapshot<'a> {
    pub fn new(devices: &'a str, memory: &'a str, network_overrides: &'a [NetworkOverride<'a>]) -> Self {
        let mem_backend = MemBackend { backend_type: "File", backend_path: memory };
        Self { snapshot_path: devices, mem_backend, network_overrides, resume_vm: true }
    }
}

/// The part of the guest's memory that a snapshot writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum SnapshotType {
    /// All of it, while the guest is paused.
    Full,
    /// The pages that are in the host's memory, into a sparse file. Of a guest that has booted these are all pages that
    /// were ever touched, so the file stands alone (docs/snapshotting/snapshot-support.md). A restored guest has the
    /// others in the file that it came from, and pages in the host's swap are missing.
    Diff,
}

/// The part of `GET /vm/config` that a driver needs.
#[derive(Debug, Deserialize)]
struct VmConfig {
    #[serde(rename = "boot-source")]
    boot_source: Option<BootedFrom>,
}

#[derive(Debug, Default, Deserialize)]
struct BootedFrom {
    #[serde(default)]
    kernel_image_path: String,
}

#[derive(Debug, Serialize)]
struct CreateSnapshot<'a> {
    snapshot_type: SnapshotType,
    snapshot_path: &'a str,
    mem_file_path: &'a str,
}

#[derive(Debug, Serialize)]
struct VmState {
    state: &'static str,
}

/// A server that has nothing configured yet.
pub struct PreBoot<'a>(Api<'a>);

/// A guest that runs or stands still.
pub struct Booted<'a>(Api<'a>);

struct Api<'a> {
    connection: Connection<'a>,
    /// The VMM's, as `GET /` has it.
    version: String,
}

impl<'a> Api<'a> {
    fn open(stream: UnixStream, patience: Patience<'a>) -> Result<(Self, Instance)> {
        let mut api = Self { connection: Connection::new(stream, patience), version: String::new() };
        let instance: Instance = api.read("/")?;
        api.version.clone_from(&instance.vmm_version);
        Ok((api, instance))
    }

    fn read<T: DeserializeOwned>(&mut self, path: &str) -> Result<T> {
        let doing = format!("ask the VMM: GET {path}");
        let answer = check(&doing, self.connection.request(Method::Get, path, b"")?)?;
        serde_json::from_slice(&answer.body)
            .map_err(|e| Error::new(Kind::VmmFailed, format!("{doing}: the answer is not as documented")).with_source(e))
    }

    fn change(&mut self, method: Method, path: &str, body: &impl Serialize, doing: &str) -> Result<()> {
        let answer = check(doing, self.ask(method, path, body, doing)?)?;
        if answer.is_deprecated {
            log::warn!("{doing}: Firecracker says that a later version does not know this any more");
        }
        Ok(())
    }

    /// Whatever it answers.
    fn ask(&mut self, method: Method, path: &str, body: &impl Serialize, doing: &str) -> Result<Answer> {
        let body = serde_json::to_vec(body).map_err(|e| Error::internal(doing).with_source(e))?;
        self.connection.request(method, path, &body).map_err(|e| e.context(doing))
    }
}

fn check(doing: &str, answer: Answer) -> Result<Answer> {
    match answer.status {
        200..=299 => Ok(answer),
        status => Err(refused(doing, status, &answer.body)),
    }
}

impl<'a> PreBoot<'a> {
    /// # Errors
    /// `vmm_failed` when it runs a guest already.
    pub fn open(stream: UnixStream, patience: Patience<'a>) -> Result<(Self, Instance)> {
        let (api, instance) = Api::open(stream, patience)?;
        match instance.state {
            State::NotStarted => Ok((Self(api), instance)),
            state => Err(Error::new(Kind::VmmFailed, format!("configure the VMM: its guest is {state:?} already"))),
        }
    }

    pub fn machine(&mut self, config: &MachineConfig) -> Result<()> {
        self.0.change(Method::Put, "/machine-config", config, "set vcpus and memory")
    }

    pub fn boot_source(&mut self, source: &BootSource<'_>) -> Result<()> {
        self.0.change(Method::Put, "/boot-source", source, "set the kernel")
    }

    pub fn drive(&mut self, drive: &Drive<'_>) -> Result<()> {
        self.0.change(Method::Put, &format!("/drives/{}", drive.drive_id), drive, &format!("add disk {}", drive.drive_id))
    }

    pub fn network(&mut self, interface: &NetworkInterface<'_>) -> Result<()> {
        let doing = format!("connect the guest to {}", interface.host_dev_name);
        self.0.change(Method::Put, &format!("/network-interfaces/{}", interface.iface_id), interface, &doing)
    }

    /// A source of random numbers.
    pub fn entropy(&mut self) -> Result<()> {
        self.0.change(Method::Put, "/entropy", &Entropy {}, "add a source of random numbers")
    }

    pub fn vsock(&mut self, vsock: &Vsock<'_>) -> Result<()> {
        self.0.change(Method::Put, "/vsock", vsock, "add a vsock")
    }

    /// One that takes nothing yet, and from which a guest that runs out of memory takes back what it needs.
    pub fn balloon(&mut self) -> Result<()> {
        let balloon = Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: STATISTICS_PERIOD_S,
            free_page_reporting: true,
        };
        self.0.change(Method::Put, "/balloon", &balloon, "add a balloon")
    }

    /// Where its serial console writes to: a file or a pipe, which it makes no larger than it is.
    pub fn serial(&mut self, path: &str) -> Result<()> {
        self.0.change(Method::Put, "/serial", &Serial { serial_out_path: path }, "set the console")
    }

    /// Where it tells what it counts: a line every minute and when it is asked. Into a pipe that is full it writes nothing.
    pub fn metrics(&mut self, path: &str) -> Result<()> {
        self.0.change(Method::Put, "/metrics", &Metrics { metrics_path: path }, "set where the metrics go")
    }

    /// The guest goes on from where it was. After a refusal the VMM exits (docs/snapshotting/snapshot-support.md).
    pub fn load(mut self, snapshot: &LoadSnapshot<'_>) -> Result<Booted<'a>> {
        self.0.change(Method::Put, "/snapshot/load", snapshot, "load the saved guest")?;
        Ok(Booted(self.0))
    }

    /// The guest runs from here on.
    pub fn start(mut self) -> Result<Booted<'a>> {
        self.0.change(Method::Put, "/actions", &Action { action_type: "InstanceStart" }, "start the guest")?;
        Ok(Booted(self.0))
    }
}

impl<'a> Booted<'a> {
    /// # Errors
    /// `vmm_failed` when no guest was started.
    pub fn open(stream: UnixStream, patience: Patience<'a>) -> Result<(Self, Instance)> {
        let (api, instance) = Api::open(stream, patience)?;
        match instance.state {
            State::NotStarted => Err(Error::new(Kind::VmmFailed, "talk to the guest's VMM: it has not started its guest")),
            State::Running | State::Paused => Ok((Self(api), instance)),
        }
    }

    /// Standing still already is ok.
    pub fn pause(&mut self) -> Result<()> {
        self.0.change(Method::Patch, "/vm", &VmState { state: "Paused" }, "pause the guest")
    }

    pub fn version(&self) -> &str {
        &self.0.version
    }

    /// True for a guest that has booted, false for one that was restored from a snapshot: that one has no kernel.
    pub fn has_booted(&mut self) -> Result<bool> {
        let config: VmConfig = self.0.read("/vm/config")?;
        Ok(config.boot_source.is_some_and(|source| !source.kernel_image_path.is_empty()))
    }

    /// The guest must be paused.
    pub fn save(&mut self, snapshot_type: SnapshotType, devices: &str, memory: &str) -> Result<()> {
        let create = CreateSnapshot { snapshot_type, snapshot_path: devices, mem_file_path: memory };
        self.0.change(Method::Put, "/snapshot/create", &create, "save the guest")
    }

    /// Of a disk of this name; what it had is gone.
    pub fn drive_rates(&mut self, drive_id: &str, bytes_per_s: Option<u64>, ops_per_s: Option<u64>) -> Result<()> {
        let rates = DriveRates { drive_id, rate_limiter: RateLimiter::instead(bytes_per_s, ops_per_s) };
        self.0.change(Method::Patch, &format!("/drives/{drive_id}"), &rates, &format!("limit disk {drive_id}"))
    }

    pub fn network_rates(&mut self, iface_id: &str, rx_bytes_per_s: Option<u64>, tx_bytes_per_s: Option<u64>) -> Result<()> {
        let of = |rate| RateLimiter { ops: None, ..RateLimiter::instead(rate, None) };
        let rates = NetworkRates { iface_id, rx_rate_limiter: of(rx_bytes_per_s), tx_rate_limiter: of(tx_bytes_per_s) };
        self.0.change(Method::Patch, &format!("/network-interfaces/{iface_id}"), &rates, "limit the network")
    }

    /// They are written when this returns.
    pub fn flush_metrics(&mut self) -> Result<()> {
        self.0.change(Method::Put, "/actions", &Action { action_type: "FlushMetrics" }, "ask for the metrics")
    }

    /// On a keyboard of which the guest may know nothing.
    pub fn ctrl_alt_del(&mut self) -> Result<()> {
        self.0.change(Method::Put, "/actions", &Action { action_type: "SendCtrlAltDel" }, "press Ctrl-Alt-Del")
    }

    /// What the guest is to give back.
    pub fn set_balloon(&mut self, amount_mib: u64) -> Result<()> {
        self.0.change(Method::Patch, "/balloon", &BalloonSize { amount_mib }, "set the balloon")
    }

    /// What it has given back.
    pub fn balloon_mib(&mut self) -> Result<u64> {
        self.0.read("/balloon/statistics").map(|statistics: BalloonStatistics| statistics.actual_mib)
    }

    /// Running already is ok, and nothing is done: with each resume a VMM holds back what goes to the guest's vsock.
    pub fn resume(&mut self) -> Result<()> {
        let instance: Instance = self.0.read("/")?;
        if instance.state == State::Running {
            return Ok(());
        }
        let is_since = |since| checks::is_since(&instance.vmm_version, since);
        if is_since(HOLDS_VSOCK_SINCE) && !is_since(HOLDS_VSOCK_UNTIL) {
            self.reset_vsock()?;
        }
        self.0.change(Method::Patch, "/vm", &VmState { state: "Resumed" }, "let the guest go on")
    }

    /// In these versions, from a resume on the VMM holds back what goes to the guest's vsock until the guest has taken note that its streams have
    /// ended; but it is told so by a save only (src/vmm/src/devices/virtio/vsock/device.rs, `kick` and `prepare_save`). So one is
    /// begun, which finds no place for its files.
    fn reset_vsock(&mut self) -> Result<()> {
        let create = CreateSnapshot { snapshot_type: SnapshotType::Full, snapshot_path: NO_PLACE, mem_file_path: NO_PLACE };
        self.0.ask(Method::Put, "/snapshot/create", &create, "end the guest's vsock streams").map(drop)
    }
}

/// Where a guest on a tap is reached.
pub fn ssh_addr(address: Ipv4Addr) -> std::net::SocketAddr {
    (address, super::SSH_PORT).into()
}

/// As text, which JSON needs.
pub fn text(path: &std::path::Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        let path: PathBuf = path.into();
        Error::new(Kind::Unsupported, format!("start the VMM: the path {} is no UTF-8", path.display()))
            .hint("use another state directory")
    })
}
