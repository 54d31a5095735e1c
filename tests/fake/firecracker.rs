//! A fake Firecracker v1.16.1. Replies, phases and quirks of the API follow recorded transcripts of
//! the real program. There is no guest: a guest that "runs" prints one line on its serial console.
//!
//! The fake reads `script` next to its executable. Each line `METHOD PATH FAULT [ARGUMENT]` says
//! what happens to which request. It writes the requests that it received to `requests`. Faults are
//! `hang`, `die`, `garbage`, `hangup`, `slow` with milliseconds, and `refuse` with a message.
//! `KEYBOARD` makes the guest shut down at Ctrl-Alt-Del. `VERSION` with a number sets the version.
//! `EXIT` with a text makes it print the text and exit at once.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PAYLOAD_BYTES_MAX: usize = 51_200;
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

struct Vmm {
    id: String,
    version: String,
    state: State,
    kernel: Option<PathBuf>,
    drives: Vec<(String, bool)>,
    networks: Vec<(String, String)>,
    serial: Option<PathBuf>,
    /// The disks' files.
    paths: Vec<String>,
    is_ending: bool,
    is_shut_down_by_key: bool,
    /// How many MiB the guest is to return. A guest that "runs" returns them immediately.
    balloon_mib: Option<u64>,
    metrics: Option<File>,
    flushes: u64,
    /// The vsock device's socket.
    vsock: Option<String>,
}

/// A response body, or the message of a fault.
type Outcome = Result<Option<Value>, String>;

impl Vmm {
    fn handle(&mut self, method: &str, path: &str, body: &[u8]) -> Outcome {
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

    /// Writes which disks the VM has to both files. The real ones hold its memory and its devices.
    fn save(&mut self, body: &Value) -> Outcome {
        match self.state {
            State::NotStarted => return Err(BEFORE.to_owned()),
            State::Running => {
                return Err("Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running".into());
            }
            State::Paused => {}
        }
        let opened = |field: &str| {
            let path = body[field].as_str().ok_or_else(|| {
                deserializing(&format!("missing field `{field}` at line 1 column 2."))
            })?;
            let file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .open(path);
            file.map_err(|e| {
                format!(
                    "Create snapshot error: Cannot perform open on the snapshot backing file: {e}"
                )
            })
        };
        let saved = (&self.paths, &self.drives, &self.networks, &self.vsock);
        for field in ["snapshot_path", "mem_file_path"] {
            serde_json::to_writer(opened(field)?, &saved)
                .map_err(|e| format!("Create snapshot error: {e}"))?;
        }
        Ok(None)
    }

    /// Loads a snapshot. A failure ends the process after it was answered.
    fn load(&mut self, body: &Value) -> Outcome {
        let failed = |why: String| {
            Err(format!(
                "Load snapshot error: Failed to restore from snapshot: {why}"
            ))
        };
        if self.state != State::NotStarted {
            return Err(AFTER.to_owned());
        }
        if self.kernel.is_some() || !self.paths.is_empty() {
            return Err(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.".into()
            );
        }
        self.is_ending = true;
        let (state, memory) = (
            body["snapshot_path"].as_str(),
            body["mem_backend"]["backend_path"].as_str(),
        );
        let (disks, drives, networks, vsock): (Vec<String>, _, _, Option<String>) =
            match File::open(state.unwrap_or_default())
                .map_err(|e| e.to_string())
                .and_then(|file| serde_json::from_reader(file).map_err(|e| e.to_string()))
            {
                Ok(saved) => saved,
                Err(e) => {
                    return failed(format!(
                        "Failed to get snapshot state from file: Failed to open snapshot file: {e}"
                    ));
                }
            };
        if let Err(e) = File::open(memory.unwrap_or_default()) {
            return failed(format!(
                "Failed to load guest memory: Error creating guest memory from file: {e}"
            ));
        }
        if body["network_overrides"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|net| net["iface_id"] != "eth0")
        {
            return failed(
                "Failed to get snapshot state from file: Unknown Network Device.".into(),
            );
        }
        for disk in disks {
            if let Err(e) = File::open(&disk) {
                return failed(format!(
                    "Failed to build microVM from snapshot: Failed to restore devices: Error restoring MMIO devices: Block: VirtioBackend(BackingFile({e:?}, {disk:?}))"
                ));
            }
        }
        if let Some(Err(e)) = vsock.as_deref().map(listen_for_vsock) {
            return failed(format!(
                "Failed to build microVM from snapshot: Failed to restore devices: Error restoring MMIO devices: VsockUnixBackend: Error binding to the host-side Unix socket: {e}"
            ));
        }
        (self.drives, self.networks, self.vsock) = (drives, networks, vsock);
        self.is_ending = false;
        self.state = if body["resume_vm"] == true {
            State::Running
        } else {
            State::Paused
        };
        self.say("the guest resumes\n");
        Ok(None)
    }

    fn say(&self, text: &str) {
        if let Some(mut serial) = self.serial.as_ref().and_then(|path| open_serial(path).ok()) {
            let _ = serial.write_all(text.as_bytes());
            // The real program keeps it open for as long as it lives.
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

fn deserializing(what: &str) -> String {
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

/// Serves vsock connections. The guest echoes on port 7 and stays silent on port 8. Nothing listens
/// on other ports.
fn listen_for_vsock(path: &str) -> std::io::Result<()> {
    let listener = UnixListener::bind(path)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer_vsock(stream));
        }
    });
    Ok(())
}

fn answer_vsock(mut stream: UnixStream) {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        if !matches!(stream.read(&mut byte), Ok(1)) {
            return;
        }
        line.push(byte[0]);
    }
    match line.as_slice() {
        b"CONNECT 7\n" => {
            let _ = stream.write_all(b"OK 1073741824\n");
            let mut from = stream.try_clone().unwrap();
            let _ = std::io::copy(&mut from, &mut stream);
        }
        b"CONNECT 8\n" => drop(stream.read(&mut [0])),
        _ => {}
    }
}

