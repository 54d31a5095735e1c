//! Firecracker's API (src/firecracker/swagger/firecracker.yaml, v1.16), limited to the parts that a
//! driver needs. The requests before and after the start of the guest are methods of two types, so
//! that a request in the wrong phase does not compile. A start or a load converts the first type
//! into the second.

use super::http::{Answer, Connection, Method};
use super::rates::RateLimiter;
use super::refusal::refused;
use super::version;
use crate::error::{Error, Kind, Result};
use crate::vmm::dial::Deadline;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The port of the guest's SSH server.
const SSH_PORT: u16 = 22;

/// The first version that needs [`Booted::reset_vsock`] after a pause. Version 1.17 fixed that
/// (firecracker-microvm/firecracker#6100).
const HOLDS_VSOCK_SINCE: (u32, u32) = (1, 16);
const HOLDS_VSOCK_UNTIL: (u32, u32) = (1, 17);
/// A path where no file can be created, with or without a jail.
const NO_PLACE: &str = "/proc/none/none";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum State {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

/// The answer to `GET /`.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Instance {
    pub id: String,
    pub state: State,
    pub vmm_version: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct MachineConfig {
    pub vcpu_count: u32,
    pub mem_size_mib: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct BootSource<'a> {
    pub kernel_image_path: &'a str,
    pub initrd_path: &'a str,
    pub boot_args: &'a str,
}

/// A disk. The first one that is added is the guest's first disk, whatever its id.
#[derive(Debug, Serialize)]
pub(crate) struct Drive<'a> {
    /// Contains only letters, digits and `_`.
    pub drive_id: &'a str,
    pub path_on_host: &'a str,
    pub is_root_device: bool,
    pub is_read_only: bool,
    /// `Writeback` honours the guest's flushes; `Unsafe`, Firecracker's default, does not.
    pub cache_type: CacheType,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
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

/// The body of `PUT /balloon`. `amount_mib` is the memory that the guest gives up to the host.
#[derive(Debug, Serialize)]
struct Balloon {
    amount_mib: u64,
    deflate_on_oom: bool,
    stats_polling_interval_s: u32,
    /// The guest reports unused pages, and the VMM returns them to the host (since 1.14).
    free_page_reporting: bool,
}

#[derive(Debug, Serialize)]
struct BalloonSize {
    amount_mib: u64,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct BalloonStatistics {
    pub actual_mib: u64,
}

/// How often the guest reports its memory statistics. fcd needs only the size of the balloon, but
/// Firecracker reports it only if statistics are enabled.
const STATISTICS_PERIOD_S: u32 = 60;

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) enum CacheType {
    Writeback,
}

#[derive(Debug, Serialize)]
pub(crate) struct NetworkInterface<'a> {
    pub iface_id: &'a str,
    /// Must exist: Firecracker silently creates a missing tap.
    pub host_dev_name: &'a str,
    pub guest_mac: &'a str,
    /// The limit for data that the guest receives.
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
pub(crate) struct Vsock<'a> {
    pub guest_cid: u32,
    /// The socket must not exist. A snapshot contains this path, and the VMM that loads it creates
    /// the socket again.
    pub uds_path: &'a str,
}

#[derive(Debug, Serialize)]
struct Action {
    action_type: &'static str,
}

/// The request to load a snapshot. All devices except the network interfaces keep the paths that
/// they had when the guest was saved.
#[derive(Debug, Serialize)]
pub(crate) struct LoadSnapshot<'a> {
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
pub(crate) struct NetworkOverride<'a> {
    pub iface_id: &'a str,
    pub host_dev_name: &'a str,
}

impl<'a> LoadSnapshot<'a> {
    pub(crate) fn new(
        devices: &'a str,
        memory: &'a str,
        network_overrides: &'a [NetworkOverride<'a>],
    ) -> Self {
        let mem_backend = MemBackend {
            backend_type: "File",
            backend_path: memory,
        };
        Self {
            snapshot_path: devices,
            mem_backend,
            network_overrides,
            resume_vm: true,
        }
    }
}

