//! Builds QEMU's command line without doing any I/O.
//!
//! Sources: qemu(1) 7.2; docs/system/i386/microvm.rst; the kernel's kernel-parameters.txt.

use crate::error::{Error, Kind, Result};
use crate::vmm::vmm_log::TRACED;
use crate::vmm::{DiskFormat, GuestNetwork, VmmSpec};
use serde_json::json;
use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::path::Path;

pub(crate) const QMP_SOCKET: &str = "qmp.sock";
/// The socket of the monitor for commands. A monitor serves only one connection at a time, and the
/// thread that waits for events keeps the connection to the other monitor.
pub(crate) const CONTROL_SOCKET: &str = "control.sock";
pub(crate) const CONSOLE_SOCKET: &str = "console.sock";
/// The guest's address on the user-mode network and its SSH port.
pub(crate) const GUEST_ADDR: &str = "10.0.2.15";
pub(crate) const GUEST_SSH_PORT: u16 = 22;
/// The IPv6 addresses of the user-mode network, which are QEMU's default. The guest gets its own
/// address in it from the seed.
const IPV6_NET: &str = "fec0::/64";
/// The size limit of QEMU's cache of translated code. Without a limit the cache grows to a
/// gigabyte.
const TCG_CACHE_MIB: u32 = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    Kvm,
    Tcg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Board {
    /// Under TCG this board has no timer to calibrate the TSC with, so the kernel gets the host's
    /// frequency as an argument.
    Microvm {
        tsc_khz: Option<u64>,
    },
    Q35,
}

/// The accelerator and the board that a VM runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Platform {
    pub accelerator: Accelerator,
    pub board: Board,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let accelerator = match self.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        };
        let board = match self.board {
            Board::Microvm { .. } => "microvm",
            Board::Q35 => "q35",
        };
        write!(f, "qemu ({accelerator}, {board})")
    }
}

impl Platform {
    fn machine(&self) -> &'static str {
        match (self.board, self.accelerator) {
            // With a PIT the kernel would use it for calibration, which never ends under TCG.
            (Board::Microvm { .. }, Accelerator::Tcg) => "microvm,pit=off,rtc=on,isa-serial=on",
            (Board::Microvm { .. }, Accelerator::Kvm) => "microvm,rtc=on,isa-serial=on",
            (Board::Q35, _) => "q35",
        }
    }

    fn device(&self, kind: &str, properties: &str) -> String {
        match self.board {
            Board::Microvm { .. } => format!("virtio-{kind}-device,{properties}"),
            Board::Q35 => format!("virtio-{kind}-pci,{properties}"),
        }
    }

    /// Returns the arguments for the machine and the sandbox, which VMs and probes have in common.
    pub(crate) fn base(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = ["-machine", self.machine(), "-accel"]
            .map(OsString::from)
            .to_vec();
        match self.accelerator {
            Accelerator::Kvm => args.extend(["kvm", "-cpu", "host"].map(OsString::from)),
            Accelerator::Tcg => {
                args.push(format!("tcg,tb-size={TCG_CACHE_MIB}").into());
                args.extend(["-cpu", "max"].map(OsString::from));
            }
        }
        let rest = [
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-sandbox",
            SANDBOX,
        ];
        args.extend(rest.map(OsString::from));
        args.extend(
            TRACED
                .iter()
                .flat_map(|event| ["-trace", event])
                .map(OsString::from),
        );
        args
    }

    fn kernel_args(&self, image: &str) -> String {
        let mut args = vec![image.trim(), "console=ttyS0"];
        if self.accelerator == Accelerator::Tcg {
            // Translated code does not speculate, so mitigations are unnecessary.
            args.push("mitigations=off");
        }
        let mut args: Vec<_> = args
            .into_iter()
            .filter(|a| !a.is_empty())
            .map(str::to_owned)
            .collect();
        if let Board::Microvm { tsc_khz } = self.board {
            // Without `reliable`, the kernel's watchdog would compare the TSC with jiffies, which
            // fall behind on a busy host, and would then switch to jiffies. Two of ten boots did so
            // at load 3.
            args.extend(tsc_khz.map(|khz| format!("tsc_early_khz={khz} tsc=reliable")));
        }
        args.join(" ")
    }
}