struct Request {
    method: String,
    path: String,
    body: Vec<u8>,
}

/// Reads one request. Returns None at the end of the connection, and the length alone if the body
/// is too long.
fn read_request(stream: &mut UnixStream, buffer: &mut Vec<u8>) -> Option<Result<Request, usize>> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut parsed = httparse::Request::new(&mut headers);
        if let Ok(httparse::Status::Complete(len)) = parsed.parse(buffer) {
            let length = parsed
                .headers
                .iter()
                .find(|h| h.name.eq_ignore_ascii_case("content-length"));
            let length = length
                .and_then(|h| std::str::from_utf8(h.value).ok()?.parse().ok())
                .unwrap_or(0);
            if length > PAYLOAD_BYTES_MAX {
                return Some(Err(length));
            }
            if buffer.len() >= len + length {
                let (method, path) = (parsed.method?.to_owned(), parsed.path?.to_owned());
                let body = buffer[len..len + length].to_vec();
                buffer.drain(..len + length);
                return Some(Ok(Request { method, path, body }));
            }
        }
        let mut piece = [0; 4096];
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => return None,
            Ok(n) => buffer.extend_from_slice(&piece[..n]),
        }
    }
}

fn respond(stream: &mut UnixStream, outcome: &Outcome) {
    let head = |status: u16| {
        format!("HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n")
    };
    let with = |status, body: String| {
        format!(
            "{}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            head(status),
            body.len()
        )
    };
    let text = match outcome {
        Ok(None) => head(204) + "\r\n",
        Ok(Some(body)) => with(200, body.to_string()),
        Err(message) if message.contains('\n') => {
            with(400, format!("{{ \"error\": \"{message}\" }}"))
        }
        Err(message) => with(400, json!({ "fault_message": message }).to_string()),
    };
    let _ = stream.write_all(text.as_bytes());
}