/// The part of the guest's memory that a snapshot contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum SnapshotType {
    /// All of the guest's memory.
    Full,
    /// The pages that are in the host's memory, in a sparse file. For a guest that has booted,
    /// these are all pages that it has ever touched, so the file is complete
    /// (docs/snapshotting/snapshot-support.md). For a restored guest, other pages may exist only in
    /// the file from which it was restored. Pages in the host's swap are missing.
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

/// The API of a VMM whose guest has not started yet.
pub(crate) struct PreBoot<'a>(Api<'a>);

/// The API of a VMM whose guest runs or is paused.
pub(crate) struct Booted<'a>(Api<'a>);

struct Api<'a> {
    connection: Connection<'a>,
    /// The VMM's version, as reported by `GET /`.
    version: String,
}

impl<'a> Api<'a> {
    fn open(stream: UnixStream, deadline: Deadline<'a>) -> Result<(Self, Instance)> {
        let mut api = Self {
            connection: Connection::new(stream, deadline),
            version: String::new(),
        };
        let instance: Instance = api.read("/")?;
        api.version.clone_from(&instance.vmm_version);
        Ok((api, instance))
    }

    fn read<T: DeserializeOwned>(&mut self, path: &str) -> Result<T> {
        let doing = format!("ask the VMM: GET {path}");
        let answer = check(&doing, self.connection.request(Method::Get, path, b"")?)?;
        serde_json::from_slice(&answer.body).map_err(|e| {
            Error::new(
                Kind::VmmFailed,
                format!("{doing}: the answer is not as documented"),
            )
            .with_source(e)
        })
    }

    fn change(
        &mut self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        doing: &str,
    ) -> Result<()> {
        let answer = check(doing, self.ask(method, path, body, doing)?)?;
        if answer.is_deprecated {
            log::warn!("{doing}: Firecracker says that this request is deprecated");
        }
        Ok(())
    }

    /// Sends a request and returns the answer, even if its status is an error.
    fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        doing: &str,
    ) -> Result<Answer> {
        let body = serde_json::to_vec(body).map_err(|e| Error::internal(doing).with_source(e))?;
        self.connection
            .request(method, path, &body)
            .map_err(|e| e.context(doing))
    }
}

fn check(doing: &str, answer: Answer) -> Result<Answer> {
    match answer.status {
        200..=299 => Ok(answer),
        status => Err(refused(doing, status, &answer.body)),
    }
}

impl<'a> PreBoot<'a> {
    /// Opens the API of a VMM that has not started its guest yet.
    ///
    /// # Errors
    /// `vmm_failed` if the guest already runs or is paused.
    pub(crate) fn open(stream: UnixStream, deadline: Deadline<'a>) -> Result<(Self, Instance)> {
        let (api, instance) = Api::open(stream, deadline)?;
        match instance.state {
            State::NotStarted => Ok((Self(api), instance)),
            state => Err(Error::new(
                Kind::VmmFailed,
                format!("configure the VMM: its guest is already {state:?}"),
            )),
        }
    }

    pub(crate) fn machine(&mut self, config: &MachineConfig) -> Result<()> {
        self.0.change(
            Method::Put,
            "/machine-config",
            config,
            "set vCPUs and memory",
        )
    }

    pub(crate) fn boot_source(&mut self, source: &BootSource<'_>) -> Result<()> {
        self.0
            .change(Method::Put, "/boot-source", source, "set the kernel")
    }

    pub(crate) fn drive(&mut self, drive: &Drive<'_>) -> Result<()> {
        self.0.change(
            Method::Put,
            &format!("/drives/{}", drive.drive_id),
            drive,
            &format!("add disk {}", drive.drive_id),
        )
    }

    pub(crate) fn network(&mut self, interface: &NetworkInterface<'_>) -> Result<()> {
        let doing = format!("connect the guest to {}", interface.host_dev_name);
        self.0.change(
            Method::Put,
            &format!("/network-interfaces/{}", interface.iface_id),
            interface,
            &doing,
        )
    }