const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// Returns the arguments for one VM. QEMU runs in the VM's `run/`, so its sockets have short names.
/// QEMU starts with the guest stopped, so that the console is read from its first byte.
pub(crate) fn argv(
    spec: &VmmSpec,
    platform: &Platform,
    is_isolated: bool,
) -> Result<Vec<OsString>> {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    if !spec.tag.as_str().bytes().all(is_plain) {
        return Err(Error::internal(format!(
            "start the VMM: the tag {:?} has characters other than a-z, 0-9 and -",
            spec.tag
        )));
    }
    let mut args: Vec<OsString> = vec!["-name".into(), spec.tag.as_str().into()];
    args.extend(platform.base());
    let mut option = |name: &str, value: String| args.extend([OsString::from(name), value.into()]);
    option("-smp", spec.vcpus.to_string());
    option("-m", format!("{}M", spec.mem_mib));
    let mut disks = vec![
        ("root", &spec.disk, spec.disk_format, false),
        ("seed", &spec.seed, DiskFormat::Raw, true),
    ];
    disks.extend(
        spec.runtime_disk
            .as_ref()
            .map(|path| ("runtime", path, DiskFormat::Raw, true)),
    );
    disks.extend(
        spec.work_disk
            .as_ref()
            .map(|path| ("work", path, DiskFormat::Raw, false)),
    );
    for (node, path, format, is_readonly) in disks {
        option("-blockdev", file_node(node, path, format, is_readonly)?);
        option("-blockdev", format_node(node, format, is_readonly));
        option(
            "-device",
            platform.device("blk", &format!("drive={node},serial={node}")),
        );
    }
    let (netdev, mac) = network(&spec.network, is_isolated)?;
    option("-netdev", netdev);
    // With a ROM, a PCI network card would try to boot from the network.
    let rom = if platform.board == Board::Q35 {
        ",romfile="
    } else {
        ""
    };
    option(
        "-device",
        platform.device("net", &format!("netdev=net{mac}{rom}")),
    );
    option("-object", "rng-builtin,id=rng".into());
    option("-device", platform.device("rng", "rng=rng"));
    if spec.has_balloon {
        // A guest that runs out of memory reclaims memory from the balloon, and returns memory that
        // it frees.
        option(
            "-device",
            platform.device("balloon", "deflate-on-oom=on,free-page-reporting=on"),
        );
    }
    option(
        "-chardev",
        format!("socket,id=console,path={CONSOLE_SOCKET},server=on,wait=off"),
    );
    option("-serial", "chardev:console".into());
    option("-qmp", format!("unix:{QMP_SOCKET},server=on,wait=off"));
    option("-qmp", format!("unix:{CONTROL_SOCKET},server=on,wait=off"));
    option("-append", platform.kernel_args(&spec.boot_args));
    if spec.saved.is_some() {
        // The file to load is passed through QMP.
        option("-incoming", "defer".into());
    }
    args.extend([
        "-kernel".into(),
        spec.kernel.clone().into(),
        "-initrd".into(),
        spec.initrd.clone().into(),
        "-S".into(),
    ]);
    Ok(args)
}

/// Returns the value of `-netdev`, and the properties to add to the device.
fn network(network: &GuestNetwork, is_isolated: bool) -> Result<(String, String)> {
    match network {
        GuestNetwork::UserMode {
            isolated,
            ipv6,
            ports,
        } => {
            // Isolation does not depend on what `restrict` means for IPv6, because an isolated
            // guest has no IPv6 at all.
            // `ipv6=on` alone would turn IPv4 off.
            let (addresses, restrict) = match (is_isolated || *isolated, ipv6) {
                (true, _) => ("ipv6=off".to_owned(), ",restrict=on"),
                (false, false) => ("ipv6=off".to_owned(), ""),
                (false, true) => (format!("ipv4=on,ipv6=on,ipv6-net={IPV6_NET}"), ""),
            };
            let mut forward = String::new();
            for p in ports {
                let (protocol, host, port, guest) =
                    (p.protocol.name(), p.host_addr, p.host_port, p.guest_port);
                let _ = write!(
                    forward,
                    "hostfwd={protocol}:{host}:{port}-{GUEST_ADDR}:{guest},"
                );
            }
            // QEMU opens the ports from the last to the first, so this port becomes the oldest.
            // `forward::ssh_port` finds it by its age.
            let _ = write!(
                forward,
                "hostfwd=tcp:127.0.0.1:0-{GUEST_ADDR}:{GUEST_SSH_PORT}"
            );
            Ok((
                format!("user,id=net,{addresses}{restrict},{forward}"),
                String::new(),
            ))
        }
        GuestNetwork::Tap { name, mac, .. } => {
            let is_plain =
                |text: &str, also: u8| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == also);
            if name.is_empty() || !is_plain(name, b'-') || !is_plain(mac, b':') {
                return Err(Error::internal(format!(
                    "start the VMM: {network:?} is not one of our taps"
                )));
            }
            // QEMU opens /dev/net/tun itself and attaches to the tap that its uid owns. No script
            // runs.
            Ok((
                format!("tap,id=net,ifname={name},script=no,downscript=no"),
                format!(",mac={mac}"),
            ))
        }
    }
}