/// Looks up in the script what happens to this request, and the argument.
fn fault(program_dir: &Path, method: &str, path: &str) -> Option<(String, String)> {
    let script = std::fs::read_to_string(program_dir.join("script")).unwrap_or_default();
    script.lines().find_map(|line| {
        let mut words = line.splitn(4, ' ');
        let is_it = words.next() == Some(method) && words.next() == Some(path);
        is_it.then(|| {
            (
                words.next().unwrap_or_default().to_owned(),
                words.next().unwrap_or_default().to_owned(),
            )
        })
    })
}

fn serve(mut stream: UnixStream, vmm: &Mutex<Vmm>, program_dir: &Path) {
    let mut buffer = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut buffer) {
        let request = match request {
            Ok(request) => request,
            Err(length) => {
                let what = format!(
                    "Request payload with size {length} is larger than the limit of {PAYLOAD_BYTES_MAX} allowed by server."
                );
                return respond(
                    &mut stream,
                    &Err(format!(
                        "{what}\nAll previous unanswered requests will be dropped."
                    )),
                );
            }
        };
        let mut vmm = vmm.lock().unwrap();
        let line = format!(
            "{} {} {}\n",
            request.method,
            request.path,
            String::from_utf8_lossy(&request.body)
        );
        let log = File::options()
            .create(true)
            .append(true)
            .open(program_dir.join("requests"));
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .unwrap();
        let outcome = match fault(program_dir, &request.method, &request.path) {
            Some((what, argument)) => match what.as_str() {
                "hang" => loop {
                    std::thread::park();
                },
                "die" => std::process::abort(),
                "hangup" => return,
                "garbage" => {
                    let _ = stream.write_all(b"\xff\x00 no HTTP at all\r\n\r\n");
                    continue;
                }
                "refuse" => Err(argument),
                _ => {
                    std::thread::sleep(Duration::from_millis(argument.parse().unwrap_or(0)));
                    vmm.handle(&request.method, &request.path, &request.body)
                }
            },
            None if !["GET", "PUT", "PATCH", "DELETE"].contains(&request.method.as_str()) => {
                Err("Invalid HTTP Method: Unsupported HTTP method.\nAll previous unanswered requests will be dropped.".to_owned())
            }
            None => vmm.handle(&request.method, &request.path, &request.body),
        };
        let is_ending = vmm.is_ending;
        drop(vmm);
        respond(&mut stream, &outcome);
        if is_ending {
            std::process::exit(i32::from(outcome.is_err()));
        }
    }
}

fn main() {
    let program_dir = std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned();
    let script = std::fs::read_to_string(program_dir.join("script")).unwrap_or_default();
    let said = |word: &str| {
        script
            .lines()
            .find_map(|line| line.strip_prefix(word).map(|rest| rest.trim().to_owned()))
    };
    let version = said("VERSION").unwrap_or_else(|| "1.16.1".to_owned());
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        args.iter()
            .position(|a| a == name)
            .and_then(|i| args.get(i + 1))
            .cloned()
    };
    if args.iter().any(|a| a == "--version") {
        println!("Firecracker v{version}\n");
        return;
    }
    if let Some(what) = said("EXIT") {
        eprintln!("{what}");
        std::process::exit(1);
    }
    let socket = value("--api-sock").unwrap_or_else(|| "/run/firecracker.socket".to_owned());
    let Ok(listener) = UnixListener::bind(&socket) else {
        eprintln!("Failed to open the API socket at: {socket}. Check that it is not already used.");
        std::process::exit(1);
    };
    let vmm = Vmm {
        id: value("--id").unwrap_or_else(|| "anonymous-instance".to_owned()),
        version,
        state: State::NotStarted,
        kernel: None,
        drives: Vec::new(),
        networks: Vec::new(),
        serial: None,
        paths: Vec::new(),
        is_ending: false,
        is_shut_down_by_key: said("KEYBOARD").is_some(),
        balloon_mib: None,
        metrics: None,
        flushes: 0,
        vsock: None,
    };
    let vmm = Arc::new(Mutex::new(vmm));
    for stream in listener.incoming().flatten() {
        let (vmm, program_dir) = (vmm.clone(), program_dir.clone());
        std::thread::spawn(move || serve(stream, &vmm, &program_dir));
    }
}
