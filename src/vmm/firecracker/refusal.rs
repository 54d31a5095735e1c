//! What Firecracker answers when it does not do what it was asked to: always status 400, with one of two bodies, of which one is no
//! JSON (a raw line end within the string). Its text decides kind and hint.

use crate::error::{Error, Kind};
use crate::host::command::printable;
use serde::Deserialize;

/// How much of it goes into an error.
const TEXT_CHARS_MAX: usize = 600;

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

/// Of the HTTP server beneath, which has no JSON library.
const SERVER_PREFIX: &str = "{ \"error\": \"";
const SERVER_SUFFIX: &str = "\" }";

/// What the answer's body says.
fn text(body: &[u8]) -> String {
    let all = String::from_utf8_lossy(body);
    let said = match serde_json::from_slice::<Fault>(body) {
        Ok(fault) => fault.fault_message,
        Err(_) => all.trim().strip_prefix(SERVER_PREFIX).and_then(|t| t.strip_suffix(SERVER_SUFFIX)).unwrap_or(&all).to_owned(),
    };
    let line = said.split(['\n', '\r']).map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ");
    printable(&line.chars().take(TEXT_CHARS_MAX).collect::<String>())
}

/// Parts of messages (v1.16; the research names the request of each), the most telling first.
const MEANINGS: [(&str, Kind, &str); 26] = [
    (
        "Invalid Elf magic number",
        Kind::Unsupported,
        "the kernel must be an uncompressed ELF file (vmlinux): fcctl image build makes one",
    ),
    ("kernel file cannot be opened", Kind::VmmFailed, "its uid must be able to read the image: see fcctl doctor"),
    ("initrd file cannot be opened", Kind::VmmFailed, "its uid must be able to read the image: see fcctl doctor"),
    ("without kernel configuration", Kind::Internal, "report it, with the VM's vmm.log"),
    ("No space left on device", Kind::DiskFull, "free some space on the host"),
    ("Cannot allocate memory", Kind::MemoryLimit, "stop another VM, or give this one less memory with fcctl vm set"),
    ("number of vCPUs", Kind::InvalidArgument, "Firecracker gives 1 to 32 vCPUs: fcctl vm set"),
    ("memory size (MiB)", Kind::InvalidArgument, "set another size: fcctl vm set"),
    ("save/restore unavailable while running", Kind::Internal, "report it, with the VM's vmm.log"),
    ("not allowed after configuring", Kind::Internal, "report it, with the VM's vmm.log"),
    ("Unknown Network Device", Kind::Internal, "report it, with the VM's vmm.log"),
    ("snapshot backing file", Kind::VmmFailed, "its uid must be able to write the snapshot: see fcctl doctor"),
    (
        "Failed to restore from snapshot",
        Kind::VmmFailed,
        "the snapshot is damaged, or was made by another version or on another CPU: fcctl snapshot show",
    ),
    ("Device or resource busy", Kind::Conflict, "another process has the tap: fcctl doctor --leaks"),
    ("Invalid interface name", Kind::Internal, "report it, with the VM's vmm.log"),
    ("MAC address", Kind::Internal, "report it, with the VM's vmm.log"),
    ("Open tap device failed", Kind::VmmFailed, "its uid must be able to open /dev/net/tun: fcctl doctor"),
    ("Error manipulating the backing file", Kind::VmmFailed, "its uid must be able to open the disk: see fcctl doctor"),
    ("root block device already exists", Kind::Internal, "report it, with the VM's vmm.log"),
    ("Address in use", Kind::Conflict, "a socket of an earlier start is left: stop the VM and start it again"),
    ("before starting the microVM", Kind::WrongState, "wait until the guest has started"),
    ("after starting the microVM", Kind::WrongState, "stop the VM first"),
    ("Device not activated yet", Kind::Busy, "the guest has not set the device up yet: try again in a moment"),
    ("No balloon device found", Kind::Unsupported, "it was started without one: fcctl vm restart"),
    ("is larger than the limit", Kind::Internal, "report it, with the VM's vmm.log"),
    ("Kvm", Kind::Unsupported, "this host's KVM lacks what Firecracker needs: fcctl doctor"),
];
const HINT: &str = "see the VM's vmm.log, or run fcctl doctor";