/// Describes the file of a disk as JSON, because in QEMU's other syntax a comma would end a path.
/// `locking` prevents a second VMM from using the same disk.
fn file_node(node: &str, path: &Path, format: DiskFormat, is_readonly: bool) -> Result<String> {
    let Some(path) = path.to_str() else {
        let message = format!("start the VMM: the path {} is not UTF-8", path.display());
        return Err(Error::new(Kind::Unsupported, message).hint("use another state directory"));
    };
    let name = format!("{node}-file");
    let driver = if format == DiskFormat::Device {
        "host_device"
    } else {
        "file"
    };
    Ok(json!({
        "driver": driver, "node-name": name, "filename": path, "locking": "on", "read-only": is_readonly,
        "discard": "unmap",
    })
    .to_string())
}

/// Describes the format of a disk. By QEMU's defaults the host's page cache is used and the guest's
/// flushes are honoured.
fn format_node(node: &str, format: DiskFormat, is_readonly: bool) -> String {
    let driver = match format {
        DiskFormat::Raw | DiskFormat::Device => "raw",
        DiskFormat::Qcow2 => "qcow2",
    };
    json!({ "driver": driver, "node-name": node, "file": format!("{node}-file"), "read-only": is_readonly, "discard": "unmap" })
        .to_string()
}

/// Returns the arguments that boot a kernel without a root file system. A kernel that runs panics
/// because it has no root file system, which ends the VMM.
pub(crate) fn probe_argv(platform: &Platform, kernel: &Path) -> Vec<OsString> {
    let mut args = platform.base();
    args.extend(
        [
            "-m",
            "256M",
            "-serial",
            "stdio",
            "-append",
            PROBE_KERNEL_ARGS,
            "-kernel",
        ]
        .map(OsString::from),
    );
    args.push(kernel.into());
    args
}