    /// Adds a source of random numbers.
    pub(crate) fn entropy(&mut self) -> Result<()> {
        self.0.change(
            Method::Put,
            "/entropy",
            &Entropy {},
            "add a source of random numbers",
        )
    }

    pub(crate) fn vsock(&mut self, vsock: &Vsock<'_>) -> Result<()> {
        self.0.change(Method::Put, "/vsock", vsock, "add a vsock")
    }

    /// Adds an empty balloon. A guest that runs out of memory can reclaim memory from the balloon.
    pub(crate) fn balloon(&mut self) -> Result<()> {
        let balloon = Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: STATISTICS_PERIOD_S,
            free_page_reporting: true,
        };
        self.0
            .change(Method::Put, "/balloon", &balloon, "add a balloon")
    }

    /// Sets the file or pipe, which must exist, that receives the output of the serial console.
    pub(crate) fn serial(&mut self, path: &str) -> Result<()> {
        self.0.change(
            Method::Put,
            "/serial",
            &Serial {
                serial_out_path: path,
            },
            "set the console",
        )
    }

    /// Sets the pipe that receives the metrics. The VMM writes a line every minute and on request,
    /// unless the pipe is full.
    pub(crate) fn metrics(&mut self, path: &str) -> Result<()> {
        self.0.change(
            Method::Put,
            "/metrics",
            &Metrics { metrics_path: path },
            "set the metrics pipe",
        )
    }

    /// Restores a guest, which continues where it was saved. The VMM exits if it rejects the
    /// snapshot (docs/snapshotting/snapshot-support.md).
    pub(crate) fn load(mut self, snapshot: &LoadSnapshot<'_>) -> Result<Booted<'a>> {
        self.0.change(
            Method::Put,
            "/snapshot/load",
            snapshot,
            "load the saved guest",
        )?;
        Ok(Booted(self.0))
    }

    /// Starts the guest.
    pub(crate) fn start(mut self) -> Result<Booted<'a>> {
        self.0.change(
            Method::Put,
            "/actions",
            &Action {
                action_type: "InstanceStart",
            },
            "start the guest",
        )?;
        Ok(Booted(self.0))
    }
}

impl<'a> Booted<'a> {
    /// Opens the API of a VMM whose guest runs or is paused.
    ///
    /// # Errors
    /// `vmm_failed` if no guest was started.
    pub(crate) fn open(stream: UnixStream, deadline: Deadline<'a>) -> Result<(Self, Instance)> {
        let (api, instance) = Api::open(stream, deadline)?;
        match instance.state {
            State::NotStarted => Err(Error::new(
                Kind::VmmFailed,
                "talk to the VMM: it has not started its guest",
            )),
            State::Running | State::Paused => Ok((Self(api), instance)),
        }
    }

    /// Pauses the guest. Succeeds if it is already paused.
    pub(crate) fn pause(&mut self) -> Result<()> {
        self.0.change(
            Method::Patch,
            "/vm",
            &VmState { state: "Paused" },
            "pause the guest",
        )
    }

    pub(crate) fn version(&self) -> &str {
        &self.0.version
    }

    /// True for a guest that has booted, and false for one that was restored from a snapshot, which
    /// has no kernel configured.
    pub(crate) fn has_booted(&mut self) -> Result<bool> {
        let config: VmConfig = self.0.read("/vm/config")?;
        Ok(config
            .boot_source
            .is_some_and(|source| !source.kernel_image_path.is_empty()))
    }

    /// Saves the guest's devices and its memory to these two paths. The guest must be paused.
    pub(crate) fn save(
        &mut self,
        snapshot_type: SnapshotType,
        devices: &str,
        memory: &str,
    ) -> Result<()> {
        let create = CreateSnapshot {
            snapshot_type,
            snapshot_path: devices,
            mem_file_path: memory,
        };
        self.0
            .change(Method::Put, "/snapshot/create", &create, "save the guest")
    }