pub fn refused(doing: &str, status: u16, body: &[u8]) -> Error {
    let said = text(body);
    let (kind, hint) =
        MEANINGS.iter().find(|(part, ..)| said.contains(part)).map_or((Kind::VmmFailed, HINT), |(_, kind, hint)| (*kind, *hint));
    let said = if said.is_empty() { format!("status {status}") } else { said };
    Error::new(kind, format!("{doing}: firecracker: {said}")).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read_and_nothing_of_them_breaks_a_line() {
        let known = br#"{"fault_message":"Start microvm error: Cannot start microvm without kernel configuration."}"#;
        let server = b"{ \"error\": \"Invalid HTTP Method: Unsupported HTTP method.\nAll previous unanswered requests will be dropped.\" }";
        assert_eq!(text(known), "Start microvm error: Cannot start microvm without kernel configuration.");
        assert_eq!(
            text(server),
            "Invalid HTTP Method: Unsupported HTTP method. All previous unanswered requests will be dropped."
        );
        assert_eq!(text(b"\xff\x1b[2J"), printable("\u{fffd}\u{1b}[2J"));
        assert_eq!(refused("do it", 500, b"").to_string(), "do it: firecracker: status 500");
        assert!(text(&[b'x'; 10_000]).len() <= TEXT_CHARS_MAX);
    }

    /// Every message of the recorded transcripts that a driver can meet.
    #[test]
    fn every_recorded_message_has_a_meaning() {
        for (message, kind) in [
            ("Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)", Kind::VmmFailed),
            (
                "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. No such file or directory (os error 2)",
                Kind::VmmFailed,
            ),
            (
                "Start microvm error: System configuration error: Cannot load kernel due to invalid memory configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel image: Kernel Loader: Invalid Elf magic number",
                Kind::Unsupported,
            ),
            ("Start microvm error: Cannot start microvm without kernel configuration.", Kind::Internal),
            (
                "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if SMT is enabled.",
                Kind::InvalidArgument,
            ),
            (
                "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size.",
                Kind::InvalidArgument,
            ),
            (
                "Drive config error: Unable to create the virtio block device: Virtio backend error: Error manipulating the backing file: No such file or directory (os error 2) /nonexistent.ext4",
                Kind::VmmFailed,
            ),
            ("Drive config error: A root block device already exists!", Kind::Internal),
            (
                "Network config error: Could not create the network device: Open tap device failed: Invalid interface name",
                Kind::Internal,
            ),
            (
                "Network config error: Could not create the network device: Open tap device failed: Error while creating ifreq structure: Device or resource busy (os error 16). Invalid TUN/TAP Backend provided by fctap0. Check our documentation on setting up the network devices.",
                Kind::Conflict,
            ),
            ("Network config error: The MAC address is already in use: 06:00:ac:10:00:02", Kind::Internal),
            (
                "An error occurred when deserializing the json body of a request: The provided MAC address is invalid. at line 1 column 76.",
                Kind::Internal,
            ),
            ("Balloon update error: Balloon: Device not activated yet.", Kind::Busy),
            ("Balloon config error: No balloon device found.", Kind::Unsupported),
            (
                "Vsock config error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: Address in use (os error 98)",
                Kind::Conflict,
            ),
            (
                "Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running",
                Kind::Internal,
            ),
            (
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.",
                Kind::Internal,
            ),
            (
                "Create snapshot error: Cannot perform open on the snapshot backing file: No such file or directory (os error 2)",
                Kind::VmmFailed,
            ),
            (
                "Load snapshot error: Failed to restore from snapshot: Failed to build microVM from snapshot: Failed to restore devices: Error restoring MMIO devices: VsockUnixBackend: Error binding to the host-side Unix socket: Address in use (os error 98)",
                Kind::VmmFailed,
            ),
            (
                "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file: Failed to open snapshot file: No such file or directory (os error 2)",
                Kind::VmmFailed,
            ),
            (
                "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file: Unknown Network Device.",
                Kind::Internal,
            ),
            ("The requested operation is not supported before starting the microVM.", Kind::WrongState),
            ("The requested operation is not supported after starting the microVM.", Kind::WrongState),
            ("StartMicroVm(Kvm(Capabilities(56)))", Kind::Unsupported),
        ] {
            let body = serde_json::json!({ "fault_message": message }).to_string();
            let e = refused("do it", 400, body.as_bytes());
            assert_eq!(e.kind(), kind, "{message}");
            assert!(e.hint_text().is_some_and(|h| h != HINT), "{message}");
        }
        let e = refused("do it", 400, br#"{"fault_message":"PCI is not enabled"}"#);
        assert_eq!((e.kind(), e.hint_text()), (Kind::VmmFailed, Some(HINT)));
    }
}