const PROBE_KERNEL_ARGS: &str = "console=ttyS0 panic=-1 quiet";
/// The last message of a kernel that finds no root file system (init/do_mounts.c).
pub(crate) const PROBE_LAST_WORDS: &str = "VFS: Unable to mount root fs";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::port::{Port, Protocol};
    use expect_test::{Expect, expect};
    use std::net::Ipv4Addr;

    fn spec() -> VmmSpec {
        VmmSpec {
            vm: "0123456789ab".parse().unwrap(),
            tag: "fc-aa-0123456789ab-1".parse().unwrap(),
            dir: "/s/vms/0123456789ab".into(),
            kernel: "/s/images/x/vmlinux".into(),
            initrd: "/s/images/x/initrd".into(),
            boot_args: "root=/dev/vda".into(),
            disk: "/s/vms/0123456789ab/disk".into(),
            disk_format: DiskFormat::Raw,
            seed: "/s/vms/0123456789ab/seed, \"the\" one".into(),
            runtime_disk: None,
            work_disk: None,
            vcpus: 2,
            mem_mib: 512,
            credentials: None,
            network: GuestNetwork::UserMode {
                isolated: false,
                ipv6: false,
                ports: Vec::new(),
            },
            rates: crate::api::vm::RateLimits::default(),
            has_balloon: true,
            console_bytes_max: 1 << 20,
            saved: None,
        }
    }

    #[track_caller]
    fn check(spec: &VmmSpec, platform: Platform, is_isolated: bool, expected: Expect) {
        let args = argv(spec, &platform, is_isolated).unwrap();
        let mut text = String::new();
        for arg in args {
            let arg = arg.into_string().unwrap();
            let is_option = arg.starts_with('-');
            text += if is_option { "\n" } else { " " };
            text += &arg;
        }
        expected.assert_eq(text.trim_start());
    }

    #[test]
    fn argv_of_microvm_under_tcg() {
        let board = Board::Microvm {
            tsc_khz: Some(2_596_111),
        };
        check(
            &spec(),
            Platform {
                accelerator: Accelerator::Tcg,
                board,
            },
            false,
            expect![[r#"
                -name fc-aa-0123456789ab-1
                -machine microvm,pit=off,rtc=on,isa-serial=on
                -accel tcg,tb-size=256
                -cpu max
                -nodefaults
                -no-user-config
                -no-reboot
                -display none
                -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
                -trace qemu_system_shutdown_request
                -trace vm_state_notify
                -smp 2
                -m 512M
                -blockdev {"discard":"unmap","driver":"file","filename":"/s/vms/0123456789ab/disk","locking":"on","node-name":"root-file","read-only":false}
                -blockdev {"discard":"unmap","driver":"raw","file":"root-file","node-name":"root","read-only":false}
                -device virtio-blk-device,drive=root,serial=root
                -blockdev {"discard":"unmap","driver":"file","filename":"/s/vms/0123456789ab/seed, \"the\" one","locking":"on","node-name":"seed-file","read-only":true}
                -blockdev {"discard":"unmap","driver":"raw","file":"seed-file","node-name":"seed","read-only":true}
                -device virtio-blk-device,drive=seed,serial=seed
                -netdev user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:0-10.0.2.15:22
                -device virtio-net-device,netdev=net
                -object rng-builtin,id=rng
                -device virtio-rng-device,rng=rng
                -device virtio-balloon-device,deflate-on-oom=on,free-page-reporting=on
                -chardev socket,id=console,path=console.sock,server=on,wait=off
                -serial chardev:console
                -qmp unix:qmp.sock,server=on,wait=off
                -qmp unix:control.sock,server=on,wait=off
                -append root=/dev/vda console=ttyS0 mitigations=off tsc_early_khz=2596111 tsc=reliable
                -kernel /s/images/x/vmlinux
                -initrd /s/images/x/initrd
                -S"#]],
        );
    }

    #[test]
    fn argv_of_isolated_q35_under_kvm_on_qcow2() {
        let spec = VmmSpec {
            disk_format: DiskFormat::Qcow2,
            ..spec()
        };
        check(
            &spec,
            Platform {
                accelerator: Accelerator::Kvm,
                board: Board::Q35,
            },
            true,
            expect![[r#"
                -name fc-aa-0123456789ab-1
                -machine q35
                -accel kvm
                -cpu host
                -nodefaults
                -no-user-config
                -no-reboot
                -display none
                -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
                -trace qemu_system_shutdown_request
                -trace vm_state_notify
                -smp 2
                -m 512M
                -blockdev {"discard":"unmap","driver":"file","filename":"/s/vms/0123456789ab/disk","locking":"on","node-name":"root-file","read-only":false}
                -blockdev {"discard":"unmap","driver":"qcow2","file":"root-file","node-name":"root","read-only":false}
                -device virtio-blk-pci,drive=root,serial=root
                -blockdev {"discard":"unmap","driver":"file","filename":"/s/vms/0123456789ab/seed, \"the\" one","locking":"on","node-name":"seed-file","read-only":true}
                -blockdev {"discard":"unmap","driver":"raw","file":"seed-file","node-name":"seed","read-only":true}
                -device virtio-blk-pci,drive=seed,serial=seed
                -netdev user,id=net,ipv6=off,restrict=on,hostfwd=tcp:127.0.0.1:0-10.0.2.15:22
                -device virtio-net-pci,netdev=net,romfile=
                -object rng-builtin,id=rng
                -device virtio-rng-pci,rng=rng
                -device virtio-balloon-pci,deflate-on-oom=on,free-page-reporting=on
                -chardev socket,id=console,path=console.sock,server=on,wait=off
                -serial chardev:console
                -qmp unix:qmp.sock,server=on,wait=off
                -qmp unix:control.sock,server=on,wait=off
                -append root=/dev/vda console=ttyS0
                -kernel /s/images/x/vmlinux
                -initrd /s/images/x/initrd
                -S"#]],
        );
    }

    #[test]
    fn user_mode_is_restricted_by_configuration_or_vm() {
        for (by_configuration, by_vm) in
            [(false, false), (true, false), (false, true), (true, true)]
        {
            let (netdev, _) = network(
                &GuestNetwork::UserMode {
                    isolated: by_vm,
                    ipv6: true,
                    ports: Vec::new(),
                },
                by_configuration,
            )
            .unwrap();
            assert_eq!(
                netdev.contains(",ipv6=off,restrict=on,"),
                by_configuration || by_vm,
                "{netdev}"
            );
            assert_eq!(
                netdev.contains(",ipv6=on,"),
                !(by_configuration || by_vm),
                "an isolated guest has no IPv6: {netdev}"
            );
        }
    }

    #[test]
    fn user_mode_forwards_published_ports() {
        let port = |host_addr: [u8; 4], protocol| Port {
            host_addr: host_addr.into(),
            host_port: 8080,
            guest_port: 80,
            protocol,
        };
        let ports = vec![
            port([127, 0, 0, 1], Protocol::Tcp),
            port([0, 0, 0, 0], Protocol::Udp),
        ];
        let (netdev, _) = network(
            &GuestNetwork::UserMode {
                isolated: false,
                ipv6: true,
                ports,
            },
            false,
        )
        .unwrap();
        assert_eq!(
            netdev,
            "user,id=net,ipv4=on,ipv6=on,ipv6-net=fec0::/64,hostfwd=tcp:127.0.0.1:8080-10.0.2.15:80,hostfwd=udp:0.0.0.0:8080-10.0.2.15:80,hostfwd=tcp:127.0.0.1:0-10.0.2.15:22"
        );
    }

    #[test]
    fn work_disk_is_last_device() {
        let spec = VmmSpec {
            runtime_disk: Some("/s/runtimes/0123456789ab/runtime.ext4".into()),
            work_disk: Some("/s/vms/0123456789ab/work".into()),
            ..spec()
        };
        let args = argv(
            &spec,
            &Platform {
                accelerator: Accelerator::Kvm,
                board: Board::Q35,
            },
            false,
        )
        .unwrap();
        let devices: Vec<_> = args
            .iter()
            .filter_map(|a| a.to_str())
            .filter(|a| a.starts_with("virtio-blk"))
            .collect();
        assert_eq!(
            devices,
            ["root", "seed", "runtime", "work"]
                .map(|n| format!("virtio-blk-pci,drive={n},serial={n}"))
        );
    }

    #[test]
    fn tap_arguments_are_checked() {
        let tap = |name: &str, mac: &str| {
            let address = Ipv4Addr::new(10, 89, 0, 5);
            network(
                &GuestNetwork::Tap {
                    name: name.into(),
                    mac: mac.into(),
                    address,
                },
                false,
            )
        };
        let (netdev, mac) = tap("fc1a2b3c4d-7", "02:fc:0a:59:00:05").unwrap();
        assert_eq!(
            netdev,
            "tap,id=net,ifname=fc1a2b3c4d-7,script=no,downscript=no"
        );
        assert_eq!(mac, ",mac=02:fc:0a:59:00:05");
        assert!(
            tap("a,script=/x", "02:fc:0a:59:00:05").is_err()
                && tap("", "").is_err()
                && tap("a", "02,x").is_err()
        );
    }

    #[test]
    fn tag_with_special_characters_is_rejected() {
        let platform = Platform {
            accelerator: Accelerator::Tcg,
            board: Board::Q35,
        };
        for install in ["a,b", "a=b", "a b"] {
            assert!(
                argv(
                    &VmmSpec {
                        tag: crate::ids::Tag::new(install, &spec().vm, 1),
                        ..spec()
                    },
                    &platform,
                    false
                )
                .is_err(),
                "{install}"
            );
        }
    }
}
