//! Maps Firecracker's refusals to errors. The status is always 400. The body has one of two forms.
//! One form is not valid JSON, because it has a raw line feed in a string. [`MEANINGS`] decides an
//! error's kind and hint.
//!
//! If the host's kernel refused something, only the error number counts, because its text depends
//! on the libc: releases are linked with musl, and distributions use glibc.

use crate::error::{Error, Kind};
use crate::host::text::printable;
use nix::libc::{EADDRINUSE, EBUSY, EDQUOT, ENOMEM, ENOSPC};
use serde::Deserialize;

/// The length limit of the body's text in an error.
const TEXT_CHARS_MAX: usize = 600;

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

/// The beginning of a body from the HTTP server below the API, which writes this form by hand,
/// without a JSON library.
const SERVER_PREFIX: &str = "{ \"error\": \"";
const SERVER_SUFFIX: &str = "\" }";

/// Returns the message in a body as one line of limited length.
fn text(body: &[u8]) -> String {
    let all = String::from_utf8_lossy(body);
    let said = match serde_json::from_slice::<Fault>(body) {
        Ok(fault) => fault.fault_message,
        Err(_) => all
            .trim()
            .strip_prefix(SERVER_PREFIX)
            .and_then(|t| t.strip_suffix(SERVER_SUFFIX))
            .unwrap_or(&all)
            .to_owned(),
    };
    let line = said
        .split(['\n', '\r'])
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    printable(&line.chars().take(TEXT_CHARS_MAX).collect::<String>())
}

/// Returns the number of the host's error, or None if the message contains none. std prints the
/// number as `(os error 16)` or, with `{:?}`, as `Os { code: 16, ... }`, and Firecracker uses both
/// forms. If there are several, the last is the cause.
fn errno(said: &str) -> Option<i32> {
    let after = |mark: &str| said.rfind(mark).map(|at| &said[at + mark.len()..]);
    let rest = after("(os error ").or_else(|| after("Os { code: "))?;
    rest[..rest.find(|c: char| !c.is_ascii_digit())?]
        .parse()
        .ok()
}

