//! The state of the microVM, and the effects of requests on it.

mod snapshots;

use crate::vsock::listen_for_vsock;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const MACHINE_CONFIG: [&str; 6] = [
    "vcpu_count",
    "mem_size_mib",
    "smt",
    "cpu_template",
    "track_dirty_pages",
    "huge_pages",
];
const BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const NO_BALLOON: &str = "Balloon config error: No balloon device found.";
const AFTER: &str = "The requested operation is not supported after starting the microVM.";

#[derive(Clone, Copy, PartialEq)]
enum State {
    NotStarted,
    Running,
    Paused,
}

pub struct Vmm {
    id: String,
    version: String,
    state: State,
    kernel: Option<PathBuf>,
    drives: Vec<(String, bool)>,
    networks: Vec<(String, String)>,
    serial: Option<PathBuf>,
    /// The paths of the disks' files.
    paths: Vec<String>,
    is_ending: bool,
    is_shut_down_by_key: bool,
    /// The memory that the guest should return, in MiB. A guest that "runs" returns it immediately.
    balloon_mib: Option<u64>,
    metrics: Option<File>,
    flushes: u64,
    /// The path of the vsock device's socket.
    vsock: Option<String>,
}

/// A response body, or the message of a fault.
pub type Outcome = Result<Option<Value>, String>;

impl Vmm {
    pub fn new(id: String, version: String, is_shut_down_by_key: bool) -> Self {
        Self {
            id,
            version,
            state: State::NotStarted,
            kernel: None,
            drives: Vec::new(),
            networks: Vec::new(),
            serial: None,
            paths: Vec::new(),
            is_ending: false,
            is_shut_down_by_key,
            balloon_mib: None,
            metrics: None,
            flushes: 0,
            vsock: None,
        }
    }

    /// True if the process exits once the last request is answered.
    pub fn is_ending(&self) -> bool {
        self.is_ending
    }

    pub fn handle(&mut self, method: &str, path: &str, body: &[u8]) -> Outcome {
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        if method == "GET" {
            return self.read(&parts);
        }
        if body.is_empty() {
            return Err(format!("Empty {method} request."));
        }
        let body: Value =
            serde_json::from_slice(body).map_err(|e| deserializing(&e.to_string()))?;
        match (method, parts.as_slice()) {
            ("PATCH", ["vm"]) => self.set_state(&body),
            ("PUT", ["actions"]) => self.act(&body),
            ("PUT", ["snapshot", "create"]) => self.save(&body),
            ("PUT", ["snapshot", "load"]) => self.load(&body),
            ("PATCH", ["drives" | "network-interfaces", id]) => self.limit(&parts, id, &body),
            ("PATCH", ["balloon"]) => self.set_balloon(&body),
            (
                "PUT",
                [
                    "machine-config" | "boot-source" | "serial" | "metrics" | "entropy" | "vsock"
                    | "balloon",
                ]
                | ["drives" | "network-interfaces", _],
            ) => {
                if self.state != State::NotStarted {
                    return Err(if parts[0] == "drives" {
                        "PCI is not enabled".to_owned()
                    } else {
                        AFTER.to_owned()
                    });
                }
                self.configure(&parts, &body)
            }
            _ => Err(format!(
                "Invalid request method and/or path: {method} {}.",
                parts[0]
            )),
        }
    }

    fn read(&self, parts: &[&str]) -> Outcome {
        match parts {
            [""] => {
                let state = match self.state {
                    State::NotStarted => "Not started",
                    State::Running => "Running",
                    State::Paused => "Paused",
                };
                Ok(Some(
                    json!({"id": self.id, "state": state, "vmm_version": self.version, "app_name": "Firecracker"}),
                ))
            }
            ["balloon", "statistics"] => {
                let mib = self.balloon_mib.ok_or(NO_BALLOON)?;
                Ok(Some(
                    json!({"target_pages": mib * 256, "actual_pages": mib * 256, "target_mib": mib, "actual_mib": mib}),
                ))
            }
            ["vm", "config"] => {
                let kernel = self
                    .kernel
                    .as_ref()
                    .map(|path| path.display().to_string())
                    .unwrap_or_default();
                let source =
                    json!({"kernel_image_path": kernel, "initrd_path": null, "boot_args": null});
                Ok(Some(json!({"boot-source": source, "drives": []})))
            }
            ["version"] => Ok(Some(json!({ "firecracker_version": self.version }))),
            [other, ..] => Err(format!("Invalid request method and/or path: GET {other}.")),
            [] => unreachable!("a split has a part"),
        }
    }