    /// Replaces the limits of this disk.
    pub(crate) fn drive_rates(
        &mut self,
        drive_id: &str,
        bytes_per_s: Option<u64>,
        ops_per_s: Option<u64>,
    ) -> Result<()> {
        let rates = DriveRates {
            drive_id,
            rate_limiter: RateLimiter::instead(bytes_per_s, ops_per_s),
        };
        self.0.change(
            Method::Patch,
            &format!("/drives/{drive_id}"),
            &rates,
            &format!("limit disk {drive_id}"),
        )
    }

    pub(crate) fn network_rates(
        &mut self,
        iface_id: &str,
        rx_bytes_per_s: Option<u64>,
        tx_bytes_per_s: Option<u64>,
    ) -> Result<()> {
        let of = |rate| RateLimiter {
            ops: None,
            ..RateLimiter::instead(rate, None)
        };
        let rates = NetworkRates {
            iface_id,
            rx_rate_limiter: of(rx_bytes_per_s),
            tx_rate_limiter: of(tx_bytes_per_s),
        };
        self.0.change(
            Method::Patch,
            &format!("/network-interfaces/{iface_id}"),
            &rates,
            "limit the network",
        )
    }

    /// Makes the VMM write its metrics, and returns when they have been written.
    pub(crate) fn flush_metrics(&mut self) -> Result<()> {
        self.0.change(
            Method::Put,
            "/actions",
            &Action {
                action_type: "FlushMetrics",
            },
            "ask for the metrics",
        )
    }

    /// Presses Ctrl-Alt-Del. The guest may have no driver for the keyboard.
    pub(crate) fn ctrl_alt_del(&mut self) -> Result<()> {
        self.0.change(
            Method::Put,
            "/actions",
            &Action {
                action_type: "SendCtrlAltDel",
            },
            "press Ctrl-Alt-Del",
        )
    }

    /// Sets how much memory the guest should return.
    pub(crate) fn set_balloon(&mut self, amount_mib: u64) -> Result<()> {
        self.0.change(
            Method::Patch,
            "/balloon",
            &BalloonSize { amount_mib },
            "set the balloon",
        )
    }

    /// Returns how much memory the guest has returned.
    pub(crate) fn balloon_mib(&mut self) -> Result<u64> {
        self.0
            .read("/balloon/statistics")
            .map(|statistics: BalloonStatistics| statistics.actual_mib)
    }

    /// Resumes the guest. Does nothing if it already runs, because every resume makes the VMM hold
    /// back data to the guest's vsock.
    pub(crate) fn resume(&mut self) -> Result<()> {
        let instance: Instance = self.0.read("/")?;
        if instance.state == State::Running {
            return Ok(());
        }
        let is_since = |since| version::is_since(&instance.vmm_version, since);
        if is_since(HOLDS_VSOCK_SINCE) && !is_since(HOLDS_VSOCK_UNTIL) {
            self.reset_vsock()?;
        }
        self.0.change(
            Method::Patch,
            "/vm",
            &VmState { state: "Resumed" },
            "resume the guest",
        )
    }

    /// Makes the VMM deliver data to the guest's vsock after a resume. The affected versions
    /// deliver nothing until the guest has handled an event that resets its streams, and only a
    /// save sends that event (src/vmm/src/devices/virtio/vsock/device.rs, `kick` and
    /// `prepare_save`). So this function begins a save that fails because of its path.
    fn reset_vsock(&mut self) -> Result<()> {
        let create = CreateSnapshot {
            snapshot_type: SnapshotType::Full,
            snapshot_path: NO_PLACE,
            mem_file_path: NO_PLACE,
        };
        self.0
            .ask(
                Method::Put,
                "/snapshot/create",
                &create,
                "end the guest's vsock streams",
            )
            .map(drop)
    }
}

/// Returns the address of the SSH server of a guest on a tap.
pub(crate) fn ssh_addr(address: Ipv4Addr) -> std::net::SocketAddr {
    (address, SSH_PORT).into()
}

/// Returns a path as text for JSON.
pub(crate) fn text(path: &std::path::Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        let path: PathBuf = path.into();
        Error::new(
            Kind::Unsupported,
            format!("start the VMM: the path {} is not UTF-8", path.display()),
        )
        .hint("use another state directory")
    })
}
