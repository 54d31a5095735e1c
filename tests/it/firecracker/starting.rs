//! Tests of starting a VMM, failing to start a broken VMM, and adopting a running VMM.

use super::{Bench, driver, soon};
use expect_test::expect;
use fcd::testing::error::Kind;
use fcd::testing::locks::{Cancel, CancelCause};
use fcd::testing::vmm::{Driver, GuestNetwork, VmmSpec};
use std::time::Instant;

/// The requests of a start in order.
const REQUESTS: [(&str, &str); 14] = [
    ("GET", "/"),
    ("PUT", "/machine-config"),
    ("PUT", "/boot-source"),
    ("PUT", "/drives/root"),
    ("PUT", "/drives/seed"),
    ("PUT", "/drives/runtime"),
    ("PUT", "/drives/work"),
    ("PUT", "/network-interfaces/eth0"),
    ("PUT", "/entropy"),
    ("PUT", "/vsock"),
    ("PUT", "/balloon"),
    ("PUT", "/serial"),
    ("PUT", "/metrics"),
    ("PUT", "/actions"),
];

#[test]
fn start_configures_vm_and_runs_guest() {
    let bench = Bench::new("");
    let running = bench.running();
    assert_eq!(running.ssh_addr.to_string(), "10.89.0.5:22");
    expect![[r#"
        GET / 
        PUT /machine-config {"vcpu_count":1,"mem_size_mib":128}
        PUT /boot-source {"kernel_image_path":"DIR/vmlinux","initrd_path":"DIR/initrd","boot_args":"root=/dev/vda init=/sbin/fcd-init console=ttyS0 reboot=k i8042.noaux i8042.nomux fcd.off=reset"}
        PUT /drives/root {"drive_id":"root","path_on_host":"DIR/vm/disk","is_root_device":true,"is_read_only":false,"cache_type":"Writeback"}
        PUT /drives/seed {"drive_id":"seed","path_on_host":"DIR/vm/seed","is_root_device":false,"is_read_only":true,"cache_type":"Writeback"}
        PUT /drives/runtime {"drive_id":"runtime","path_on_host":"DIR/runtime.ext4","is_root_device":false,"is_read_only":true,"cache_type":"Writeback"}
        PUT /drives/work {"drive_id":"work","path_on_host":"DIR/vm/work","is_root_device":false,"is_read_only":false,"cache_type":"Writeback"}
        PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"fc0011aabb-1","guest_mac":"02:fc:0a:59:00:05"}
        PUT /entropy {}
        PUT /vsock {"guest_cid":3,"uds_path":"vsock"}
        PUT /balloon {"amount_mib":0,"deflate_on_oom":true,"stats_polling_interval_s":60,"free_page_reporting":true}
        PUT /serial {"serial_out_path":"console"}
        PUT /metrics {"metrics_path":"metrics"}
        PUT /actions {"action_type":"InstanceStart"}
    "#]]
    .assert_eq(&bench.requests());
    bench.await_console("the guest runs");
    assert_eq!(
        bench
            .driver
            .processes()
            .find(bench.tag(1).as_str())
            .unwrap()
            .as_ref(),
        Some(&running.identity)
    );
    assert!(
        bench
            .driver
            .processes()
            .is_ours(&running.identity, bench.tag(1).as_str())
            && !bench
                .driver
                .processes()
                .is_ours(&running.identity, "fc-other-x-1")
    );
    // The VMM has inherited its output, socket, console and connections, and no other descriptor of
    // this process.
    for fd in std::fs::read_dir(format!("/proc/{}/fd", running.identity.pid))
        .unwrap()
        .flatten()
    {
        let Ok(target) = std::fs::read_link(fd.path()) else {
            continue;
        };
        let (target, dir) = (
            target.display().to_string(),
            bench.dir.path().display().to_string(),
        );
        assert!(
            target == "/dev/null" || target.starts_with("socket:") || target.starts_with(&dir),
            "{target}"
        );
    }
    bench
        .driver
        .processes()
        .kill(&running.identity, soon())
        .unwrap();
    assert_eq!(
        bench
            .driver
            .processes()
            .find(bench.tag(1).as_str())
            .unwrap(),
        None
    );
    // Files of the previous run do not prevent the next start.
    bench
        .driver
        .processes()
        .kill(&bench.running().identity, soon())
        .unwrap();
}

#[test]
fn start_with_fault_at_any_request_leaves_nothing() {
    let never = Cancel::try_new().unwrap();
    let bench = Bench::new("");
    for (method, path) in REQUESTS {
        bench.script(&format!("{method} {path} die"));
        let e = bench.fails(&never);
        assert!(
            e.kind() == Kind::VmmFailed
                && e.to_string().contains("firecracker ended with signal 6"),
            "{path}: {e}"
        );
        for fault in ["hangup", "garbage"] {
            bench.script(&format!("{method} {path} {fault}"));
            let e = bench.fails(&never);
            assert!(
                e.kind() == Kind::VmmFailed && e.hint_text().is_none_or(|h| !h.is_empty()),
                "{path}: {e}"
            );
        }
        bench.script(&format!(
            "{method} {path} refuse Error manipulating the backing file: No such file or directory (os error 2)"
        ));
        let e = bench.fails(&never);
        assert!(
            e.kind() == Kind::VmmFailed
                && e.to_string().contains("backing file")
                && e.hint_text().is_some(),
            "{path}: {e}"
        );
        bench.script(&format!("{method} {path} slow 30"));
        bench
            .driver
            .processes()
            .kill(&bench.running().identity, soon())
            .unwrap();
    }
}

#[test]
fn hanging_start_is_cancelled_at_once() {
    for (method, path) in REQUESTS {
        let bench = Bench::new(&format!("{method} {path} hang"));
        let cancel = Cancel::try_new().unwrap();
        std::thread::scope(|s| {
            s.spawn(|| {
                let deadline = soon();
                let asked = || {
                    std::fs::read_to_string(bench.dir.path().join("requests")).unwrap_or_default()
                };
                while !asked().contains(&format!("{method} {path} ")) {
                    assert!(
                        Instant::now() < deadline,
                        "the fake received no request for {path}"
                    );
                    std::thread::yield_now();
                }
                cancel.cancel(CancelCause::VmStopped);
            });
            let e = bench.fails(&cancel);
            assert_eq!(e.kind(), Kind::Cancelled, "{path}: {e}");
        });
    }
}

#[test]
fn refusals_have_hints() {
    let never = Cancel::try_new().unwrap();
    let kind = |change: &dyn Fn(&Bench)| {
        let bench = Bench::new("");
        change(&bench);
        let e = bench.fails(&never);
        assert!(e.hint_text().is_some(), "{e}");
        (e.kind(), e.to_string())
    };
    let (no_elf, said) =
        kind(&|b| std::fs::write(b.dir.path().join("vmlinux"), "MZ, a bzImage").unwrap());
    assert!(
        no_elf == Kind::Unsupported && said.contains("Invalid Elf magic number"),
        "{said}"
    );
    let (no_disk, said) = kind(&|b| std::fs::remove_file(b.dir.path().join("vm/disk")).unwrap());
    assert!(
        no_disk == Kind::VmmFailed && said.contains("add disk root"),
        "{said}"
    );
    let (too_old, said) = kind(&|b| b.script("VERSION 1.13.1"));
    assert!(
        too_old == Kind::Unsupported && said.contains("1.13.1") && said.contains("1.14"),
        "{said}"
    );
    let (ends, said) = kind(&|b| b.script("EXIT the seccomp filter cannot be loaded"));
    assert!(
        ends == Kind::VmmFailed
            && said.contains("exit status 1: the seccomp filter cannot be loaded"),
        "{said}"
    );
    let (missing, said) =
        kind(&|b| std::fs::remove_file(b.dir.path().join("firecracker")).unwrap());
    assert_eq!(missing, Kind::CommandMissing, "{said}");
    let (not_executable, said) = kind(&|b| {
        let program = b.dir.path().join("firecracker");
        std::fs::remove_file(&program).unwrap();
        std::fs::write(&program, "x").unwrap();
    });
    assert!(
        not_executable == Kind::Unsupported && said.contains("mode 0644"),
        "{said}"
    );
    // Only QEMU supports these networks and disks.
    let bench = Bench::new("");
    let user_mode = VmmSpec {
        network: GuestNetwork::UserMode {
            isolated: false,
            ipv6: false,
            ports: Vec::new(),
        },
        ..bench.spec()
    };
    let qcow2 = VmmSpec {
        disk_format: fcd::testing::vmm::DiskFormat::Qcow2,
        ..bench.spec()
    };
    for spec in [user_mode, qcow2] {
        let e = bench.driver.start(&spec, &never, &mut |_| {}).unwrap_err();
        assert!(
            e.kind() == Kind::Unsupported && e.hint_text().is_some(),
            "{e}"
        );
        assert_eq!(bench.driver.processes().list(&bench.prefix).unwrap(), []);
    }
}

#[test]
fn adopt_by_next_daemon_continues() {
    let mut bench = Bench::new("");
    let running = bench.running();
    bench.await_console("the guest runs");
    bench.driver = driver(bench.dir.path());
    assert_eq!(
        bench
            .driver
            .adopt(&bench.spec(), &running.identity)
            .unwrap(),
        running
    );
    bench.await_console("reconnected");
    // The log continues with new console output.
    std::fs::write(bench.dir.path().join("vm/run/console"), "and says more\n").unwrap();
    bench.await_console("and says more");
    let other = VmmSpec {
        tag: bench.tag(2),
        ..bench.spec()
    };
    assert_eq!(
        bench
            .driver
            .adopt(&other, &running.identity)
            .unwrap_err()
            .kind(),
        Kind::VmmFailed
    );
    bench
        .driver
        .processes()
        .kill(&running.identity, soon())
        .unwrap();
    assert_eq!(
        bench
            .driver
            .adopt(&bench.spec(), &running.identity)
            .unwrap_err()
            .kind(),
        Kind::VmmFailed
    );
}