    fn configure(&mut self, parts: &[&str], body: &Value) -> Outcome {
        match parts {
            ["machine-config"] => machine(body)?,
            ["boot-source"] => {
                for (field, what) in [
                    ("kernel_image_path", "The kernel file cannot be opened: "),
                    (
                        "initrd_path",
                        "The initrd file cannot be opened due to invalid path or invalid permissions. ",
                    ),
                ] {
                    let Some(path) = body[field].as_str() else {
                        continue;
                    };
                    File::open(path).map_err(|e| format!("Boot source error: {what}{e}"))?;
                }
                self.kernel = body["kernel_image_path"].as_str().map(PathBuf::from);
            }
            ["drives", id] => self.drive(id, body)?,
            ["network-interfaces", id] => self.network(id, body)?,
            ["serial"] => {
                let path = PathBuf::from(body["serial_out_path"].as_str().unwrap_or_default());
                open_serial(&path).map_err(|e| format!("Serial config error: {e}"))?;
                self.serial = Some(path);
            }
            ["metrics"] => {
                let path = PathBuf::from(body["metrics_path"].as_str().unwrap_or_default());
                self.metrics = Some(open_serial(&path).map_err(|e| format!("Metrics error: {e}"))?);
            }
            ["vsock"] => {
                let path = body["uds_path"].as_str().unwrap_or_default().to_owned();
                listen_for_vsock(&path).map_err(|e| {
                    format!("Vsock config error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: {e}")
                })?;
                self.vsock = Some(path);
            }
            ["balloon"] => {
                if body["deflate_on_oom"].as_bool().is_none() {
                    return Err(deserializing(
                        "missing field `deflate_on_oom` at line 1 column 16.",
                    ));
                }
                self.balloon_mib = body["amount_mib"].as_u64();
            }
            _ => {}
        }
        Ok(None)
    }

    fn limit(&self, parts: &[&str], id: &str, body: &Value) -> Outcome {
        let (field, limiters) = if parts[0] == "drives" {
            ("drive_id", &["rate_limiter"][..])
        } else {
            ("iface_id", &["rx_rate_limiter", "tx_rate_limiter"][..])
        };
        check_id(id, &body[field])?;
        if self.state == State::NotStarted {
            return Err(BEFORE.to_owned());
        }
        for bucket in limiters
            .iter()
            .flat_map(|l| ["bandwidth", "ops"].map(|b| &body[*l][b]))
            .filter(|b| !b.is_null())
        {
            for member in ["size", "refill_time"] {
                bucket[member].as_u64().ok_or_else(|| {
                    deserializing(&format!("missing field `{member}` at line 1 column 60."))
                })?;
            }
        }
        let mut known = self
            .drives
            .iter()
            .map(|(known, _)| known)
            .chain(self.networks.iter().map(|(known, _)| known));
        if known.any(|known| known == id) {
            Ok(None)
        } else {
            Err(format!("Invalid device ID: {id}"))
        }
    }

    fn set_balloon(&mut self, body: &Value) -> Outcome {
        if self.state == State::NotStarted {
            return Err(BEFORE.to_owned());
        }
        let mib = self.balloon_mib.as_mut().ok_or(NO_BALLOON)?;
        *mib = body["amount_mib"]
            .as_u64()
            .ok_or_else(|| deserializing("missing field `amount_mib` at line 1 column 2."))?;
        Ok(None)
    }

    fn drive(&mut self, id: &str, body: &Value) -> Result<(), String> {
        check_id(id, &body["drive_id"])?;
        let path = body["path_on_host"].as_str().unwrap_or_default();
        File::options().read(true).write(body["is_read_only"] != true).open(path).map_err(|e| {
            format!("Drive config error: Unable to create the virtio block device: Virtio backend error: Error manipulating the backing file: {e} {path}")
        })?;
        let is_root = body["is_root_device"] == true;
        if is_root && self.drives.iter().any(|(other, root)| *root && other != id) {
            return Err("Drive config error: A root block device already exists!".to_owned());
        }
        self.drives.retain(|(other, _)| other != id);
        self.drives.push((id.to_owned(), is_root));
        self.paths.push(path.to_owned());
        Ok(())
    }

    fn network(&mut self, id: &str, body: &Value) -> Result<(), String> {
        check_id(id, &body["iface_id"])?;
        let (device, mac) = (
            body["host_dev_name"].as_str().unwrap_or_default(),
            body["guest_mac"].as_str().unwrap_or_default(),
        );
        if device.len() > 15 {
            return Err(
                "Network config error: Could not create the network device: Open tap device failed: Invalid interface name"
                    .into(),
            );
        }
        if mac
            .split(':')
            .filter(|p| u8::from_str_radix(p, 16).is_ok())
            .count()
            != 6
        {
            return Err(deserializing(
                "The provided MAC address is invalid. at line 1 column 76.",
            ));
        }
        let mac = mac.to_lowercase();
        if self
            .networks
            .iter()
            .any(|(other, used)| other != id && *used == mac)
        {
            return Err(format!(
                "Network config error: The MAC address is already in use: {mac}"
            ));
        }
        self.networks.push((id.to_owned(), mac));
        Ok(())
    }