/// The part of a message that identifies it.
enum Sign {
    /// The message contains this part of Firecracker's own text.
    Text(&'static str),
    /// The message contains this number of an error of the host.
    Errno(i32),
    Both(&'static str, i32),
}

use Sign::{Both, Errno, Text};

impl Sign {
    fn is_in(&self, said: &str) -> bool {
        match *self {
            Text(part) => said.contains(part),
            Errno(number) => errno(said) == Some(number),
            Both(part, number) => said.contains(part) && errno(said) == Some(number),
        }
    }
}

const REPORT: &str = "report it, with the VM's vmm.log";
const FREE_SPACE: &str = "free some space on the host";
const READ_IMAGE: &str = "make the image readable for the VMM's uid: see fcctl doctor";

/// The known messages of v1.16, and the kind and hint for each. The first sign that matches
/// decides.
const MEANINGS: [(Sign, Kind, &str); 27] = [
    (
        Text("Invalid Elf magic number"),
        Kind::Unsupported,
        "the kernel must be an uncompressed ELF file (vmlinux): fcctl image build makes one",
    ),
    (
        Text("kernel file cannot be opened"),
        Kind::VmmFailed,
        READ_IMAGE,
    ),
    (
        Text("initrd file cannot be opened"),
        Kind::VmmFailed,
        READ_IMAGE,
    ),
    (Text("without kernel configuration"), Kind::Internal, REPORT),
    (Errno(ENOSPC), Kind::DiskFull, FREE_SPACE),
    (Errno(EDQUOT), Kind::DiskFull, FREE_SPACE),
    (
        Errno(ENOMEM),
        Kind::MemoryLimit,
        "stop another VM, or give this one less memory with fcctl vm set",
    ),
    (
        Text("number of vCPUs"),
        Kind::InvalidArgument,
        "set 1 to 32 vCPUs: fcctl vm set",
    ),
    (
        Text("memory size (MiB)"),
        Kind::InvalidArgument,
        "set another size: fcctl vm set",
    ),
    (
        Text("save/restore unavailable while running"),
        Kind::Internal,
        REPORT,
    ),
    (
        Text("not allowed after configuring"),
        Kind::Internal,
        REPORT,
    ),
    (Text("Unknown Network Device"), Kind::Internal, REPORT),
    (
        Text("snapshot backing file"),
        Kind::VmmFailed,
        "make the snapshot writable for the VMM's uid: see fcctl doctor",
    ),
    (
        Text("Failed to restore from snapshot"),
        Kind::VmmFailed,
        "the snapshot is damaged, or comes from another Firecracker version or CPU: see fcctl snapshot show",
    ),
    (
        Both("tap", EBUSY),
        Kind::Conflict,
        "find the process that uses the tap: fcctl doctor --leaks",
    ),
    (Text("Invalid interface name"), Kind::Internal, REPORT),
    (Text("MAC address"), Kind::Internal, REPORT),
    (
        Text("Open tap device failed"),
        Kind::VmmFailed,
        "make /dev/net/tun accessible for the VMM's uid: fcctl doctor",
    ),
    (
        Text("Error manipulating the backing file"),
        Kind::VmmFailed,
        "make the disk accessible for the VMM's uid: see fcctl doctor",
    ),
    (
        Text("root block device already exists"),
        Kind::Internal,
        REPORT,
    ),
    (
        Errno(EADDRINUSE),
        Kind::Conflict,
        "stop the VM and start it again to remove an old socket",
    ),
    (
        Text("before starting the microVM"),
        Kind::WrongState,
        "wait until the guest has started",
    ),
    (
        Text("after starting the microVM"),
        Kind::WrongState,
        "stop the VM first",
    ),
    (
        Text("Device not activated yet"),
        Kind::Busy,
        "try again when the guest has set up the device",
    ),
    (
        Text("No balloon device found"),
        Kind::Unsupported,
        "restart the VM to add one: fcctl vm restart",
    ),
    (Text("is larger than the limit"), Kind::Internal, REPORT),
    (
        Text("Kvm"),
        Kind::Unsupported,
        "this host's KVM lacks what Firecracker needs: fcctl doctor",
    ),
];
const HINT: &str = "see the VM's vmm.log, or run fcctl doctor";

pub(crate) fn refused(doing: &str, status: u16, body: &[u8]) -> Error {
    let said = text(body);
    let (kind, hint) = MEANINGS
        .iter()
        .find(|(sign, ..)| sign.is_in(&said))
        .map_or((Kind::VmmFailed, HINT), |(_, kind, hint)| (*kind, *hint));
    let said = if said.is_empty() {
        format!("status {status}")
    } else {
        said
    };
    Error::new(kind, format!("{doing}: firecracker: {said}")).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_parsed_to_one_printable_line() {
        let known = br#"{"fault_message":"Start microvm error: Cannot start microvm without kernel configuration."}"#;
        let server = b"{ \"error\": \"Invalid HTTP Method: Unsupported HTTP method.\nAll previous unanswered requests will be dropped.\" }";
        assert_eq!(
            text(known),
            "Start microvm error: Cannot start microvm without kernel configuration."
        );
        assert_eq!(
            text(server),
            "Invalid HTTP Method: Unsupported HTTP method. All previous unanswered requests will be dropped."
        );
        assert_eq!(text(b"\xff\x1b[2J"), printable("\u{fffd}\u{1b}[2J"));
        assert_eq!(
            refused("do it", 500, b"").to_string(),
            "do it: firecracker: status 500"
        );
        assert!(text(&[b'x'; 10_000]).len() <= TEXT_CHARS_MAX);
    }

    /// The messages come from recorded transcripts.
    #[test]
    fn every_recorded_message_has_a_meaning() {
        for (message, kind) in [
            (
                "Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)",
                Kind::VmmFailed,
            ),
            (
                "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. No such file or directory (os error 2)",
                Kind::VmmFailed,
            ),
            (
                "Start microvm error: System configuration error: Cannot load kernel due to invalid memory configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel image: Kernel Loader: Invalid Elf magic number",
                Kind::Unsupported,
            ),
            (
                "Start microvm error: Cannot start microvm without kernel configuration.",
                Kind::Internal,
            ),
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
            (
                "Drive config error: A root block device already exists!",
                Kind::Internal,
            ),
            (
                "Network config error: Could not create the network device: Open tap device failed: Invalid interface name",
                Kind::Internal,
            ),
            (
                "Network config error: Could not create the network device: Open tap device failed: Error while creating ifreq structure: Device or resource busy (os error 16). Invalid TUN/TAP Backend provided by fctap0. Check our documentation on setting up the network devices.",
                Kind::Conflict,
            ),
            (
                "Network config error: The MAC address is already in use: 06:00:ac:10:00:02",
                Kind::Internal,
            ),
            (
                "An error occurred when deserializing the json body of a request: The provided MAC address is invalid. at line 1 column 76.",
                Kind::Internal,
            ),
            (
                "Balloon update error: Balloon: Device not activated yet.",
                Kind::Busy,
            ),
            (
                "Balloon config error: No balloon device found.",
                Kind::Unsupported,
            ),
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
            (
                "The requested operation is not supported before starting the microVM.",
                Kind::WrongState,
            ),
            (
                "The requested operation is not supported after starting the microVM.",
                Kind::WrongState,
            ),
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

    /// Released builds are linked with musl and those of distributions with glibc, so the same
    /// error has two texts. Firecracker also prints errors with `{:?}`, which is a third form.
    #[test]
    fn host_errors_have_the_same_meaning_with_every_libc() {
        let tap = "Network config error: Could not create the network device: Open tap device failed: Error while creating ifreq structure: ";
        let vsock = "Vsock config error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: ";
        let memory =
            "Start microvm error: System configuration error: Cannot create guest memory: ";
        let save = "Create snapshot error: Cannot write the memory file: ";
        for (before, texts, debug, kind) in [
            (
                tap,
                [
                    "Device or resource busy (os error 16)",
                    "Resource busy (os error 16)",
                ],
                "ResourceBusy",
                Kind::Conflict,
            ),
            (
                vsock,
                [
                    "Address already in use (os error 98)",
                    "Address in use (os error 98)",
                ],
                "AddrInUse",
                Kind::Conflict,
            ),
            (
                memory,
                [
                    "Cannot allocate memory (os error 12)",
                    "Out of memory (os error 12)",
                ],
                "OutOfMemory",
                Kind::MemoryLimit,
            ),
            (
                save,
                [
                    "No space left on device (os error 28)",
                    "No space left on device (os error 28)",
                ],
                "StorageFull",
                Kind::DiskFull,
            ),
            (
                save,
                [
                    "Disk quota exceeded (os error 122)",
                    "Quota exceeded (os error 122)",
                ],
                "QuotaExceeded",
                Kind::DiskFull,
            ),
        ] {
            let number = texts[0].rsplit(' ').next().unwrap().trim_end_matches(')');
            let debug = format!(
                "Os {{ code: {number}, kind: {debug}, message: {:?} }}",
                texts[1]
            );
            for text in texts.into_iter().chain([debug.as_str()]) {
                let body =
                    serde_json::json!({ "fault_message": format!("{before}{text}. More text.") })
                        .to_string();
                let e = refused("do it", 400, body.as_bytes());
                assert_eq!(e.kind(), kind, "{e}");
                assert!(e.hint_text().is_some_and(|h| h != HINT), "{e}");
            }
        }
    }
}