    fn set_state(&mut self, body: &Value) -> Outcome {
        let state = match body["state"].as_str() {
            Some("Paused") => State::Paused,
            Some("Resumed") => State::Running,
            other => {
                return Err(deserializing(&format!(
                    "unknown variant `{}`, expected `Paused` or `Resumed`",
                    other.unwrap_or("")
                )));
            }
        };
        if self.state == State::NotStarted {
            return Err(BEFORE.to_owned());
        }
        self.state = state;
        Ok(None)
    }

    pub(super) fn say(&self, text: &str) {
        if let Some(mut serial) = self.serial.as_ref().and_then(|path| open_serial(path).ok()) {
            let _ = serial.write_all(text.as_bytes());
            // The real program keeps the file open until it exits.
            std::mem::forget(serial);
        }
    }

    fn act(&mut self, body: &Value) -> Outcome {
        match (body["action_type"].as_str(), self.state) {
            (Some("InstanceStart"), State::NotStarted) => self.start(),
            (Some("InstanceStart"), _) => Err(AFTER.to_owned()),
            (Some("SendCtrlAltDel" | "FlushMetrics"), State::NotStarted) => Err(BEFORE.to_owned()),
            (Some("SendCtrlAltDel"), _) => {
                // A reset by the guest ends the real program with status 0.
                self.is_ending = self.is_shut_down_by_key;
                Ok(None)
            }
            (Some("FlushMetrics"), _) => {
                self.flushes += 1;
                let line = format!(
                    "{}\n",
                    json!({"utc_timestamp_ms": 7, "flushes": self.flushes})
                );
                // The real program also drops metrics that do not fit.
                let _ = self
                    .metrics
                    .as_mut()
                    .map(|metrics| metrics.write_all(line.as_bytes()));
                Ok(None)
            }
            (other, _) => Err(deserializing(&format!(
                "unknown variant `{}`, expected one of `FlushMetrics`, `InstanceStart`, `SendCtrlAltDel`",
                other.unwrap_or_default()
            ))),
        }
    }

    fn start(&mut self) -> Outcome {
        let Some(kernel) = &self.kernel else {
            return Err(
                "Start microvm error: Cannot start microvm without kernel configuration."
                    .to_owned(),
            );
        };
        let mut magic = [0; 4];
        let read = File::open(kernel).and_then(|mut file| file.read_exact(&mut magic));
        if read.is_err() || magic != *b"\x7fELF" {
            return Err("Start microvm error: System configuration error: Cannot load kernel due to invalid memory configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel image: Kernel Loader: Invalid Elf magic number".to_owned());
        }
        self.state = State::Running;
        self.say("the guest runs\n");
        Ok(None)
    }
}

fn machine(body: &Value) -> Result<(), String> {
    let unknown = body
        .as_object()
        .and_then(|o| o.keys().find(|key| !MACHINE_CONFIG.contains(&key.as_str())));
    if let Some(key) = unknown {
        let known: Vec<String> = MACHINE_CONFIG.iter().map(|k| format!("`{k}`")).collect();
        return Err(deserializing(&format!(
            "unknown field `{key}`, expected one of {} at line 1 column 42.",
            known.join(", ")
        )));
    }
    if !(1..=32).contains(&body["vcpu_count"].as_u64().unwrap_or(0)) {
        return Err("Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if SMT is enabled.".into());
    }
    match body["mem_size_mib"].as_u64() {
        None => Err(deserializing("missing field `mem_size_mib` at line 1 column 16.")),
        Some(0) => {
            Err("Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size.".into())
        }
        Some(_) => Ok(()),
    }
}

fn check_id(id: &str, in_body: &Value) -> Result<(), String> {
    if !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(
            "API Resource IDs can only contain alphanumeric characters and underscores.".to_owned(),
        );
    }
    if in_body != id {
        Err("The id from the path does not match the id from the body!".to_owned())
    } else {
        Ok(())
    }
}

pub fn deserializing(what: &str) -> String {
    format!("An error occurred when deserializing the json body of a request: {what}")
}

fn open_serial(path: &Path) -> std::io::Result<File> {
    File::options()
        .custom_flags(libc::O_NONBLOCK)
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
}
